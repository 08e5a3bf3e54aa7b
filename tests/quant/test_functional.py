# yolo_qc_plugin, AGPL-3.0
"""fake_quantize against its defining formula: values, gradients, dtypes, memory layouts.

Offsets of the samples are on their grids, but for those of the test of what brings them there."""

import pytest
import torch

from yolo_qc_plugin.quant.functional import fake_quantize, from_codes, grid_offset, to_codes

# Gradients in float64: both sides sum at most a few hundred products of order 10, each off by at most 1e-16 of itself.
GRAD = dict(rtol=1e-11, atol=1e-11)

RANGES = [pytest.param(b, s, id=f"{b}bit-{'signed' if s else 'unsigned'}") for b in range(2, 9) for s in (True, False)]


def limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def along(p, x):
    """p of shape (1,) or (C,), viewed along the first axis of x."""
    return p.view(-1, *[1] * (x.dim() - 1))


def formula(x, s, z, lo, hi):
    """The definition: clip(round((x - z) / s), lo, hi) * s + z."""
    v = x / s if z is None else (x - z) / s
    code = v.round().clamp(lo, hi)
    return s * code if z is None else s * code + z


def straight_through(x, s, z, lo, hi):
    """The same with an autograd graph in which rounding has gradient 1, and clipping the gradient of clamp."""
    z = torch.zeros_like(s) if z is None else z
    vc = ((x - z) / s).clamp(lo, hi)
    code = vc + (vc.round() - vc).detach()
    return s * code + z


def sample(lo, hi, channels, with_offset, dtype=torch.float64, shape=(5, 4, 3, 3)):
    """x that covers the range and a third beyond it on each side, with its scale and offset."""
    rand = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=rand, dtype=torch.float64)
    s = 0.01 + 0.1 * torch.rand(channels, generator=rand, dtype=torch.float64)
    steps = torch.rand(channels, generator=rand, dtype=torch.float64)
    z = grid_offset((lo - hi) * steps * s, s, lo, hi) if with_offset else None
    width = hi - lo
    x = along(s, x) * (lo - width / 3 + x * width * 5 / 3) + (along(z, x) if with_offset else 0)
    s = s.to(dtype)
    return x.to(dtype), s, z if z is None else grid_offset(z.to(dtype), s, lo, hi)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize("bits,signed", RANGES)
def test_values_equal_the_formula_bit_for_bit(bits, signed, with_offset, channels, dtype):
    lo, hi = limits(bits, signed)
    x, s, z = sample(lo, hi, channels, with_offset, dtype)
    expected = formula(x, along(s, x), along(z, x) if with_offset else None, lo, hi)
    assert torch.equal(fake_quantize(x, s, z, lo, hi), expected)
    used = to_codes(x, along(s, x), along(z, x) if with_offset else None, lo, hi)
    assert used.min() == lo and used.max() == hi  # both ends are clipped
    assert torch.equal(from_codes(used, along(s, x), along(z, x) if with_offset else None), expected)


@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
def test_values_at_rounding_thresholds_equal_the_formula(with_offset):
    """On every threshold and a few ulp around: a product with 1 / scale instead of a division shows there."""
    scales = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.01
    up, reciprocal_differs = torch.tensor(torch.inf), 0
    for s in scales.split(1):
        z = -5 * s if with_offset else None
        start = from_codes(torch.arange(-8, 7) + 0.5, s, z)
        for x in (start, start.nextafter(up), start.nextafter(-up), start.nextafter(up).nextafter(up)):
            expected = formula(x, s, z, -8, 7)
            assert torch.equal(fake_quantize(x, s, z, -8, 7), expected)
            product = ((x - z if with_offset else x) * (1 / s)).round().clamp(-8, 7)
            reciprocal_differs += (from_codes(product, s, z) != expected).sum().item()
    assert reciprocal_differs > 10


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize("bits,signed", RANGES)
def test_gradients_equal_autograd_of_the_formula(bits, signed, with_offset, channels):
    lo, hi = limits(bits, signed)
    x, s, z = sample(lo, hi, channels, with_offset)
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    results = []
    for straight, factor in ((True, 1.0), (False, 0.37)):
        a, b = x.clone().requires_grad_(), s.clone().requires_grad_()
        c = z.clone().requires_grad_() if with_offset else None
        if straight:
            y = straight_through(a, along(b, x), along(c, x) if with_offset else None, lo, hi)
        else:
            y = fake_quantize(a, b, c, lo, hi, factor)
        y.backward(upstream)
        results.append([a.grad, b.grad, c.grad if with_offset else torch.zeros(channels)])
    (x_ref, s_ref, z_ref), (x_got, s_got, z_got) = results
    assert torch.equal(x_got != 0, x_ref != 0) and 0.1 < (x_ref == 0).double().mean() < 0.9
    torch.testing.assert_close(x_got, x_ref, **GRAD)
    torch.testing.assert_close(s_got, 0.37 * s_ref, **GRAD)
    torch.testing.assert_close(z_got, 0.37 * z_ref, **GRAD)


