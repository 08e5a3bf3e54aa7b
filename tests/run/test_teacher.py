# yolo_qc_plugin, AGPL-3.0
"""The float model that a run starts from as its teacher: when it teaches, what a run shows and keeps of it."""

from __future__ import annotations

import csv
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import FLOAT, last_epoch, steps_of
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host.architecture import scores_as
from yolo_qc_plugin.quant.layers import is_quantized

OPTIONS = {"output_bits": None, "correction": "off", "telemetry": False}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "weights" / "last.pt")[0].state_dict()


def test_the_start_teaches_and_results_have_a_column_of_it(train, tmp_path):
    yolo = train({**OPTIONS, "correction": "channel"}, model=FLOAT, epochs=2, val=False)
    assert steps_of(yolo.trainer).distillation.teacher is not None
    assert last_epoch(tmp_path / "run")["train/teacher_loss"] > 0
    with (tmp_path / "run" / "results.csv").open() as file:
        header, *rows = csv.reader(file)
    *rows, kept = rows
    assert len(rows) == 2 and all(len(row) == len(header) for row in (*rows, kept))
    assert [row[header.index("val/teacher_loss")] for row in rows] == ["0", "0"]
    assert all(row[header.index("val/box_loss")] != row[header.index("val/teacher_loss")] for row in rows[1:])
    assert not is_quantized(load_checkpoint(tmp_path / "run" / "weights" / "teacher.pt")[0])


def test_labels_can_be_left_out(train, digits, tmp_path):
    """Without their weight, what the labels are makes no difference to what is learned from a teacher."""
    moved = tmp_path / "moved"
    text = digits.read_text().replace(str(digits.parent), str(moved))
    for source in digits.parent.rglob("*"):
        target = moved / source.relative_to(digits.parent)
        if source.suffix == ".txt" and "train" in source.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(f"3{line[1:]}" for line in source.open()))  # every digit is a 3
        elif source.is_file() and source.suffix != ".cache":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (moved / digits.name).write_text(text)
    found = {}
    for name, data, weight in (("a", digits, 0.0), ("b", moved / digits.name, 0.0), ("c", moved / digits.name, 1.0)):
        train({**OPTIONS, "label_weight": weight}, model=FLOAT, name=name, data=str(data), mosaic=0.0, seed=1)
        found[name] = weights(tmp_path / name)
    assert all(torch.equal(v, found["b"][k]) for k, v in found["a"].items())
    assert not all(torch.equal(v, found["c"][k]) for k, v in found["a"].items())


def test_labels_have_no_weight_without_a_teacher(train):
    with pytest.raises(QCError, match=r"label_weight=0\.5 weighs labels against a teacher"):
        train({**OPTIONS, "teacher": "off", "label_weight": 0.5})


@pytest.mark.parametrize("options,model,message", [
    ({"teacher": "off"}, FLOAT, r"label_weight=0\.0 leaves nothing to learn from with teacher='off'"),
    ({"distill_outputs": 0, "distill_features": 0}, FLOAT, r"label_weight=0\.0 leaves nothing to learn from"),
    ({}, "yolov5n.yaml", r"label_weight=0\.0 needs a teacher, and model=yolov5n\.yaml has a fitness of 0\.0"),
])  # fmt: skip
def test_without_labels_and_a_teacher_nothing_is_trained(train, tmp_path, options, model, message):
    with pytest.raises(QCError, match=message):
        train({**OPTIONS, **options, "label_weight": 0.0}, model=model)
    assert not (tmp_path / "run" / "results.csv").exists()


@pytest.mark.parametrize("options,arguments", [
    ({}, {"model": "yolov5n.yaml"}),
    ({"teacher": "off"}, {}),
    ({"distill_outputs": 0, "distill_features": 0}, {}),
    ({}, {"single_cls": True}),
])  # fmt: skip
def test_nothing_is_left_where_nobody_teaches(train, tmp_path, monkeypatch, options, arguments):
    """Untrained, not asked for, without any weight, and with a head that begins anew, whatever such a start scores."""
    monkeypatch.setattr("yolo_qc_plugin.run.start.MIN_FITNESS", 0.0)
    yolo = train({**OPTIONS, **options}, **{"model": FLOAT, **arguments})
    assert steps_of(yolo.trainer).distillation is None
    assert "train/teacher_loss" not in last_epoch(tmp_path / "run")
    assert not (tmp_path / "run" / "weights" / "teacher.pt").exists()


def test_batch_norm_keeps_the_statistics_of_a_start_that_teaches(train, tmp_path):
    """Its weights learn all the same; without the option, or the teacher, the statistics follow the training."""
    before = load_checkpoint(FLOAT)[0].state_dict()

    def same(key: str, **options) -> bool:
        train({**OPTIONS, **options}, model=FLOAT, exist_ok=True)
        after = weights(tmp_path / "run")
        return all(torch.equal(v, after[k]) for k, v in before.items() if k.endswith(key))

    assert same("running_mean") and same("running_var") and not same("bn.weight")
    assert not same("running_mean", bn_freeze=False)
    assert not same("running_mean", teacher="off")


@pytest.mark.parametrize("yaml,known", [(None, True), ("yolov8n.yaml", False), ("yolov8n-cls.yaml", False)])
def test_class_scores_are_known_by_their_weights(yaml, known):
    """In another order too; those of another model's head, or of the same begun anew, are not."""
    model = load_checkpoint(FLOAT)[0] if known else YOLO(yaml).model
    other = deepcopy(model)
    for layer in [other.model[-1].linear] if "cls" in str(yaml) else [branch[-1] for branch in other.model[-1].cv3]:
        layer.weight.data = layer.weight.data.flip(0) if known else torch.randn_like(layer.weight)
    assert scores_as(model, other) == known and scores_as(model, deepcopy(model))
    assert not scores_as(load_checkpoint(FLOAT)[0], YOLO("yolov8n.yaml").model)


def test_a_resumed_run_has_the_same_teacher(train, tmp_path):
    """Killed in its second epoch and moved, it ends as the uninterrupted one does, without the start's own file.

    Without the teacher's, a run that has one is refused.
    """
    start = tmp_path / "start.pt"
    start.write_bytes(FLOAT.read_bytes())
    train(OPTIONS, model=start, name="whole", epochs=2)

    def kill(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(OPTIONS, {"on_train_batch_end": kill}, model=start, name="killed", epochs=2)
    start.unlink()
    weights_now = (tmp_path / "killed").rename(tmp_path / "moved") / "weights"
    (weights_now / "teacher.pt").rename(tmp_path / "teacher.pt")
    with pytest.raises(QCError, match=r"moved/weights/teacher\.pt is missing"):
        YOLO(weights_now / "last.pt").train(resume=True)
    (tmp_path / "teacher.pt").rename(weights_now / "teacher.pt")
    YOLO(weights_now / "last.pt").train(resume=True)
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
