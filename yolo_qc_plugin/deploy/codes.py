# yolo_qc_plugin, AGPL-3.0
"""Codes of a deployed model in PyTorch beside those of a runtime, and of the model as it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import QCError
from ..quant.activations import quant_activations
from ..quant.functional import to_codes
from ..quant.layers import quant_convs
from ..quant.modules import hooked
from ..quant.quantizer import ActQuantizer
from .exported import Exported, batched
from .fold import DeployedConv2d, FixedQuantizer, deployed_convs, head_grids


@torch.no_grad()
def compare_codes(model: nn.Module, graph: Exported, name: str, images: Tensor) -> dict[str, Any]:
    """Codes of PyTorch and of a runtime: layer by layer on the runtime's own codes, and end to end.

    Args:
        model: In the deployed form.
        graph: What was exported of it.
        name: One of the file's runtimes.
        images: Shape (n, 3, h, w), in 0..1.

    Returns:
        "output", the largest difference end to end, in the outputs' own units; and, where the runtime shows codes,
        "steps", the largest difference of a code layer by layer; "changed" and "changed_end_to_end", shares of codes.

    Raises:
        QCError: If the file's outputs have other shapes than the model's.
    """
    content, names = graph.with_codes() if graph.codes else (None, [])
    run = batched(graph.open(name, content), graph.fixed_batch)
    layers, comparison, output = deployed_convs(model), _Comparison(), 0.0
    for image in images.split(graph.fixed_batch or 1):
        values = run(image.numpy())
        count = len(values) - len(names)
        tensors = dict(zip(names, values[count:]))
        points = [_input_of(graph, layer, tensors) for name, layer in layers.items() if name in graph.codes]
        points += [_output_of(graph, layer, tensors) for name, layer in layers.items() if name in graph.outputs]
        mine = comparison.run(model, image, points)
        output = max(output, _largest_difference(graph, mine, values[:count]))
    return {**(comparison.summary() if graph.codes else {}), "output": output}


@torch.no_grad()
def compare_trained(trained: nn.Module, deployed: nn.Module, images: Tensor) -> dict[str, Any]:
    """Codes of a model as it was trained and deployed: layer by layer on those of the latter, and end to end.

    These are inputs of convolutions and, where they have a grid, outputs of the head.

    Args:
        trained: Fake-quantized.
        deployed: In the deployed form.
        images: Shape (n, 3, h, w), in 0..1.

    Returns:
        "steps", "changed" and "changed_end_to_end", as of `compare_codes`.
    """
    comparison, layers, heads = _Comparison(), deployed_convs(deployed), head_grids(deployed)
    watched: list[tuple[str, nn.Module, FixedQuantizer]] = [(name, m, m.act_quant) for name, m in layers.items()]
    watched += [(f"{name}.act", grid, grid) for name, grid in heads.items()]
    read: dict[str, tuple[nn.Module, ActQuantizer]] = {name: (m, m.act_quant) for name, m in quant_convs(trained)}
    read |= {name: (act.quant, act.quant) for name, act in quant_activations(trained)}
    for image in images.split(1):
        codes: dict[str, list[Tensor]] = {}
        with hooked(m.register_forward_pre_hook(partial(_note, codes, name, grid)) for name, m, grid in watched):
            deployed(image)
        points = [(*read[name], steps) for name, steps in codes.items()]  # training alone uses others
        comparison.run(trained, image, [_Point(m, FixedQuantizer(quant), steps) for m, quant, steps in points])
    return comparison.summary()


def _note(codes: dict[str, list[Tensor]], name: str, grid: FixedQuantizer, layer: nn.Module, args: tuple) -> None:
    codes.setdefault(name, []).append(grid.steps(args[0]))


def _largest_difference(graph: Exported, mine: Any, theirs: list[np.ndarray]) -> float:
    """Of outputs, in their own units."""
    mine = mine[0] if isinstance(mine, (tuple, list)) else mine  # the others are for the training loss
    mine = mine if isinstance(mine, (tuple, list)) else (mine,)
    shapes = [tuple(v.shape) for v in mine], [v.shape for v in theirs]
    if shapes[0] != shapes[1]:
        raise QCError(
            f"QC: file={graph.path} gives outputs of shape {shapes[1]}, the model {shapes[0]}; "
            "accepted: files exported without nms=True."
        )
    return max(float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(mine, theirs))


@dataclass
class _Point:
    """Where codes are compared: a layer's input or output.

    Attributes:
        layer: The module.
        grid: Gives whole steps of what the layer reads or gives.
        theirs: The other's steps, call by call.
        is_output: Which of the two.
    """

    layer: nn.Module
    grid: Any
    theirs: list[Tensor]
    is_output: bool = False


@dataclass
class _Grid:
    """A grid of 8 bits that a file has: its scale, and its smallest whole step."""

    scale: float
    low: int

    def steps(self, x: Tensor) -> Tensor:
        """Whole steps from 0."""
        return to_codes(x, self.scale, None, self.low, self.low + 255)


def _input_of(graph: Exported, layer: DeployedConv2d, tensors: dict[str, np.ndarray]) -> _Point:
    tensor, zero_point = graph.codes[layer.name]
    return _Point(layer, layer.act_quant, [_steps(tensors[tensor], zero_point)])


def _output_of(graph: Exported, layer: DeployedConv2d, tensors: dict[str, np.ndarray]) -> _Point:
    tensor, scale, zero_point = graph.outputs[layer.name]
    low = -128 if tensors[tensor].dtype == np.int8 else 0
    return _Point(layer, _Grid(scale, low - zero_point), [_steps(tensors[tensor], zero_point)], is_output=True)


def _steps(codes: np.ndarray, zero_point: int) -> Tensor:
    return torch.from_numpy(codes.astype(np.int16)) - zero_point


class _Count:
    """Codes that differ.

    Attributes:
        total: Codes compared.
        changed: Those that differ.
        steps: Largest difference.
    """

    def __init__(self):
        self.total = self.changed = self.steps = 0

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Count some."""
        difference = (mine - theirs).abs()
        self.total += difference.numel()
        self.changed += int((difference > 0).sum())
        self.steps = max(self.steps, int(difference.max()))


class _Comparison:
    """Codes of a model beside those of another, on as many images as are run."""

    def __init__(self):
        self._end_to_end, self._by_layer = _Count(), _Count()

    def run(self, model: nn.Module, image: Tensor, points: list[_Point]) -> Any:
        """Run the model as it is, which gives what is returned, and with the other's codes in each layer."""
        with hooked(self._hook(point, self._end_to_end, force=False) for point in points):
            outputs = model(image)
        if points:
            with hooked(self._hook(point, self._by_layer, force=True) for point in points):
                model(image)
        return outputs

    def summary(self) -> dict[str, Any]:
        """What `compare_codes` gives of codes."""
        by_layer = self._by_layer
        return {
            "steps": by_layer.steps,
            "changed": by_layer.changed / by_layer.total,
            "changed_end_to_end": self._end_to_end.changed / self._end_to_end.total,
        }

    @staticmethod
    def _hook(point: _Point, count: _Count, force: bool) -> RemovableHandle:
        left = iter(point.theirs)

        def compare(value: Tensor) -> Tensor | None:
            theirs = next(left)
            count.add(point.grid.steps(value), theirs)
            return theirs * point.grid.scale if force else None

        if point.is_output:
            return point.layer.register_forward_hook(lambda _, args, y: compare(y))
        return point.layer.register_forward_pre_hook(lambda _, args: compare(args[0]))
