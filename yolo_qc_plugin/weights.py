# yolo_qc_plugin, AGPL-3.0
"""Quantize all weights of a model together, before each forward pass of training."""

from __future__ import annotations

from torch import nn

from .functional import fake_quantize_all
from .layers import quant_convs


class WeightsTogether:
    """Computes all quantized weights and leaves each with its quantizer, which hands it out once.

    What changes a weight or a scale before that, and passes without gradients, compute it anew, as without this.

    Args:
        model: Injected model.
    """

    def __init__(self, model: nn.Module):
        self.convs = [conv for _, conv in quant_convs(model)]
        self.quants = [conv.weight_quant for conv in self.convs]
        self.ranges = [(q.quant_min, q.quant_max) for q in self.quants]
        self.grad_scales = [q.grad_scale(conv.weight) for q, conv in zip(self.quants, self.convs)]

    def prepare(self) -> None:
        """Compute them, with gradients; to be called before a forward pass."""
        weights = [conv.weight for conv in self.convs]
        results = fake_quantize_all(weights, [q.scale for q in self.quants], self.ranges, self.grad_scales)
        for quant, weight, result in zip(self.quants, weights, results):
            quant.keep(weight, result)
