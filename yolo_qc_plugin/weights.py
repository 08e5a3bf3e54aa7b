# yolo_qc_plugin, AGPL-3.0
"""Quantize all weights of a model together, at the start of each forward pass of training."""

from __future__ import annotations

import torch
from torch import nn

from .functional import fake_quantize_all
from .layers import quant_convs


def quantize_together(model: nn.Module) -> None:
    """From now on the model's quantized convolutions are given their weights' values, in place.

    For the model that is trained: a hook at its forward computes them, and each quantizer hands its own out once.
    Passes without gradients, and what changes a weight or scale in between, compute them anew, as before.

    Args:
        model: Injected model.
    """
    convs = [conv for _, conv in quant_convs(model)]
    quants = [conv.weight_quant for conv in convs]
    ranges = [(q.quant_min, q.quant_max) for q in quants]
    grad_scales = [conv.weight_quant.grad_scale(conv.weight) for conv in convs]

    def before(module: nn.Module, args: tuple) -> None:
        for quant in quants:
            quant.forget()
        if torch.is_grad_enabled():
            weights = [conv.weight for conv in convs]
            results = fake_quantize_all(weights, [q.scale for q in quants], ranges, grad_scales)
            for quant, weight, result in zip(quants, weights, results):
                quant.keep(weight, result)

    model.register_forward_pre_hook(before)
