# yolo_qc_plugin, AGPL-3.0
"""The compiled passes: the values of the separate operations, their gradients, one compilation, a way without."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from torch import nn
from torch._dynamo.utils import counters
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.quant import gpu, kernels, native
from yolo_qc_plugin.quant.activations import QuantActivation
from yolo_qc_plugin.quant.functional import fake_quantize, grid_offset, quantized_silu, to_codes


@pytest.fixture(autouse=True)
def switched_on():
    """Every test starts with the compiled passes, for small tensors too, and leaves all as it was."""
    was = kernels.enabled, kernels.MIN_SIZE
    kernels.enabled, kernels.MIN_SIZE = True, 2**10
    yield
    kernels.enabled, kernels.MIN_SIZE = was


def compute(x, grad, scale, offset, low, high, compiled):
    """Values and the three gradients (by offset None without one)."""
    kernels.enabled = compiled
    x, scale = x.detach().requires_grad_(), scale.clone().requires_grad_()
    offset = None if offset is None else offset.clone().requires_grad_()
    y = fake_quantize(x, scale, offset, low, high, 0.25)
    y.backward(grad)
    assert kernels.usable(x, scale, offset) is compiled  # it has not given up
    return y.detach(), x.grad, scale.grad, None if offset is None else offset.grad


CASES = {
    "activation": ((4, 8, 40, 40), 1, True, torch.contiguous_format),
    "channels last": ((4, 8, 40, 40), 1, True, torch.channels_last),
    "one image": ((1, 16, 33, 41), 1, True, torch.contiguous_format),
    "weight": ((64, 32, 3, 3), 1, False, torch.contiguous_format),
    "weight per channel": ((64, 32, 3, 3), 64, False, torch.contiguous_format),
}


@pytest.mark.parametrize("shape,scales,with_offset,memory", CASES.values(), ids=CASES)
def test_equal_to_separate_operations(shape, scales, with_offset, memory):
    """Values and gradients by x exactly; sums as near to FP64's as those of the separate operations, and nearer."""
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).contiguous(memory_format=memory) for _ in range(2))
    scale = torch.rand(scales) * 0.2 + 0.1
    offset = torch.tensor([-0.3]) if with_offset else None
    bounds = (0, 15) if with_offset else (-8, 7)
    found = compute(x, grad, scale, offset, *bounds, True)
    wanted = compute(x, grad, scale, offset, *bounds, False)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert found[0].dtype == found[1].dtype == x.dtype and found[0].stride() == x.stride()
    terms = grad.double().abs().reshape(scales, -1).sum(1) * 16 * 0.25  # the largest factor is a code of 15
    for a, b in zip(found[2:], wanted[2:]):
        if b is not None:
            assert ((a - b).abs() <= 1e-6 * terms).all()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_quantized_silu_equals_its_parts(memory):
    """The one pass of a quantized activation under QC: values exactly, the gradient to rounding, clipped values too."""
    torch.manual_seed(0)
    act = QuantActivation(nn.SiLU(), 8).requires_grad_(False)
    u = (3 * torch.randn(4, 8, 40, 40)).contiguous(memory_format=memory)
    act.calibrate(u.flatten() / 2, -4.0, 4.0)
    assert 0.01 < act.quant.clipped(u) < 0.5
    found = []
    for compiled in (True, False):
        kernels.enabled = compiled
        x = u.clone().requires_grad_()
        y = act(x)
        assert ("QuantizedSiLU" in type(y.grad_fn).__name__) is compiled
        y.backward(torch.randn(u.shape, generator=torch.Generator().manual_seed(1)))
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].stride() == u.stride()
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    kernels.enabled = True
    with torch.no_grad():  # measuring takes the parts
        assert torch.equal(act(u), found[0][0])


def test_where_compiling_is_refused(monkeypatch, caplog):
    """As torch.compile does on a Python that is too new for it: said once, then computed by separate operations."""
    act = QuantActivation(nn.SiLU(), 8).requires_grad_(False)
    u = torch.linspace(-6, 6, 2**14).requires_grad_()
    act.calibrate(u.detach(), -6.0, 6.0)

    def refuse(f):
        raise RuntimeError("not on this Python")

    monkeypatch.setattr(kernels, "_compiled", refuse)
    values = act(u)
    assert not kernels.enabled and caplog.text.count("quantizers are not compiled") == 1
    assert "not on this Python" in caplog.text and torch.equal(values, act(u))


