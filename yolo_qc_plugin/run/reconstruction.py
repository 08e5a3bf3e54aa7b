# yolo_qc_plugin, AGPL-3.0
"""Reconstruct a model layer after layer before a run's first epoch, from images of the run and its teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError  # the error alone
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import TQDM

from ..files import replacing
from ..host import log
from ..host.distillation import Gains, features_loss, head_loss
from ..host.record import write_checkpoint
from ..host.teacher import Teacher, feature_layers
from ..qat.reconstruction import reconstruct
from ..quant.modules import evaluating, hooked

IMAGES = 1024  # at most, whose layers' outputs are kept, in half precision, while they are needed
MEMORY = 2**31  # bytes that the outputs of the largest layer may take, of both models together
BATCH = 32
LR, SCALE_LR = 1e-3, 1e-2
REPORT = "reconstruction.json"  # in a run's qc/
FILE = "reconstruction.pt"  # in its weights/, until it ends
PERIOD = 30  # seconds between two writings of the file


def reconstruct_model(
    model: BaseModel, teacher: Teacher, images: Iterable[Tensor], gains: Gains, steps: int, seed: int, done: Done
) -> list[dict]:
    """Reconstruct the top-level layers in the order they run, in place; the head by the loss of outputs.

    Each layer is put back where it ends farther from the float one than it began.

    Args:
        model: Injected and calibrated.
        teacher: The float model it was, with its spreads.
        images: Batches as the model takes them.
        gains: Of the loss of outputs.
        steps: Steps of each layer.
        seed: Of the order in which images are drawn.
        done: Layers that are done already; gets the others.

    Returns:
        Of each layer that has parameters: its index, type, and its error on the first images before and after, in units
        of the spread, or the head's loss.
    """
    spreads = {id(layer): s for layer, s in zip(feature_layers(teacher.model), teacher.spreads)}
    streams = Streams(model, teacher.model, images, next(model.parameters()).device)
    spared: set[int] = set()  # of quantizers that several layers share, the first one's
    layers = list(zip(model.model, teacher.model.model))
    bar = TQDM(layers, total=len(layers), desc="reconstruction")
    with evaluating(model):
        for place, (layer, float_layer) in enumerate(bar):
            head = place == len(layers) - 1
            layer.training = float_layer.training = head  # a head then gives what losses take; its batch norms stay

            def error(take: Tensor, layer: Any = layer, float_layer: Any = float_layer, head: bool = head) -> Tensor:
                output = layer(streams.inputs(layer, take, quantized=True))
                if head:
                    with torch.no_grad():
                        target = float_layer(streams.inputs(layer, take, quantized=False))
                    return head_loss(layer, output, target, gains)
                return features_loss([output], [streams.targets(take)], [spreads[id(float_layer)]])

            if not head:
                streams.run(float_layer, layer, quantized=False)
            if any(True for _ in layer.parameters()):
                if place not in done.rows:
                    before, after = _fit(layer, error, streams.count, steps, seed + place, spared)
                    done.add(place, layer, {"type": type(layer).__name__, "before": before, "after": after})
                layer.load_state_dict(done.states[place])
                spared |= {id(p) for p in layer.parameters()}
                bar.set_description("reconstruction {layer}: {before:.3f} -> {after:.3f}".format_map(done.rows[place]))
            if not head:
                streams.run(layer, layer, quantized=True)
                streams.forget(place)
            layer.training = float_layer.training = False
    done.write()
    return list(done.rows.values())


def _fit(
    layer: nn.Module, error: Callable[[Tensor], Tensor], count: int, steps: int, seed: int, spared: set[int]
) -> tuple[float, float]:
    """Reconstruct one layer, or leave it; its error on the first images before and after."""
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)
    first = torch.arange(min(2 * BATCH, count))
    with torch.no_grad():
        before = error(first).item()
    reconstruct(layer, lambda: error(torch.randperm(count, generator=draw)[:BATCH]), steps, LR, SCALE_LR, spared)
    with torch.no_grad():
        after = error(first).item()
    if after < before:
        return before, after
    layer.load_state_dict(state)
    return before, before


class Done:
    """The layers that are reconstructed, kept in a file, so that a run begun again in its folder goes on from there.

    Args:
        folder: Of the file.
        key: Of what the layers depend on; a file with another key is of no use.

    Attributes:
        rows: Index of a layer -> what `reconstruct_model` returns of it.
        states: Index of a layer -> its state.
    """

    def __init__(self, folder: Path, key: str):
        self.file, self.key = folder / FILE, key
        self.rows: dict[int, dict] = {}
        self.states: dict[int, dict[str, Tensor]] = {}
        self._written = time.monotonic()
        with suppress(OSError, RuntimeError, EOFError, UnpicklingError):
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            if found["key"] == key:
                self.rows, self.states = found["rows"], found["states"]
                log.info(f"{len(self.rows)} layers are reconstructed already, in {self.file}")

    def add(self, place: int, layer: nn.Module, row: dict) -> None:
        """Take note of a layer."""
        self.rows[place] = {"layer": place, **row}
        self.states[place] = {k: v.detach().cpu().clone() for k, v in layer.state_dict().items()}
        if time.monotonic() - self._written > PERIOD:
            self.write()

    def write(self) -> None:
        """Write the file."""
        write_checkpoint({"key": self.key, "rows": self.rows, "states": self.states}, self.file)
        self._written = time.monotonic()


class Streams:
    """What the layers of the float and of the quantized model gave for a set of images, while a later one reads it.

    Args:
        model: Whose layers' sources (`f`) say what is read.
        float_model: The other one.
        images: Batches of images; the first `IMAGES` are kept, or as many as `MEMORY` allows.
        device: Where layers run.
    """

    def __init__(self, model: BaseModel, float_model: BaseModel, images: Iterable[Tensor], device: torch.device):
        self.device = device
        kept: list[Tensor] = []
        most = IMAGES
        for batch in images:
            if not kept:
                most = max(min(IMAGES, MEMORY // largest_output(float_model, batch[:1])), 1)
            kept.append(batch.detach().cpu().half())
            if sum(map(len, kept)) >= most:
                break
        self.images = torch.cat(kept)[:most]
        self.count = len(self.images)
        self.outputs: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}  # quantized -> layer -> output
        self.last_reader = {s: i for i, m in enumerate(model.model) for s in self._sources(m)}
        self._target: Tensor

    @staticmethod
    def _sources(layer: Any) -> list[int]:
        """Indices of the layers that a layer reads; -1 is the images."""
        return [layer.i - 1 if f == -1 else f for f in ([layer.f] if isinstance(layer.f, int) else layer.f)]

    def inputs(self, layer: Any, take: Tensor, quantized: bool) -> Any:
        """What a layer of one of the models reads, of some images."""
        found = [(self.images if s < 0 else self.outputs[quantized][s])[take] for s in self._sources(layer)]
        found = [x.to(self.device).float() for x in found]
        return found[0] if isinstance(layer.f, int) else found

    def targets(self, take: Tensor) -> Tensor:
        """What the float layer that ran last gave, of some images."""
        return self._target[take].to(self.device).float()

    @torch.no_grad()
    def run(self, layer: nn.Module, place: Any, quantized: bool) -> None:
        """Run a layer on all images, and keep what it gives.

        Args:
            layer: Of either model.
            place: The layer of the quantized model that stands there.
            quantized: Which model it is of.
        """
        parts = [
            layer(self.inputs(place, take, quantized)).cpu().half() for take in torch.arange(self.count).split(BATCH)
        ]
        self.outputs[quantized][place.i] = torch.cat(parts)
        if not quantized:
            self._target = self.outputs[False][place.i]

    def forget(self, place: int) -> None:
        """Let go of what no layer after `place` reads."""
        for outputs in self.outputs.values():
            for source in [s for s in outputs if self.last_reader.get(s, -1) <= place]:
                del outputs[source]


@torch.no_grad()
def largest_output(model: BaseModel, image: Tensor) -> int:
    """Bytes that the largest output of a layer before the head takes, in half precision, for two models."""
    sizes: list[int] = []
    with hooked(
        layer.register_forward_hook(lambda m, args, out: sizes.append(out.numel())) for layer in model.model[:-1]
    ):
        model(image)
    return 2 * 2 * max(sizes)


def write(found: list[dict], folder: Path) -> None:
    """Write what `reconstruct_model` found, and say it in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    layers, head = found[:-1], found[-1]
    before, after = (sum(row[key] for row in layers) / max(len(layers), 1) for key in ("before", "after"))
    log.info(
        f"error of {len(layers)} layers in units of their spread, on average {before:.3f} before reconstruction and "
        f"{after:.3f} after; loss of outputs {head['before']:.3f} and {head['after']:.3f}"
    )
