# yolo_qc_plugin, AGPL-3.0
"""What follows training: the better of QAT and QC is kept, whichever it is, and QC's loss is the last epoch's."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FLOAT, TINY_YAML
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.loss import E2ELoss

from yolo_qc_plugin.qat.correction import freeze_statistics


@pytest.mark.parametrize("kept,options", [
    ("qc", {"bits": 3, "correction_lr": 0.01, "correction_epochs": 3}),  # three bits leave much to correct
    ("qat", {"bits": 4, "correction_lr": 1.0}),  # ruins the model
], ids=["qc", "qat"])  # fmt: skip
def test_the_better_is_kept(train, digits, kept, options):
    yolo = train(options, model=FLOAT, optimizer="Adam", lr0=1e-4, nbs=8, mosaic=0.0)
    folder = yolo.trainer.save_dir / "qc"
    wdir, report = yolo.trainer.wdir, json.loads((folder / "report.json").read_text())
    figures = report["metrics"]
    lost = {"qc": "qat", "qat": "qc"}[kept]
    assert figures[kept]["map50_95"] > 0.05
    assert figures[kept]["fitness"] > figures[lost]["fitness"] + 0.02, "the test must be able to fail"

    assert report["kept"] == kept
    assert yolo.returned.box.map == figures[kept]["map50_95"]
    assert yolo.returned.results_dict["fitness"] == figures[kept]["fitness"]
    assert ((wdir / "best.pt").read_bytes() == (wdir / "qat.pt").read_bytes()) is (kept == "qat")
    assert {file.name for file in folder.iterdir()} == {  # plots=False draws nothing
        "report.json", "telemetry.parquet", "layers.txt", "MODEL_CARD.md", "plan.json", "sensitivity.json"
    }  # fmt: skip
    assert report["rounding"] is None
    found = YOLO(wdir / "best.pt").val(data=str(digits), imgsz=64, workers=0, plots=False, verbose=False)
    assert found.box.map == pytest.approx(figures[kept]["map50_95"], abs=1e-6)


def test_the_correction_trains_in_the_memory_format_of_the_run(train, monkeypatch):
    """On a GPU channels last; what it writes lies as any checkpoint does."""
    seen = []

    def look(model):
        weights = [p for p in model.parameters() if p.dim() == 4]
        seen.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in weights))
        return freeze_statistics(model)

    def lay_out(trainer):
        trainer.model.to(memory_format=torch.channels_last)

    monkeypatch.setattr("yolo_qc_plugin.run.qc.freeze_statistics", look)
    yolo = train({"correction_lr": 1e-9}, {"on_pretrain_routine_end": lay_out}, model=FLOAT, epochs=1)
    (qc,) = (yolo.trainer.save_dir / "qc").glob("report.json")
    assert seen == [True] and json.loads(qc.read_text())["metrics"]["qc"]["map50_95"] > 0.05
    for file in ("best.pt", "qat.pt"):
        model = load_checkpoint(yolo.trainer.wdir / file)[0]
        assert all(p.is_contiguous() for p in model.parameters()), file


def test_the_correction_weighs_the_losses_as_the_last_epoch_did(train, tmp_path, monkeypatch):
    """An end-to-end head's two losses, whose weights shift from epoch to epoch."""
    model, call, seen = tmp_path / "tiny-end2end.yaml", E2ELoss.__call__, []
    model.write_text(TINY_YAML.read_text() + "\nend2end: True\n")

    def look(self, *args):
        if torch.is_grad_enabled():  # not a validation
            seen.append((self.o2m, self.o2o))
        return call(self, *args)

    monkeypatch.setattr(E2ELoss, "__call__", look)
    train({"correction_epochs": 2}, model=model, epochs=3)
    epochs = [set(seen[i : i + 3]) for i in range(0, len(seen), 3)]  # three batches each
    assert [len(weights) for weights in epochs] == [1] * 5
    first, second, last, *corrections = (weights.pop() for weights in epochs)
    assert first[0] > second[0] > last[0] and first[1] < second[1] < last[1]
    assert corrections == [last, last]