def test_a_lack_of_memory_is_not_taken_for_a_lack_of_a_compiler():
    """Triton tells it as a RuntimeError; Ultralytics then takes a smaller batch, whose kernels are compiled."""

    def run_out(*_):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kernels._unless_given_up(run_out)
    assert kernels.enabled


def test_quantized_silu_where_compiling_fails(monkeypatch):
    """A compiler that gives up between forward and backward changes nothing but the speed."""
    act = QuantActivation(nn.SiLU(), 8).requires_grad_(False)
    u = torch.linspace(-6, 6, 2**14)
    act.calibrate(u, -6.0, 6.0)
    gradients = []
    for fails in (False, True):
        x = u.clone().requires_grad_()
        y = act(x).sum()
        if fails:
            monkeypatch.setattr(kernels, "enabled", False)
        y.backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6) and gradients[0].abs().max() > 0.5


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_of_silu_in_one_backward_pass(memory, inplace):
    """Values exactly; gradients as near to FP64's as those of SiLU and quantizer apart, where others read x, too."""
    torch.manual_seed(0)
    u, grad, other = (torch.randn(4, 8, 40, 40).mul(4).contiguous(memory_format=memory) for _ in range(3))
    u[0, 0, 0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0])
    found = {}
    for way, dtype in (("one", torch.float32), ("apart", torch.float32), ("wide", torch.float64)):
        kernels.enabled = way != "apart"
        leaf = u.to(dtype, copy=True).requires_grad_()
        scale = torch.tensor([0.2], dtype=dtype, requires_grad=True)
        offset = torch.tensor([-0.25], dtype=dtype, requires_grad=True)
        x = nn.functional.silu(leaf * 1, inplace=inplace)
        y = fake_quantize(x, scale, offset, 0, 15, 0.25)
        assert ("OfSiLU" in type(y.grad_fn).__name__) is (way == "one") and y.stride() == u.stride()
        ((y * grad).sum() + (x * other).sum()).backward()
        found[way] = [t.double() for t in (y.detach(), leaf.grad, scale.grad, offset.grad)]
    assert torch.equal(found["one"][0], found["apart"][0])
    terms = grad.double().abs().sum() * 16 * 0.25
    assert torch.allclose(found["one"][1], found["wide"][1], rtol=1e-5, atol=1e-5)
    for sums in zip(found["one"][2:], found["apart"][2:]):
        assert (sums[0] - sums[1]).abs() <= 1e-6 * terms


def test_of_silu_where_compiling_fails(monkeypatch):
    u, gradients = torch.linspace(-6, 6, 2**14), []
    for fails in (False, True):
        monkeypatch.setattr(kernels, "backward", (lambda *_, **__: None) if fails else kernels.backward)
        x, scale = u.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
        fake_quantize(nn.functional.silu(x), scale, None, -8, 7).sum().backward()
        gradients.append((x.grad, scale.grad))
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5) and one.abs().max() > 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_of_silu_of_what_is_not_finite(value):
    """NaN reaches the host's check; infinity is clipped."""
    x = torch.tensor([0.3, value, -0.7, 0.1] * 256, requires_grad=True)
    scale = torch.tensor([0.1], requires_grad=True)
    y = fake_quantize(nn.functional.silu(x), scale, None, -8, 7)
    y.sum().backward()
    for seen in (y[1], scale.grad):
        assert seen.isnan() if value != value else seen.isfinite()
    assert x.grad[0::4].eq(x.grad[0]).all() and x.grad[0] > 0.5


@pytest.mark.parametrize(
    "change", ["slice", "slice of channels last", "transposed", "expanded gradient", "strided gradient"]
)
def test_any_memory_layout(change):
    torch.manual_seed(0)
    x, grad = torch.randn(4, 32, 24, 24), torch.randn(4, 32, 24, 24)
    if change == "slice":
        x = x[:, 8:24]
        grad = grad[:, :16].contiguous()
    elif change == "slice of channels last":
        x = x.contiguous(memory_format=torch.channels_last)[:, 8:24]
        grad = grad[:, :16].contiguous()
        assert kernels._dense(x).is_contiguous(memory_format=torch.channels_last)  # what follows stays in that order
    elif change == "transposed":
        x = x.transpose(2, 3)
    elif change == "expanded gradient":
        grad = torch.tensor(0.5).expand(x.shape)
    else:
        grad = grad.contiguous(memory_format=torch.channels_last)
    arguments = torch.tensor([0.2]), torch.tensor([-0.4]), 0, 15
    found, wanted = (compute(x, grad, *arguments, compiled) for compiled in (True, False))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    for a, b in zip(found[2:], wanted[2:]):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scales,columns", [(1, 8192), (1, 100_003), (5, 8192 * 2 + 1), (64, 9)])
