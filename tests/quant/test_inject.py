# yolo_qc_plugin, AGPL-3.0
"""inject, remove and calibrate on real detection models: what they touch and what they leave."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import DFL
from ultralytics.nn.tasks import DetectionModel

from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.host.architecture import blank_image, edge_convs, fixed_convs
from yolo_qc_plugin.qat.correction import insert_correction
from yolo_qc_plugin.quant import quantizer
from yolo_qc_plugin.quant.calibrate import calibrate, quantizers_off
from yolo_qc_plugin.quant.inject import inject, remove
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs
from yolo_qc_plugin.quant.observers import SampleObserver
from yolo_qc_plugin.quant.precision import WideConv2d
from yolo_qc_plugin.quant.quantizer import ActQuantizer
from yolo_qc_plugin.quant.share import share_quantizers

MODELS = ["yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"]


def build(yaml):
    torch.manual_seed(0)
    model = DetectionModel(yaml, nc=3, verbose=False)
    model.eval()(images())  # the head keeps its anchors from the first forward in eval mode
    return model.train()


@pytest.fixture(scope="module", params=MODELS)
def pristine(request):
    return build(request.param)


@pytest.fixture
def model(pristine):
    return copy.deepcopy(pristine)


@pytest.fixture(scope="module")
def small():
    return build("yolov5n.yaml")


def images(batch=2, seed=0, size=64):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def put_in(model, calibrated=True, **options):
    """inject as a run does it; the float edges and the fixed convolutions are the host's."""
    config = QCConfig(**{"scale_init": "lsq", **options})  # "mse" is slower, and has tests of its own
    done = inject(model, config, edge_convs(model), fixed_convs(model))
    if calibrated:
        calibrate(model, [images()], model, config.scale_init)
    return done


def heads(model, x):
    """Raw outputs of the head (both branches of an end-to-end one), each of shape (batch, channels, positions)."""
    with torch.no_grad():
        out = copy.deepcopy(model).train()(x)
    return [branch[k] for branch in (out.values() if "one2one" in out else [out]) for k in ("boxes", "scores")]


def raw(model, x):
    """The same as one vector."""
    return torch.cat([y.flatten() for y in heads(model, x)])


def anatomy(model):
    """Everything about the modules but their values: types, attribute names, children, hooks, modes."""
    return {
        name: (
            *(type(m), sorted(vars(m)), list(m._modules), list(m._parameters), m.training),
            *(len(v) for k, v in sorted(vars(m).items()) if "hooks" in k),
        )
        for name, m in model.named_modules()
    }


def expected_edges(model):
    """By attribute, not by search: the first convolution, and the last of every branch of the head."""
    head = len(model.model) - 1
    edges = {"model.0.conv"}
    for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for i, layers in enumerate(getattr(model.model[-1], branch, [])):
            edges.add(f"model.{head}.{branch}.{i}.{len(layers) - 1}")
    return edges


def test_every_convolution_but_dfl_is_quantized_at_its_width(model):
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    dfl = {f"{n}.conv" for n, m in model.named_modules() if isinstance(m, DFL)}
    end2end = hasattr(model.model[-1], "one2one_cv2")
    edges = expected_edges(model)
    assert len(edges) == (13 if end2end else 7) and len(dfl) == (0 if end2end else 1)  # 26 has neither
    done = put_in(model, False, bits=4, weight_bits=3, edge_bits=7)
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not isinstance(m, QuantConv2d)}
    assert left == dfl == set(done.skipped)
    widths = {n: (m.weight_quant.bits, m.act_quant.bits) for n, m in quant_convs(model)}
    assert widths == {n: (7, 7) if n in edges else (3, 4) for n in convs - dfl} == done.quantized
    assert f"{len(widths)} convolutions quantized" in str(done) and f"{len(edges)} at W7A7" in str(done)
    assert f"{len(dfl)} left in float" in str(done)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("act_offset", [False, True])
