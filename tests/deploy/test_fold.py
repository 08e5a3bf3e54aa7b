# yolo_qc_plugin, AGPL-3.0
"""The deployed form: integer codes that do not move, one scale and one shift per channel, and the same outputs."""

import copy
from functools import cache
from threading import Event, Thread

import pytest
import torch
from gpu_arithmetic import DivisionByNumbers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.nn.modules import Conv, Conv2, ConvTranspose, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.tasks import BaseModel

from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy import fold as fold_module
from yolo_qc_plugin.deploy.codes import compare_trained
from yolo_qc_plugin.deploy.fold import FixedQuantizer, deploy_conv, deployed_convs, head_grids
from yolo_qc_plugin.deploy.snap import snap
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.host.record import QuantRecord
from yolo_qc_plugin.qat.correction import insert_correction
from yolo_qc_plugin.quant.activations import QuantActivation, quant_activations
from yolo_qc_plugin.quant.calibrate import calibrate, calibrate_outputs
from yolo_qc_plugin.quant.functional import to_codes
from yolo_qc_plugin.quant.inject import inject, quantize_outputs, remove
from yolo_qc_plugin.quant.layers import ChannelAffine, QuantConv2d, quant_convs
from yolo_qc_plugin.quant.quantizer import ActQuantizer
from yolo_qc_plugin.quant.share import share_quantizers
from yolo_qc_plugin.quant.taps import tap_sums
from yolo_qc_plugin.run.callbacks import attach

attach()

# Largest deviation relative to the largest output. Float64, end to end: rounding (1e-16) through 100 layers, amplified
# by them. Float32 (1e-7), one layer: sums of some thousand products and the cancellation in batch norm. Not end to
# end, because a value at a rounding threshold moves by a whole step, and one does in float32.
DOUBLE, SINGLE = 1e-9, 1e-4

# Distance from a rounding threshold, in steps, below which float32 may round either way: the position is at most 255,
# rounded (6e-8, relative) two or three times.
NEAR = 1e-4

MODELS = ["yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"]


def images(batch=1):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomize(model):
    """Batch norms as after training, and worse: negative weights, any mean and variance."""
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 0, 1.5)
            nn.init.normal_(m.bias, 0, 0.5)
            nn.init.normal_(m.running_mean, 0, 0.2)
            nn.init.uniform_(m.running_var, 0.1, 1.0)
    return model


def correct(model, per_channel=True):
    insert_correction(model, per_channel)
    for _, m in quant_convs(model):
        nn.init.normal_(m.correction.gamma, 1, 0.5)  # some are negative
        nn.init.normal_(m.correction.beta, 0, 0.2)


def build(yaml, change=None, quantize=True, corrected=True, outputs=False, task="detect", **options):
    """A model in eval mode that has been trained, by the look of its numbers; outputs: quantized, to 8 bits if True."""
    torch.manual_seed(0)
    model = architecture.MODELS[task](yaml, nc=3, verbose=False)
    if change:
        change(model)
    randomize(model).half().float().eval()  # as read from a checkpoint
    if quantize:
        config = QCConfig(**{"scale_init": "lsq", **options})
        inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
        image = architecture.blank_image(model)
        if config.runs_on.sums:
            tap_sums(model, image, config, architecture.sums_of_branches(model))
        if config.runs_on.joined:
            share_quantizers(model, image, joined=True)
        calibrate(model, [images(2)], model, config.scale_init)
        if outputs:
            width = 8 if outputs is True else outputs
            quantize_outputs(architecture.output_blocks(model), width, config.runs_on.rounded_silu)
            calibrate_outputs(model, [images(2)], model)
        if corrected:
            correct(model)
        snap(model, architecture.blank_image(model))
    return model


def write_trained(model, path, config=None, half=True, task="detect"):
    """Write a model as training does, quantized where options are given; returns the path."""
    model.names = {0: "red", 1: "white", 2: "platelet"}
    if config:
        model.qc = QuantRecord(config.to_dict())
    torch.save({"model": model.half() if half else model, "train_args": {"imgsz": 64, "task": task}}, path)
    return path


@cache
def _yolov5n():
    return build("yolov5n.yaml")


def yolov5n():
    return copy.deepcopy(_yolov5n())


