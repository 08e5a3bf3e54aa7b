# yolo_qc_plugin, AGPL-3.0
"""Weights handed out ahead of a forward pass: what each layer computes by itself, and never an old one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from yolo_qc_plugin.qat.annealed_rounding import AnnealedRounding
from yolo_qc_plugin.qat.oscillation import Oscillation
from yolo_qc_plugin.qat.prepare import TrainedWeights, weights_quantized_once
from yolo_qc_plugin.quant import kernels, native
from yolo_qc_plugin.quant.layers import QuantConv2d
from yolo_qc_plugin.quant.quantizer import WeightQuantizer


@pytest.fixture(autouse=True, params=[False, True], ids=["tensor operations", "C"])
def way(request, monkeypatch):
    """Each is compared with itself: sums are rounded in another order."""
    monkeypatch.setattr(kernels, "enabled", request.param)


def quantized_model():
    torch.manual_seed(0)
    convs = [QuantConv2d.from_float(nn.Conv2d(*c), 4, 4, per_channel, True) for c, per_channel in CONVS]
    model = nn.Sequential(*convs)
    for conv in convs:
        conv.weight_quant.calibrate(conv.weight, "mse")
        conv.act_quant.scale.data.fill_(0.2)
    return model


CONVS = [((3, 8, 3), False), ((8, 8, 1), True), ((8, 4, 3), False)]


def gradients(model, *batches, weights=None):
    """Losses and gradients of all batches together, weights handed out before each or not."""
    model.zero_grad()
    losses = []
    for x in batches:
        if weights:
            weights.hand_out()
        loss = model(x).square().sum()
        loss.backward()
        losses.append(loss.detach())
        if weights:
            weights.take_back()
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@torch.no_grad()
def step(model):
    for p in model.parameters():
        p -= 1e-3 * p.grad.sign() * p.abs()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_model_trains_as_by_itself(micro_batches):
    """Bit for bit over steps that change weights and scales, clipped weights included, per tensor and per channel; but
    for the sums by scale where all layers are in one line."""
    plain = quantized_model()
    together = copy.deepcopy(plain)
    for model in (plain, together):
        with torch.no_grad():
            model[1].weight.mul_(3)
    weights, rand = TrainedWeights(together), torch.Generator().manual_seed(0)
    assert 0.05 < plain[1].weight_quant.clipped(plain[1].weight) < 0.9
    for _ in range(3):
        batches = [torch.rand(2, 3, 12, 12, generator=rand) for _ in range(micro_batches)]
        found, wanted = gradients(together, *batches, weights=weights), gradients(plain, *batches)
        assert len(found) == len(wanted) > 10
        for a, b in zip(found, wanted):
            summed = b.dim() == 1 and not kernels.enabled
            assert torch.allclose(a, b, rtol=1e-5, atol=0) if summed else torch.equal(a, b)
        step(plain)
        step(together)
        weights.read()


@pytest.mark.parametrize("softness", [None, 0.2])
def test_channels_last(softness):
    """As the host has weights on a GPU: what is handed out has that format, and is otherwise the same."""
    results, states = [], []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = quantized_model().to(memory_format=memory)
        weights = TrainedWeights(model)
        given = AnnealedRounding(weights).hand_out(softness) if softness else weights.hand_out()
        assert [v.stride() for v in given] == [conv.weight.stride() for conv in model]
        loss = model(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))).square().sum()
        loss.backward()
        results.append([loss.detach(), *given, *(p.grad for p in model.parameters() if p.grad is not None)])
        followed = Oscillation(weights)
        for part, conv in zip(weights.by_layer(followed.codes), model):
            assert torch.equal(part, conv.weight_codes())
        states.append(followed.state_dict()["codes"])
        again = Oscillation(weights)
        again.codes.zero_()
        again.load_state_dict(followed.state_dict())
        assert torch.equal(again.codes, followed.codes)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(*states)


@pytest.mark.parametrize("softness", [None, 0.2])
def test_in_half_precision(softness):
    """One cast in place of each layer's: the values are the cast ones, and gradients those of gradients in half."""
    model = quantized_model()
    weights = TrainedWeights(model)
    annealed = AnnealedRounding(weights)
    gains = [torch.randn_like(w) for w in weights.weights]
    found = {}
    for dtype in (torch.float16, None):
        model.zero_grad()
        handed = weights.hand_out(dtype) if softness is None else annealed.hand_out(softness, dtype)
        assert all(h.dtype == (dtype or torch.float32) and h is c.given_weight for h, c in zip(handed, model))
        sum((h.float() * g.half()).sum() for h, g in zip(handed, gains)).backward()
        grads = [p.grad for conv in model for p in (conv.weight, conv.weight_quant.scale)]
        found[dtype] = [*(h.half() for h in handed), *grads]
    for a, b in zip(*found.values()):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=2e-6, atol=1e-7) and a.abs().max() > 0
    assert all(map(torch.equal, found[None][:3], found[torch.float16][:3])) or kernels.enabled


