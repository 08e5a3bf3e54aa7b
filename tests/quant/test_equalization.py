# yolo_qc_plugin, AGPL-3.0
"""Equalized activations: the same convolution with the quantizers off, float weights outside, one number to the end."""

import copy
import json
import pickle

import pytest
import torch
from conftest import TINY
from torch import nn
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks, choose_onnx_kind
from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.deploy.fold import FixedQuantizer, deploy_conv
from yolo_qc_plugin.host.record import FORMAT, QuantRecord
from yolo_qc_plugin.qat.ema import ConstantEMA
from yolo_qc_plugin.quant.equalization import equalize, equalizing_factors
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs
from yolo_qc_plugin.tools.check import check

GEOMETRIES = {
    "plain": dict(kernel_size=3, padding=1),
    "groups": dict(kernel_size=3, stride=2, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=6),
}
SIZES = torch.tensor([1.0, 0.1, 30.0, 4.0, 0.02, 1.0]).view(1, -1, 1, 1)


def uneven(batch=2, seed=0):
    """An input (batch, 6, 9, 9) of channels of very different sizes."""
    return SIZES * torch.randn(batch, 6, 9, 9, generator=torch.Generator().manual_seed(seed))


def twins(geometry, bits=3, equalized=True):
    """A float convolution and its quantized twin with scales from data, in a model of its own."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, **geometry)
    q = QuantConv2d.from_float(copy.deepcopy(conv), bits, bits, True, True, equalized)
    model = nn.Sequential(q)
    equalize(model, [uneven(), uneven(seed=1)], model)
    x = q.act_quant.equalized(uneven()).flatten()
    q.act_quant.calibrate(x, float(x.min()), "mse")
    q.weight_quant.calibrate(q.weight, "mse")
    return conv, q


def test_factors_are_powers_of_two_that_even_out():
    assert equalizing_factors(torch.tensor([0.1, 0.4, 1.6])).tolist() == [4, 1, 0.25]
    sizes = torch.rand(64, generator=torch.Generator().manual_seed(0)).mul(-8).exp2()
    factors = equalizing_factors(sizes)
    assert torch.equal(torch.log2(factors), torch.log2(factors).round())
    evened = sizes * factors
    assert evened.max() / evened.min() <= 2.0001 < sizes.max() / sizes.min()
    assert equalizing_factors(torch.tensor([0.0, 0.0])).isfinite().all()  # nothing passes there
    assert equalizing_factors(torch.tensor([0.0, 1.0])).max() < 64  # and next to nothing is not blown up


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_nothing_but_the_quantizers_changes(geometry):
    """With them off the float convolution comes out to the last bit; out of them too, and in a saved state."""
    conv, q = twins(geometry)
    assert q.act_quant.equalizer.unique().numel() > 3 and not torch.equal(q.weight, conv.weight)
    assert not torch.equal(q(uneven()), conv(uneven()))  # with them on it differs
    q.weight_quant.enabled = q.act_quant.enabled = False
    assert torch.equal(q(uneven()), conv(uneven()))
    assert torch.equal(q.state_dict()["weight"], conv.weight)
    assert torch.equal(copy.deepcopy(q).to_float().weight, conv.weight)


def test_low_bits_keep_small_channels():
    """What the convolution makes of each channel alone is nearer to float's where channels are equalized."""
    errors = []
    for equalized in (False, True):
        conv, q = twins(GEOMETRIES["depthwise"], equalized=equalized)
        wanted = conv(uneven())
        errors.append((q(uneven()) - wanted).square().mean((0, 2, 3)) / wanted.square().mean((0, 2, 3)))
    assert errors[1].max() < 0.2 < errors[0].max()


def test_a_state_goes_into_any_twin():
    """Of a quantized twin with other equalizers, and of a float convolution; back again too."""
    conv, q = twins(GEOMETRIES["groups"])
    other = QuantConv2d.from_float(nn.Conv2d(6, 6, **GEOMETRIES["groups"]), 3, 3, True, True, True)
    other.load_state_dict(q.state_dict())
    for (name, mine), (_, theirs) in zip(q.named_parameters(), other.named_parameters()):
        assert torch.equal(mine, theirs), name
    assert torch.equal(other.act_quant.equalizer, q.act_quant.equalizer) and torch.equal(other(uneven()), q(uneven()))
    plain = nn.Conv2d(6, 6, **GEOMETRIES["groups"])
    plain.load_state_dict(q.state_dict(), strict=False)
    assert torch.equal(plain.weight, conv.weight)
    before = q.weight.clone()
    q.load_state_dict(conv.state_dict(), strict=False)
    assert torch.equal(q.weight, before)


def test_the_average_moves_the_weights_themselves():
    _, q = twins(GEOMETRIES["plain"])
    model, averaged = nn.Sequential(q), nn.Sequential(copy.deepcopy(q))
    ema = ConstantEMA(averaged, 0.5)
    with torch.no_grad():
        q.weight.add_(1.0)
    before = averaged[0].weight.clone()
    ema.step(model)
    torch.testing.assert_close(averaged[0].weight, before + (1 - ema.decay(1)))


@pytest.mark.parametrize("also_in_training", [False, True])
def test_an_average_that_is_not_finite_is_mended(also_in_training):
    """As the host mends all others; it cannot reach these."""
    _, q = twins(GEOMETRIES["plain"])
    averaged = copy.deepcopy(q)
    with torch.no_grad():
        for weight in (averaged.weight, q.weight)[: 1 + also_in_training]:
            weight[0, 0, 0, 0] = float("nan")
    averaged.state_dict()["weight"].nan_to_num_()
    assert not averaged.weight.isfinite().all()
    ConstantEMA(nn.Sequential(averaged), 0.5).mend(nn.Sequential(q))
    assert torch.equal(averaged.weight, q.weight.nan_to_num())
    assert torch.equal(averaged.weight, q.weight) != also_in_training