def outputs(model, x):
    """Raw outputs of the head that inference reads; the decoded ones follow from them (top-k would reorder)."""
    with torch.no_grad():
        _, raw = model(x)
    if "one2one" in raw:
        raw = raw["one2one" if model.end2end else "one2many"]
    return torch.cat([raw["boxes"], raw["scores"]], 1)


def deviation(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def codes_of(model):
    return {name: m.weight_codes() for name, m in quant_convs(model)}


def observe(model, x):
    """What a run of a quantized model on x shows of each convolution and of each quantized output.

    Returns:
        Of convolutions by name: input, quantized input, output behind its own batch norm if it has one and before its
        own grid; of quantized outputs by name: value, quantized value.
    """
    convs, acts, hooks = {}, {}, []

    def watch(module, store, key, part):
        hooks.append(module.register_forward_hook(
            lambda m, args, out: store.setdefault(key, {}).update({f"{part}in": args[0].clone(), part: out.clone()})
        ))  # fmt: skip

    names = {m: name for name, m in quant_convs(model)}
    for m, name in names.items():
        watch(m.act_quant, convs, name, "act")
        watch(m, convs, name, "out")
    for m in model.modules():  # hooked later, so that it has the last word
        if isinstance(m, Conv) and not isinstance(m, Conv2) and m.conv in names:
            watch(m.bn, convs, names[m.conv], "out")
    for name, m in quant_activations(model):
        watch(m.quant, acts, name, "act")
    outputs(model, x)
    for hook in hooks:
        hook.remove()
    for name in convs.keys() & {n.removesuffix(".act") for n in acts}:
        convs[name]["out"] = acts[f"{name}.act"]["actin"]
    return {n: (s["actin"], s["act"], s["out"]) for n, s in convs.items()}, {
        n: (s["actin"], s["act"]) for n, s in acts.items()
    }


def check_quantizer(fixed, x, wanted):
    """Equal codes, but for values at a rounding threshold, which may be one step off."""
    position = (x / fixed.scale).double()
    moved = ((fixed(x) - wanted).double() / fixed.scale).abs()
    near = (position - position.floor() - 0.5).abs() < NEAR
    assert moved[~near].max() < NEAR and moved.max() < 1 + NEAR


def check_fuse(model):
    """Fuse copies in both precisions and compare; returns the fused float32 one."""
    double = copy.deepcopy(model).double()
    before = outputs(double, images().double())
    assert before.std() > 0.01 and before.isfinite().all()  # there is something to compare
    assert deviation(outputs(double.fuse(verbose=False), images().double()), before) < DOUBLE

    convs, acts = observe(model, images())
    single = copy.deepcopy(model)
    assert single.fuse(verbose=False) is single
    assert not any(isinstance(m, (QuantConv2d, QuantActivation, ActQuantizer)) for m in single.modules())
    modules, codes = dict(single.named_modules()), codes_of(model)
    for name, layer in deployed_convs(single).items():
        assert modules[name] is layer and layer.weight_codes.dtype == torch.int8
        assert torch.equal(layer.weight_codes, codes[name])
        assert layer.scale.shape == layer.shift.shape == (layer.out_channels,)
        x, quantized, wanted = convs[name]
        check_quantizer(layer.act_quant, x, quantized)
        # values of the grid stand far from thresholds
        assert deviation(layer.scaled_sums(quantized), wanted) < SINGLE, name
    removed = codes.keys() - deployed_convs(single).keys()  # of a head's two branches, if it has two
    of_removed = {prefix for name in removed for prefix in (f"{name}.act", f"{name.removesuffix('conv')}act")}
    for name, (x, wanted) in acts.items():
        if name not in of_removed:
            check_quantizer(modules[name][0], x, wanted)
            assert type(modules[name][1]) is type(model.get_submodule(name).function)
    head = f"model.{len(model.model) - 1}."
    assert all(name.startswith(head) for name in removed)
    return single


def fuse_changes_nothing(model):
    """Whether another fuse leaves the modules, their forward methods and every value as they are."""
    values, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    forwards = [m.forward for m in modules]
    model.fuse(verbose=False)
    after = model.state_dict()
    return (
        list(map(id, model.modules())) == list(map(id, modules))
        and [m.forward for m in modules] == forwards
        and after.keys() == values.keys()
        and all(torch.equal(after[k], v) for k, v in values.items())
    )


@pytest.mark.parametrize("quantized_outputs", [False, True])
@pytest.mark.parametrize("yaml,end2end", [*((m, False) for m in MODELS), ("yolo26n.yaml", True)])
def test_fuse_keeps_outputs_and_codes(yaml, end2end, quantized_outputs):
    model = build(yaml, outputs=quantized_outputs)
    model.end2end = end2end
    assert model.end2end == end2end
    assert any((m.weight < 0).any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert any(True for _ in quant_activations(model)) == quantized_outputs
    fused = check_fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) and fused.is_fused()
    head = fused.model[-1]
    assert (head.cv2 is None) == end2end and (getattr(head, "one2one_cv2", None) is None) != end2end
    assert not quantized_outputs or sum(isinstance(m, FixedQuantizer) for m in fused.modules()) > len(
        deployed_convs(fused)
    )
    assert fuse_changes_nothing(fused) and not fuse_changes_nothing(model)


@pytest.mark.parametrize("options", [
    dict(per_channel=True), dict(act_offset=False), dict(skip=("model.1.*", "model.4.*", "model.24.cv2.*")),
], ids=["per channel", "no offset", "partly float"])  # fmt: skip
@pytest.mark.parametrize("corrected", [False, True])
def test_fuse_with_options(options, corrected):
    fused = check_fuse(build("yolov5n.yaml", corrected=corrected, **options))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_fuse_of_a_per_tensor_correction():
    model = build("yolov5n.yaml", corrected=False)
    correct(model, per_channel=False)
    check_fuse(model)


def replace(model, index, block):
    """Put a block in place of the model's layer of that index."""
    block.i, block.f, block.type = model.model[index].i, model.model[index].f, type(block).__name__
    model.model[index] = block


BLOCKS = {  # blocks of several branches: kept, as merging them would move the codes; transposed convolutions are float
    "RepConv": ("yolov9t.yaml", None, RepConv),
    "RepVGGDW": ("yolov10n.yaml", None, RepVGGDW),
    "RepConv with identity": ("yolov5n.yaml", lambda m: replace(m, 2, RepConv(32, 32, bn=True)), RepConv),
    "Conv2": ("yolov5n.yaml", lambda m: replace(m, 1, Conv2(16, 32, 3, 2)), Conv2),
    "ConvTranspose": ("yolov5n.yaml", lambda m: replace(m, 11, ConvTranspose(128, 128)), ConvTranspose),
}


@pytest.mark.parametrize("yaml,change,block", BLOCKS.values(), ids=BLOCKS)
def test_fuse_of_models_with_other_blocks(yaml, change, block):
    model = build(yaml, change, outputs=True)
    before = [m for m in model.modules() if type(m) is block]
    fused = check_fuse(model)
    kept = [m for m in fused.modules() if type(m) is block]
    assert len(kept) == len(before) > 0
    for m in kept:
        if block is ConvTranspose:
            assert isinstance(m.conv_transpose, nn.ConvTranspose2d) and not hasattr(m, "bn")
        else:  # both branches are there
            assert len(deployed_convs(m)) == 2
    assert fuse_changes_nothing(fused)


@pytest.mark.parametrize("yaml", ["yolov5n.yaml", "yolo26n.yaml", "yolov9t.yaml"])
def test_a_float_model_is_fused_by_the_host_itself(yaml):
    model = build(yaml, quantize=False)
    ours, theirs = copy.deepcopy(model).fuse(verbose=False), BaseModel.fuse.__wrapped__(copy.deepcopy(model), False)
    assert list(ours.state_dict()) == list(theirs.state_dict()) != list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert torch.equal(outputs(ours, images()), outputs(theirs, images()))
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_the_comparison_with_training_sees_outputs_of_the_head():
    """Which no convolution reads: a grid there that the deployed form has otherwise."""
    model = build("yolov5n.yaml", outputs=True)
    fused = copy.deepcopy(model).fuse(verbose=False)
    assert compare_trained(model, fused, images())["steps"] == 0 and len(head_grids(fused)) == 6
    head_grids(fused)["model.24.cv2.1.2"].scale *= 2
    found = compare_trained(model, fused, images())
    assert found["steps"] > 1 and 0 < found["changed"] < 0.1


def test_the_hosts_own_fuse_would_move_the_codes():
    """Negative control: why the patch is there."""
    model = yolov5n()
    codes, before = codes_of(model), outputs(model, images())
    BaseModel.fuse.__wrapped__(model, False)
    assert any(not torch.equal(c, codes[n]) for n, c in codes_of(model).items())
    assert deviation(outputs(model, images()), before) > 0.01


def test_a_fused_model_survives_copies_files_and_half(tmp_path):
    """Saved checkpoints are half; scales, shifts and codes stay as they are."""
    fused = yolov5n().fuse(verbose=False)
    before = outputs(fused, images())
    torch.save(fused, tmp_path / "fused.pt")
    for twin in (
        copy.deepcopy(fused),
        torch.load(tmp_path / "fused.pt", weights_only=False),
        copy.deepcopy(fused).half().float(),
    ):
        assert torch.equal(outputs(twin, images()), before)
        assert fuse_changes_nothing(twin)
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), fused.state_dict().values()))