def test_granularity_and_offset(small, per_channel, act_offset):
    model = copy.deepcopy(small)
    put_in(model, False, per_channel=per_channel, act_offset=act_offset)
    for _, m in quant_convs(model):
        assert m.weight_quant.scale.numel() == (m.out_channels if per_channel else 1)
        assert (m.act_quant.offset is not None) == act_offset


def test_patterns_choose_layers(small):
    model = copy.deepcopy(small)
    layer_bits = {"model.1.*": 3, "model.[34].*": 5, "model.3.conv": 6, "model.0.conv": 2}
    done = put_in(model, False, skip=("model.2.*", "model.24.cv3.?.2"), layer_bits=layer_bits)
    names = {n for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    skipped = {n for n in names if n.startswith("model.2.") or fnmatchcase(n, "model.24.cv3.?.2")}
    assert set(done.skipped) == skipped | {"model.24.dfl.conv"} and len(skipped) > 4
    for name, m in quant_convs(model):
        expected = 8 if name in expected_edges(small) else 4
        expected = 3 if name.startswith("model.1.") else expected  # model.1, not model.10
        expected = 5 if name.startswith(("model.3.", "model.4.")) else expected
        expected = 6 if name == "model.3.conv" else expected  # the last pattern that matches
        expected = 2 if name == "model.0.conv" else expected  # an edge too, once it is named
        assert (m.weight_quant.bits, m.act_quant.bits) == (expected, expected), name
    assert type(model.get_submodule("model.2.cv1.conv")) is WideConv2d


def test_patterns_name_weights_and_activations_apart(small):
    model = copy.deepcopy(small)
    widths = {
        "model.1.*": "A8",
        "model.[34].*": "W3",
        "model.3.conv": "W2A6",
        "model.4.cv1.conv": "A5",
        "model.0.*": "W4",
    }
    done = put_in(model, False, bits=4, layer_bits=widths)
    named = ("model.1.conv", "model.3.conv", "model.4.cv1.conv", "model.4.cv2.conv", "model.0.conv", "model.5.conv")
    assert [done.quantized[n] for n in named] == [(4, 8), (2, 6), (3, 5), (3, 4), (4, 8), (4, 4)]
    assert {n: (m.weight_quant.bits, m.act_quant.bits) for n, m in quant_convs(model)} == done.quantized


REFUSED = {
    "skip matches nothing": (dict(skip=("model.0.conv", "model.99.*")), "skip='model.99.\\*' matches no convolution"),
    "layer_bits matches nothing": (dict(layer_bits={"nowhere": 4}), "layer_bits='nowhere' matches no.*model.0.conv"),
    "everything skipped": (dict(skip="*"), r"skip=\['\*'\] leaves no convolution"),
}


@pytest.mark.parametrize("options,message", REFUSED.values(), ids=REFUSED)
def test_refused_and_left_untouched(small, options, message):
    model = copy.deepcopy(small)
    before, modules = list(model.state_dict()), list(model.modules())
    with pytest.raises(QCError, match=message):
        put_in(model, False, **options)
    assert list(model.state_dict()) == before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and anatomy(model) == anatomy(small)


def test_quantized_twice_is_refused(small):
    model = copy.deepcopy(small)
    put_in(model)
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    with pytest.raises(QCError, match="already quantized"):
        put_in(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(QCError, match=r"Sequential has no nn\.Conv2d"):
        inject(nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 2)), QCConfig())


def test_remove_gives_back_the_float_model(model, pristine):
    pristine_parameters = [id(p) for p in model.parameters()]
    count = len(put_in(model).quantized)
    x = images(seed=1)
    assert not torch.equal(raw(model, x), raw(pristine, x)) and anatomy(model) != anatomy(pristine)
    assert remove(model) == count
    assert [id(p) for p in model.parameters()] == pristine_parameters  # the very objects, in order
    assert anatomy(model) == anatomy(pristine)
    assert list(model.state_dict()) == list(pristine.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), pristine.state_dict().values()))
    assert torch.equal(raw(model, x), raw(pristine, x))
    assert remove(model) == 0


