# yolo_qc_plugin, AGPL-3.0
"""What a finished run has left in its folder: the record, the traces, the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from ultralytics.nn.tasks import load_checkpoint

from .traces import COLUMNS, FILE, read

RECORD = "report.json"  # in a run's qc/


@dataclass
class Run:
    """What a run has left.

    Attributes:
        name: Its folder's name; with a number where several runs have it.
        folder: Its folder.
        layers: Names of the trained layers; none where the run was not traced.
        steps: Numbers of the last steps, shape (n,).
        values: COLUMNS of these steps, shape (n, layers, columns).
    """

    name: str
    folder: Path
    layers: list[str]
    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def load(cls, folder: Path, last: int) -> Run:
        """Read the folder of a run, and of its steps the last ones, as many as `last`.

        Raises:
            QCError: If it has neither traces nor a record, or traces that cannot be read.
        """
        name = folder.resolve().name
        if not (folder / "qc" / FILE).is_file() and (folder / "qc" / RECORD).is_file():
            return cls(name, folder, [], np.zeros(0, np.int64), np.zeros((0, 0, len(COLUMNS)), np.float32))
        layers, steps, values = read(folder / "qc" / FILE)
        shown = steps > steps[-1] - last
        return cls(name, folder, layers, steps[shown], values[shown])

    def traces(self, column: str) -> np.ndarray:
        """One column, shape (n, layers)."""
        return self.values[..., COLUMNS.index(column)]

    @property
    def averaged(self) -> bool:
        """Whether it was trained with EMA; without EMA the average is the model itself."""
        return not np.array_equal(self.traces("weight_scale"), self.traces("weight_scale_ema"))

    @cached_property
    def report(self) -> dict[str, Any]:
        """Its record; empty where it has not ended."""
        return self.json(RECORD) or {}

    @cached_property
    def model(self) -> nn.Module | None:
        """The quantized model, in FP32 on the CPU: before QC, if there is such a file; None where there is none."""
        files = [self.folder / "weights" / f"{name}.pt" for name in ("qat", "best", "last")]
        file = next((f for f in files if f.is_file()), None)
        return load_checkpoint(file)[0].float().eval() if file else None

    def json(self, name: str) -> dict[str, Any] | None:
        """What a file of its qc/ holds; None where there is none."""
        file = self.folder / "qc" / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_runs(folders: Sequence[str | Path], last: int) -> list[Run]:
    """Read folders of runs; names that come again are numbered by their place. See `Run.load`."""
    runs = [Run.load(Path(folder), last) for folder in folders]
    names = [run.name for run in runs]
    for number, run in enumerate(runs, 1):
        run.name += f" {number}" * (names.count(run.name) > 1)
    return runs


def shares_at_the_end(folder: Path) -> dict[str, float]:
    """Layer -> share of its weights that oscillate at the end of a run, 0..1; empty where it was not traced.

    Args:
        folder: The run's qc/.
    """
    if not (folder / FILE).is_file():
        return {}
    layers, _, values = read(folder / FILE)
    return dict(zip(layers, values[-1, :, COLUMNS.index("oscillating")].tolist()))
