# yolo_qc_plugin, AGPL-3.0
"""Segment, pose, obb and classify: real runs of each, what is quantized in each head; and the models refused."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from conftest import last_epoch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.host.architecture import edge_convs, fixed_convs, head_outputs
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.run.callbacks import QCCallbacks
from yolo_qc_plugin.tools.check import check

FIGURES = {
    "segment": {"map50_95", "map50", "mask_map50_95", "mask_map50"},
    "pose": {"map50_95", "map50", "pose_map50_95", "pose_map50"},
    "obb": {"map50_95", "map50"},
    "classify": {"top1", "top5"},
}
MAIN = {  # our name -> the host's
    "map50_95": "metrics/mAP50-95(B)",
    "mask_map50_95": "metrics/mAP50-95(M)",
    "pose_map50_95": "metrics/mAP50-95(P)",
    "top1": "metrics/accuracy_top1",
}
TENSORS = {
    "segment": {"boxes", "scores", "mask_coefficient", "proto"},
    "pose": {"boxes", "scores", "kpts"},
    "obb": {"boxes", "scores", "angle"},
}


@pytest.mark.parametrize("task,name", [
    ("segment", "yolov8n-seg"), ("pose", "yolo26n-pose"), ("obb", "yolo11n-obb"), ("classify", "yolov8n-cls"),
])  # fmt: skip
def test_a_run_of_each_task(train, tmp_path, monkeypatch, task, name):
    """QAT, QC, report; the file gives the run's figures again, and its deployed form and ONNX file its outputs."""
    data = compose(tmp_path / "data", 8, 8, 64, task=task)
    options = {"bits": 4, "calibration_batches": 1, "correction_lr": 0.05}
    drawn = task == "classify"  # the cheapest; pictures want a float start, whose file is that of a teacher
    if drawn:
        monkeypatch.setattr("yolo_qc_plugin.run.start.why_no_teacher", lambda *_: "")
    yolo = train(options, model=f"{name}.yaml", data=str(data), conf=1e-6, nbs=8, plots=drawn)
    if drawn:
        found = json.loads((yolo.trainer.save_dir / "qc" / "plots" / "predictions.json").read_text())["images"]
        assert len(found) == 8 and all(len(image["float_alone"]) == 1 - image["both"] for image in found)
    report = json.loads((yolo.trainer.save_dir / "qc" / "report.json").read_text())
    for key in ("float", "float_outputs", "qat", "qc"):
        assert set(report["metrics"][key]) == FIGURES[task] | {"fitness"}
    epochs, measured = last_epoch(yolo.trainer.save_dir), report["metrics"]["float_outputs"]
    for ours, theirs in MAIN.items():
        assert ours not in measured or epochs[theirs] == round(measured[ours], 5)
    kept = report["metrics"][report["kept"]]
    assert yolo.returned.results_dict["fitness"] == kept["fitness"]
    assert task != "classify" or kept["top5"] > 0
    found = YOLO(yolo.trainer.best).val(data=str(data), imgsz=64, conf=1e-6, plots=False, verbose=False, workers=0)
    assert found.results_dict == yolo.returned.results_dict

    model, _ = load_checkpoint(yolo.trainer.wdir / "best.pt")
    corrected = [c.correction for _, c in quant_convs(model)]
    assert len(corrected) == len(report["layers"]) > 25 and report["metrics"]["qc"] and any(corrected)
    deployed = deepcopy(model).fuse(verbose=False)
    assert deployed_convs(deployed).keys() <= dict(quant_convs(model)).keys()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain, fused = (m(x)[1] for m in (model, deployed))
    if task == "classify":
        plain, fused = {"logits": plain}, {"logits": fused}
    branch = "one2one" if getattr(model, "end2end", False) else "one2many"
    plain, fused = (p.get(branch, p) for p in (plain, fused))
    assert TENSORS.get(task, {"logits"}) <= plain.keys() & fused.keys()
    for key in TENSORS.get(task, {"logits"}):
        torch.testing.assert_close(plain[key], fused[key], rtol=1e-3, atol=1e-3)

    if task == "segment":  # two outputs
        checked = check(yolo.trainer.best, YOLO(yolo.trainer.best).export(format="onnx", imgsz=64), data, images=2)
        assert checked["passed"] and checked["pytorch"].keys() == {"AP", "AP50", "mask_AP", "mask_AP50"}
        assert all(r["changed_end_to_end"] == 0 and r["output"] < 1e-2 for r in checked["runtimes"] if "steps" in r)


