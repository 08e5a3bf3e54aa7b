# yolo_qc_plugin, AGPL-3.0
"""Codes of a deployed model in PyTorch beside those of a runtime, and of the model as it was trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import QCError
from ..quant.functional import to_codes
from ..quant.layers import QuantConv2d, quant_convs
from ..quant.modules import hooked
from .exported import Exported, batched
from .fold import DeployedConv2d, FixedQuantizer, deployed_convs


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
    total = changed = changed_end_to_end = steps = 0
    output = 0.0
    for image in images.split(graph.fixed_batch or 1):
        values = run(image.numpy())
        count = len(values) - len(names)
        theirs = dict(zip(names, values[count:]))
        free = _Codes(model, graph, theirs, force=False)
        with free:
            mine = model(image)
        output = max(output, _largest_difference(graph, mine, values[:count]))
        if graph.codes:
            forced = _Codes(model, graph, theirs, force=True)
            with forced:
                model(image)
            total, changed = total + forced.total, changed + forced.changed
            changed_end_to_end, steps = changed_end_to_end + free.changed, max(steps, forced.steps)
    if not graph.codes:
        return {"output": output}
    return {
        "steps": steps,
        "changed": changed / total,
        "changed_end_to_end": changed_end_to_end / total,
        "output": output,
    }


@torch.no_grad()
def compare_trained(trained: nn.Module, deployed: nn.Module, images: Tensor) -> dict[str, Any]:
    """Input codes of a model as it was trained and deployed: layer by layer on those of the latter, and end to end.

    Args:
        trained: Fake-quantized.
        deployed: In the deployed form.
        images: Shape (n, 3, h, w), in 0..1.

    Returns:
        "steps", "changed" and "changed_end_to_end", as of `compare_codes`.
    """
    total = changed = changed_end_to_end = steps = 0
    for image in images.split(1):
        codes: dict[str, list[Tensor]] = {}
        layers = deployed_convs(deployed)
        with hooked(m.register_forward_pre_hook(partial(_note, codes)) for m in layers.values()):
            deployed(image)
        convs = [(name, conv) for name, conv in quant_convs(trained) if name in codes]  # training alone uses others
        for force in (False, True):
            left = {name: list(given) for name, given in codes.items()}
            differences: list[Tensor] = []

            def compare(name: str, conv: QuantConv2d, args: tuple, left=left, differences=differences, force=force):
                quant, theirs = FixedQuantizer(conv.act_quant), left[name].pop(0)
                differences.append((quant.steps(args[0]) - theirs).abs().flatten())
                return (theirs * quant.scale,) if force else None

            with hooked(conv.register_forward_pre_hook(partial(compare, name)) for name, conv in convs):
                trained(image)
            found = torch.cat(differences)
            if force:
                total, changed = total + found.numel(), changed + int((found > 0).sum())
                steps = max(steps, int(found.max()))
            else:
                changed_end_to_end += int((found > 0).sum())
    return {"steps": steps, "changed": changed / total, "changed_end_to_end": changed_end_to_end / total}


def _note(codes: dict[str, list[Tensor]], layer: DeployedConv2d, args: tuple) -> None:
    codes.setdefault(layer.name, []).append(layer.act_quant.steps(args[0]))


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


class _Codes:
    """Hooks that compare a model's codes with those of a runtime; with `force` the model computes with the runtime's.

    Attributes:
        total: Codes compared.
        changed: Codes that differ.
        steps: Largest difference.
    """

    def __init__(self, model: nn.Module, graph: Exported, theirs: dict[str, np.ndarray], force: bool):
        self.layers, self.graph, self.theirs, self.force = deployed_convs(model), graph, theirs, force
        self.total = self.changed = self.steps = 0

    def __enter__(self):
        self.hooks = []
        for name, layer in self.layers.items():
            if name in self.graph.codes:
                self.hooks.append(layer.register_forward_pre_hook(self._input))
            if name in self.graph.outputs:
                self.hooks.append(layer.register_forward_hook(self._output))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _input(self, layer: DeployedConv2d, args):
        tensor, zero_point = self.graph.codes[layer.name]
        theirs = torch.from_numpy(self.theirs[tensor].astype(np.int16)) - zero_point
        self._count(layer.act_quant.steps(args[0]), theirs)
        return (theirs * layer.act_quant.scale,) if self.force else None

    def _output(self, layer: DeployedConv2d, args, y):
        tensor, scale, zero_point = self.graph.outputs[layer.name]
        found = self.theirs[tensor]
        theirs = torch.from_numpy(found.astype(np.int16)) - zero_point
        low = -128 if found.dtype == np.int8 else 0
        self._count(to_codes(y, scale, None, low - zero_point, low + 255 - zero_point), theirs)
        return theirs * scale if self.force else None

    def _count(self, mine: Tensor, theirs: Tensor) -> None:
        difference = (mine - theirs).abs()
        self.total += difference.numel()
        self.changed += int((difference > 0).sum())
        self.steps = max(self.steps, int(difference.max()))
