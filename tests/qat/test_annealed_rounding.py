# yolo_qc_plugin, AGPL-3.0
"""Annealed rounding: its values and gradients by the formula, its ends, and what a real run makes of it."""

import copy
import math

import pytest
import torch
from test_prepare import quantized_model
from torch import nn

from yolo_qc_plugin.qat.annealed_rounding import END, HARD, START, AnnealedRounding, temperature
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.quant import kernels


@pytest.fixture
def model() -> nn.Module:
    """Three convolutions, per tensor and per channel; a fifth of the second one's weights are clipped."""
    found = quantized_model()
    with torch.no_grad():
        found[1].weight.mul_(3)
    return found


def by_formula(conv: nn.Module, t: float) -> torch.Tensor:
    """What the module's head says, by autograd."""
    quant = conv.weight_quant
    scale = quant.per_weight(conv.weight)
    v = (conv.weight / scale).clamp(quant.quant_min, quant.quant_max)
    lower = v.detach().floor()
    h = (1 + ((v - lower - 0.5) / (2 * t)).tanh() / math.tanh(1 / (4 * t))) / 2
    return scale * (lower + h)


@pytest.mark.parametrize("t", [START, 0.05, END])
def test_values_and_gradients_are_those_of_the_formula(model, t):
    """In FP64, where autograd's own sums differ by little; clipped weights have no gradient, their scales do."""
    model = model.double()
    weights = TrainedWeights(model)
    handed = AnnealedRounding(weights).hand_out(t)
    gains = [torch.randn_like(w) for w in handed]
    sum((w * g).sum() for w, g in zip(handed, gains)).backward()
    found = [(conv.weight.grad.clone(), conv.weight_quant.scale.grad.clone()) for conv in model]
    model.zero_grad()
    for conv, value, gain, (by_weight, by_scale) in zip(model, handed, gains, found):
        wanted = by_formula(conv, t)
        (wanted * gain).sum().backward()
        assert torch.allclose(value, wanted, rtol=0, atol=1e-12) and conv.given_weight is value
        assert torch.allclose(by_weight, conv.weight.grad, rtol=1e-9, atol=1e-12)
        lsq = conv.weight_quant.grad_scale(conv.weight)
        assert torch.allclose(by_scale, conv.weight_quant.scale.grad * lsq, rtol=1e-9, atol=1e-12)
    v = model[1].weight / model[1].weight_quant.per_weight(model[1].weight)
    clipped = (v < -8) | (v > 7)
    assert clipped.any() and not found[1][0][clipped].any()
    assert t == END or found[1][0][~clipped].any()  # a step has a slope next to a half alone


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("t", [100.0, START, 0.05, END])
def test_in_c_as_by_tensor_operations(model, t, memory, monkeypatch):
    """To the rounding of FP32, and in the memory format of the weights."""
    model = model.to(memory_format=memory)
    gains = [torch.randn_like(conv.weight) for conv in model]
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "enabled", enabled)
        assert kernels.by_c([c.weight for c in model], [c.weight_quant.scale for c in model]) is enabled
        handed = AnnealedRounding(TrainedWeights(model)).hand_out(t)
        sum((w * g).sum() for w, g in zip(handed, gains)).backward()
        found.append([(w, c.weight.grad, c.weight_quant.scale.grad) for w, c in zip(handed, model)])
        model.zero_grad()
    for conv, gain, (value, by_weight, by_scale), wanted in zip(model, gains, *found):
        scale = conv.weight_quant.scale
        steps = 1e-6 + 1e-7 / t  # of a value; a tanh takes its argument's error times its own slope
        assert (value - wanted[0]).abs().max() <= 8 * steps * scale.max() and value.stride() == conv.weight.stride()
        assert ((by_weight - wanted[1]).abs() <= gain.abs() * 10 * steps / t).all()
        assert by_weight.stride() == wanted[1].stride() == conv.weight.stride()
        assert ((by_scale - wanted[2]).abs() <= 10 * steps / t * gain.abs().sum()).all()


def test_it_goes_from_clipping_to_rounding(model):
    weights = TrainedWeights(model)
    soft = AnnealedRounding(weights)
    rounded = [w.detach() for w in weights.hand_out()]
    for conv, almost_float, almost_rounded, wanted in zip(model, soft.hand_out(100.0), soft.hand_out(1e-4), rounded):
        quant, scale = conv.weight_quant, conv.weight_quant.per_weight(conv.weight)
        clipped = conv.weight.maximum(quant.quant_min * scale).minimum(quant.quant_max * scale)
        assert torch.allclose(almost_float, clipped, atol=1e-5 * scale.max().item())
        assert ((almost_rounded - wanted).abs() < 1e-3 * scale).float().mean() > 0.99  # but at ties
    weights.take_back()
    assert all(conv.given_weight is None for conv in model)


def test_the_temperature_falls_to_the_end_and_ends():
    found = [temperature(i / 1000) for i in range(1001)]
    soft = [t for t in found if t is not None]
    assert soft[0] == START and soft == sorted(soft, reverse=True) and soft[-1] == pytest.approx(END, rel=0.01)
    assert found[len(soft) :] == [None] * (1001 - len(soft)) and len(soft) == 1000 * HARD


def test_a_weight_that_nothing_uses_has_no_gradient(model):
    weights, x = TrainedWeights(model), torch.rand(1, 3, 12, 12)
    AnnealedRounding(weights).hand_out(0.1)
    model[1](model[0](x)).sum().backward()
    assert model[2].weight.grad is model[2].weight_quant.scale.grad is None and model[0].weight.grad.any()


def test_training_hardens_without_oscillation(model):
    """Weights that learn a float layer's outputs end near grid points, and rounding them costs next to nothing."""
    teacher = copy.deepcopy(model)
    for conv in teacher:
        conv.weight_quant.enabled = False
    weights, rand = TrainedWeights(model), torch.Generator().manual_seed(0)
    soft, optimizer = AnnealedRounding(weights), torch.optim.Adam([conv.weight for conv in model], lr=3e-3)

    def off_grid() -> float:
        v = torch.cat([(c.weight / c.weight_quant.per_weight(c.weight)).detach().flatten() for c in model])
        return (v - v.round()).abs().gt(0.4).float().mean().item()

    before = off_grid()
    for i in range(200):
        x = torch.rand(4, 3, 12, 12, generator=rand)
        soft.hand_out(temperature(HARD * i / 200))
        (model(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights.take_back()
    assert before > 0.15 and off_grid() < before / 3


def test_a_run_anneals_then_rounds(train, monkeypatch):
    """Through the real trainer: the temperatures by progress, hard rounding at the end, patience that waits."""
    from yolo_qc_plugin.qat import annealed_rounding

    seen, best = [], []
    hand_out, hard = AnnealedRounding.hand_out, TrainedWeights.hand_out
    monkeypatch.setattr(AnnealedRounding, "hand_out", lambda self, t, _: seen.append(t) or hand_out(self, t))
    monkeypatch.setattr(TrainedWeights, "hand_out", lambda self, _: seen.append(None) or hard(self))
    train(
        {"rounding": "annealed"},
        {
            "on_train_start": lambda trainer: setattr(trainer.stopper, "best_fitness", 1.0),  # no epoch is better
            "on_train_epoch_end": lambda trainer: best.append(trainer.stopper.best_epoch),
        },
        epochs=4,
        patience=1,
        nbs=8,  # every batch is a step
    )
    wanted = [annealed_rounding.temperature(i / 12) for i in range(12)]
    assert seen == pytest.approx(wanted) and seen[-1] is None and len(best) == 4
