# yolo_qc_plugin, AGPL-3.0
"""Snapped numbers: near what was there, of the form promised, and far from every rounding threshold."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold import CONVS, build, images, layer
from torch import nn

from yolo_qc_plugin.deploy.fold import deploy_conv
from yolo_qc_plugin.deploy.snap import MULTIPLIER_BITS, SCALE_BITS, snap, snap_conv, snap_scale, unit_of_scale
from yolo_qc_plugin.quant.activations import QuantActivation, quant_activations
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.quant.observers import binary_range
from yolo_qc_plugin.quant.quantizer import ActQuantizer
from yolo_qc_plugin.quant.taps import taps


def with_grid(scale):
    act = QuantActivation(nn.SiLU(), 8)
    with torch.no_grad():
        act.quant.scale.fill_(scale)
    return act


@pytest.mark.parametrize("step", [2.0**-5, 2.0**-12, 4.0])
@pytest.mark.parametrize("correction", [None, 1, 6])
@torch.no_grad()
def test_snapped_channels(correction, step):
    """A power of two over an odd number, whole biases, near what was there; channels of zero scale stay as they are."""
    conv, bn, _ = layer(CONVS["no bias"], correction=correction, dtype=torch.float32)
    before = deploy_conv(conv, bn, "")
    snap_conv(conv, bn, with_grid(step))
    after = deploy_conv(conv, bn, "")
    used = before.scale != 0
    assert torch.equal(after.weight_codes, before.weight_codes) and 0 < (~used).sum() < 3
    assert not after.scale[~used].any() and torch.equal(after.shift[~used], before.shift[~used])

    unit = after.act_quant.scale * after.scale[used].double()
    multiplier = (unit / step).abs()
    q = 2.0 ** (torch.log2(multiplier) + MULTIPLIER_BITS - 1).ceil().clamp(min=0) / multiplier
    assert ((q - q.round()).abs() < q * 1e-6).all() and (q.round() % 2 == 1).all()
    assert (q >= 2 ** (MULTIPLIER_BITS - 1) - 1).all()
    assert ((after.scale / before.scale)[used] - 1).abs().max() <= 2.0 ** (1 - MULTIPLIER_BITS) + 1e-6
    bias = after.shift[used] / unit
    assert ((bias - bias.round()).abs() < 1e-3 + 1e-6 * bias.abs()).all()
    assert ((after.shift - before.shift)[used].abs() <= 0.501 * unit.abs() + 1e-6).all()
    snap_conv(conv, bn, with_grid(step))
    torch.testing.assert_close(deploy_conv(conv, bn, "").state_dict(), after.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(st.floats(1e-6, 1e3), st.integers(0, 3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_snapped_scales(bits, scale, zero_point, offset):
    """An odd multiple of a power of two, near what was there, in FP32; the zero point stays."""
    quant = ActQuantizer(bits, offset)
    with torch.no_grad():
        quant.scale.fill_(scale)
        if offset:
            quant.offset.fill_(-zero_point * quant.scale.item())
    was = quant.scale.item()
    for _ in range(2):  # again, it changes nothing
        with torch.no_grad():
            snap_scale(quant, unit_of_scale(quant))
        now = quant.scale.item()
        odd, _ = Fraction(now).as_integer_ratio()
        while odd % 2 == 0:
            odd //= 2
        assert 2 ** (SCALE_BITS - bits - 1) <= odd < 2 ** (SCALE_BITS - bits)
        assert abs(now / was - 1) <= 2.0 ** -(SCALE_BITS - bits - 1)
        assert quant.zero_point == (zero_point if offset else 0)


@pytest.mark.parametrize("options", [{}, dict(target="litert", per_channel=True, act_bits=8)], ids=str)
@torch.no_grad()
def test_no_value_comes_near_a_threshold(options):
    """In a model after `snap`: of every convolution's output and every input, in exact arithmetic.

    Outputs must be 1 / 2q of a step off, inputs (of SiLU, concatenations and residual sums of it) 2^-16 of a step: some
    times FP32's rounding of positions of up to 255 steps. What residual sums add can have grids too.
    """
    model = build("yolov5n.yaml", outputs=True, **options).double()
    snap(model, images().double())  # in float64: no rounding but that of the numbers themselves
    seen = {}

    def note(name, quant):
        def hook(_, args):
            seen[name] = args[0] / quant.scale, quant

        return hook

    hooks = [m.act_quant.register_forward_pre_hook(note(n, m.act_quant)) for n, m in quant_convs(model)]
    hooks += [m.quant.register_forward_pre_hook(note(n, m.quant)) for n, m in quant_activations(model)]
    hooks += [m.act_quant.register_forward_pre_hook(note(n, m.act_quant)) for n, m in taps(model)]
    model(images().double())
    for hook in hooks:
        hook.remove()
    assert len(seen) == 75 + 75 + len(list(taps(model)))
    for name, (position, _) in seen.items():
        if name == "model.0.conv":
            continue  # the image's own values are given
        distance = (position - position.floor() - 0.5).abs().min().item()
        assert distance > (2.0**-14 if name.endswith(".act") else 2.0**-17), (name, distance)


def test_the_grid_of_outputs_is_binary_and_near_the_best():
    torch.manual_seed(0)
    silu = nn.SiLU()
    for spread in (0.01, 1.0, 30.0):
        x = spread * torch.randn(4096)
        scale, offset = binary_range(x, x.min().item(), x.max().item(), 255, silu)
        assert (
            torch.frexp(torch.tensor(scale))[0] == 0.5 and (offset / scale).is_integer() and -255 <= offset / scale <= 0
        )
        grid = (x / scale).round().clamp(offset / scale, 255 + offset / scale) * scale
        full = (x.max() - min(x.min(), torch.tensor(0.0))) / 255  # the uniform grid that cuts nothing
        plain = (x / full).round() * full
        assert (silu(grid) - silu(x)).square().mean() < 4 * (silu(plain) - silu(x)).square().mean()