def test_remove_takes_a_correction_out_too(small):
    model = copy.deepcopy(small)
    put_in(model)
    insert_correction(model, per_channel=True)
    for _, m in quant_convs(model):
        nn.init.normal_(m.correction.gamma)
    remove(model)
    assert anatomy(model) == anatomy(small) and torch.equal(raw(model, images()), raw(small, images()))


def test_quantizers_off_is_the_float_model_and_ends_with_the_context(small):
    model, x = copy.deepcopy(small), images(seed=1)
    put_in(model)
    quantized, reference = raw(model, x), raw(small, x)
    both = [q for _, m in quant_convs(model) for q in (m.weight_quant, m.act_quant)]
    with pytest.raises(KeyError), quantizers_off(both):
        assert torch.equal(raw(model, x), reference)
        raise KeyError
    assert torch.equal(raw(model, x), quantized) and not torch.equal(quantized, reference)


def test_quantizers_off_restores_each_switch(small):
    model = copy.deepcopy(small)
    put_in(model, False)
    first = next(quant_convs(model))[1]
    first.weight_quant.enabled = False
    with quantizers_off(q for _, m in quant_convs(model) for q in (m.weight_quant, m.act_quant)):
        assert not first.act_quant.enabled
    assert first.act_quant.enabled and not first.weight_quant.enabled


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "forward raises"])
def test_calibrate_changes_scales_offsets_and_ranges_only(model, fails):
    put_in(model, False)
    model.train()
    model.model[3].eval()  # modes are mixed, as with frozen layers
    before, shape = {k: v.clone() for k, v in model.state_dict().items()}, anatomy(model)
    norms = [(m.track_running_stats, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = []

    def forward(x):
        seen.append(model(x))
        if fails and len(seen) == 2:
            raise KeyError("forward failed")

    if fails:
        with pytest.raises(KeyError, match="forward failed"):
            calibrate(model, [images(seed=s) for s in (1, 2)], forward, "lsq")
    else:
        calibrate(model, [images(seed=s) for s in (1, 2)], forward, "lsq")
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert {k.rpartition(".")[2] for k in changed} == (set() if fails else {"scale", "offset"})
    assert len(changed) >= (0 if fails else 2 * len(list(quant_convs(model))))  # every scale started
    assert anatomy(model) == shape and len(seen) == 2
    assert [(m.track_running_stats, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == norms
    assert all(q.enabled for _, m in quant_convs(model) for q in (m.weight_quant, m.act_quant))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method,training", [("mse", True), ("lsq", True), ("lsq", False)])
def test_calibrate_starts_from_what_each_layer_sees(small, method, training):
    """In a float model whose batch norms are in the mode that the model is in."""
    model, plain = copy.deepcopy(small).train(training), copy.deepcopy(small).train(training)
    put_in(model, False)
    batches = [images(seed=s) for s in (1, 2)]
    calibrate(model, batches, model, method)
    for name in ("model.0.conv", "model.2.cv1.conv", "model.24.cv2.1.2"):
        seen = SampleObserver()
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args[0]))
        for x in batches:
            plain(x)
        found, expected = model.get_submodule(name), copy.deepcopy(model.get_submodule(name))
        expected.weight_quant.calibrate(plain.get_submodule(name).weight, method)
        expected.act_quant.calibrate(seen.values, seen.low, method)
        for key, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[key], value) and not (value == 1).all(), (name, key)


def test_calibrate_chooses_unsigned_without_offset(small):
    model = copy.deepcopy(small)
    put_in(model, act_offset=False)
    signed = {n: m.act_quant.quant_min < 0 for n, m in quant_convs(model)}
    assert not signed["model.0.conv"] and signed["model.1.conv"]  # pixels, then SiLU's negative tail


def test_calibrate_names_a_layer_that_did_not_run(small):
    model = copy.deepcopy(small)
    model.unused = nn.Conv2d(3, 3, 1)
    assert "unused" in fixed_convs(model)  # which is why a run leaves it in float
    inject(model, QCConfig())
    with pytest.raises(RuntimeError, match=r"convolution unused did not run.*skip"):
        calibrate(model, [images()], model, "lsq")


class Twice(nn.Module):
    """One convolution under two names, and in a list."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.b = self.a
        self.c = nn.ModuleList([self.a, nn.Conv2d(3, 3, 1)])

    def forward(self, x):
        return self.c[1](self.c[0](self.b(self.a(x))))


def test_a_module_registered_twice_is_replaced_everywhere():
    model = Twice()
    conv, x = model.a, images()
    expected = model(x)
    done = inject(model, QCConfig(bits=8))
    assert list(done.quantized) == ["a", "c.1"]
    assert type(model.a) is QuantConv2d and model.a is model.b is model.c[0] and model.a.weight is conv.weight
    calibrate(model, [x], model)
    assert not torch.equal(model(x), expected)
    assert remove(model) == 2
    assert type(model.a) is nn.Conv2d and model.a is model.b is model.c[0] and torch.equal(model(x), expected)


def test_subclasses_of_conv2d_are_left_alone():
    class Other(nn.Conv2d):
        pass

    model = nn.Sequential(Other(3, 3, 1), nn.Conv2d(3, 3, 1))
    assert list(inject(model, QCConfig()).quantized) == ["1"] and type(model[0]) is Other


def test_eight_bits_are_near_float_and_two_are_not(small):
    """Layer by layer, on the input that the float model gives it (an untrained network with batch norm amplifies any
    deviation from layer to layer, so its final outputs tell nothing). Relative to the output's spread."""
    model, x = copy.deepcopy(small), images()
    seen = {}
    for name, m in model.named_modules():
        if type(m) is nn.Conv2d:
            m.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0].detach(), y.detach())}))
    model(x)
    for bits, low, high in ((8, 0.0, 0.03), (2, 0.25, 2.0)):
        quantized = copy.deepcopy(small)
        inject(quantized, QCConfig(bits=bits, edge_bits=bits), (), fixed_convs(quantized))
        calibrate(quantized, [x], quantized)
        with torch.no_grad():
            error = [((m(seen[n][0]) - seen[n][1]).norm() / (seen[n][1] - seen[n][1].mean()).norm()).item()
                     for n, m in quant_convs(quantized)]  # fmt: skip
        assert low < min(error) and max(error) < high


