# yolo_qc_plugin, AGPL-3.0
"""Code flips and oscillation frequencies against a count by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from yolo_qc_plugin.qat.oscillation import Oscillation
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.quant import kernels
from yolo_qc_plugin.quant.layers import QuantConv2d

CONVS = [((3, 8, 3), 3, False), ((8, 8, 1), 2, True), ((8, 4, 3), 8, True), ((4, 4, 3), 4, False)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    convs = [QuantConv2d.from_float(nn.Conv2d(*c), bits, 4, per_channel, True) for c, bits, per_channel in CONVS]
    for conv in convs:
        conv.weight_quant.calibrate(conv.weight, "mse")
    for p in convs[3].parameters():
        p.requires_grad_(False)
    return nn.Sequential(*convs)


@torch.no_grad()
def walk(model, seed):
    """A step of a random walk of weights and scales, of half the distance between codes: some codes jump."""
    rand = torch.Generator().manual_seed(seed)
    for conv in model:
        noise = torch.randn(conv.weight.shape, generator=rand)
        conv.weight.add_(noise * conv.weight_quant.scale.view(-1, 1, 1, 1), alpha=0.5)
        conv.weight_quant.scale.mul_(1 + 0.02 * torch.randn(conv.weight_quant.scale.shape, generator=rand))


def take_step(oscillation):
    oscillation.weights.read()
    oscillation.step()


def codes_by_hand(conv) -> np.ndarray:
    weight, scale = conv.weight.detach().numpy(), conv.weight_quant.scale.detach().numpy().reshape(-1, 1, 1, 1)
    half = 2 ** (conv.weight_quant.bits - 1)
    return np.clip(np.round(weight / scale), -half, half - 1).astype(int)


@pytest.mark.parametrize("way", ["C", "tensor operations"])
def test_counts_are_those_by_hand(model, way, monkeypatch):
    """Weight by weight over a random walk of weights and scales; frozen layers are left out."""
    monkeypatch.setattr(kernels, "enabled", way == "C")
    found = Oscillation(TrainedWeights(model), momentum=0.1, threshold=0.1)
    assert found.names == ["0", "1", "2"]
    history = [[codes_by_hand(conv) for conv in model]]
    for step in range(30):
        walk(model, step)
        take_step(found)
        history.append([codes_by_hand(conv) for conv in model])
    oscillations = 0
    for layer in range(3):
        series = np.stack([codes[layer].ravel() for codes in history])
        last, frequency = np.zeros(series.shape[1]), np.zeros(series.shape[1])
        for w in range(series.shape[1]):
            for before, now in zip(series[:-1, w], series[1:, w]):
                sign = np.sign(now - before)
                oscillated = sign != 0 and last[w] != 0 and sign != last[w]
                frequency[w] = 0.9 * frequency[w] + 0.1 * oscillated
                last[w] = sign or last[w]
                oscillations += oscillated
        np.testing.assert_allclose(found.by_layer(found.frequency)[layer].ravel(), frequency, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(found.by_layer(found.direction)[layer].ravel(), last)
        np.testing.assert_array_equal(found.by_layer(found.codes)[layer].ravel(), series[-1])
        assert found.by_layer(found.codes)[layer].equal(model[layer].weight_codes())
        assert found.flipped[layer].item() == pytest.approx(np.mean(series[-1] != series[-2]))
        assert found.oscillating[layer].item() == pytest.approx(np.mean(frequency > 0.1))
    assert oscillations > 1000


def test_codes_that_jump_across_the_range(model):
    """At 8 bits by 255: the sign of such a change is not lost in 8-bit arithmetic."""
    conv, found = model[2], None
    for sign in (1, -1, 1, -1, 1):
        with torch.no_grad():
            conv.weight.fill_(1e3 * sign)
        if found:
            take_step(found)
        found = found or Oscillation(TrainedWeights(model))
    assert found.by_layer(found.codes)[2].unique().tolist() == [127]
    assert found.by_layer(found.direction)[2].unique().tolist() == [1]
    torch.testing.assert_close(found.by_layer(found.frequency)[2].unique(), torch.tensor([1 - 0.99**3]))
    assert found.flipped.tolist() == [0, 0, 1] and found.oscillating.tolist() == [0, 0, 1]


def test_state_goes_on_as_if_it_had_not_been_interrupted(model):
    first = Oscillation(TrainedWeights(model))
    for step in range(4):
        walk(model, step)
        take_step(first)
    state = copy.deepcopy(first.state_dict())
    second = Oscillation(TrainedWeights(model))
    second.load_state_dict(state)
    for step in range(4, 8):
        walk(model, step)
        take_step(first)
        take_step(second)
    assert all(v.equal(second.state_dict()[k]) for k, v in first.state_dict().items())
    assert first.change.equal(second.change) and first.frequency.count_nonzero()


def test_both_ways_give_the_same(model, monkeypatch):
    """In C and by tensor operations: state and shares bit for bit, in turns as well."""
    found = {way: Oscillation(TrainedWeights(model)) for way in ("C", "tensors", "in turns")}
    for step in range(40):
        walk(model, step)
        for way, one in found.items():
            monkeypatch.setattr(kernels, "enabled", way == "C" or (way == "in turns" and step % 2 == 0))
            take_step(one)
    first = found.pop("C")
    for other in found.values():
        for name in ("codes", "direction", "frequency", "change", "flipped", "oscillating"):
            assert getattr(first, name).equal(getattr(other, name)), name
    assert first.flipped.min() > 0 and first.oscillating.min() > 0
