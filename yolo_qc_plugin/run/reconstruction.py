# yolo_qc_plugin, AGPL-3.0
"""Reconstruct a model layer after layer before a run's first epoch, from images of the run and its teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import TQDM

from ..files import replacing
from ..host import log
from ..host.distillation import Gains, features_loss, head_loss
from ..host.teacher import Teacher, feature_layers
from ..qat.reconstruction import reconstruct
from ..quant.modules import evaluating

IMAGES = 512  # whose layers' outputs are kept, in half precision, while they are needed
BATCH = 32
LR, SCALE_LR = 1e-3, 1e-2
FILE = "reconstruction.json"  # in a run's qc/


def reconstruct_model(
    model: BaseModel, teacher: Teacher, images: Iterable[Tensor], gains: Gains, steps: int, seed: int
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

    Returns:
        Of each layer that has parameters: its index, type, and its error on the first images before and after, in units
        of the spread, or the head's loss.
    """
    spreads = {id(layer): s for layer, s in zip(feature_layers(teacher.model), teacher.spreads)}
    streams = Streams(model, images, next(model.parameters()).device)
    found: list[dict] = []
    trained: set[int] = set()
    draw = torch.Generator().manual_seed(seed)
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
                state = {k: v.clone() for k, v in layer.state_dict().items()}
                first = torch.arange(min(2 * BATCH, streams.count))
                with torch.no_grad():
                    before = error(first).item()
                trained |= reconstruct(
                    layer,
                    lambda: error(torch.randperm(streams.count, generator=draw)[:BATCH]),
                    steps,
                    LR,
                    SCALE_LR,
                    trained,
                )
                with torch.no_grad():
                    after = error(first).item()
                if not after < before:
                    layer.load_state_dict(state)
                    after = before
                found.append({"layer": place, "type": type(layer).__name__, "before": before, "after": after})
                bar.set_description(f"reconstruction {place}: {before:.3f} -> {after:.3f}")
            if not head:
                streams.run(layer, layer, quantized=True)
                streams.forget(place)
            layer.training = float_layer.training = False
    return found


class Streams:
    """What the layers of the float and of the quantized model gave for a set of images, while a later one reads it.

    Args:
        model: Whose layers' sources (`f`) say what is read.
        images: Batches of images; the first `IMAGES` are kept.
        device: Where layers run.
    """

    def __init__(self, model: BaseModel, images: Iterable[Tensor], device: torch.device):
        self.device = device
        kept: list[Tensor] = []
        for batch in images:
            kept.append(batch.detach().cpu().half())
            if sum(map(len, kept)) >= IMAGES:
                break
        self.images = torch.cat(kept)[:IMAGES]
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


def write(found: list[dict], folder: Path) -> None:
    """Write what `reconstruct_model` found, and say it in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    layers, head = found[:-1], found[-1]
    before, after = (sum(row[key] for row in layers) / max(len(layers), 1) for key in ("before", "after"))
    log.info(
        f"error of {len(layers)} layers in units of their spread, on average {before:.3f} before reconstruction and "
        f"{after:.3f} after; loss of outputs {head['before']:.3f} and {head['after']:.3f}"
    )
