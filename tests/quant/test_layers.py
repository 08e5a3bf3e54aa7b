# yolo_qc_plugin, AGPL-3.0
"""QuantConv2d: shares the float convolution's parameters, keeps them FP32, survives copies and casts."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import profile
from ultralytics import YOLO

from yolo_qc_plugin import QCConfig
from yolo_qc_plugin.quant import functional, inject
from yolo_qc_plugin.quant.activations import HeadOutput, QuantActivation, from_thresholds, unit_of
from yolo_qc_plugin.quant.layers import ChannelAffine, QuantConv2d, is_quantized, quant_convs, scale_parameters
from yolo_qc_plugin.quant.precision import keep_wide, undo_keep_wide
from yolo_qc_plugin.quant.share import share_quantizers

CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "no bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "groups, stride, dilation": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular, eval": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular").eval(),
}
ATTRIBUTES = (
    "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed output_padding "
    "_reversed_padding_repeated_twice training"
).split()


def images(batch=2, seed=0):
    return torch.randn(batch, 4, 9, 8, generator=torch.Generator().manual_seed(seed))


def quantized(conv=None, bits=4, per_channel=False, offset=True):
    """A calibrated QuantConv2d with a correction that is not the identity."""
    torch.manual_seed(0)
    q = QuantConv2d.from_float(conv or nn.Conv2d(4, 6, 3, padding=1), bits, bits, per_channel, offset)
    q.weight_quant.calibrate(q.weight, "mse")
    x = images().flatten()
    q.act_quant.calibrate(x, float(x.min()), "mse")
    q.correction = ChannelAffine(q.out_channels)
    nn.init.normal_(q.correction.gamma, 1, 0.1)
    nn.init.normal_(q.correction.beta)
    return q


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_from_and_to_float_share_parameters_and_attributes(make, per_channel):
    conv = make()
    conv.mark = "kept"  # the host hangs attributes of its own on modules
    before = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(conv).items()}
    q = QuantConv2d.from_float(conv, 3, 5, per_channel, True)
    assert type(q) is QuantConv2d and q.weight is conv.weight and q.bias is conv.bias
    assert {k: getattr(q, k) for k in ATTRIBUTES} == {k: getattr(conv, k) for k in ATTRIBUTES} and q.mark == "kept"
    assert (q.weight_quant.bits, q.act_quant.bits) == (3, 5)
    assert q.weight_quant.scale.shape == (conv.out_channels if per_channel else 1,)
    assert vars(conv) == before  # the original is not changed by it
    back = q.to_float()
    assert type(back) is nn.Conv2d and back.weight is conv.weight and back.bias is conv.bias
    assert vars(back) == before
    assert is_quantized(q) and list(q.state_dict()) != list(back.state_dict()) == list(conv.state_dict())


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
def test_to_float_after_a_correction_leaves_nothing_behind(make):
    conv = make()
    back = quantized(conv).to_float()
    assert vars(back).keys() == vars(conv).keys() and not back._modules
    assert torch.equal(back(images()), conv(images()))


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
def test_quantizers_off_equals_the_float_convolution(make):
    conv = make()
    q = quantized(conv)
    q.correction = None
    assert not torch.equal(q(images()), conv(images()))  # with them on it differs
    q.weight_quant.enabled = q.act_quant.enabled = False
    assert torch.equal(q(images()), conv(images()))


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_forward_convolves_the_quantized_values(make, per_channel):
    conv = make()
    q = quantized(conv, per_channel=per_channel)
    plain = copy.deepcopy(conv)
    plain.weight.data = q.weight_codes() * q.weight_quant.scale.detach().view(-1, 1, 1, 1)
    expected = q.correction.gamma.view(1, -1, 1, 1) * plain(q.act_quant(images()))
    expected = expected + q.correction.beta.view(1, -1, 1, 1)
    torch.testing.assert_close(q(images()), expected, rtol=1e-6, atol=1e-6)  # the correction may fuse multiply and add


@pytest.mark.parametrize("channels", [1, 6])
def test_channel_affine_starts_as_the_identity(channels):
    affine = ChannelAffine(channels)
    x = images()[:, :1].expand(-1, 6, -1, -1)
    assert torch.equal(affine(x), x) and affine(x.half()).dtype == torch.half


def both(q):
    return nn.Sequential(q, nn.PReLU(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [
    lambda m, d: m.half() if d == torch.float16 else m.bfloat16(), lambda m, d: m.to(d), lambda m, d: m.to("cpu", d),
], ids=["method", "to(dtype)", "to(device, dtype)"])  # fmt: skip
def test_casts_below_fp32_leave_the_layer_alone(cast, dtype):
    model = both(quantized())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cast(model, dtype)
    assert model[1].weight.dtype == dtype  # the neighbour is cast
    after = model[0].state_dict()
    assert {"weight", "bias", "weight_quant.scale", "act_quant.scale", "act_quant.offset", "correction.gamma",
            "correction.beta"} < after.keys()  # fmt: skip
    for name, value in after.items():
        assert value.dtype == before[f"0.{name}"].dtype and torch.equal(value, before[f"0.{name}"]), name


def test_double_widens_and_half_does_not_narrow_again():
    model = both(quantized()).double()
    assert {t.dtype for t in model[0].state_dict().values()} == {torch.float64, torch.int32}
    y = model(images().double())
    y.sum().backward()
    assert y.dtype == torch.float64 and model[0].weight_quant.scale.grad.dtype == torch.float64
    assert model.half()[0].weight.dtype == torch.float64
    assert model.float()[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer,x", [
    (nn.BatchNorm2d(4).eval(), images()),
    (nn.Conv2d(4, 6, 3), images()),
    (nn.ConvTranspose2d(4, 6, 2), images()),
    (nn.Linear(4, 6), images()[..., 0, 0]),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_layers_left_in_float_keep_fp32_and_compute_in_it(layer, x, dtype):
    model, x = nn.Sequential(copy.deepcopy(layer)), x.to(dtype)
    expected = model(x.float())
    plain, tensors, model[0].i = type(model[0]), [*map(id, model.state_dict(keep_vars=True).values())], 3
    keep_wide(model)
    assert type(model[0]) is not plain and isinstance(model[0], plain) and model[0].i == 3
    assert [*map(id, model.state_dict(keep_vars=True).values())] == tensors
    assert torch.equal(model(x.float()), expected)
    model.to(dtype)
    assert {t.dtype for t in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert torch.equal(model.float()(x.float()), expected)
    y = model.to(dtype)(x)
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    undo_keep_wide(model)
    assert type(model[0]) is plain and model.to(dtype)[0].weight.dtype == dtype


def test_gradients_stay_fp32_across_half():
    q = quantized()
    q(images()).sum().backward()
    before = q.weight.grad.clone()
    assert q.half().weight.grad.dtype == torch.float32 and torch.equal(q.weight.grad, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_in_half_returns_half(dtype):
    q = quantized().to(dtype)
    y = q(images().to(dtype))
    assert y.dtype == dtype
    # three roundings to `dtype` on the way: of the values, of the product sum and of the correction
    error = (y.float() - q(images().to(dtype).float())).norm() / y.float().norm()
    assert error < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_in_half_convolves_the_codes_of_fp32(dtype):
    q = quantized()
    q.correction = None
    at_thresholds(q)
    x, weight = images().to(dtype), q.weight_quant(q.weight).to(dtype)
    expected = nn.functional.conv2d(q.act_quant(x), weight, q.bias.to(dtype), padding=1)
    assert torch.equal(q(x), expected)


def at_thresholds(q):
    """Weights on every rounding threshold of q's grid, and one ulp to either side; returns how many there are."""
    s = q.weight_quant.scale.detach()
    t = s * (torch.arange(q.weight_quant.quant_min, q.weight_quant.quant_max) + 0.5)
    w = torch.cat([t, t.nextafter(torch.tensor(torch.inf)), t.nextafter(torch.tensor(-torch.inf))])
    q.weight.data.flatten()[: len(w)] = w
    return len(w)


