# yolo_qc_plugin, AGPL-3.0
"""Noting what scales and codes do in training, for qc/telemetry.parquet, whose columns report/traces.py names.

The last 4,000 steps are kept, and of those before every k-th, k being the power of two that leaves 4,000 at most: what
is kept depends on the number of steps alone, however often a run is resumed.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config import QCError
from ..files import AtomicPath
from ..host import log
from ..qat.oscillation import Oscillation
from ..qat.prepare import trained_convs
from ..quant.layers import quant_convs
from ..quant.quantizer import Quantizer
from ..report.traces import COLUMNS, FILE, WINDOW, read

BUFFER = EVERY = 500  # steps that wait on the device, and at least between two writings of the file


class Telemetry:
    """Notes scales, code flips and oscillation, a row of numbers on the device at each step, without waiting for it.

    Args:
        model: Injected model, whose frozen layers are frozen already.
        oscillation: Follows the codes of its weights.
        folder: Where the file is written, the run's folder qc.

    Attributes:
        layers: Names of the layers, in model order.
        steps: Numbers of the steps kept, shape (n,), rising.
        values: What was noted in them, FP32, shape (n, layers, len(COLUMNS)); NaN where there is nothing to note.
    """

    def __init__(self, model: nn.Module, oscillation: Oscillation, folder: Path):
        self.layers = list(trained_convs(model))
        self.oscillation = oscillation
        self.file = folder / FILE
        self.steps = np.zeros(0, np.int64)
        self.values = np.zeros((0, len(self.layers), len(COLUMNS)), np.float32)
        self._pending: list[int] = []  # steps whose rows wait on the device
        self._sizes = [conv.weight.numel() for conv in trained_convs(model).values()]
        self._written = 0  # last step in the file
        self._shown = 0  # last step that loggers know of
        self._warned = False

    def watch(self, model: nn.Module, averaged: nn.Module) -> None:
        """Take the scales from these two models from now on; to be called where Ultralytics may have replaced one.

        Args:
            model: The model in training.
            averaged: The EMA model.
        """
        convs, twins = trained_convs(model), dict(quant_convs(averaged))
        readers: dict[Quantizer, int] = {}  # learned quantizer of an input -> the first layer that reads it
        for i, conv in enumerate(convs.values()):
            if conv.act_quant.scale.requires_grad:
                readers.setdefault(conv.act_quant, i)
        acts = [self.layers[i] for i in readers.values()]
        quantizers = [
            *(conv.weight_quant for conv in convs.values()),
            *(twins[name].weight_quant for name in convs),
            *readers,
            *(twins[name].act_quant for name in acts),
        ]
        self._scales = [q.scale.detach() for q in quantizers]
        everywhere, read = list(range(len(convs))), list(readers.values())
        # where the numbers of a row belong: layer and column
        self._places = (
            np.array([*everywhere * 2, *read * 2, *everywhere * 2]),
            np.repeat(np.arange(len(COLUMNS)), [len(convs)] * 2 + [len(read)] * 2 + [len(convs)] * 2),
        )
        sizes = [s.numel() for s in self._scales]
        self._counts = np.array(sizes + [1] * 2 * len(convs), np.float32)
        self._lengths = torch.tensor(sizes, device=self._scales[0].device)
        self._buffer = torch.empty(BUFFER, len(self._counts), device=self._scales[0].device)

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Note where a step has led; one that comes again takes the place of the earlier one and of what followed."""
        if len(self._pending) == BUFFER or (self._pending and step <= self._pending[-1]):
            self.collect()
        sums = torch.segment_reduce(torch.cat(self._scales), "sum", lengths=self._lengths, unsafe=True)
        torch.cat([sums, self.oscillation.flipped, self.oscillation.oscillating], out=self._buffer[len(self._pending)])
        self._pending.append(step)

    def collect(self) -> None:
        """Bring the rows that wait on the device over, and thin out what has become old."""
        if not self._pending:
            return
        rows = np.full((len(self._pending), *self.values.shape[1:]), np.nan, np.float32)
        layer, column = self._places
        rows[:, layer, column] = self._buffer[: len(rows)].cpu().numpy() / self._counts
        earlier = self.steps < self._pending[0]
        steps = np.concatenate([self.steps[earlier], self._pending])
        values = np.concatenate([self.values[earlier], rows])
        keep = kept(steps)
        self.steps, self.values = steps[keep], values[keep]
        self._pending = []

    def write(self, wait: int = 0) -> None:
        """Write telemetry.parquet, atomically; what prevents it stops no run, and is said once.

        Args:
            wait: Write only if so many steps are not in the file yet.
        """
        self.collect()
        if not len(self.steps) or self.steps[-1] < self._written + wait:
            return
        try:
            import polars as pl

            layer = pl.Series(self.layers).gather(np.repeat(np.arange(len(self.layers)), len(self.steps)))
            columns = {"step": np.tile(self.steps, len(self.layers)), "layer": layer}
            columns |= {name: self.values[:, :, i].T.ravel() for i, name in enumerate(COLUMNS)}
            buffer = io.BytesIO()
            pl.DataFrame(columns).with_columns(pl.col(pl.Float32).fill_nan(None)).write_parquet(buffer)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            AtomicPath(self.file).write_bytes(buffer.getbuffer())
            self._written = int(self.steps[-1])
        except (OSError, ImportError) as error:
            if not self._warned:
                log.warning(f"{FILE} could not be written ({error}).")
            self._warned = True

    def state_dict(self) -> dict:
        """What a resumed run needs beside the file: the steps that are not in it."""
        self.collect()
        new = self.steps > self._written
        steps, values = torch.from_numpy(self.steps[new]), torch.from_numpy(self.values[new])
        return {"written": self._written, "steps": steps, "values": values}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave, and the file before it."""
        if state["written"]:
            self.reread(state["written"])
        self.steps = np.concatenate([self.steps, state["steps"].numpy()])
        self.values = np.concatenate([self.values, state["values"].numpy()])
        self._shown = int(self.steps[-1]) if len(self.steps) else state["written"]

    def reread(self, step: int) -> None:
        """Take up the file as far as a step; says so where it cannot be read."""
        self._written = self._shown = step
        try:
            layers, steps, values = read(self.file)
            if layers != self.layers:
                raise QCError(f"QC: {self.file} is of other layers.")
            self.steps, self.values = steps[steps <= step], values[steps <= step]
        except QCError as error:
            log.warning(f"telemetry goes on without what the run had written: {error}")

    def scalars(self) -> dict[str, float]:
        """Numbers for loggers, by name, of the steps since the last call; empty where there are none.

        Of each layer its share of flips in a step, and of weights that oscillate, and its scales after the last step;
        and both shares of all weights.
        """
        self.collect()
        new = self.values[self.steps > self._shown]
        if not len(new):
            return {}
        self._shown = int(self.steps[-1])
        columns = dict(zip(COLUMNS, new[-1].T)) | {"flips": new[..., COLUMNS.index("flips")].mean(0)}
        found = {f"qc/{n}": float(np.average(columns[n], weights=self._sizes)) for n in ("flips", "oscillating")}
        for name, values in columns.items():
            found |= {f"qc_{name}/{layer}": float(v) for layer, v in zip(self.layers, values) if not np.isnan(v)}
        return found


def kept(steps: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Which steps to keep, bool, shape (n,): the last `window`, and before them at most as many, evenly.

    What is kept later is a part of what is kept now.

    Args:
        steps: Numbers of steps, shape (n,), rising, at least one.
        window: Steps at full rate.
    """
    old = steps[-1] - window
    every = 1
    while old > window * every:
        every *= 2
    return (steps > old) | (steps % every == 0)