def test_c_over_chunks_rows_and_threads(scales, columns, threads):
    """Chunks that are full, cut short and more than one a row; sums do not depend on the threads."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, scales, columns)
    scale, offset = torch.rand(scales) * 0.2 + 0.1, torch.rand(scales) - 0.5
    assert native.takes(x, scale, offset)
    was, found = torch.get_num_threads(), []
    for n in (threads, 1):
        torch.set_num_threads(n)
        found.append((native.forward(x, scale, offset, -8, 7), *native.backward(grad, x, scale, offset, -8, 7, 0.5)))
    torch.set_num_threads(was)
    assert all(map(torch.equal, *found))
    offset = grid_offset(offset, scale, -8, 7)
    wide, s, o = x.double(), scale.double().view(-1, 1), offset.double().view(-1, 1)
    v = (x - offset.view(-1, 1)) / scale.view(-1, 1)
    inside, code = (v > -8) & (v < 7), v.round().clamp(-8, 7)
    assert torch.equal(found[0][0], code * scale.view(-1, 1) + offset.view(-1, 1))
    assert torch.equal(found[0][1], grad * inside)
    by_scale = grad.double() * torch.where(inside, code.double() - (wide - o) / s, code.double())
    for sums, wanted in ((found[0][2], by_scale), (found[0][3], grad.double() * ~inside)):
        torch.testing.assert_close(sums.double(), wanted.sum(1) * 0.5, rtol=1e-5, atol=1e-5 * columns**0.5)


@pytest.mark.parametrize("low,high", [(-8, 7), (0, 255)])
def test_codes_of_halves_and_beyond_the_range(low, high):
    """There are several ways to round a half; `to_codes` has the one that counts."""
    v = torch.arange(-600, 600).float() / 2
    found = compute(v, torch.ones_like(v), torch.ones(1), None, low, high, True)
    codes = to_codes(v, torch.ones(1), None, low, high)
    assert torch.equal(found[0], codes) and codes.unique().tolist() == list(range(low, high + 1))
    assert torch.equal(found[1], ((v > low) & (v < high)).float())
    act = QuantActivation(nn.SiLU(), 8).requires_grad_(False)
    act.quant.fix(1.0)
    act.quant.set_signed(low < 0)
    x = v.clone().requires_grad_()
    assert torch.equal(act(x), act.function(act.quant(v))) and "QuantizedSiLU" in type(act(x).grad_fn).__name__


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_of_the_separate_operations(value):
    x, grad = torch.tensor([0.3, value, -0.7, 0.1] * 256), torch.tensor([1.0, 2.0, 3.0, 4.0] * 256)
    found = [compute(x, grad, torch.tensor([0.1]), torch.tensor([0.0]), -8, 7, compiled) for compiled in (True, False)]
    assert torch.equal(found[0][0].nan_to_num(-99), found[1][0].nan_to_num(-99))
    assert torch.equal(found[0][1][x.isfinite()], found[1][1][x.isfinite()])
    for seen in (found[0][0][1], found[0][2]):  # NaN reaches the host's check; infinity is clipped
        assert seen.isnan() if value != value else seen.isfinite()


def test_c_leaves_no_file_and_takes_only_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    native.library.cache_clear()
    one = torch.ones(1)
    assert native.library() is not None and not any(tmp_path.iterdir())
    assert native.takes(one, one, None) and native.takes(one, one, one)
    for x, scale, offset in [(one.double(), one, None), (one.half(), one, None), (one.to("meta"), one, None),
                             (one, one.double(), None), (one, torch.ones(2), one), (one[:0], one, None)]:  # fmt: skip
        assert not native.takes(x, scale, offset)


def test_what_follows_may_work_in_place():
    """As the host's LeakyReLU and ReLU do, behind a quantized output."""
    start = torch.randn(2, 8, 80, 80)
    scale, offset = torch.tensor([0.1]), torch.tensor([-1.0])
    assert kernels.usable(start, scale, offset)
    found = []
    for inplace in (True, False):
        x = start.clone().requires_grad_()
        y = torch.nn.functional.leaky_relu(fake_quantize(x, scale, offset, 0, 255), 0.1, inplace)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert all(map(torch.equal, *found)) and (found[0][0] < 0).any()