@pytest.mark.parametrize("channels", [1, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_float32_gradients_of_a_million_elements(bits, channels):
    """Within 100 eps of the sum of magnitudes. Adding n = 2^20 terms in the 16 or more lanes of a BLAS dot product is
    off by about sqrt(n / 16) / 4 = 64 eps at most (roundings of random sign); products, and a v that falls on the other
    side of a rounding threshold (off by 1, as often as by eps * |v|), add a few. FP16 sums would be off by 8192 eps."""
    lo, hi = limits(bits, False)
    x, s, z = sample(lo, hi, channels, True, torch.float32, (64, 1 << 14))
    upstream = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    grads = {}
    for dtype in (torch.float32, torch.float64):
        a, b, c = (t.to(dtype, copy=True).requires_grad_() for t in (x, s, z))
        exact = dtype == torch.float64
        y = straight_through(a, along(b, a), along(c, a), lo, hi) if exact else fake_quantize(a, b, c, lo, hi)
        y.backward(upstream.to(dtype))
        grads[dtype] = a.grad, b.grad, c.grad
    got, exact = grads[torch.float32], grads[torch.float64]
    assert got[1].dtype == torch.float32
    assert (got[0].double() != exact[0]).sum() <= 1e-5 * x.numel()  # v within rounding of the ends of the range
    magnitude = upstream.double() * to_codes(x.double(), along(s, x).double(), along(z, x).double(), lo, hi)
    bound = 100 * torch.finfo(torch.float32).eps
    for name, g, e, m in (("scale", got[1], exact[1], magnitude), ("offset", got[2], exact[2], upstream.double())):
        m = m.sum() if channels == 1 else m.sum(1)
        assert ((g.double() - e).abs() <= bound * m).all(), (name, ((g.double() - e).abs() / m).max())


@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize("bits,signed", RANGES)
def test_grid_points_are_fixed_points(bits, signed, with_offset):
    """Idempotence in floating point: s * code + z divided by s again is at most a few eps * 2^bits from code."""
    lo, hi = limits(bits, signed)
    x, s, z = sample(lo, hi, 1, with_offset, torch.float32)
    grid = from_codes(torch.arange(lo, hi + 1.0), s, z)
    assert torch.equal(fake_quantize(grid, s, z, lo, hi), grid)
    once = fake_quantize(x, s, z, lo, hi)
    assert torch.equal(fake_quantize(once, s, z, lo, hi), once)
    assert set(once.unique().tolist()) <= set(grid.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
def test_half_inputs_compute_in_float32(dtype, with_offset):
    x, s, z = sample(0, 255, 1, with_offset, torch.float32, (32, 64))
    a = x.to(dtype).requires_grad_()
    b, c = s.requires_grad_(), z.requires_grad_() if with_offset else None
    y = fake_quantize(a, b, c, 0, 255)
    wide = a.detach().float().requires_grad_()
    y32 = fake_quantize(wide, b, c, 0, 255)
    assert y.dtype == dtype and torch.equal(y, y32.to(dtype))
    assert not torch.equal(y, formula(a, s.to(dtype), z.to(dtype) if with_offset else None, 0, 255))  # else no evidence
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    learned = [b] + [c] * with_offset
    got = torch.autograd.grad(y, [a, *learned], upstream)
    expected = torch.autograd.grad(y32, [wide, *learned], upstream.float())
    assert got[0].dtype == dtype and torch.equal(got[0], expected[0].to(dtype))
    for g, e in zip(got[1:], expected[1:]):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-3)  # half runs in torch, float in C: sums in another order


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grad_layout", [lambda x: x, LAYOUTS["channels_last"]], ids=["plain grad", "other grad"])
@pytest.mark.parametrize("channels", [1, 5])
def test_memory_layout_does_not_matter(layout, grad_layout, channels):
    x, s, z = sample(-8, 7, channels, True)
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    assert not layout(x).is_contiguous() and torch.equal(layout(x), x)
    results = []
    for a, g in ((x, upstream), (layout(x), grad_layout(upstream))):
        a, b, c = a.detach().requires_grad_(), s.clone().requires_grad_(), z.clone().requires_grad_()
        y = fake_quantize(a, b, c, -8, 7)
        results.append([y, *torch.autograd.grad(y, [a, b, c], g)])
    assert torch.equal(results[0][0], results[1][0])
    for plain, other in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(other, plain, **GRAD)


def test_inputs_are_left_alone():
    x, s, z = sample(-8, 7, 5, True)
    before = [t.clone() for t in (x, s, z)]
    a = x.requires_grad_()
    g = torch.ones_like(x)
    fake_quantize(a, s.requires_grad_(), z.requires_grad_(), -8, 7).backward(g)
    to_codes(x.detach(), along(s.detach(), x), None, -8, 7)
    assert all(torch.equal(t.detach(), b) for t, b in zip((x, s, z), before)) and (g == 1).all()


def test_empty_batch():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    s, z = torch.full((1,), 0.1, requires_grad=True), torch.zeros(1, requires_grad=True)
    y = fake_quantize(x, s, z, 0, 15)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert s.grad.tolist() == z.grad.tolist() == [0.0]


def test_worked_numbers_of_the_docstring():
    """x = 0.26, s = 0.1: v = 2.6, code = 3, xhat = 0.3, d xhat / d s = 3 - 2.6 = 0.4."""
    x = torch.tensor([0.26], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, s, None, -8, 7)
    y.backward()
    assert to_codes(x.detach(), s.detach(), None, -8, 7).tolist() == [3.0]
    assert y.item() == pytest.approx(0.3, rel=1e-15)
    assert s.grad.item() == pytest.approx(0.4, rel=1e-13) and x.grad.tolist() == [1.0]


@pytest.mark.parametrize("lo,hi", [(-8, 7), (0, 15), (-2, 1)])
def test_the_ends_of_the_range_count_as_outside(lo, hi):
    """LSQ equation 3 has -Q_N < v < Q_P for the inside; at the ends the gradient by s is Q_P or -Q_N, not 0."""
    v = torch.tensor([lo - 1, lo, lo + 1e-9, hi - 1e-9, hi, hi + 1], dtype=torch.float64)
    s, z = torch.tensor([0.5], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)
    inside = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.float64)
    by_scale = torch.tensor([lo, lo, -1e-9, 1e-9, hi, hi], dtype=torch.float64)
    for i in range(len(v)):
        x = (v[i : i + 1] * s + z).requires_grad_()
        b, c = s.clone().requires_grad_(), z.clone().requires_grad_()
        fake_quantize(x, b, c, lo, hi).backward()
        assert x.grad.item() == inside[i] and c.grad.item() == 1 - inside[i]
        assert b.grad.item() == pytest.approx(by_scale[i].item(), abs=1e-12)


def test_halves_round_to_even():
    v = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert to_codes(v, torch.ones(1), None, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


def test_only_what_needs_a_gradient_gets_one():
    x, s, z = sample(-8, 7, 1, True)
    y = fake_quantize(x, s.requires_grad_(), z, -8, 7)
    assert torch.autograd.grad(y.sum(), s)[0].shape == (1,)
    y = fake_quantize(x.clone().requires_grad_(), s.detach(), z, -8, 7)
    y.sum().backward()
    assert s.grad is None and z.grad is None


@pytest.mark.parametrize("lo,hi", [(0, 15), (-8, 7)])
@pytest.mark.parametrize("steps", [0.3, -2.5, -3.5, 40.0, -40.0])
def test_an_offset_between_grid_points_counts_as_the_nearest(steps, lo, hi):
    """In values and in all gradients, and within what leaves 0 a code; halves go to the even number of steps."""
    s, x = torch.tensor([0.25], dtype=torch.float64), torch.linspace(-5, 5, 101, dtype=torch.float64)
    found = []
    for z in (steps, min(max(round(steps), -hi), -lo)):
        a, b, c = (t.clone().requires_grad_() for t in (x, s, s * z))
        y = fake_quantize(a, b, c, lo, hi)
        y.square().sum().backward()
        found.append((y.detach(), a.grad, b.grad, c.grad))
    assert all(map(torch.equal, *found)) and found[0][3].any()
    assert fake_quantize(torch.zeros(3, dtype=s.dtype), s, s * steps, lo, hi).tolist() == [0] * 3
