# yolo_qc_plugin, AGPL-3.0
"""coco_eval: pycocotools' metrics of what a run reports, and nothing else of the run is another."""

from __future__ import annotations

import json

import pytest
from conftest import CHECKPOINTS
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.tools.evaluate import evaluate


def test_masks_of_all_that_is_reported(train, tmp_path):
    """As `yolo-qc eval` has them of the files; Ultralytics' own figures are those of a run without the option."""
    data = compose(tmp_path / "data", 8, 12, 96, task="segment")
    settings = dict(model=CHECKPOINTS / "segment.pt", data=str(data), imgsz=96, nbs=8, seed=1)
    options = {"bits": 4, "calibration_batches": 1, "telemetry": False}
    plain = train(options, **settings, name="plain").trainer
    trainer = train({**options, "coco_eval": True}, **settings).trainer
    expected, found = (json.loads((t.save_dir / "qc" / "report.json").read_text())["metrics"] for t in (plain, trainer))
    of_coco = {stage: figures.pop("coco") for stage, figures in found.items() if "coco" in figures}
    assert found == expected and of_coco.keys() == {"float", "qat", "qc"}
    for stage, model in (("float", CHECKPOINTS / "segment.pt"), ("qat", trainer.wdir / "qat.pt")):
        again = evaluate(model, data, imgsz=96, batch=16, device="cpu")
        assert of_coco[stage].pop("ground_truth") == "labels" and of_coco[stage].keys() == {"bbox", "segm"}
        for kind, metrics in of_coco[stage].items():
            assert metrics["AP"] == pytest.approx(again["coco"][kind]["AP"], abs=1e-6)
    assert of_coco["float"]["segm"]["AP"] > found["float"]["mask_map50_95"] + 0.01  # whole masks, see docs


def test_without_quantized_outputs_qat_is_measured_for_it(train):
    trainer = train({"correction": "off", "output_bits": None, "calibration_batches": 1, "coco_eval": True}).trainer
    metrics = json.loads((trainer.save_dir / "qc" / "report.json").read_text())["metrics"]
    assert metrics["qat"]["coco"]["bbox"].keys() > {"AP", "APs", "per_class"} and "coco" not in metrics["float_outputs"]
    assert metrics["qat"]["map50_95"] == metrics["float_outputs"]["map50_95"]


@pytest.mark.parametrize("name", ["yolov8n-cls", "yolo11n-obb"])
def test_other_tasks_are_refused_before_data_is_read(name):
    yolo = YOLO(f"{name}.yaml")
    add_qc_callbacks(yolo, coco_eval=True)
    with pytest.raises(QCError, match=rf"coco_eval=True does not work with task='{yolo.task}'.*detect, segment, pose"):
        yolo.train(data="missing.yaml")
