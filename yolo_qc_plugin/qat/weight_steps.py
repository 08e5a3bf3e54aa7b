# yolo_qc_plugin, AGPL-3.0
"""Optimizer steps on quantized weights in proportion to the weights of their layer."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from .prepare import TrainedWeights
from .scale_steps import ScaleSteps


class WeightSteps:
    """Takes an adaptive optimizer's step on each quantized weight times the size of its layer's weights.

    The Adam family moves every weight by about lr. A step of the grid, however, is as large as the layer's weights are,
    which fall with the square root of its inputs: one lr moves the weights of a wide layer over many thresholds while
    those of a narrow one do not reach their first. The factor of a layer is the root mean square of its weights at the
    start, over the geometric mean of all layers', so that lr keeps its meaning on average. Batch norm makes a layer's
    function independent of that size. Our reading; the papers train with SGD, which is left as it is.

    Args:
        optimizer: Holds the weights; gets a pre- and a post-step hook if it is of the Adam family.
        weights: Their layers.

    Attributes:
        factors: Of each layer, above 0.
    """

    def __init__(self, optimizer: Optimizer, weights: TrainedWeights):
        self.tensors = [w.detach() for w in weights.weights]
        sizes = [max(w.square().mean().sqrt().item(), 1e-12) for w in self.tensors]
        middle = math.exp(sum(map(math.log, sizes)) / max(len(sizes), 1))
        self.factors = [size / middle for size in sizes]
        self.attach(optimizer)

    def attach(self, optimizer: Optimizer) -> None:
        """Hook into an optimizer."""
        if type(optimizer).__name__ in ScaleSteps.ADAPTIVE:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs) -> None:
        self.old = list(torch._foreach_add(self.tensors, 0.0))

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs) -> None:
        steps = torch._foreach_sub(self.tensors, self.old)
        torch._foreach_mul_(steps, self.factors)
        torch._foreach_copy_(self.tensors, torch._foreach_add(self.old, steps))
        del self.old

    def state_dict(self) -> dict:
        """What resume.pt keeps."""
        return {"factors": self.factors}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self.factors = state["factors"]
