# yolo_qc_plugin, AGPL-3.0
"""What a quantized checkpoint carries beside its layers, and how one is written.

A model of ours is the host's model with QuantConv2d layers and a `QuantRecord` as its attribute `qc`. Unpickling the
record attaches the plugin to the host, so that a fresh process needs no import of ours.

Importing this file lets a restricted load (ULTRALYTICS_SAFE_LOAD=1, or weights_only=True) build the classes that such a
model is made of: plain modules and the record, which take their state and call nothing that a file could choose.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn

from . import __version__
from .config import QCConfig
from .layers import WIDE, ChannelAffine, QuantActivation, QuantConv2d, QuantSiLU
from .quantizer import ActQuantizer, WeightQuantizer

# 2: equalizers. Raise it when older plugins would misread a checkpoint; one that they read right keeps its number.
FORMAT = 2


@dataclass
class QuantRecord:
    """How a model was quantized.

    Args:
        config: Its options, `QCConfig.to_dict()`.
        float_metrics: Figures of the float model that training began with (see report.figures_of), where measured.
        format: Version of the checkpoint's form.
        plugin: Version of the plugin that wrote it.
        run: Id of the training run.
    """

    config: dict
    float_metrics: dict[str, float] = field(default_factory=dict)
    format: int = field(init=False)
    plugin: str = __version__
    run: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self):
        self.format = FORMAT if self.config.get("act_equalize") else 1

    def __setstate__(self, state: dict) -> None:
        if state["format"] > FORMAT:
            raise RuntimeError(
                f"QC: this checkpoint was written by yolo-qc-plugin {state['plugin']} in format {state['format']}; "
                f"version {__version__} reads formats up to {FORMAT}. Upgrade yolo-qc-plugin."
            )
        self.__dict__.update({"run": "", **state})
        from .callbacks import attach  # a checkpoint may be all that this process has of the plugin

        attach()

    @property
    def options(self) -> QCConfig:
        """The config as a checked object."""
        return QCConfig.from_options(self.config)


torch.serialization.add_safe_globals(
    [QuantRecord, *WIDE.values(), QuantConv2d, QuantActivation, QuantSiLU, ChannelAffine, WeightQuantizer, ActQuantizer]
)


def record_of(model: nn.Module | None) -> QuantRecord | None:
    """The record of a model of ours, or of one beside its teacher (the host's distill_model); else None."""
    return getattr(getattr(model, "student_model", model), "qc", None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`.

    A reader sees the old file or the new one, never a part; an error leaves the old one, and an OSError names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.errno:
            e.filename = str(path)  # a write to a full disk names no file
        raise
    finally:
        with suppress(OSError):  # of a folder that forbids writing; it would hide the first one
            temporary.unlink(missing_ok=True)


class AtomicPath(type(Path())):
    """A path whose `write_bytes` replaces the file as a whole, and from which such paths are joined."""

    def write_bytes(self, data: bytes) -> int:
        """Write `data` atomically; returns their number."""
        with replacing(Path(self)) as temporary:
            return temporary.write_bytes(data)


def write_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: If the disk is full or forbids it; the old file stays.
    """
    buffer = io.BytesIO()  # torch.save to a file hides why it failed
    torch.save(checkpoint, buffer)
    AtomicPath(path).write_bytes(buffer.getbuffer())