def test_one_compilation_serves_all_sizes_and_ranges():
    """Of the quantized SiLU; and what is too small is not compiled at all."""
    torch.manual_seed(0)

    def call(shape, low, high):
        u = torch.randn(shape, requires_grad=True)
        quantized_silu(u, torch.tensor([0.125]), torch.tensor([-1.0]), low, high).sum().backward()

    call((2, 8, 32, 32), 0, 255)
    before = counters["stats"]["unique_graphs"]
    for batch, channels, height, width in [(3, 8, 32, 32), (1, 64, 20, 20), (16, 16, 17, 64), (2, 24, 40, 40)]:
        call((batch, channels, height, width), 0, 255)
        call((batch, channels, height, width), 0, 15)
    assert counters["stats"]["unique_graphs"] == before and not kernels.worth_compiling(torch.ones(2**10 - 1))


# what Triton's interpreter makes of the passes for a GPU, which it computes on a CPU
INTERPRETED = """
import torch
from yolo_qc_plugin.quant import gpu, kernels
from yolo_qc_plugin.quant.functional import fake_quantize, gradients
kernels.enabled = False
torch.manual_seed(0)
cases = [((3, 7, 41, 53), 1, True, (0, 15)), ((67, 31, 3, 3), 67, False, (-8, 7)), ((5, 4, 31, 33), 5, True, (-8, 7))]
for shape, scales, with_offset, bounds in cases:
    for dtype in (torch.float32, torch.float16):
        x, grad = torch.randn(2, *shape).to(dtype)
        x.view(-1)[:3] = torch.tensor([1e4, -1e4, 0.0])
        if scales == 1:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        scale, offset = torch.rand(scales) * 0.2 + 0.1, torch.rand(scales) - 0.6 if with_offset else None
        xhat = gpu.forward(x, scale, offset, *bounds)
        assert torch.equal(xhat, fake_quantize(x, scale, offset, *bounds))
        found = gpu.backward(grad, x, scale, offset, *bounds, 0.25)
        wanted = gradients(grad, x, scale, offset, *bounds, 0.25)
        assert torch.equal(found[0], wanted[0])
        assert xhat.dtype == found[0].dtype == dtype and xhat.stride() == found[0].stride() == x.stride()
        allowed = 1e-6 * 16 * grad.double().abs().sum() / scales
        for a, b in list(zip(found, wanted))[1 : 2 + with_offset]:
            assert ((a - b).abs() < allowed).all(), (a - b).abs().max()
        silu = torch.nn.functional.silu(x)
        found = gpu.backward(grad, x, scale, offset, *bounds, 0.25, silu=True)
        wanted = gradients(grad, silu, scale, offset, *bounds, 0.25)
        by_u = torch.ops.aten.silu_backward(wanted[0], x)
        near = (found[0].float() - by_u.float()).abs() <= 8 * torch.finfo(dtype).eps * grad.float().abs()
        assert near.float().mean() > 0.9999, near.float().mean()  # but where the last place of x decides what clips
        assert found[0].dtype == dtype and found[0].stride() == x.stride()
        for a, b in list(zip(found, wanted))[1 : 2 + with_offset]:
            assert ((a - b).abs() < 10 * allowed).all(), (a - b).abs().max()
halves = torch.arange(-600, 600) / 2
assert torch.equal(gpu.forward(halves, torch.ones(1), None, -8, 7), halves.round().clamp(-8, 7))
assert gpu.forward(torch.tensor([float("nan")]), torch.ones(1), None, -8, 7).isnan()
x, scale, offset = (torch.randn(2, 32, 80, 80) * 0.5).half(), torch.tensor([0.05]), torch.tensor([-0.2])
for size in (6e-8, 3e4):  # FP16's smallest number and nearly its largest, of one sign, so that nothing cancels
    # the second finds the counts of programs as the first has left them
    grad = (torch.randint(1, 3, x.shape) * size).half()
    v = (x.double() - offset.double()) / scale.double()
    inside = (v > 0) & (v < 15)
    factor = torch.where(inside, v.round() - v, v.clamp(0, 15))
    _, by_scale, by_offset = gpu.backward(grad, x, scale, offset, 0, 15, 0.25)
    for found, wanted in ((by_scale, grad.double() * factor), (by_offset, grad.double() * ~inside)):
        torch.testing.assert_close(found.double(), wanted.sum().view(1) * 0.25, rtol=5e-3, atol=0)
blocks = gpu.PARTS + 3
x, grad = torch.randn(blocks * gpu.BLOCK - 5), torch.randint(1, 4, (blocks * gpu.BLOCK - 5,)).float()
_, by_scale, by_offset = gpu.backward(grad, x, torch.tensor([0.1]), None, -8, 7, 1.0)
inside = (x / 0.1 > -8) & (x / 0.1 < 7)
assert (by_offset - (grad * ~inside).double().sum()).abs() < 1
print("all equal")
"""


