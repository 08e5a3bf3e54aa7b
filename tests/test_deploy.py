# yolo_qc_plugin, AGPL-3.0
"""Folding batch norm behind quantized convolutions: the same outputs, and weights that do not move."""

import copy

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv, Conv2, ConvTranspose, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.tasks import BaseModel, DetectionModel

from yolo_qc_plugin import host
from yolo_qc_plugin.callbacks import attach
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.correction import insert_correction
from yolo_qc_plugin.fold import fold_bn
from yolo_qc_plugin.inject import calibrate, inject, remove
from yolo_qc_plugin.layers import ChannelAffine, QuantConv2d, quant_convs

attach()

# Largest deviation relative to the largest output. Float64: rounding (1e-16) through 100 layers, amplified by them.
# Float32: the same from 1e-7, with activations unquantized, because one that lies at a rounding threshold would move by
# a whole step; that the quantized ones agree is what float64 shows.
DOUBLE, SINGLE = 1e-9, 1e-4

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


def build(yaml, change=None, quantize=True, corrected=True, **options):
    """A model in eval mode that has been trained, by the look of its numbers."""
    torch.manual_seed(0)
    model = DetectionModel(yaml, nc=3, verbose=False)
    if change:
        change(model)
    randomize(model).eval()
    if quantize:
        config = QCConfig(**{"scale_init": "lsq", **options})
        inject(model, config, host.edge_convs(model), host.fixed_convs(model))
        calibrate(model, [images(2)], model, config.scale_init)
        if corrected:
            correct(model)
    return model


def outputs(model, x):
    """Raw outputs of the head that inference reads; the decoded ones follow from them (top-k would reorder)."""
    with torch.no_grad():
        _, raw = model(x)
    if "one2one" in raw:
        raw = raw["one2one" if model.end2end else "one2many"]
    return torch.cat([raw["boxes"], raw["scores"]], 1)