def share(model):
    return share_quantizers(model, blank_image(model))


def test_a_tensor_that_several_read_is_quantized_once_in_training(model, monkeypatch):
    """The same values, and gradients to rounding; nothing is kept when all have read."""
    put_in(model)
    gone, calls, found = share(model), [], []
    true = quantizer.fake_quantize
    monkeypatch.setattr(quantizer, "fake_quantize", lambda x, *args: calls.append(x) or true(x, *args))
    quants = {conv.act_quant for _, conv in quant_convs(model)}
    assert sum(q.readers for q in quants) - len(quants) == gone
    for once in (True, False):
        if not once:
            for quant in quants:
                quant.readers = 1
        calls.clear()
        model.zero_grad()
        out = model.train()(images())
        values = [branch[k] for branch in (out.values() if "one2one" in out else [out]) for k in ("boxes", "scores")]
        assert all(quant._kept is None for quant in quants)
        sum(v.square().mean() for v in values).backward()
        found.append((len(calls), values, [p.grad for p in model.parameters() if p.grad is not None]))
    (few, values, gradients), (many, others, other_gradients) = found
    # the second head of YOLO26 reads the first one's inputs detached, which are other tensors
    assert many - few == gone - 3 * ("one2one" in out) and all(map(torch.equal, values, others))
    assert len(gradients) == len(other_gradients)
    for a, b in zip(gradients, other_gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 + 1e-3 * b.abs().max().item())