def test_the_host_sees_an_ordinary_fused_model():
    """Its forward methods, its dtype (read from the first parameter) and its number of parameters."""
    model = yolov5n()
    weights = sum(m.weight.numel() for _, m in quant_convs(model))
    fused = model.fuse(verbose=False)
    for m in fused.modules():
        if isinstance(m, Conv):
            assert m.forward.__func__ is Conv.forward_fuse and not hasattr(m, "bn")
    assert next(fused.parameters()).dtype == torch.float32
    assert not any(p.requires_grad for m in deployed_convs(fused).values() for p in m.parameters())
    channels = sum(m.out_channels for m in deployed_convs(fused).values())
    assert sum(p.numel() for m in deployed_convs(fused).values() for p in m.parameters()) == weights + 2 * channels


def test_the_quantizers_of_a_fused_model_cannot_be_removed():
    """Its batch norms are gone: removing would leave a wrong model, so it is refused and left as it is."""
    model = yolov5n().fuse(verbose=False)
    with pytest.raises(QCError, match=r"fused; load the checkpoint again and remove\(\) before fuse"):
        remove(model)
    assert fuse_changes_nothing(model) and len(deployed_convs(model)) == 75


def test_remove_gives_the_float_model_back_with_quantized_outputs_too():
    plain, model = build("yolov5n.yaml", quantize=False), build("yolov5n.yaml", outputs=True)
    assert sum(1 for _ in quant_activations(model)) == 75 and remove(model) == 75
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(outputs(model, images()), outputs(plain, images()))