def test_without_equalizers_no_image_is_read():
    model = nn.Sequential(twins(GEOMETRIES["plain"], equalized=False)[1])
    before = copy.deepcopy(model.state_dict())
    equalize(model, iter(lambda: pytest.fail("a batch was taken"), None), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_deployed_form_is_the_same(geometry):
    _, q = twins(geometry)
    deployed = deploy_conv(q.double(), None, "a")
    x = uneven().double()
    torch.testing.assert_close(deployed(x), q(x), rtol=1e-12, atol=1e-12)
    steps = deployed.act_quant.steps(x)
    assert torch.equal(deployed.act_quant.steps(deployed.act_quant.before(steps)), steps)
    assert torch.equal(steps, q.act_quant.codes(x) - deployed.act_quant.zero_point)


def test_quantizers_of_before_are_read_as_they_are():
    _, q = twins(GEOMETRIES["plain"], equalized=False)
    state = q.act_quant.__getstate__()
    del state["_buffers"]["equalizer"]
    old = type(q.act_quant).__new__(type(q.act_quant))
    old.__setstate__(state)
    assert torch.equal(old(uneven()), q.act_quant(uneven()))


def test_deployed_quantizers_of_before_are_read_as_they_are():
    fixed = FixedQuantizer(twins(GEOMETRIES["plain"], equalized=False)[1].act_quant)
    state = fixed.__getstate__()
    del state["_buffers"]["equalizer"]
    old = FixedQuantizer.__new__(FixedQuantizer)
    old.__setstate__(state)
    assert torch.equal(old(uneven()), fixed(uneven()))


@pytest.mark.parametrize("equalize", [False, True])
def test_plugins_that_would_misread_a_checkpoint_refuse_it(equalize):
    """Those of before equalizers know formats up to 1 and would leave the equalizers out."""
    record = QuantRecord(QCConfig(act_equalize=equalize).to_dict())
    assert record.format == 1 + equalize and pickle.loads(pickle.dumps(record)) == record
    record.format = FORMAT + 1
    with pytest.raises(RuntimeError, match="Upgrade yolo-qc-plugin"):
        pickle.loads(pickle.dumps(record))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Folder of a real run at 3 bits, and the state of its model after calibration.

    In each epoch a weight of its average becomes NaN.
    """
    folder, seen = tmp_path_factory.mktemp("equalized"), {}

    def poison(trainer):
        with torch.no_grad():
            trainer.ema.ema.get_submodule("model.3.conv").weight[0, 0, 0, 0] = float("nan")

    model = YOLO("yolov5n.yaml")
    model.add_callback("on_train_batch_end", poison)
    add_qc_callbacks(model, bits=3, per_channel=True, act_equalize=True)
    model.add_callback("on_train_start", lambda t: seen.update(copy.deepcopy(t.model).state_dict()))
    model.train(data=str(digits), project=str(folder), name="run", **{**TINY, "epochs": 2, "batch": 16})
    return folder / "run", seen


def test_a_run_equalizes_what_is_below_8_bits(run):
    folder, start = run
    report = json.loads((folder / "qc" / "report.json").read_text())
    narrow = [layer for layer in report["layers"] if layer["act_bits"] == 3]
    assert len(narrow) > 40 and all(layer["act_equalizer"] for layer in narrow)
    assert len({f for layer in narrow for f in layer["act_equalizer"]}) > 3
    assert {layer["act_equalizer"] for layer in report["layers"] if layer["act_bits"] == 8} == {None}
    model = YOLO(folder / "weights" / "qat.pt").model
    for name, conv in quant_convs(model):  # fixed once they are found
        if conv.act_quant.equalizer is not None:
            assert torch.equal(conv.act_quant.equalizer, start[f"{name}.act_quant.equalizer"]), name


def test_what_is_saved_is_finite(run):
    for name in ("last.pt", "qat.pt"):
        assert all(v.isfinite().all() for v in YOLO(run[0] / "weights" / name).model.state_dict().values())


def test_one_model_one_number(run, digits, tmp_path):
    """The file, its deployed form and its exported graphs give the same codes and figures."""
    folder, _ = run
    for kind in ("int8", "int4"):
        yolo = YOLO(folder / "weights" / "qat.pt")
        choose_onnx_kind(yolo, kind)
        file = yolo.export(format="onnx", imgsz=64, simplify=True)
        found = check(folder / "weights" / "qat.pt", file, str(digits), images=4)
        assert found["passed"], (kind, found["weights"], found["checkpoint"], found["pytorch"], found["runtimes"])
        for runtime in found["runtimes"]:
            assert "skipped" in runtime or runtime["changed_end_to_end"] == 0, runtime


def test_readers_of_one_tensor_share_its_product(run):
    """An exported graph equalizes each tensor once."""
    import onnx

    folder, _ = run
    graph = onnx.load(YOLO(folder / "weights" / "qat.pt").export(format="onnx", imgsz=64)).graph
    sources = {out: n for n in graph.node for out in n.output}
    before = [n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"]
    products = [sources[name] for name in before if name in sources and sources[name].op_type == "Mul"]
    products += [sources[sources[n].input[0]] for n in before if n in sources and sources[n].op_type == "Max"]
    assert len(products) > 20 and len({tuple(n.input) for n in products}) == len({n.name for n in products})
