# yolo_qc_plugin, AGPL-3.0
"""Training from photographs without labels: what is written, what is kept, what is predicted again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT, TINY, TINY_YAML
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import YAML
from ultralytics.utils.callbacks.base import default_callbacks

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.run import labelled
from yolo_qc_plugin.run.callbacks import QCCallbacks
from yolo_qc_plugin.run.labels import format_labels, label, label_for_run, labels_of_run, refuse_without_labels

ALL = 32
QUICK = {"labels": "teacher", "correction": "off", "output_bits": None, "telemetry": False, "calibration_batches": 1}


@pytest.fixture
def photos(digits, tmp_path) -> Path:
    """The digits without their labels; the names of one folder are those of the other."""
    return Path(shutil.copytree(digits.parent / "images", tmp_path / "photos"))


@pytest.fixture
def predicted(monkeypatch) -> list[str]:
    """Files that any predictor has read, in this test."""
    files: list[str] = []
    seen = [lambda predictor: files.extend(Path(p).stem for p in predictor.batch[0])]
    monkeypatch.setitem(default_callbacks, "on_predict_postprocess_end", seen)
    return files


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Relative path -> bytes and time of all files but Ultralytics' caches."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".cache"]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def rows(file: Path) -> torch.Tensor:
    return torch.tensor([[float(v) for v in line.split()] for line in file.read_text().splitlines()]).reshape(-1, 5)


def test_labels_are_the_models_own_predictions(photos, tmp_path):
    before = contents(photos)
    summary = label(FLOAT, photos, tmp_path / "out", device="cpu")
    assert contents(photos) == before
    images = sorted((tmp_path / "out" / "images").rglob("*.jpg"))
    assert len(images) == ALL == summary["by_model"] and summary["by_data"] == summary["unreadable"] == 0
    model, boxes = YOLO(FLOAT), 0
    for image in images:
        assert image.resolve().is_relative_to(photos)
        (result,) = model.predict(image.resolve(), imgsz=64, conf=0.25, verbose=False, device="cpu")
        expected = torch.cat((result.boxes.cls[:, None], result.boxes.xywhn), 1)
        found = rows(tmp_path / "out" / "labels" / image.parent.name / f"{image.stem}.txt")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        boxes += len(expected)
    assert boxes == sum(summary["boxes"].values()) > ALL
    assert {image.resolve() for image in images} == set(photos.rglob("*.jpg"))  # also where names are the same
    data = check_det_dataset(summary["data"])
    assert data["names"] == model.names and (summary["train"], summary["val"]) == (29, 3)


def test_labels_of_the_data_set_are_kept(photos, tmp_path, predicted):
    """Byte for byte; an empty file says that nothing is there."""
    given = {photos / "train" / "00000.txt": b"3 0.50 .5 2e-1 0.200000\r\n", photos / "val" / "00001.txt": b""}
    for file, content in given.items():
        file.write_bytes(content)
    (tmp_path / "photos.yaml").write_text("train: photos/train\nval: photos/val\n")
    summary = label(FLOAT, tmp_path / "photos.yaml", tmp_path / "out", device="cpu")
    assert (summary["train"], summary["val"], summary["by_data"], summary["by_model"]) == (24, 8, 2, 30)
    for file, content in given.items():
        assert (tmp_path / "out" / "labels" / file.relative_to(photos)).read_bytes() == content
    assert len(predicted) == 30


def test_interrupted_labelling_goes_on(photos, tmp_path, predicted, monkeypatch):
    def stop(predictor):
        if len(predicted) == 5:
            raise KeyboardInterrupt

    whole = label(FLOAT, photos, tmp_path / "whole", device="cpu")
    predicted.clear()
    with monkeypatch.context() as patched:
        patched.setitem(default_callbacks, "on_predict_batch_start", [stop])
        with pytest.raises(KeyboardInterrupt):
            label(FLOAT, photos, tmp_path / "out", device="cpu")
    texts = contents(tmp_path / "out" / "labels")
    assert len(texts) == 5
    summary = label(FLOAT, photos, tmp_path / "out", device="cpu")
    assert len(predicted) == ALL
    assert contents(tmp_path / "out" / "labels").items() >= texts.items()
    once = {name: content for name, (content, _) in contents(tmp_path / "whole" / "labels").items()}
    assert {name: content for name, (content, _) in contents(tmp_path / "out" / "labels").items()} == once
    assert {**summary, "data": ""} == {**whole, "data": ""}

    predicted.clear()
    assert label(FLOAT, photos, tmp_path / "out", device="cpu") == summary and not predicted
    higher = label(FLOAT, photos, tmp_path / "out", confidence=0.8, device="cpu")
    assert len(predicted) == ALL and sum(higher["boxes"].values()) < sum(summary["boxes"].values())


def test_photographs_that_come_and_go(photos, tmp_path, predicted):
    (photos / "train" / "broken.jpg").write_bytes(b"no picture")
    first = label(FLOAT, photos / "train", tmp_path / "out", device="cpu")
    assert first["unreadable"] == 1 and first["train"] + first["val"] == 24
    last, other = sorted((photos / "train").glob("0*.jpg"))[-1], sorted((photos / "val").glob("*.jpg"))[0]
    last.unlink()
    shutil.copy(other, photos / "train" / "zero.jpg")
    predicted.clear()
    label(FLOAT, photos / "train", tmp_path / "out", device="cpu")
    assert predicted == ["zero"]
    names = {file.stem for file in (tmp_path / "out" / "labels").rglob("*.txt")}
    assert "zero" in names and last.stem not in names
    assert names == {file.stem for file in (tmp_path / "out" / "images").rglob("*.jpg")}
    predicted.clear()
    with pytest.raises(QCError, match=f"holds labels of {photos / 'train'}, .* not of {photos / 'val'}; give another"):
        label(FLOAT, photos / "val", tmp_path / "out", device="cpu")
    assert names == {file.stem for file in (tmp_path / "out" / "labels").rglob("*.txt")}
    (photos / "train").rename(tmp_path / "gone")  # others of the same names
    label(FLOAT, photos / "val", tmp_path / "out", device="cpu")
    assert len(predicted) == len(list((tmp_path / "out" / "labels").rglob("*.txt"))) == 8


def test_labels_that_were_changed_by_hand_are_kept(photos, tmp_path, predicted):
    """The model's and copies of the user's, called again and with another confidence; all others follow the call."""
    given = photos / "train" / "00000.txt"
    given.write_text("3 0.5 0.5 0.2 0.2\n")
    (tmp_path / "photos.yaml").write_text("train: photos/train\nval: photos/val\n")

    def again(confidence=0.25):
        predicted.clear()
        return label(FLOAT, tmp_path / "photos.yaml", tmp_path / "out", confidence, device="cpu")

    assert again()["by_hand"] == 0
    labels = tmp_path / "out" / "labels"
    changed = {
        labels / "train" / "00000.txt": "3 0.5 0.5 0.3 0.3\n",
        labels / "val" / "00001.txt": "0 0.1 0.1 0.1 0.1\n",
    }
    for file, text in changed.items():
        file.write_text(text)
    for confidence, expected in ((0.25, 0), (0.9, ALL - 2), (0.9, 0)):
        summary = again(confidence)
        assert (summary["by_data"], summary["by_hand"], summary["by_model"]) == (0, 2, 30) and len(
            predicted
        ) == expected
        assert {file: file.read_text() for file in changed} == changed
    assert "0 labelled by the data set, 30 by float.pt" in format_labels(summary)
    assert "2 changed by hand and kept" in format_labels(summary)
    (photos / "val" / "00001.jpg").unlink()  # and its labels go with it
    assert again(0.9)["by_hand"] == 1 and not (labels / "val" / "00001.txt").exists()


def test_labels_that_were_changed_by_hand_outlive_a_move_and_an_interruption(photos, tmp_path, predicted, monkeypatch):
    """Photographs in a folder of another name are linked anew; an interrupted call forgets nothing."""
    data, out = tmp_path / "photos.yaml", tmp_path / "out"
    data.write_text("train: photos/train\nval: photos/val\n")
    label(FLOAT, data, out, device="cpu")
    first, second = (out / "labels" / name for name in ("train/00000.txt", "val/00001.txt"))
    first.write_text("3 0.5 0.5 0.3 0.3\n")
    photos.rename(tmp_path / "moved")
    data.write_text("train: moved/train\nval: moved/val\n")

    def stop(predictor):
        if len(predicted) == 5:
            raise KeyboardInterrupt

    predicted.clear()
    with monkeypatch.context() as patched:
        patched.setitem(default_callbacks, "on_predict_batch_start", [stop])
        with pytest.raises(KeyboardInterrupt):
            label(FLOAT, data, out, device="cpu")
    label(FLOAT, data, out, device="cpu")
    second.write_text("0 0.1 0.1 0.1 0.1\n")
    predicted.clear()
    with monkeypatch.context() as patched:
        patched.setitem(default_callbacks, "on_predict_batch_start", [stop])
        with pytest.raises(KeyboardInterrupt):
            label(FLOAT, data, out, 0.9, device="cpu")
    third = next(file for file in sorted((out / "labels").rglob("*.txt")) if file not in (first, second))
    third.write_text("1 0.2 0.2 0.1 0.1\n")  # what the interrupted call had found
    summary = label(FLOAT, data, out, 0.8, device="cpu")
    assert (summary["by_hand"], summary["by_model"]) == (3, ALL - 3)
    assert [f.read_text()[:3] for f in (first, second, third)] == ["3 0", "0 0", "1 0"]
    assert all(Path(os.readlink(image)).exists() for image in (out / "images").rglob("*.jpg"))


def test_what_was_added_by_hand_is_kept(photos, tmp_path, predicted):
    out = tmp_path / "out"
    label(FLOAT, photos / "train", out, device="cpu")
    mine = out / "images" / "train" / "mine.jpg", out / "labels" / "train" / "mine.txt"
    shutil.copy(next((photos / "val").glob("*.jpg")), mine[0])
    mine[1].write_text("0 0.5 0.5 0.1 0.1\n")
    whole = {file.name for file in (out / "images").rglob("*")}
    gone = sorted((photos / "train").glob("*.jpg"))[-1]
    gone.unlink()
    label(FLOAT, photos / "train", out, confidence=0.9, device="cpu")
    assert mine[1].read_text() == "0 0.5 0.5 0.1 0.1\n"
    assert {file.name for file in (out / "images").rglob("*")} == whole - {gone.name}


def test_figures_on_a_models_labels_are_said_to_be_agreement(train, photos, tmp_path, predicted, caplog):
    """In a run on what the command wrote, and where that run is corrected again."""
    label(FLOAT, photos, tmp_path / "out", device="cpu")
    options = {"correction": "off", "output_bits": None, "telemetry": False, "calibration_batches": 1}
    run = train(options, model=FLOAT, data=str(tmp_path / "out" / "data.yaml")).trainer
    assert "photographs to validate are labelled by float.pt: figures tell the agreement with it" in caplog.text
    caplog.clear()
    label_for_run(run, QCConfig(labels="teacher"))  # which has nothing to do
    assert "figures tell the agreement with it" in caplog.text
    tensor = ["correction=tensor"]
    assert main(["correct", f"model={run.best}", f"project={tmp_path}", "name=again", "batch=4", *tensor]) == 0
    for folder in run.save_dir, tmp_path / "again":
        card = (folder / "qc" / "MODEL_CARD.md").read_text("utf-8")
        assert "of its photographs: agreement with it, not accuracy)" in card and "- Data: photos" in card
    command = json.loads((tmp_path / "again" / "qc" / "report.json").read_text())["training"]["command"]
    assert command.endswith(f" project={tmp_path} name=again batch=4 correction=tensor")


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}"])
def test_another_file_of_the_records_name_says_nothing(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    assert labels_of_run(SimpleNamespace(args=SimpleNamespace(data=str(tmp_path / "data.yaml")))) == {}


def test_another_folder_is_not_touched(photos, tmp_path):
    mine = Path(shutil.copytree(photos, tmp_path / "images"))
    with pytest.raises(QCError, match=f"{mine} holds other files than a labelled data set"):
        label(FLOAT, photos, mine)
    assert contents(mine) == contents(photos)


def test_without_links_photographs_are_copied(photos, tmp_path, predicted, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(labelled.os, "symlink", refuse)
    monkeypatch.setattr(labelled.os, "link", refuse)
    for _ in range(2):
        label(FLOAT, photos, tmp_path / "out", device="cpu")
    images = list((tmp_path / "out" / "images").rglob("*.jpg"))
    assert len(images) == len(predicted) == ALL and not any(image.is_symlink() for image in images)


def test_a_run_from_a_bare_folder(train, photos, tmp_path, predicted, caplog):
    """Ultralytics trains on the labelled data set; a run that was interrupted goes on with it."""

    def stop(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    seen = {}
    start = load_checkpoint(FLOAT)[0].state_dict()
    callbacks = {
        "on_train_start": lambda t: seen.update(weight=t.model.state_dict()["model.3.conv.weight"].clone(), t=t),
        "on_train_epoch_start": stop,
    }
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, callbacks, model=FLOAT, data=str(photos), epochs=2)
    trainer, data = seen["t"], tmp_path / "run" / "qc" / "data"
    assert Path(trainer.args.data) == data / "data.yaml" and len(predicted) == ALL
    assert torch.equal(seen["weight"], start["model.3.conv.weight"])  # the teacher was another copy
    dataset = trainer.train_loader.dataset
    assert len(dataset) == 29 and all(Path(file).is_relative_to(data) for file in dataset.im_files)
    assert sum(len(labels["cls"]) for labels in dataset.labels) > 29
    told = "\n".join(caplog.messages)
    assert "0 labelled by the data set, 32 by float.pt (confidence at least 0.25, 64 px)" in told
    assert "3 of 3 photographs to validate are labelled by float.pt: figures tell the agreement with it" in told

    before = contents(data)
    predicted.clear()
    shutil.copytree(tmp_path / "run", tmp_path / "kept", symlinks=True)
    yolo = YOLO(tmp_path / "run" / "weights" / "last.pt")
    yolo.train(resume=True)
    assert Path(yolo.trainer.args.data) == data / "data.yaml" and yolo.trainer.epoch == 1
    report = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())
    assert report["config"]["labels"] == "teacher" and report["metrics"]["float"]["map50_95"] > 0.8
    assert report["training"]["photographs"] == str(photos) and report["training"]["val_by_model"] == 3

    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "kept", tmp_path / "run")  # the same, with the command's options given once more
    yolo = YOLO(tmp_path / "run" / "weights" / "last.pt")
    QCCallbacks(QCConfig(**QUICK)).register(yolo)
    yolo.train(resume=True, data=str(photos))
    assert Path(yolo.trainer.args.data) == data / "data.yaml"
    assert contents(data) == before and not predicted


def test_a_complete_data_set_stays_as_it_is(train, digits, tmp_path, predicted):
    yolo = train(QUICK)
    assert yolo.trainer.args.data == str(digits) and not (tmp_path / "run" / "qc" / "data").exists()
    assert not predicted


@pytest.mark.parametrize("options, arguments, message", [
    (QUICK, {"model": TINY_YAML}, "tiny.yaml is not trained"),
    (QUICK, {"pretrained": False}, "pretrained=False is not accepted with labels='teacher'"),
    (QUICK, {"names": ["1", "0", *"23456789"]}, "class 0 is '1' in data=.* and '0' in float.pt"),
    (QUICK, {"names": [*"0123456789", "ten"]}, "class 10 is 'ten' in data=.* and missing in float.pt"),
    (QUICK, {"names": ["0", "1"]}, "class 2 is missing in data="),
    ({**QUICK, "label_confidence": 0.999}, {}, "finds nothing in 32 photographs .* at least 0.999 at 64 px"),
    ({**QUICK, "labels": "data"}, {}, "is a folder without a data YAML; callbacks=qc qc_labels=teacher"),
    ({**QUICK, "labels": "data"}, {"names": [*"0123456789"]}, "has no label for any training image; give label files"),
])  # fmt: skip
def test_refusals_before_training(train, photos, options, arguments, message):
    names = arguments.pop("names", None)
    if names:
        YAML.save(photos / "photos.yaml", {"train": "train", "val": "val", "names": names})
    with pytest.raises(QCError, match=message):
        train(options, model=arguments.pop("model", FLOAT), data=str(photos), **arguments)


def test_a_start_of_another_task_is_refused(photos, tmp_path):
    torch.save({"model": YOLO("yolov8n-seg.yaml").model, "train_args": {"task": "segment"}}, tmp_path / "seg.pt")
    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, **QUICK)
    overrides = {**TINY, "model": str(tmp_path / "seg.pt"), "data": str(photos), "project": str(tmp_path)}
    with pytest.raises(QCError, match="is for segment and cannot label for detect"):
        DetectionTrainer(overrides=overrides, _callbacks=yolo.callbacks)


def test_a_trainer_has_read_its_data(digits, tmp_path):
    trainer = DetectionTrainer(overrides={**TINY, "model": str(FLOAT), "data": str(digits), "project": str(tmp_path)})
    with pytest.raises(QCError, match="labels='teacher' is too late for a trainer"):
        add_qc_callbacks(trainer, labels="teacher")


def test_a_trainer_with_a_data_set_of_its_own_needs_no_label_files(photos):
    """Such as one that reads COCO's annotations; Ultralytics' own is refused before it reads all images."""

    class Stock(SimpleNamespace):
        build_dataset = DetectionTrainer.build_dataset

    class Own(SimpleNamespace):
        def build_dataset(self):
            """Labels are elsewhere."""

    given = {"args": SimpleNamespace(task="detect", data="d.yaml"), "data": {"train": str(photos)}}
    refuse_without_labels(Own(**given))
    with pytest.raises(QCError, match=r"data=d.yaml has no label for any training image"):
        refuse_without_labels(Stock(**given))


def test_several_devices(photos, digits, tmp_path):
    """Refused by the process that starts the others, which has no on_pretrain_routine_start; but not a complete set."""

    class Launcher(DetectionTrainer):
        ddp = property(lambda self: True, lambda self, value: None)

    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, **QUICK)
    overrides = {**TINY, "model": str(FLOAT), "project": str(tmp_path)}
    with pytest.raises(QCError, match=f"one device, or label first by `yolo-qc label model={FLOAT} data={photos}`"):
        Launcher(overrides={**overrides, "data": str(photos)}, _callbacks=yolo.callbacks)
    assert Launcher(overrides={**overrides, "data": str(digits)}, _callbacks=yolo.callbacks).data["nc"] == 10


@pytest.mark.parametrize("task, name", [("segment", "yolov8n-seg"), ("pose", "yolo11n-pose"), ("obb", "yolo11n-obb")])
def test_labels_of_other_tasks_are_read_again(photos, tmp_path, task, name):
    torch.manual_seed(0)
    model = YOLO(f"{name}.yaml").model
    model.kpt_shape = getattr(model.model[-1], "kpt_shape", None)  # which a training notes
    torch.save({"model": model, "train_args": {"task": task, "imgsz": 64}}, tmp_path / "start.pt")
    for image in list(photos.rglob("*.jpg"))[4:]:
        image.unlink()
    summary = label(tmp_path / "start.pt", photos, tmp_path / "out", confidence=1e-5, device="cpu")
    assert summary["boxes"]
    data = check_det_dataset(summary["data"])
    trainer = YOLO(f"{name}.yaml").task_map[task]["trainer"](
        overrides={**TINY, "model": f"{name}.yaml", "data": summary["data"], "project": str(tmp_path)}
    )
    trainer.model = model
    dataset = trainer.build_dataset(data["train"], batch=2)
    assert len(dataset) == summary["train"] == 3 and sum(len(labels["cls"]) for labels in dataset.labels)
    if task == "pose":
        assert data["kpt_shape"] == [17, 3]
        (tmp_path / "p.yaml").write_text(f"train: {photos}\nkpt_shape: [4, 2]\n")
        with pytest.raises(QCError, match=r"kpt_shape is \[4, 2\] in data="):
            label(tmp_path / "start.pt", tmp_path / "p.yaml", tmp_path / "other")


def test_the_command(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["label", f"model={FLOAT}", f"data={photos}", "device=cpu"]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'photos-labelled' / 'data.yaml'}: 29 photographs to train, 3 to validate" in told
    assert "found: 2 15, " in told and "and 2 classes more" in told
    assert main(["label", f"model={FLOAT}", f"data={photos}", "confidence=1"]) == 1
    assert "confidence=1.0 is not accepted; give a number above 0 and below 1" in capsys.readouterr().err
