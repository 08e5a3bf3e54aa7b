# yolo_qc_plugin, AGPL-3.0
"""What a quantized checkpoint carries beside its layers, and how one is written.

A model of ours is Ultralytics' model with QuantConv2d layers and a `QuantRecord` as its attribute `qc`. A process that
unpickles the record gets what opening a checkpoint takes (`run.opening`), so that it needs no import of ours.

Importing this file lets a restricted load (ULTRALYTICS_SAFE_LOAD=1, or weights_only=True) build the classes that such a
model is made of: plain modules and the record, which take their state and call nothing that a file could choose.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import strip_optimizer

from .. import __version__
from ..config import QCConfig, QCError
from ..files import AtomicPath, replacing
from ..quant.activations import HeadOutput, QuantActivation, QuantSiLU, RoundedSiLU
from ..quant.layers import ChannelAffine, QuantConv2d
from ..quant.precision import WIDE
from ..quant.quantizer import ActQuantizer, WeightQuantizer
from ..quant.taps import Tap
from . import log

FORMAT = 1  # raise it when older plugins would misread a checkpoint
# what earlier versions did, whose records lack the option: a resumed run is to go on with it
BEFORE = {
    "target": None,
    "budget": None,
    "rounding": "nearest",
    "relative_steps": False,
    "teacher": "off",
    "distill_features": 0.0,
    "bn_freeze": False,
    "labels": "data",
}
GONE = {"bn_reestimate"}  # options that earlier versions had and whose work no measurement showed


@dataclass
class QuantRecord:
    """How a model was quantized.

    Args:
        config: Its options, `QCConfig.to_dict()`; those that an earlier version did not have are what it did (BEFORE),
            and those that it alone had are left out (GONE).
        float_metrics: Figures of the float model that training began with (as report.record has them), where measured.
        format: Version of the checkpoint's form.
        plugin: Version of the plugin that wrote it.
        run: Id of the training run.
        start: What training began with, as the user named it; empty in checkpoints of earlier versions.
        taught: Whether what training began with teaches; None in checkpoints of earlier versions.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    config: dict
    float_metrics: dict[str, Any] = field(default_factory=dict)
    format: int = field(init=False)
    plugin: str = __version__
    run: str = field(default_factory=lambda: uuid4().hex)
    start: str = ""
    taught: bool | None = None

    def __post_init__(self) -> None:
        self.format = FORMAT

    def __setstate__(self, state: dict) -> None:
        if state["format"] > FORMAT:
            raise RuntimeError(
                f"QC: this checkpoint was written by yolo-qc-plugin {state['plugin']} in format {state['format']}; "
                f"version {__version__} reads formats up to {FORMAT}. Upgrade yolo-qc-plugin."
            )
        config = {name: value for name, value in state["config"].items() if name not in GONE}
        self.__dict__.update(state, config={**BEFORE, **config})

    @property
    def options(self) -> QCConfig:
        """The config as a checked object."""
        return QCConfig.from_options(self.config)


torch.serialization.add_safe_globals(
    [
        QuantRecord,
        *WIDE.values(),
        QuantConv2d,
        QuantActivation,
        QuantSiLU,
        RoundedSiLU,
        HeadOutput,
        ChannelAffine,
        WeightQuantizer,
        ActQuantizer,
        Tap,
    ]
)


def record_of(model: nn.Module | None) -> QuantRecord | None:
    """The record of a model of ours, or of one beside its teacher (Ultralytics' distill_model); else None."""
    return getattr(getattr(model, "student_model", model), "qc", None)


def own_record(model: nn.Module) -> QuantRecord:
    """The record of a model that is known to be ours.

    Raises:
        QCError: If it has none.
    """
    record = record_of(model)
    if record is None:
        raise QCError(f"QC: {type(model).__name__} was not trained with callbacks=qc.")
    return record


def write_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: If the disk is full or forbids it; the old file stays.
    """
    buffer = io.BytesIO()  # torch.save to a file hides why it failed
    torch.save(checkpoint, buffer)
    AtomicPath(path).write_bytes(buffer.getbuffer())


def strip(file: AtomicPath, updates: dict | None = None) -> dict:
    """Strip a checkpoint of what resuming takes, atomically; returns it, or {} and leaves the file if it is none."""
    with replacing(file) as temporary:
        with log.quiet():  # it would name the temporary file
            stripped = strip_optimizer(file, temporary, updates)
        if not stripped:
            shutil.copyfile(file, temporary)
    if stripped:
        LOGGER.info(f"Optimizer stripped from {file}, {file.stat().st_size / 1e6:.1f}MB")
    return stripped