def test_a_run_in_which_no_quantized_layer_is_trained(train, tmp_path):
    """A classifier whose linear layer alone is: nothing flips, and its convolutions stay as they were calibrated."""
    data = compose(tmp_path / "data", 8, 8, 64, task="classify")
    frozen = {"freeze": 9, "optimizer": "Adam", "lr0": 1e-3, "nbs": 4}
    yolo = train({"skip": ("model.9.*",), "budget": None}, model="yolov8n-cls.yaml", data=str(data), **frozen)
    report = json.loads((yolo.trainer.save_dir / "qc" / "report.json").read_text())
    assert report["metrics"]["qat"] and not (yolo.trainer.save_dir / "qc" / "telemetry.parquet").exists()


@pytest.mark.parametrize("name,last,fixed", [
    ("yolov8n-seg", {"cv2", "cv3", "cv4", "proto.cv3"}, {"dfl"}),
    ("yolo26n-seg", {"cv2", "cv3", "cv4", "one2one_cv2", "one2one_cv3", "one2one_cv4", "proto.cv3"}, {"proto.semseg"}),
    ("yolo26n-pose", {"cv2", "cv3", "cv4_kpts", "one2one_cv2", "one2one_cv3", "one2one_cv4_kpts"},
     {"cv4_sigma", "one2one_cv4_sigma"}),
    ("yolo11n-obb", {"cv2", "cv3", "cv4"}, {"dfl"}),
    ("yolov8n-cls", set(), set()),
])  # fmt: skip
def test_edges_of_each_head(name, last, fixed):
    """What writes an output has wider grids; what the training loss alone reads stays float."""
    model = YOLO(f"{name}.yaml").model
    modes = {m: m.training for m in model.modules()}
    head = f"model.{len(model.model) - 1}."

    def branches(names):
        """Branches of the head that convolutions are in."""
        assert all(name.startswith(head) for name in names)
        parts = [name.removeprefix(head).split(".") for name in names]
        return {".".join(p[:2]) if p[0] == "proto" else p[0] for p in parts}

    edges, floats = edge_convs(model) - {"model.0.conv"}, fixed_convs(model)
    assert edges < edge_convs(model) and branches(floats) == fixed
    assert branches(edges - floats) == last
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(convs[n].bias is not None for n in edges if "proto" not in n)
    assert modes == {m: m.training for m in model.modules()}


@pytest.mark.parametrize("name,scores,sides", [
    ("yolov5n", {"cv3"}, {"cv2"}),
    ("yolov10n", {"cv3", "one2one_cv3"}, {"cv2", "one2one_cv2"}),
    ("yolo26n", {"cv3", "one2one_cv3"}, set()),  # whose box sides are no distributions
    ("yolo26n-pose", {"cv3", "one2one_cv3"}, set()),
    ("yolov8n-seg", {"cv3"}, {"cv2"}),
    ("yolo11n-obb", {"cv3"}, {"cv2"}),
    ("yolov8n-cls", set(), set()),
])  # fmt: skip
def test_head_outputs_with_a_grid(name, scores, sides):
    """Class scores, cut where nothing counts, and box sides that are distributions, uncut; all else stays float."""
    model = YOLO(f"{name}.yaml").model
    assert not head_outputs(model)  # float convolutions have none
    inject(model, QCConfig(), edge_convs(model), fixed_convs(model))
    names = {m: name.removeprefix(f"model.{len(model.model) - 1}.") for name, m in quant_convs(model)}
    found = {names[conv]: output.lowest for conv, output in head_outputs(model).items()}
    wanted = {f"{branch}.{i}.2": -8.0 for branch in scores for i in range(3)}
    assert found == wanted | {f"{branch}.{i}.2": None for branch in sides for i in range(3)}


@pytest.mark.parametrize("kind,name,found", [
    (YOLO, "yolo26n-sem", "SemanticSegmentationModel with head SemanticSegment"),
    (YOLO, "yolo26n-depth", "DepthModel with head Depth"),
    (YOLO, "yolov8s-worldv2", "WorldModel with head WorldDetect"),
    (YOLO, "yoloe-v8s-seg", "YOLOESegModel with head YOLOESegment"),
    (RTDETR, "yolov8-rtdetr", "RTDETRDetectionModel with head RTDETRDecoder"),
])  # fmt: skip
def test_other_models_are_refused_at_once(kind, name, found):
    with pytest.raises(QCError, match=f"{found} is not supported; .* detect, segment, pose, obb, classify"):
        add_qc_callbacks(kind(f"{name}.yaml"))


def test_other_tasks_are_refused_before_data_is_read():
    """As from the command line, where the callbacks are there before the model."""
    yolo = YOLO("yolo26n-sem.yaml")
    for event, callback in QCCallbacks(QCConfig()).events().items():
        yolo.add_callback(event, callback)
    with pytest.raises(QCError, match="task='semantic' is not supported; accepted: detect, segment"):
        yolo.train(data="missing.yaml")