def test_what_was_quantized_is_not_read_again_when_anything_has_changed():
    quant = ActQuantizer(4, offset=True)
    quant.readers, x = 9, torch.rand(1, 2, 4, 4)
    first = quant(x)
    assert quant(x) is first and copy.deepcopy(quant)._kept is None
    with torch.no_grad():
        quant.scale.mul_(0.5)
    second = quant(x)
    assert not torch.equal(second, first)
    x.mul_(2)
    assert not torch.equal(quant(x), second)
    assert quant(x.clone()) is not quant(x.clone())
    assert quant._kept is not None
    with torch.no_grad():
        assert quant(x) is not quant(x)
    assert quant._kept is None


def test_convolutions_that_read_one_tensor_share_its_quantizer(model, pristine):
    """Found by running: for other images too, readers of one tensor have one quantizer, and no others do."""
    put_in(model, calibrated=False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {m: m.training for m in model.modules()}
    gone = share(model)
    assert gone > 0 and share(model) == 0  # once
    assert all(m.training == modes[m] for m in model.modules())
    fixed = "model.0.conv.act_quant."  # the image's
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, state[k])]
    assert all(k.startswith(fixed) for k in changed), changed  # batch statistics included

    seen, kept = {}, []

    def note(conv, args):
        kept.append(args[0])
        seen[conv] = args[0].data_ptr(), args[0].shape

    hooks = [m.register_forward_pre_hook(note) for _, m in quant_convs(model)]
    heads(model.eval(), images(size=96))
    for hook in hooks:
        hook.remove()
    by_quantizer = {}
    for conv, tensor in seen.items():
        by_quantizer.setdefault(conv.act_quant, set()).add((tensor, conv.act_quant.bits))
    assert all(len(tensors) == 1 for tensors in by_quantizer.values())
    assert len(set.union(*by_quantizer.values())) == len(by_quantizer) == len(seen) - gone

    twin = copy.deepcopy(model)
    assert sum(1 for _ in twin.parameters()) == sum(1 for _ in model.parameters())
    remove(model)
    assert model.state_dict().keys() == pristine.state_dict().keys()


def test_quantizers_of_other_widths_are_not_shared(small):
    model = copy.deepcopy(small)
    put_in(model, calibrated=False, layer_bits={"model.2.cv1.conv": 6})
    share(model)
    first, second = model.model[2].cv1.conv, model.model[2].cv2.conv
    assert first.act_quant is not second.act_quant and (first.act_quant.bits, second.act_quant.bits) == (6, 4)


def test_a_shared_quantizer_is_calibrated_once_and_used_by_all(small):
    model = copy.deepcopy(small)
    put_in(model, calibrated=False)
    share(model)
    calibrate(model, [images()], model, "lsq")
    first, second = model.model[2].cv1.conv, model.model[2].cv2.conv
    assert first.act_quant is second.act_quant and 0 < first.act_quant.scale < 100
    x = torch.rand(1, first.in_channels, 8, 8)
    assert torch.equal(first.act_quant(x), second.act_quant(x))


@pytest.mark.parametrize("offset", [True, False])
def test_codes_of_the_image_are_its_bytes(small, offset):
    """Its quantizer is fixed, survives calibration on dark images, and asks for no gradient of the image."""
    model = copy.deepcopy(small)
    put_in(model, calibrated=False, act_offset=offset)
    share(model)
    names = {n for n, _ in model.named_parameters()}
    assert not any(n.startswith("model.0.conv.act_quant.") for n in names)
    assert "model.1.conv.act_quant.scale" in names
    calibrate(model, [images() * 0.2 - 0.1], model)
    quant = model.model[0].conv.act_quant
    levels = torch.arange(256)
    image = (levels.float() / 255).view(1, 1, 16, 16)
    assert torch.equal(quant.codes(image).flatten().long(), levels) and quant.zero_point == 0
    assert torch.allclose(quant(image), image, rtol=3e-7) and not quant(image).requires_grad


def test_the_images_grid_follows_the_edge_width(small):
    model = copy.deepcopy(small)
    put_in(model, calibrated=False, edge_bits=4)
    share(model)
    quant = model.model[0].conv.act_quant
    assert quant(torch.tensor([0.0, 0.49, 0.51, 1.0])).mul(15).tolist() == pytest.approx([0, 7, 8, 15])