def deviation(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def check_fuse(model):
    """Fuse copies in both precisions and compare; returns the fused float32 one."""
    double = copy.deepcopy(model).double()
    before = outputs(double, images().double())
    assert before.std() > 0.01 and before.isfinite().all()  # there is something to compare
    assert deviation(outputs(double.fuse(verbose=False), images().double()), before) < DOUBLE

    single = copy.deepcopy(model)
    frozen = {n: (m.weight, m.weight.clone(), m.weight_codes()) for n, m in quant_convs(single)}
    scales = {n: v.clone() for n, v in single.state_dict().items() if "_quant." in n}
    for _, m in quant_convs(single):
        m.act_quant.enabled = False
    before = outputs(single, images())
    assert single.fuse(verbose=False) is single
    assert deviation(outputs(single, images()), before) < SINGLE

    for name, m in quant_convs(single):
        weight, value, codes = frozen[name]
        assert m.weight is weight and torch.equal(m.weight, value) and torch.equal(m.weight_codes(), codes)
    after = single.state_dict()
    assert all(torch.equal(after[n], v) for n, v in scales.items() if n in after)
    for _, m in quant_convs(single):
        m.act_quant.enabled = True
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


@pytest.mark.parametrize("yaml,end2end", [*((m, False) for m in MODELS), ("yolo26n.yaml", True)])
def test_fuse_keeps_outputs_and_weights(yaml, end2end):
    model = build(yaml)
    model.end2end = end2end
    assert model.end2end == end2end
    assert any((m.weight < 0).any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    fused = check_fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) and fused.is_fused()
    head = fused.model[-1]
    assert (head.cv2 is None) == end2end and (getattr(head, "one2one_cv2", None) is None) != end2end
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
    fused = check_fuse(model)
    assert fused.model[0].conv.correction.gamma.shape == (16,)  # batch norm is per channel


def replace(model, index, block):
    """Put a block in place of the model's layer of that index."""
    block.i, block.f, block.type = model.model[index].i, model.model[index].f, type(block).__name__
    model.model[index] = block


BLOCKS = {  # blocks of several branches: kept, as merging them would move the codes
    "RepConv": ("yolov9t.yaml", None, RepConv),
    "RepVGGDW": ("yolov10n.yaml", None, RepVGGDW),
    "RepConv with identity": ("yolov5n.yaml", lambda m: replace(m, 2, RepConv(32, 32, bn=True)), RepConv),
    "Conv2": ("yolov5n.yaml", lambda m: replace(m, 1, Conv2(16, 32, 3, 2)), Conv2),
    "ConvTranspose": ("yolov5n.yaml", lambda m: replace(m, 11, ConvTranspose(128, 128)), ConvTranspose),
}


@pytest.mark.parametrize("yaml,change,block", BLOCKS.values(), ids=BLOCKS)
def test_fuse_of_models_with_other_blocks(yaml, change, block):
    model = build(yaml, change)
    assert any(type(m) is block for m in model.modules())
    fused = check_fuse(model)
    assert any(type(m) is block for m in fused.modules())
    assert fuse_changes_nothing(fused)


@pytest.mark.parametrize("yaml", ["yolov5n.yaml", "yolo26n.yaml", "yolov9t.yaml"])
def test_a_float_model_is_fused_by_the_host_itself(yaml):
    model = build(yaml, quantize=False)
    ours, theirs = copy.deepcopy(model).fuse(verbose=False), BaseModel.fuse.__wrapped__(copy.deepcopy(model), False)
    assert list(ours.state_dict()) == list(theirs.state_dict()) != list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    assert torch.equal(outputs(ours, images()), outputs(theirs, images()))
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_the_hosts_own_fuse_would_move_the_codes():
    """Negative control: why the patch is there."""
    model = build("yolov5n.yaml")
    codes, before = {n: m.weight_codes() for n, m in quant_convs(model)}, outputs(model, images())
    BaseModel.fuse.__wrapped__(model, False)
    assert any(not torch.equal(m.weight_codes(), codes[n]) for n, m in quant_convs(model))
    assert deviation(outputs(model, images()), before) > 0.01


def test_fused_model_survives_half():
    """Saved checkpoints are half; factors stay FP32."""
    fused = build("yolov5n.yaml").fuse(verbose=False)
    before = outputs(fused, images())
    assert torch.equal(outputs(copy.deepcopy(fused).half().float(), images()), before)


@pytest.mark.parametrize("length", [None, 1, 6])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_fold_of_one_layer(length, dtype, tolerance):
    """BN(gamma * y + beta) of one convolution, with a batch norm whose variance is tiny in one channel."""
    torch.manual_seed(0)
    conv = QuantConv2d.from_float(nn.Conv2d(3, 6, 3), 4, 4, False, True)
    block = randomize(nn.Sequential(conv, nn.BatchNorm2d(6, eps=1e-3))).to(dtype).eval()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    conv.weight_quant.calibrate(conv.weight, "mse")
    conv.act_quant.calibrate(x.flatten(), float(x.min()), "mse")
    block[1].running_var[2] = 1e-8
    if length:
        conv.correction = ChannelAffine(length).to(dtype)
        nn.init.normal_(conv.correction.gamma)
        nn.init.normal_(conv.correction.beta)
    before = block(x)
    assert fold_bn(conv, block[1]) is conv
    assert not any(p.requires_grad for p in conv.parameters())
    assert conv.correction.gamma.shape == conv.correction.beta.shape == (6,) and conv.correction.gamma.dtype == dtype
    assert (conv.correction.gamma < 0).any()
    assert deviation(conv(x), before) < tolerance


def test_convs_of_the_host_take_their_fused_forward():
    fused = build("yolov5n.yaml").fuse(verbose=False)
    for m in fused.modules():
        if isinstance(m, Conv):
            assert m.forward.__func__ is Conv.forward_fuse and not hasattr(m, "bn")


def test_the_quantizers_of_a_fused_model_cannot_be_removed():
    """Its batch norms are gone: removing would leave a wrong model, so it is refused and left as it is."""
    model = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    inject(model, QCConfig())
    model.fuse(verbose=False)
    with pytest.raises(QCError, match="fused"):
        remove(model)
    assert any(True for _ in quant_convs(model))