def test_the_passes_for_a_gpu():
    """By Triton's interpreter; on a GPU it is examples/benchmarks/gpu.py that compares."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.stdout == "all equal\n", done.stderr


PROGRAM = """
import torch
from yolo_qc_plugin.quant import kernels
from yolo_qc_plugin.quant.functional import fake_quantize
x, s = torch.linspace(-2, 2, 200_000, requires_grad=True), torch.tensor([0.25], requires_grad=True)
for _ in range(3):
    fake_quantize(x, s, None, -8, 7).sum().backward()
print(kernels.usable(x, s, None), x.grad.sum().item(), s.grad.item())
"""


NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


@pytest.mark.parametrize("environment,tried", [(NO_COMPILER, True), ({"YOLO_QC_COMPILE": "0"}, False)])
def test_without_a_compiler(environment, tried, tmp_path):
    """One line says so, and the result is the same."""
    results = []
    for more in ({}, environment):
        env = {**os.environ, "YOLO_QC_COMPILE": "1", **more}
        if more:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)  # nothing compiled before
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append((done.stdout.split(), done.stderr.count("quantizers are not compiled")))
    (compiled, said), (plain, said_without) = results
    assert compiled[0] == "True" and said == 0
    assert plain[0] == "False" and said_without == int(tried)
    assert [float(v) for v in plain[1:]] == pytest.approx([float(v) for v in compiled[1:]], rel=1e-5)


def test_a_run_is_the_same_with_and_without(digits, tmp_path):
    """Two epochs of a fixed seed: equal losses at the start, and to 1% later (sums are rounded in another order)."""
    losses = []
    for compiled in (True, False):
        kernels.enabled = compiled
        model, seen = YOLO("yolov5n.yaml"), []
        add_qc_callbacks(model, bits=4, correction="off")
        model.add_callback("on_train_batch_end", lambda t, seen=seen: seen.append(float(t.loss)))
        model.train(data=str(digits), project=str(tmp_path), name=str(compiled), **{**TINY, "epochs": 2})
        assert kernels.enabled is compiled
        losses.append(seen)
    assert len(losses[0]) == len(losses[1]) >= 4 and losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("size", [6e-8, 3e4], ids=["smallest", "largest"])
def test_sums_of_half_precision_neither_overflow_nor_underflow(size):
    """FP16 activations of a batch at 640 px, and the gradients of a loss scaled by 65536, from FP16's smallest number
    to its largest."""
    torch.manual_seed(0)
    x = (torch.randn(8, 32, 160, 160) * 0.5).half()
    grad = (torch.randint(1, 3, x.shape) * size).half()  # of one sign, so that nothing cancels
    scale, offset = torch.tensor([0.05]), torch.tensor([-0.2])
    _, _, by_scale, by_offset = compute(x, grad, scale, offset, 0, 15, False)
    v = (x.double() - offset.double()) / scale.double()
    inside = (v > 0) & (v < 15)
    factor = torch.where(inside, v.round() - v, v.clamp(0, 15))
    for found, wanted in ((by_scale, grad.double() * factor), (by_offset, grad.double() * ~inside)):
        assert found.dtype == torch.float32
        # FP32's rounding of six million additions, which torch.dot on a CPU makes one after another
        torch.testing.assert_close(found.double(), wanted.sum().view(1) * 0.25, rtol=5e-3, atol=0)
    in_half = grad * factor.half()  # negative control
    assert in_half.sum().isinf() if size > 1 else (in_half[inside] == 0).float().mean() > 0.3


def test_what_is_missing_to_compile_with_is_told_once(monkeypatch, caplog):
    for passes, name, value in ((native, "library", lambda: None), (gpu, "triton", None)):
        kernels._there.cache_clear()
        monkeypatch.setattr(passes, name, value)
        for _ in range(2):
            assert not kernels._there(passes)
    kernels._there.cache_clear()
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "no C compiler: tried" in said[0] and "no Triton" in said[1]