def test_padding_other_than_zeros_is_refused_by_name():
    model = build("yolov5n.yaml", lambda m: setattr(m.model[3].conv, "padding_mode", "reflect"))
    with pytest.raises(QCError, match=r"model\.3\.conv pads by 'reflect'; only zero padding"):
        model.fuse(verbose=False)
    skipped = build(
        "yolov5n.yaml", lambda m: setattr(m.model[3].conv, "padding_mode", "reflect"), skip=("model.3.conv",)
    )
    assert "model.3.conv" not in deployed_convs(skipped.fuse(verbose=False))  # what the message advises


CONVS = {
    "plain": dict(kernel_size=3),
    "no bias": dict(kernel_size=3, padding=1, bias=False),
    "groups": dict(kernel_size=3, stride=2, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=6),
    "dilation": dict(kernel_size=3, padding=2, dilation=2),
    "oblong": dict(kernel_size=(1, 5), stride=(2, 1), padding=(0, 2), bias=False),
}


def layer(geometry, bits=4, per_channel=False, offset=True, correction=None, dtype=torch.float64):
    """A calibrated convolution, a batch norm with one tiny variance and one zero weight, and an input."""
    torch.manual_seed(0)
    conv = QuantConv2d.from_float(nn.Conv2d(6, 6, **geometry), bits, bits, per_channel, offset)
    block = randomize(nn.Sequential(conv, nn.BatchNorm2d(6, eps=1e-3))).to(dtype).eval()
    x = torch.randn(2, 6, 9, 9, dtype=dtype)
    conv.weight_quant.calibrate(conv.weight, "mse")
    conv.act_quant.calibrate(x.flatten(), float(x.min()), "mse")
    with torch.no_grad():
        block[1].running_var[2] = 1e-8
        block[1].weight[3] = 0
    if correction:
        conv.correction = ChannelAffine(correction).to(dtype)
        nn.init.normal_(conv.correction.gamma)
        nn.init.normal_(conv.correction.beta)
        if correction > 1:
            conv.correction.gamma.data[4] = 0
    return *block, x


