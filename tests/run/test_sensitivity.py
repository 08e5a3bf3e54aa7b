# yolo_qc_plugin, AGPL-3.0
"""What one quantizer costs alone."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import FLOAT
from ultralytics import YOLO

from yolo_qc_plugin import model_yaml
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.host.distillation import head_loss
from yolo_qc_plugin.host.images import read_images, spread_out
from yolo_qc_plugin.quant.quantizer import WeightQuantizer
from yolo_qc_plugin.run.sensitivity import GAINS, KINDS, Probe, completed, describe, measure, size_for, to_measure


@pytest.fixture(scope="module")
def float_model():
    return YOLO(FLOAT).model.float().eval()


@pytest.fixture(scope="module")
def probe(float_model):
    torch.manual_seed(0)
    return Probe(float_model, QCConfig(), list(torch.rand(4, 3, 64, 64).split(2)))


def test_a_cost_is_the_loss_of_the_float_model_with_that_weight_alone_rounded(probe, float_model):
    name = "model.2.cv1.conv"
    other = deepcopy(float_model)
    conv = other.get_submodule(name)
    quant = WeightQuantizer(3, conv.out_channels)
    quant.calibrate(conv.weight, "mse")
    with torch.no_grad():
        conv.weight.copy_(quant(conv.weight))
        losses = [head_loss(other.model[-1], other(x), float_model(x), GAINS).item() for x in probe.images]
    assert probe.cost("weights", name, 3) == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "yaml",
    [
        "yolo11n-seg.yaml",
        "yolov9t.yaml",
        "yolov10n.yaml",
        "yolo26n.yaml",
        "yolo11n-cls.yaml",
        model_yaml("yolov7-tiny"),
    ],
)
@torch.no_grad()
def test_blocks_one_by_one_are_the_forward_pass(yaml):
    """Of families whose blocks read several others, and blocks further back than the last."""
    model = YOLO(str(yaml)).model.float().eval()
    image = torch.rand(1, 3, 64, 64)
    wanted = flat(model(image))
    for stops in ([None], [4, None], [4, 4, 9, None]):
        outputs = [image]
        for stop in stops:
            outputs = architecture.run_blocks(model, outputs, stop)
            assert len(outputs) == 1 + (len(model.model) if stop is None else stop)
        assert len(wanted) == len(flat(outputs[-1])) and all(map(torch.equal, wanted, flat(outputs[-1])))
    assert sum(o is None for o in outputs) > len(outputs) / 3  # memory is let go of


def flat(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for part in (outputs.values() if isinstance(outputs, dict) else outputs) for t in flat(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cost_is_the_same_whatever_was_measured_before(probe, kind):
    names = list(probe.convs if kind == "weights" else probe.inputs)[1::3]
    forwards, backwards = ({n: probe.cost(kind, n, 3) for n in order} for order in (names, names[::-1]))
    assert forwards == backwards and len(names) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_cost_falls_with_the_width_and_nothing_stays_on(probe, kind):
    names = list(probe.convs if kind == "weights" else probe.inputs)
    for name in names[:: len(names) // 3]:
        costs = [probe.cost(kind, name, bits) for bits in (2, 4, 8)]
        assert costs[0] > 2 * costs[1] > 4 * costs[2] > 0
    with torch.no_grad():
        head = probe.model.model[-1]
        again = [head_loss(head, probe.model(x), y, GAINS) for x, y in zip(probe.images, probe._outputs)]
    assert max(map(abs, again)) < 1e-6


def test_the_float_model_stays_as_it_is(float_model):
    before = deepcopy(float_model.state_dict())
    Probe(float_model, QCConfig(), [torch.rand(1, 3, 64, 64)]).cost("weights", "model.0.conv", 2)
    assert before.keys() == float_model.state_dict().keys()
    assert all(torch.equal(v, float_model.state_dict()[k]) for k, v in before.items())


def test_what_is_counted(probe):
    conv = probe.convs["model.0.conv"]
    assert probe.macs["model.0.conv"] == conv.weight.numel() * 32 * 32  # stride 2 at 64 px
    assert "model.0.conv" not in {name for readers in probe.readers.values() for name in readers}  # reads the image
    assert sorted(["model.0.conv", *(n for names in probe.readers.values() for n in names)]) == sorted(probe.convs)


def test_measuring_goes_on_where_it_stopped(probe, tmp_path, monkeypatch):
    file = tmp_path / "sensitivity.json"
    image = tmp_path / "a.jpg"
    image.write_bytes(b"one")
    about = describe(probe, QCConfig(), [image], 64)
    image.write_bytes(b"another")
    assert describe(probe, QCConfig(), [image], 64) != about
    wanted = {("weights", "model.0.conv"): (2, 4), ("activations", "model.1.conv"): (2,)}
    asked = []
    monkeypatch.setattr(probe, "cost", lambda *which: asked.append(which) or float(len(asked)))
    first = measure(probe, dict(list(wanted.items())[:1]), about, file)
    assert first["weights"] == {"model.0.conv": {"2": 1.0, "4": 2.0}}
    costs = measure(probe, wanted, about, file)
    assert asked[2:] == [("activations", "model.1.conv", 2)]
    assert json.loads(file.read_text()) == {"about": about, "costs": costs}
    measure(probe, wanted, {**about, "imgsz": 96}, file)  # of other images
    assert len(asked) == 6


def test_costs_between_the_measured_widths_follow_from_them():
    """A quarter a bit beyond the last, the same share a bit between two; what was measured stays, 0 stays 0."""
    wanted = {("weights", "a"): range(2, 9), ("weights", "b"): (4, 7), ("activations", "c"): (8,)}
    wanted |= {("activations", "d"): (5, 6, 7), ("weights", "e"): (4, 5, 6), ("activations", "f"): (2, 3, 4, 5)}
    assert {name: widths for (_, name), widths in to_measure(wanted).items()} == {
        "a": [2, 3, 4, 6], "b": [4], "c": [8], "d": [5, 6], "e": [4, 6], "f": [2, 3, 4]
    }  # fmt: skip
    costs = {
        "weights": {"a": {"2": 8.0, "3": 3.0, "4": 0.9, "6": 0.1}, "b": {"4": 0.64}, "e": {"4": 0.5, "6": 0.0}},
        "activations": {"c": {"8": 0.2}, "f": {"2": 1.0, "3": -1e-9, "4": 0.0}, "d": {"5": 0.5, "6": 0.3}},
    }
    found = completed(costs, wanted)
    whole = {"2": 8.0, "3": 3.0, "4": 0.9, "5": 0.3, "6": 0.1, "7": 0.025, "8": 0.00625}
    assert found["weights"]["a"] == pytest.approx(whole)
    assert found["weights"]["b"] == pytest.approx({"4": 0.64, "7": 0.01})
    assert found["weights"]["e"] == {"4": 0.5, "5": 0.0, "6": 0.0}
    assert found["activations"]["c"] == {"8": 0.2}
    assert found["activations"]["d"] == pytest.approx({"5": 0.5, "6": 0.3, "7": 0.075})
    assert found["activations"]["f"] == {"2": 1.0, "3": 0.0, "4": 0.0, "5": 0.0}


def test_costs_are_of_half_the_size_of_training_but_of_no_small_images():
    assert [size_for(imgsz) for imgsz in (64, 320, 416, 640, 1280)] == [64, 320, 320, 320, 640]
    assert size_for([480, 960]) == size_for((960,)) == 480


def test_images_are_padded_and_spread_over_their_order(tmp_path):
    cv2 = pytest.importorskip("cv2")
    image = np.zeros((20, 40, 3), np.uint8)
    image[..., 2] = 255  # red, as OpenCV writes it
    cv2.imwrite(str(tmp_path / "a.png"), image)
    batch = read_images([tmp_path / "a.png"], 64)
    assert batch.shape == (1, 3, 64, 64) and batch[0, :, 32, 32].tolist() == [1, 0, 0]
    assert batch[0, :, 0, 0].tolist() == pytest.approx([114 / 255] * 3)
    assert read_images([tmp_path / "a.png"], 64, channels=1).shape == (1, 1, 64, 64)
    image = np.dstack([image, np.full((20, 40), 51, np.uint8)])  # blue, green, red and a fourth channel, as they are
    cv2.imwrite(str(tmp_path / "four.png"), image)
    four = read_images([tmp_path / "four.png"], 64, channels=4)
    assert four[0, :, 32, 32].tolist() == pytest.approx([0, 0, 1, 0.2])
    with pytest.raises(QCError, match=r"four.png has 4 channels; the model takes 10"):
        read_images([tmp_path / "four.png"], 64, channels=10)
    assert spread_out(list("abcdefgh"), 4) == list("aceg") and spread_out(list("ab"), 4) == list("ab")


def test_images_that_cannot_be_read_are_left_out(tmp_path, caplog):
    """As of training; where none can be read, one line says so."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 40, 3), np.uint8))
    (tmp_path / "b.png").write_text("no image")
    (tmp_path / "c.png").touch()
    files = [tmp_path / f"{name}.png" for name in ("b", "a", "c", "missing")]
    assert len(read_images(files, 64)) == 1
    for file in files[:1] + files[2:]:
        assert f"{file} cannot be read as an image and is left out" in caplog.text
    with pytest.raises(QCError, match=r"of 1 images none can be read, such as .*b.png"):
        read_images(files[:1], 64)
