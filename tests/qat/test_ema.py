# yolo_qc_plugin, AGPL-3.0
"""ConstantEMA: the formula, its warm-up, what is averaged and what is copied."""

import copy

import pytest
import torch
from torch import nn

from yolo_qc_plugin.qat.ema import ConstantEMA
from yolo_qc_plugin.quant.layers import QuantConv2d

# One lerp in float32 rounds three times; a handful of steps stays within a few eps of the float64 recursion.
CLOSE = dict(rtol=2e-6, atol=1e-7)


def network(seed=0):
    """A quantized convolution with batch norm: parameters, float buffers and integer buffers."""
    torch.manual_seed(seed)
    q = QuantConv2d.from_float(nn.Conv2d(3, 4, 3), 4, 4, True, True)
    return nn.Sequential(q, nn.BatchNorm2d(4))


def train(model, step):
    """Move everything that a training step moves."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model[1].running_mean.add_(torch.randn(4))
        model[1].running_var.mul_(1.5)
        model[1].num_batches_tracked.add_(1)


def pair(decay, updates=0):
    model = network()
    ema = ConstantEMA(copy.deepcopy(model).eval().requires_grad_(False), decay, updates)
    return model, ema


@pytest.mark.parametrize("decay,updates", [(0.9, 0), (0.999, 0), (0.5, 100), (0.9999, 10_000), (0.99, 889)])
def test_formula_over_several_steps(decay, updates):
    """ema <- d * ema + (1 - d) * value with d = min(decay, (1 + n) / (10 + n)), by hand in float64."""
    model, ema = pair(decay, updates)
    expected = {k: v.double() for k, v in model.state_dict().items()}
    for n in range(updates + 1, updates + 6):
        train(model, n)
        ema.step(model)
        d = min(decay, (1 + n) / (10 + n))
        expected = {k: d * expected[k] + (1 - d) * v.double() for k, v in model.state_dict().items()}
    assert ema.updates == updates + 5
    integers = {"0.weight_quant.quant_range", "0.act_quant.quant_range", "1.num_batches_tracked"}
    averaged = ema.ema.state_dict()
    assert {"0.weight", "0.bias", "0.weight_quant.scale", "0.act_quant.scale", "0.act_quant.offset", "1.running_mean",
            "1.running_var", *integers} < averaged.keys()  # fmt: skip
    for name, value in averaged.items():
        if name in integers:
            assert torch.equal(value, model.state_dict()[name])
        else:
            torch.testing.assert_close(value, expected[name].float(), **CLOSE)
            assert not torch.equal(value, model.state_dict()[name]), name
    assert averaged["1.num_batches_tracked"] == 5


def test_warm_up_values():
    ema = ConstantEMA(network(), 0.9999)
    assert [ema.decay(n) for n in (1, 2, 8, 90)] == pytest.approx([2 / 11, 3 / 12, 0.5, 0.91])
    for decay, reached in ((0.9, 80), (0.99, 890), (0.999, 8990)):
        ema = ConstantEMA(network(), decay)
        assert ema.decay(reached - 1) < decay == ema.decay(reached) == ema.decay(10**6)
    assert ConstantEMA(network(), 0.0).decay(1) == 0.0 and ConstantEMA(network(), 0.1).decay(1) == 0.1


def test_decay_0_is_the_model():
    model, ema = pair(0.0)
    for n in range(3):
        train(model, n)
        ema.step(model)
        for a, b in zip(ema.ema.state_dict().values(), model.state_dict().values()):
            assert torch.equal(a, b)


def test_integer_buffers_are_copied():
    model, ema = pair(0.999)
    model[0].act_quant.set_signed(True)
    model[1].num_batches_tracked.fill_(7)
    ema.step(model)
    assert ema.ema[0].act_quant.quant_range.tolist() == [-8, 7] and ema.ema[1].num_batches_tracked == 7


class Pair(nn.Module):
    """Two layers of the same shape, registered in the order given."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(2, 2))


def test_tensors_are_matched_by_name_not_by_order():
    model, averaged = Pair("ab"), Pair("ba")
    assert list(model.state_dict()) != list(averaged.state_dict())
    ConstantEMA(averaged, 0.0).step(model)
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert not torch.equal(averaged.a.weight, averaged.b.weight)


def test_a_tensor_under_two_names_is_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model[0])
    ema = ConstantEMA(copy.deepcopy(model), 0.5, updates=100)
    start = ema.ema[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.step(model)
    torch.testing.assert_close(ema.ema[0].weight, start + 0.5)


def test_update_moves_nothing():
    model, ema = pair(0.5)
    before = {k: v.clone() for k, v in ema.ema.state_dict().items()}
    train(model, 0)
    ema.update(model)
    assert ema.updates == 0 and all(torch.equal(v, before[k]) for k, v in ema.ema.state_dict().items())
    ema.step(model)
    assert not torch.equal(ema.ema[0].weight, before["0.weight"])


def test_averages_are_moved_in_place():
    model, ema = pair(0.5)
    objects = [id(t) for t in (*ema.ema.parameters(), *ema.ema.buffers())]
    storage = [t.data_ptr() for t in ema.ema.state_dict().values()]
    source = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        ema.step(model)
    assert [id(t) for t in (*ema.ema.parameters(), *ema.ema.buffers())] == objects
    assert [t.data_ptr() for t in ema.ema.state_dict().values()] == storage
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items())  # the model is read only
    assert not set(storage) & {t.data_ptr() for t in model.state_dict().values()}
    assert all(p.grad_fn is None and not p.requires_grad for p in ema.ema.parameters())


def test_update_attr_copies_what_is_named_and_there():
    model, ema = pair(0.5)
    model.names, model.stride, model.args = {0: "a"}, 32, "secret"
    ema.update_attr(model, include=["names", "stride", "args", "missing"], exclude=("args",))
    assert ema.ema.names == {0: "a"} and ema.ema.stride == 32
    assert not hasattr(ema.ema, "args") and not hasattr(ema.ema, "missing")


def test_attributes_that_the_host_reads():
    _, ema = pair(0.9, updates=3)
    assert ema.enabled and ema.updates == 3 and ema.ema is not None
