# yolo_qc_plugin, AGPL-3.0
"""Reconstruction before training: what it brings nearer to the float model, what it leaves alone, that it repeats."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import FLOAT
from ultralytics import YOLO

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.host.distillation import Gains, head_loss
from yolo_qc_plugin.host.teacher import Teacher
from yolo_qc_plugin.quant.calibrate import calibrate
from yolo_qc_plugin.quant.inject import inject, share_quantizers
from yolo_qc_plugin.run import reconstruction
from yolo_qc_plugin.run.reconstruction import Done, reconstruct_model

GAINS = Gains(outputs=1.0, features=1.0, labels=0.0, cls=0.5, dfl=1.5)


def start(name: str | None = None):
    """A calibrated model, its teacher and images of their own kind."""
    torch.manual_seed(0)
    model = YOLO(f"{name}.yaml" if name else FLOAT).model.float()
    images = [torch.rand(8, 3, 64, 64) for _ in range(3)]
    teacher = Teacher(model)
    teacher.measure(images)
    model.load_state_dict(teacher.model.state_dict())
    config = QCConfig(bits=4)
    inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
    share_quantizers(model, architecture.blank_image(model))
    calibrate(model.eval(), images, model)
    for name, p in model.named_parameters():
        p.requires_grad_(".dfl" not in name)
    return model, teacher, images


def rebuild(model, teacher, images, steps: int, seed: int, folder: Path | None = None, key: str = "") -> list[dict]:
    """Reconstruct, with a file where a folder is given."""
    with tempfile.TemporaryDirectory() as temporary:
        done = Done(folder or Path(temporary), key)
        return reconstruct_model(model, teacher, images, GAINS, steps, seed, done)


def outputs_loss(model, teacher, images) -> float:
    """The loss of outputs of the whole model on all images."""
    image = torch.cat(images)
    with torch.no_grad():
        return head_loss(architecture.student(model).model[-1], model(image), teacher.model(image), GAINS).item()


def test_every_layer_and_the_whole_come_nearer_to_the_float_model():
    model, teacher, images = start()
    before = outputs_loss(model, teacher, images)
    found = rebuild(model, teacher, images, steps=60, seed=0)
    assert len(found) == sum(any(True for _ in layer.parameters()) for layer in model.model)
    assert all(row["after"] <= row["before"] for row in found)
    assert sum(row["after"] < 0.8 * row["before"] for row in found) > len(found) / 2
    assert outputs_loss(model, teacher, images) < 0.8 * before
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["yolo26n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"])
def test_every_task_has_layers_to_reconstruct(name):
    model, teacher, images = start(name)
    found = rebuild(model, teacher, images, steps=2, seed=0)
    assert all(row["after"] <= row["before"] for row in found)


def test_statistics_frozen_layers_and_the_teacher_stay():
    model, teacher, images = start()
    model.model[1].requires_grad_(False)
    before, taught = deepcopy(model.state_dict()), deepcopy(teacher.model.state_dict())
    rebuild(model, teacher, images, steps=3, seed=0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("model.2.") for k in changed) and not any(k.startswith("model.1.") for k in changed)
    assert not any("running" in k for k in changed)
    assert all(torch.equal(v, taught[k]) for k, v in teacher.model.state_dict().items())


def test_a_layer_that_would_end_farther_is_put_back(monkeypatch):
    monkeypatch.setattr(reconstruction, "LR", 10.0)
    model, teacher, images = start()
    before = deepcopy(model.state_dict())
    found = rebuild(model, teacher, images, steps=2, seed=0)
    put_back = [row["layer"] for row in found if row["after"] == row["before"]]
    assert put_back
    for place in put_back:
        state = model.model[place].state_dict()
        assert all(torch.equal(v, before[f"model.{place}.{k}"]) for k, v in state.items())


def test_the_same_seed_gives_the_same_model():
    states = []
    for seed in 0, 0, 1:
        model, teacher, images = start()
        rebuild(model, teacher, images, steps=3, seed=seed)
        states.append(model.state_dict())
    one, same, other = states
    assert all(torch.equal(v, same[k]) for k, v in one.items())
    assert not all(torch.equal(v, other[k]) for k, v in one.items())


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """Stopped after some layers, a second attempt ends where an undisturbed one does; another key begins anew."""
    monkeypatch.setattr(reconstruction, "PERIOD", -1)
    model, teacher, images = start()
    whole = rebuild(model, teacher, images, steps=3, seed=0)
    expected, fit, fitted = deepcopy(model.state_dict()), reconstruction._fit, []

    def stop_at_the_fifth(layer, *args):
        fitted.append(layer.i)
        if len(fitted) == 5:
            raise KeyboardInterrupt
        return fit(layer, *args)

    monkeypatch.setattr(reconstruction, "_fit", stop_at_the_fifth)
    model, teacher, images = start()
    with pytest.raises(KeyboardInterrupt):
        rebuild(model, teacher, images, 3, 0, tmp_path, "a")
    model, teacher, images = start()
    assert rebuild(model, teacher, images, 3, 0, tmp_path, "a") == whole
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert sorted(fitted) == sorted([*(row["layer"] for row in whole), fitted[4]])
    fitted.clear()
    with pytest.raises(KeyboardInterrupt):
        rebuild(model, teacher, images, 3, 0, tmp_path, "b")
    assert len(fitted) == 5


def test_fewer_images_are_kept_where_layers_are_large(monkeypatch):
    model, teacher, images = start()
    largest = reconstruction.largest_output(teacher.model, images[0][:1])
    sizes = [layer.numel() for layer in (teacher.model.model[0](images[0][:1]),)]
    assert largest >= 4 * sizes[0]
    monkeypatch.setattr(reconstruction, "MEMORY", 5 * largest)
    assert reconstruction.Streams(model, teacher.model, images, torch.device("cpu")).count == 5


def test_a_run_writes_what_it_found(train, tmp_path):
    options = {"output_bits": None, "correction": "off", "reconstruction": 5}
    train(options, model=FLOAT)
    found = json.loads((tmp_path / "run" / "qc" / "reconstruction.json").read_text())
    assert [set(row) for row in found] == [{"layer", "type", "before", "after"}] * len(found) and found
    assert not (tmp_path / "run" / "weights" / "reconstruction.pt").exists()
    train({**options, "reconstruction": 0}, model=FLOAT, name="without")
    assert not (tmp_path / "without" / "qc" / "reconstruction.json").exists()