def test_codes_are_those_of_the_layers():
    """In one flat buffer, and of the weights of now once they are read."""
    model = quantized_model()
    weights = TrainedWeights(model)
    for _ in range(2):
        parts = weights.by_layer(weights.codes)
        assert weights.codes.dtype == torch.int8 and weights.names == ["0", "1", "2"]
        assert all(codes.equal(conv.weight_codes()) for codes, conv in zip(parts, model))
        with torch.no_grad():
            model[1].weight.neg_()
        assert not parts[1].equal(model[1].weight_codes())
        weights.read()


def test_weights_are_quantized_once_a_step(monkeypatch):
    """To codes, whatever the number of micro-batches; no layer quantizes one by itself."""
    calls, positions, read = [], TrainedWeights.positions, native.read_codes
    monkeypatch.setattr(native, "read_codes", lambda *args: calls.append("read_codes") or read(*args))
    monkeypatch.setattr(TrainedWeights, "positions", lambda *args: calls.append("positions") or positions(*args))
    monkeypatch.setattr(WeightQuantizer, "codes", lambda *args: calls.append("codes"))
    monkeypatch.setattr(WeightQuantizer, "forward", lambda *args: calls.append("forward"))
    model = quantized_model()
    weights = TrainedWeights(model)
    gradients(model, *[torch.rand(1, 3, 12, 12)] * 3, weights=weights)
    assert calls == ["read_codes"] * 3 if kernels.enabled else ["positions"]  # layer by layer, or all at once


def test_a_weight_that_nothing_uses_has_no_gradient():
    model = quantized_model()
    weights, x = TrainedWeights(model), torch.rand(1, 3, 12, 12)
    weights.hand_out()
    model[1](model[0](x)).sum().backward()
    assert model[2].weight.grad is model[2].weight_quant.scale.grad is None and model[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_where_all_layers_are_frozen_nothing_is_handed_out(dtype):
    model = quantized_model().requires_grad_(False)
    weights = TrainedWeights(model)
    weights.read()
    assert weights.hand_out(dtype) == () and all(conv.given_weight is None for conv in model)


def test_what_is_handed_out_is_taken_back_and_left_out_of_copies():
    model = quantized_model()
    weights, first, x = TrainedWeights(model), model[0], torch.rand(1, 3, 12, 12)
    handed = weights.hand_out()
    assert first.given_weight is handed[0]
    with torch.no_grad():
        first.weight.neg_()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].given_weight is None and not torch.equal(copied[0](x), first(x))
        weights.take_back()
        assert torch.equal(copied[0](x), first(x)) and "given_weight" not in vars(copied[0])
        weights.hand_out()
    weights.take_back()
    assert all(conv.given_weight is None for conv in model)
    assert "given_weight" not in vars(first.to_float())


def test_frozen_layers_stay_out_of_backward():
    model = quantized_model()
    for p in model[0].parameters():
        p.requires_grad_(False)
    weights, x = TrainedWeights(model), torch.rand(1, 3, 12, 12)
    weights.hand_out()
    assert not model[0](x).requires_grad and model(x).requires_grad


def test_frozen_weights_are_quantized_once():
    """Within the context neither a changed weight nor a changed scale shows; after it they do again."""
    model, x = quantized_model(), torch.rand(1, 3, 12, 12)
    before = model(x)
    with pytest.raises(ZeroDivisionError), weights_quantized_once(model):
        with torch.no_grad():
            model[1].weight.neg_()
            model[2].weight_quant.scale.mul_(2)
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        raise ZeroDivisionError
    assert all(conv.weight.grad is None for conv in model) and not torch.equal(model(x), before)