@pytest.mark.parametrize("correction", [None, 1, 6])
@pytest.mark.parametrize("geometry", CONVS.values(), ids=CONVS)
@torch.no_grad()
def test_one_layer(geometry, correction):
    """Of every geometry and option, with batch norm and without; scales negative and zero."""
    for bits, per_channel, offset in ((2, True, False), (4, False, True), (8, True, True)):
        conv, bn, x = layer(geometry, bits, per_channel, offset, correction)
        before = {k: v.clone() for k, v in conv.state_dict().items()}
        deployed = deploy_conv(conv, bn, "a.b")
        assert deployed.name == "a.b" and deployed.bits == bits and not deployed.training
        assert deviation(deployed(x), bn(conv(x))) < DOUBLE
        assert deviation(deploy_conv(conv, None, "")(x), conv(x)) < DOUBLE
        assert (deployed.scale < 0).any() and (deployed.scale > 0).any() and deployed.scale[3] == 0
        assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
        assert torch.equal(deployed.weight_codes, conv.weight_codes())

        single, _, _ = layer(geometry, bits, per_channel, offset, correction, torch.float32)
        given = single.act_quant(x.float())
        assert deviation(deploy_conv(single, bn.float(), "")(given), bn(single(given))) < SINGLE


@torch.no_grad()
def test_casts_keep_the_numbers_of_a_layer_wide():
    """Half and bfloat16 inputs are widened; only the result is rounded."""
    conv, bn, x = layer(CONVS["groups"], correction=6, dtype=torch.float32)
    deployed = deploy_conv(conv, bn, "")
    before = {k: v.clone() for k, v in deployed.state_dict().items()}
    for dtype in (torch.float16, torch.bfloat16):
        cast = copy.deepcopy(deployed).to(dtype)
        after = cast.state_dict()
        assert {k: v.dtype for k, v in after.items()} == {
            "scale": torch.float32, "shift": torch.float32, "weight_codes": torch.int8,
        }  # fmt: skip
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        narrow = x.to(dtype)
        assert cast(narrow).dtype == dtype and torch.equal(cast(narrow), deployed(narrow.float()).to(dtype))
    wide = copy.deepcopy(deployed).double()
    assert wide.scale.dtype == wide.shift.dtype == torch.float64 and wide.weight_codes.dtype == torch.int8
    assert torch.equal(wide.half().scale, wide.scale) and wide.half().scale.dtype == torch.float64
    quantizer = deployed.act_quant
    assert torch.equal(quantizer(x.half()), quantizer(x.half().float()).half())


def with_codes(codes, scale):
    """A deployed layer of given codes (one a channel) and scales."""
    conv = QuantConv2d.from_float(nn.Conv2d(1, len(codes), 1, bias=False), 8, 8, False, False)
    deployed = deploy_conv(conv, None, "")
    deployed.weight_codes.data = torch.tensor(codes, dtype=torch.int8).view(-1, 1, 1, 1)
    deployed.scale.data = torch.tensor(scale)
    return deployed


@pytest.mark.parametrize("lowest,highest,codes,scale,wanted,signed", [
    (-8, 7, [7, -7, -8, 0], [0.5, -2.0, 1.0, -1.0], [7, 7, -8, 0], False),
    (-8, 7, [3, -8, 5, 1], [-0.5, -2.0, 1.0, 1.0], [3, -8, 5, 1], True),  # 8 does not fit: nothing is negated
    (-128, 127, [3, -8, 5, 1], [-0.5, -2.0, 1.0, 1.0], [-3, 8, 5, 1], False),
    (-128, 127, [-128, 127, 0, 1], [-1.0, -1.0, 1.0, 1.0], [-128, 127, 0, 1], True),
    (-8, 7, [-8, -8, 7, 7], [0.0, 1.0, 0.0, -1.0], [0, -8, 0, -7], False),  # a zero scale makes no difference
    (-8, 7, [5, -8, 7, 7], [0.0, -1.0, -0.0, -1.0], [0, -8, 0, 7], True),
])  # fmt: skip
def test_positive_scale(lowest, highest, codes, scale, wanted, signed):
    deployed = with_codes(codes, scale)
    found, positive, sign = deployed.positive_scale(lowest, highest)
    assert found.flatten().tolist() == wanted and found.shape == deployed.weight_codes.shape
    assert (positive > 0).all() and (sign is not None) == signed
    sign = torch.ones(4) if sign is None else sign
    assert torch.equal(found.flatten() * positive * sign, deployed.weight_codes.flatten() * deployed.scale)


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_codes_do_not_depend_on_how_a_gpu_divides_by_numbers(bits):
    """At and beside every threshold of some grids."""
    moved = 0
    for seed in range(20):
        quant = ActQuantizer(bits, offset=True)
        quant.scale.fill_(torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() + 0.01)
        quant.offset.copy_(-3 * quant.scale)
        fixed = FixedQuantizer(quant)
        x = [(torch.arange(*fixed.range) + 0.5) * fixed.scale]
        for towards in (-torch.inf, torch.inf):
            x.append(torch.nextafter(x[0], torch.tensor(towards)))
        x = torch.cat(x)
        steps = fixed.steps(x)
        assert torch.equal(steps, (x.double() / fixed.scale).float().round().clamp(*fixed.range))
        with DivisionByNumbers():
            assert torch.equal(fixed.steps(x), steps)
            moved += (to_codes(x, fixed.scale, None, *fixed.range) != steps).sum().item()
    assert moved > 10  # were the scale a number


