# yolo_qc_plugin, AGPL-3.0
"""QC alone, on a finished run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import FLOAT
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load

from yolo_qc_plugin import correct
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host.record import write_checkpoint
from yolo_qc_plugin.quant.layers import quant_convs


def state_of(file) -> dict:
    return load_checkpoint(file)[0].state_dict()


def test_a_finished_run_is_corrected_again(train, digits, tmp_path):
    """From a corrected checkpoint too: the correction is undone, so what it starts from is qat.pt, bit by bit."""
    small = {"nbs": 8, "lr0": 1e-3, "optimizer": "Adam"}
    run = train({"ema_decay": 0.5, "correction": "off"}, model=FLOAT, **small).trainer
    first = json.loads((run.save_dir / "qc" / "report.json").read_text())
    checkpoint, _ = torch_safe_load(run.best)
    for _, conv in quant_convs(checkpoint["model"]):
        if conv.correction:
            conv.correction.gamma.mul_(1.1)
    checkpoint["train_args"]["plots"] = True  # as is usual
    corrected = run.wdir / "corrected.pt"
    write_checkpoint(checkpoint, corrected)

    options = ["correction=tensor", "correction_shift=False", f"project={tmp_path}", "name=again"]
    assert main(["correct", f"model={corrected}", *options]) == 0
    report = json.loads((tmp_path / "again" / "qc" / "report.json").read_text())
    assert report["training"]["command"].startswith(f"yolo-qc correct model={corrected} data=")
    page = (tmp_path / "again" / "qc" / "report.html").read_text("utf-8")
    assert "Predictions</h2>" in page and "Scales</h2>" not in page  # nothing was trained that could be traced
    before, copied = state_of(run.wdir / "qat.pt"), state_of(tmp_path / "again" / "weights" / "qat.pt")
    assert before.keys() == copied.keys() and all(torch.equal(before[k], copied[k]) for k in before)
    assert first["metrics"]["qat"]["map50_95"] > 0.1, "the test must be able to fail"
    assert report["metrics"]["qat"] == pytest.approx(first["metrics"]["qat"])
    assert report["metrics"]["qc"]["map50_95"] > 0.1 and report["metrics"]["qc"] != report["metrics"]["qat"]
    assert report["config"] == {**first["config"], "correction": "tensor", "correction_shift": False}
    assert load_checkpoint(tmp_path / "again" / "weights" / "best.pt")[0].qc.config == report["config"]

    photographs = shutil.copytree(digits.parent / "images", tmp_path / "bare" / "images")
    with pytest.raises(QCError, match=r"data=.*bare is a folder without a data YAML; leave data= out, for the data"):
        correct(run.best, photographs.parent, correction="tensor")
    bare = photographs.parent / "digits.yaml"
    bare.write_text(digits.read_text().replace(str(digits.parent), str(photographs.parent)))
    with pytest.raises(QCError, match=r"digits.yaml has no label for any training image; .*, or leave data= out"):
        correct(run.best, bare, correction="tensor")


def test_the_teacher_of_the_run_teaches_again(train, tmp_path):
    """Without labels QC has nothing else to learn from."""
    run = train({"ema_decay": 0.5, "correction": "off", "label_weight": 0.0}, model=FLOAT, nbs=8).trainer
    corrected = {}
    for taught in (True, False):
        weights = tmp_path / f"{taught}"
        weights.mkdir()
        shutil.copy(run.wdir / "qat.pt", weights)
        if taught:
            shutil.copy(run.wdir / "teacher.pt", weights)
        corrected[taught] = correct(weights / "qat.pt", correction="channel", project=tmp_path, name=f"again-{taught}")
    figures = [report["metrics"] for report in corrected.values()]
    assert figures[0]["qat"] == figures[1]["qat"] and figures[0]["qc"] != figures[1]["qc"]


def test_what_cannot_be_corrected_is_refused(capsys, tmp_path):
    half = tmp_path / "half.pt"
    half.write_bytes(FLOAT.read_bytes()[:20_000])
    for content in (half.read_bytes(), b"", b"no checkpoint"):
        half.write_bytes(content)
        with pytest.raises(QCError, match=r"model=.*half.pt cannot be read as a checkpoint: "):
            correct(half)
    with pytest.raises(QCError, match="is not quantized"):
        correct(FLOAT)
    assert main(["correct", "correction=tensor"]) == 1
    assert main(["correct", f"model={FLOAT}", "correction_shape=1"]) == 1
    assert "correction_shift" in capsys.readouterr().err
