# yolo_qc_plugin, AGPL-3.0
"""Steps on weights in proportion to their layer's size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.qat.weight_steps import WeightSteps
from yolo_qc_plugin.quant.calibrate import calibrate
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import quant_convs


def layers() -> tuple[nn.Module, TrainedWeights]:
    """Three convolutions whose weights are 1, 2 and 4 times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)))
    for i, conv in enumerate(model):
        conv.weight.data = torch.randn(3, 3, 3, 3)
        conv.weight.data *= 2**i / conv.weight.data.square().mean().sqrt()
    inject(model, QCConfig())
    calibrate(model, [torch.randn(2, 3, 8, 8)], model)
    return model, TrainedWeights(model)


def moved(optimizer_class, relative: bool) -> list[torch.Tensor]:
    """By how much one step with the same gradients moves each layer's weights."""
    model, weights = layers()
    optimizer = optimizer_class([c.weight for _, c in quant_convs(model)], lr=0.1)
    steps = WeightSteps(optimizer, weights) if relative else None
    before = [c.weight.detach().clone() for c in weights.convs]
    torch.manual_seed(1)
    for conv in weights.convs:
        conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    if steps:
        assert steps.factors == pytest.approx([0.5, 1.0, 2.0], rel=1e-5)
    return [c.weight.detach() - b for c, b in zip(weights.convs, before)]


def test_a_step_of_adam_is_in_proportion_to_the_layer():
    plain, relative = moved(torch.optim.Adam, False), moved(torch.optim.Adam, True)
    for factor, one, other in zip((0.5, 1.0, 2.0), plain, relative):
        assert torch.allclose(other, factor * one, rtol=1e-4, atol=1e-6)


def test_a_step_of_sgd_is_left_as_it_is():
    for one, other in zip(moved(torch.optim.SGD, False), moved(torch.optim.SGD, True)):
        assert torch.equal(one, other)