@torch.no_grad()
def test_mixed_precision_and_devices_without_fp64(monkeypatch):
    """The first moves no code; on the second a layer is folded on the CPU, and computes wide sums in FP32."""
    deployed, x = one_sign(512, 8)
    wanted = deployed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deployed(x), wanted)
    monkeypatch.setattr(fold_module, "WITHOUT_FP64", {"cpu"})
    narrow, _ = one_sign(512, 8)
    assert torch.equal(narrow.scale, deployed.scale) and torch.equal(narrow.shift, deployed.shift)
    with ConvolutionTypes() as types:
        found = narrow(x)
    assert types.seen == {torch.float32} and torch.allclose(found, wanted, rtol=1e-5)


class ConvolutionTypes(TorchDispatchMode):
    """Collects the types in which convolutions are computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def one_sign(channels, bits):
    """A deployed 3x3 convolution of positive weights with unit scales, and an input that takes the highest codes."""
    torch.manual_seed(0)
    conv = QuantConv2d.from_float(nn.Conv2d(channels, 8, 3, padding=1, bias=False), bits, bits, False, False)
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        conv.weight.copy_(torch.randint(top // 2, top + 1, conv.weight.shape))
    conv.act_quant.set_signed(False)
    deployed = deploy_conv(conv, None, "")
    high = deployed.act_quant.quant_max
    return deployed, torch.randint(high // 2, high + 1, (1, channels, 8, 8)).float()


@pytest.mark.parametrize("channels,bits,computed", [
    (512, 8, torch.float64),
    (64, 8, torch.float32),  # up to 64 * 9 * 127 * 255 = 1.9e7 by its shape, less by its codes
    (512, 4, torch.float32),
])  # fmt: skip
@torch.no_grad()
def test_sums_are_those_of_whole_numbers(channels, bits, computed):
    """Whatever the size of a layer; FP64, which is slower, only where FP32 does not hold every sum."""
    deployed, x = one_sign(channels, bits)
    codes = deployed.weight_codes.long().flatten(1)
    sums = (codes @ nn.functional.unfold(x, 3, padding=1).long()).view(1, 8, 8, 8)
    assert (sums.max().item() > 2**24) is (computed is torch.float64)
    with ConvolutionTypes() as types:
        found = deployed(x)
    assert found.dtype == torch.float32 and torch.equal(found, sums.float())  # the sum rounded once
    assert types.seen == {computed}


def test_cudnn_stays_off_until_the_last_thread_is_done(monkeypatch):
    """The first thread leaves while the second is within, and the second finds what was there before."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    inside, go_on, seen = Event(), Event(), []

    def second():
        with fold_module.without_cudnn:
            inside.set()
            go_on.wait(10)
            seen.append(torch.backends.cudnn.enabled)

    thread = Thread(target=second)
    with fold_module.without_cudnn:
        thread.start()
        assert inside.wait(10)
    assert not torch.backends.cudnn.enabled
    go_on.set()
    thread.join()
    assert seen == [False] and torch.backends.cudnn.enabled
    with pytest.raises(ZeroDivisionError), fold_module.without_cudnn:
        1 / 0
    assert torch.backends.cudnn.enabled