@pytest.mark.parametrize("scale", [0.0123, 0.1, 2.5e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_at_rounding_thresholds_survive_a_cast(dtype, scale):
    q = quantized()
    q.weight_quant.scale.data.fill_(scale)
    assert at_thresholds(q) == 45
    codes = q.weight_codes()
    assert codes.flatten()[15:30].tolist() != codes.flatten()[30:45].tolist()  # an ulp makes the difference
    # negative control: the same weights and scale in a plain module do change their codes
    plain = nn.ParameterList([q.weight.detach().clone(), q.weight_quant.scale.detach().clone()]).to(dtype).float()
    assert not torch.equal((plain[0] / plain[1]).round().clamp(-8, 7).to(torch.int8), codes)
    assert not torch.equal(q.weight_quant.codes(q.weight.to(dtype)), codes)
    q.to(dtype).float()
    assert torch.equal(q.weight_codes(), codes)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_at_most_two_to_the_bits_codes(bits, per_channel):
    q = quantized(nn.Conv2d(4, 64, 3), bits, per_channel)
    q.correction = None
    nn.init.normal_(q.weight)
    q.weight_quant.scale.data.fill_(1.5 / 2 ** (bits - 1))  # clips at both ends
    codes = q.weight_codes()
    assert codes.dtype == torch.int8 and codes.shape == q.weight.shape
    assert -(2 ** (bits - 1)) == codes.min() and codes.max() == 2 ** (bits - 1) - 1
    values = q.weight_quant(q.weight).detach()
    for channel in values if per_channel else [values]:
        assert channel.unique().numel() <= 2**bits
    assert q.act_quant(images(8)).unique().numel() <= 2**bits


@pytest.mark.parametrize("through", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"])
@pytest.mark.parametrize("offset", [False, True])
def test_copies_compute_the_same_and_share_nothing(through, offset):
    q = quantized(per_channel=True, offset=offset)
    other = through(q)
    assert torch.equal(other(images()), q(images())) and torch.equal(other.weight_codes(), q.weight_codes())
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in q.parameters())
    for p in other.parameters():
        p.data += 1
    assert not torch.equal(other(images()), q(images()))


def test_state_dict_restores_a_layer():
    q, fresh = quantized(offset=False), quantized(nn.Conv2d(4, 6, 3, padding=1), offset=False)
    q.act_quant.calibrate(images().abs().flatten(), 0.0, "mse")
    assert not torch.equal(fresh(images()), q(images()))
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(images()), q(images()))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_autocast_gives_finite_fp32_gradients(per_channel, offset):
    q = quantized(per_channel=per_channel, offset=offset)
    gradients = []
    for enabled in (True, False):
        q.zero_grad()
        x = images().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = q(x)
            loss = y.float().square().mean()
        loss.backward()
        assert (y.dtype == torch.bfloat16) == enabled
        gradients.append({**{n: p.grad.clone() for n, p in q.named_parameters()}, "x": x.grad})
    for name, grad in gradients[0].items():
        assert grad.dtype == torch.float32 and grad.isfinite().all() and (grad != 0).any(), name
        # sums over 432 or more values that bfloat16 rounded by 1 part in 256, of random signs, a few times on the way
        error = (grad - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 0.05, (name, error)


@pytest.mark.parametrize("per_channel", [False, True])
def test_backward_within_autocast_sums_scale_gradients_in_fp32(per_channel):
    """The sums of the scale's gradient cancel; autocast must not turn them into bfloat16 products."""
    q = quantized(nn.Conv2d(4, 6, 3), bits=8, per_channel=per_channel).weight_quant
    torch.manual_seed(0)
    w, upstream = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    q(w).backward(upstream)
    expected, q.scale.grad = q.scale.grad.clone(), None
    with torch.autocast("cpu", torch.bfloat16):
        q(w).backward(upstream)
    torch.testing.assert_close(q.scale.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(params=[0, 2**40], ids=["recomputed", "kept"])
def recomputed(request, monkeypatch):
    """Whether quantized inputs are computed again in backward, of whatever size."""
    monkeypatch.setattr(functional, "RECOMPUTED_SIZE", request.param)
    return request.param == 0


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fixed weight"])
def test_of_an_input_and_its_quantized_values_one_is_kept(recomputed, trained):
    """The input. A fixed weight needs the values of neither, and gets by with the mask's."""
    q, refs = quantized().requires_grad_(trained), []
    q.act_quant.register_forward_hook(lambda m, args, xhat: refs.append(StorageWeakRef(xhat.untyped_storage())))
    y = q(images().requires_grad_().mul(1))
    (ref,) = refs
    assert ref.expired() is (recomputed or not trained)
    assert y.requires_grad


def gradients(calls, make, change=lambda x: x, trained=True, autocast=False, passes=1):
    """By the input and all parameters, of two convolutions that share a quantizer; `calls` are backward's then."""
    torch.manual_seed(0)
    first, second = quantized(make()), quantized(make())
    second.act_quant = first.act_quant
    both = nn.ModuleList([first, second])
    for conv in both:
        conv.weight.requires_grad_(trained)
        conv.weight_quant.requires_grad_(trained)
    start = images().requires_grad_()
    x = change(start * 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = sum(conv(x).float().square().mean() for conv in both)
    calls.clear()
    for i in range(passes):
        loss.backward(retain_graph=i < passes - 1)
    return {"x": start.grad, **{n: p.grad for n, p in both.named_parameters() if p.grad is not None}}


CASES = {
    **{name: dict(make=make) for name, make in CONVS.items()},
    "channels last": dict(change=lambda x: x.contiguous(memory_format=torch.channels_last)),
    "strided": dict(change=lambda x: x.transpose(2, 3)),
    "half": dict(change=lambda x: x.bfloat16()),
    "autocast": dict(autocast=True),
    "fixed weight": dict(trained=False),
    "backward twice": dict(passes=2),
}


@pytest.mark.parametrize("name", CASES)
def test_computing_again_changes_no_gradient(name, monkeypatch):
    """Bit for bit; it is done once for each convolution and backward pass."""
    case, found, calls = {"make": CONVS["plain"], **CASES[name]}, [], []
    values = functional._values
    monkeypatch.setattr(functional, "_values", lambda *args: calls.append(args) or values(*args))
    for size in (0, 2**40):
        monkeypatch.setattr(functional, "RECOMPUTED_SIZE", size)
        found.append(gradients(calls, **case))
        again = 0 if case.keys() & {"autocast", "trained"} else 2 * case.get("passes", 1)  # autocast keeps a copy
        assert "circular" in name or len(calls) == (0 if size else again)
    assert found[0].keys() == found[1].keys() and all(torch.equal(g, found[1][n]) for n, g in found[0].items())
    assert len(found[0]) >= 3 and found[0]["x"].any()


def kept_for_backward(model):
    """MB that are there after a forward pass, and were not before."""
    with profile(profile_memory=True) as seen:
        out = model(torch.zeros(2, 3, 64, 64))
    assert out
    return sum(e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]") / 1e6


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolo11n.yaml"])
def test_a_model_keeps_as_much_as_in_float(name, recomputed):
    """But for its quantized weights and the image, which float keeps from before; and a third more otherwise."""
    model = YOLO(name).model.train()
    plain = kept_for_backward(model)
    inject.inject(model, QCConfig())
    share_quantizers(model, torch.zeros(1, 3, 64, 64))
    weights = sum(c.weight.numel() for _, c in quant_convs(model)) * 4e-6
    more = kept_for_backward(model) - weights
    assert (more < 1.05 * plain) is recomputed and more < 1.5 * plain


def test_nothing_stays_after_backward_where_a_head_reads_detached_tensors():
    """YOLO26's second head shares quantizers with the first, but not the gradient; none holds on to a tensor."""
    model = YOLO("yolo26n.yaml").model.train()
    inject.inject(model, QCConfig())
    assert share_quantizers(model, torch.zeros(1, 3, 64, 64)) > 0
    shared = {conv.act_quant for _, conv in quant_convs(model)}
    refs = []
    for quant in shared:
        quant.register_forward_hook(lambda m, args, y: refs.append(StorageWeakRef(y.untyped_storage())))
    out = model(torch.rand(2, 3, 64, 64))
    sum(y.square().mean() for head in out.values() for y in head.values() if isinstance(y, torch.Tensor)).backward()
    del out
    assert len(refs) > len(shared) and all(ref.expired() for ref in refs)


def test_listing_of_layers_and_scales():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), quantized(), nn.Sequential(quantized(offset=False)))
    assert [n for n, _ in quant_convs(model)] == ["1", "2.0"]
    expected = [model[1].weight_quant.scale, model[1].act_quant.scale, model[1].act_quant.offset]
    expected += [model[2][0].weight_quant.scale, model[2][0].act_quant.scale]
    assert list(map(id, scale_parameters(model))) == list(map(id, expected))
    assert is_quantized(model) and not is_quantized(model[0])


def test_silu_on_a_grid():
    """x times sigmoid in whole 256ths; nothing to train, the gradient is SiLU's but for the rounding."""
    act = QuantActivation(nn.SiLU(), 8)
    x = torch.linspace(-8, 8, 1001, requires_grad=True)
    y = act.function(x)
    assert torch.equal(y, x * (256 * x.sigmoid()).round().clamp(max=255) / 256)
    y.sum().backward()
    wanted = torch.autograd.functional.jvp(nn.functional.silu, x.detach(), torch.ones_like(x))[1]
    assert (x.grad - wanted).abs().max() < 0.03
    assert not list(act.function.parameters()) and torch.equal(act.half().function.quant.scale, torch.tensor([2.0**-8]))
    relu = nn.ReLU()
    assert QuantActivation(relu, 8).function is QuantActivation(relu, 8, rounded_silu=True).function is relu


@pytest.mark.parametrize("high", [-9.0, -1.0, 2.5, 9.0])
def test_grid_of_scores(high):
    """Lower logits than the lowest have its code, no higher one has, and what is higher keeps its place."""
    act = QuantActivation(HeadOutput(-8.0), 8)
    values = torch.linspace(-50, high, 999)
    act.calibrate(values, -50.0, high)
    step, x = act.quant.scale.item(), torch.linspace(-60, high, 5001)
    y = act(x)
    assert (y[x <= -8] == -8).all() and (y[x > -8 + step / 2] > -8).all()
    assert act.quant.offset.item() == -8 and step <= 2 * max(8 + high, 8) / 255
    above = x > -8
    assert ((y - x)[above].abs() <= step / 2 * (1 + 1e-6)).all()  # to the very top
    assert y.sigmoid()[x <= -8].max() < 0.001 / 2  # far from where detections count
    assert (y.diff() >= 0).all()


def test_grid_of_box_sides_covers_all_that_is_seen():
    """A single value of many far above the others too, which the least squared error would cut."""
    values = torch.cat([torch.randn(99_999, generator=torch.Generator().manual_seed(0)), torch.tensor([20.0])])
    low, high = values.min().item(), values.max().item()
    sides, plain = (QuantActivation(kind(), 8) for kind in (HeadOutput, nn.Identity))
    for act in (sides, plain):
        act.calibrate(values, low, high)
    step = sides.quant.scale.item()
    assert (sides(values) - values).abs().max() <= step / 2 and step <= 2 * (high - low) / 255
    assert (plain(values) - values).abs().max() > 1


def test_rounded_silu():
    """Whole multiples of a unit next to SiLU's values; gradients are SiLU's, values are the same with them."""
    act = QuantActivation(nn.SiLU(), 8, rounded_silu=True)
    act.calibrate(torch.linspace(-6, 8, 1000), -6.0, 8.0)
    step, unit = act.quant.scale.item(), act.function.unit
    assert step / unit in {8, 16, 32, 64}
    x = torch.linspace(-6, 8, 1001, requires_grad=True)
    y = act.function(x)
    exact = x.detach().double() * x.detach().double().sigmoid()
    assert torch.equal((y / unit).round() * unit, y) and (y - exact).abs().max() <= unit / 2 * (1 + 1e-5)
    assert torch.equal(act.function(x.detach()), y.detach())
    y.sum().backward()
    wanted = torch.autograd.functional.jvp(nn.functional.silu, x.detach(), torch.ones_like(x))[1]
    assert torch.allclose(x.grad, wanted) and not list(act.function.parameters())


FLOATS = 5e-7  # of SiLU's value: twice what PyTorch's and OpenVINO's is off at most


@pytest.mark.parametrize("exponent", range(-2, 13))
def test_no_value_of_silu_comes_near_a_threshold_of_its_unit(exponent):
    """Of those that whole steps have, in exact arithmetic, nor by a sigmoid that is off by 6e-8, as ONNX Runtime's."""
    step = 2.0**-exponent
    unit = unit_of(step, 255)
    assert step / 64 <= unit <= step / 8 and from_thresholds(step, 255, unit) >= FLOATS
    x = step * torch.arange(-255, 256, dtype=torch.float64)
    exact = (x * x.sigmoid() / unit).round()
    for off in (-6e-8, 6e-8):
        assert torch.equal((x * (x.sigmoid() + off) / unit).round(), exact)


def test_a_value_on_a_threshold_is_seen():
    """For a unit of twice the value of one step, that value lies half a unit off."""
    value = float(torch.tensor(1.0, dtype=torch.float64).sigmoid())
    assert from_thresholds(1.0, 1, 2 * value) < 1e-12 < from_thresholds(1.0, 1, value)
