# yolo_qc_plugin, AGPL-3.0
"""All weights quantized together: what one by one gives, and never a stale one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from yolo_qc_plugin.qat.weights import WeightsTogether
from yolo_qc_plugin.quant import foreach, kernels
from yolo_qc_plugin.quant.foreach import fake_quantize_all
from yolo_qc_plugin.quant.functional import fake_quantize
from yolo_qc_plugin.quant.layers import QuantConv2d


@pytest.fixture(autouse=True, params=[False, True], ids=["operations on lists", "C"])
def way(request, monkeypatch):
    """Both are compared with themselves: sums are rounded in another order."""
    monkeypatch.setattr(kernels, "enabled", request.param)


def test_values_and_gradients_are_those_of_each_alone():
    """Exactly, clipped weights and weights on the range's ends included; one that nothing uses gets no gradient."""
    rand = torch.Generator().manual_seed(0)
    shapes, scales = [(8, 3, 3, 3), (30, 6, 3, 3), (5, 4, 1, 1), (7, 1, 1, 1)], [0.3, 0.1, 0.2, 0.25]
    starts = [torch.randn(s, generator=rand) for s in shapes]
    starts[3] = torch.tensor([-2.0, 1.75, 0.0, 5.0, -5.0, 0.125, 0.375]).view(7, 1, 1, 1)  # in units of 0.25
    factors = [torch.full((1 if i % 2 else len(w),), s) for i, (w, s) in enumerate(zip(starts, scales))]
    ranges, grad_scales = [(-8, 7), (-4, 3), (-128, 127), (-8, 7)], [0.1, 0.2, 0.3, 0.4]
    upstream = [torch.randn(s, generator=rand) for s in shapes]
    found = []
    for together in (True, False):
        weights = [w.clone().requires_grad_() for w in starts]
        s = [f.clone().requires_grad_() for f in factors]
        if together:
            out = fake_quantize_all(weights, s, ranges, grad_scales)
        else:
            out = [fake_quantize(w, f, None, *r, g) for w, f, r, g in zip(weights, s, ranges, grad_scales)]
        torch.autograd.backward([out[0], out[1], out[3]], [upstream[0], upstream[1], upstream[3]])
        assert weights[2].grad is None and s[2].grad is None
        used = weights[:2] + weights[3:] + s[:2] + s[3:]
        found.append([*(y.detach() for y in out), *(t.grad for t in used)])
    assert len(found[0]) == 10 and all(map(torch.equal, *found))
    assert 0 < (found[0][6] == 0).sum() < 7  # of the last weight, some are clipped


def quantized_model():
    torch.manual_seed(0)
    convs = [QuantConv2d.from_float(nn.Conv2d(*c), 4, 4, per_channel, True) for c, per_channel in CONVS]
    model = nn.Sequential(*convs)
    for conv in convs:
        conv.weight_quant.calibrate(conv.weight, "mse")
        conv.act_quant.scale.data.fill_(0.2)
    return model


CONVS = [((3, 8, 3), False), ((8, 8, 1), True), ((8, 4, 3), False)]


def gradients(model, x, weights=None):
    model.zero_grad()
    if weights:
        weights.prepare()
    loss = model(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_model_trains_as_before():
    """Over steps that change weights and scales; a copy made in between takes nothing along."""
    plain = quantized_model()
    together = copy.deepcopy(plain)
    weights = WeightsTogether(together)
    x = torch.rand(2, 3, 12, 12)
    for _ in range(3):
        found, wanted = gradients(together, x, weights), gradients(plain, x)
        assert len(found) == len(wanted) > 10 and all(map(torch.equal, found, wanted))
        for model in (plain, together):
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-3 * p.grad.sign() * p.abs()
    weights.prepare()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(together)))
    assert all(map(torch.equal, gradients(plain, x), gradients(copied, x)))


def test_no_stale_weight_is_used():
    """Not after a change of it, not for a second call, not without gradients, not when switched off."""
    model = quantized_model()
    weights, first, x = WeightsTogether(model), model[0], torch.rand(1, 3, 12, 12)
    calls = []
    first.weight_quant.register_forward_hook(lambda m, a, y: calls.append(y))

    def run(prepare=True):
        if prepare:
            weights.prepare()
        first(x)
        return calls[-1]

    def together(y):
        return y.grad_fn.name().startswith("_FakeQuantizeAll")

    old = run()
    assert together(old) and not together(run(prepare=False))
    weights.prepare()
    with torch.no_grad():
        first.weight.mul_(0.5)
    changed = run(prepare=False)
    assert not together(changed) and not torch.equal(changed, old)
    weights.prepare()
    with torch.no_grad():
        assert run(prepare=False).grad_fn is None
    weights.prepare()
    first.weight_quant.enabled = False
    assert run(prepare=False) is first.weight


def test_frozen_layers_stay_out_of_backward():
    model = quantized_model()
    for p in model[0].parameters():
        p.requires_grad_(False)
    weights, x = WeightsTogether(model), torch.rand(1, 3, 12, 12)
    weights.prepare()
    assert not model[0](x).requires_grad and model(x).requires_grad


def test_micro_batches_share_the_values(monkeypatch):
    """Accumulated over three of them, exactly; computed once, and again after a step or `forget`."""
    plain = quantized_model()
    together = copy.deepcopy(plain)
    weights, calls = WeightsTogether(together), []
    original = foreach.to_codes_all
    monkeypatch.setattr(foreach, "to_codes_all", lambda *a: calls.append("list") or original(*a))
    in_c = kernels.forward_all
    monkeypatch.setattr(kernels, "forward_all", lambda *a: calls.append("C") or in_c(*a))
    way = ["C"] if kernels.enabled else ["C", "list"]  # which C has left to operations on lists
    rand = torch.Generator().manual_seed(0)
    batches = [torch.rand(2, 3, 12, 12, generator=rand) for _ in range(3)]
    for step in range(2):
        calls.clear()
        for model in (plain, together):
            model.zero_grad()
            for x in batches:
                if model is together:
                    weights.prepare()
                model(x).square().sum().backward()
        assert calls == way
        pairs = [(p.grad, q.grad) for p, q in zip(plain.parameters(), together.parameters()) if p.grad is not None]
        assert len(pairs) >= 10 and all(a.equal(b) for a, b in pairs)
        for model in (plain, together):
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
    weights.forget()
    calls.clear()
    weights.prepare()
    assert calls == way
