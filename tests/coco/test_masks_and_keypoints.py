# yolo_qc_plugin, AGPL-3.0
"""Masks and keypoints: pycocotools' own numbers of the same files, Ultralytics' own within half a point, refusals."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import CHECKPOINTS
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics import YOLO
from ultralytics.utils.metrics import OKS_SIGMA

from yolo_qc_plugin.cli import main
from yolo_qc_plugin.coco.metrics import RESULT, coco_metrics
from yolo_qc_plugin.coco.truth import coco_ground_truth, encode
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.tools.accuracy import held_against, is_as_accurate, measure
from yolo_qc_plugin.tools.evaluate import detect, evaluate

KEYS = {
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
TASKS = {"segment": "segm", "pose": "keypoints"}
SIDE = 240


def ellipse(x: float, y: float, w: float, h: float) -> dict:
    """A mask in COCO form."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(mask, (round(x), round(y)), (max(round(w), 2), max(round(h), 2)), 0, 0, 360, 1, -1)
    return encode(mask)


def files(folder: Path, kind: str, points: int = 17) -> tuple[Path, Path]:
    """Ground truth with a crowd, and predictions that half hit it, of 2 classes in 8 images, as COCO has them."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, 9):
        for _ in range(rng.integers(1, 7)):
            x, y, w, h = rng.uniform(60, 180), rng.uniform(60, 180), *np.exp(rng.uniform(1.5, 4.2, 2))
            place = {"image_id": image, "category_id": int(rng.integers(1, 3))}
            of_box = {"bbox": [x - w, y - h, 2 * w, 2 * h], "iscrowd": int(rng.random() < 0.1)}
            at = rng.uniform(-1, 1, (points, 2)) * (w, h) + (x, y)
            seen = rng.integers(0, 3, points) * (rng.random() > 0.2)
            truth = {"keypoints": np.column_stack([at, seen]).ravel().tolist(), "num_keypoints": int((seen > 0).sum())}
            truth = {"area": 2 * w * h, **truth} if kind == "keypoints" else ellipse(x, y, w, h)
            annotations.append({"id": len(annotations) + 1, **place, **of_box, **truth})
            for _ in range(rng.integers(0, 4)):
                found = ellipse(*np.array([x, y, w, h]) + rng.normal(0, 0.06 * (w + h), 4))
                moved = np.column_stack([at + rng.normal(0, 0.03 * (w + h), at.shape), rng.random(points)])
                result = {"segmentation": found["segmentation"], "keypoints": moved.ravel().tolist()}
                key = {"segm": "segmentation", "keypoints": "keypoints"}[kind]
                detections.append({**place, "score": float(rng.random()), key: result[key]})
    truth = {
        "images": [{"id": image, "file_name": f"{image}.jpg", "width": SIDE, "height": SIDE} for image in range(1, 9)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(detections))
    return folder / "truth.json", folder / "results.json"


def by_hand(truth: Path, results: Path, kind: str, sigmas=None) -> list[float | None]:
    """What pycocotools prints of two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        run = COCOeval(coco, coco.loadRes(str(results)), kind)
        if sigmas is not None:
            run.params.kpt_oks_sigmas = np.asarray(sigmas)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if value == -1 else value for value in run.stats.tolist()]


@pytest.mark.parametrize("kind,points", [("segm", 17), ("keypoints", 17), ("keypoints", 5)])
def test_equals_cocoeval_called_by_hand(tmp_path, kind, points):
    """Of files, from the command line as well; one prediction moved by a pixel is seen."""
    truth, results = files(tmp_path, kind, points)
    expected = by_hand(truth, results, kind, None if points == 17 else [1 / points] * points)
    metrics = coco_metrics(truth, results, kind)
    assert tuple(key for key in metrics if key != "per_class") == KEYS[kind]
    assert [metrics[key] for key in KEYS[kind]] == expected and 0.1 < metrics["AP"] < 0.9
    arguments = [f"annotations={truth}", f"detections={results}", f"iou_type={kind}", f"json={tmp_path / 'out.json'}"]
    assert main(["eval", *arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == metrics

    found = json.loads(results.read_text())
    with_boxes = [{**d, "bbox": [0, 0, 1, 1]} for d in found]  # as Ultralytics writes them
    assert coco_metrics(truth, with_boxes, kind) == metrics
    found[0] = {**found[0], **found[-1], "image_id": found[0]["image_id"]}
    assert coco_metrics(truth, found, kind) != metrics


def test_sigmas_decide_what_keypoints_are_worth(tmp_path):
    truth, results = files(tmp_path, "keypoints", 5)
    sigmas = [0.02, 0.3, 0.3, 0.3, 0.05]
    metrics = coco_metrics(truth, results, "keypoints", sigmas=sigmas)
    assert [metrics[key] for key in KEYS["keypoints"]] == by_hand(truth, results, "keypoints", sigmas)
    assert metrics["AP"] != coco_metrics(truth, results, "keypoints")["AP"]
    for wrong in ([0.1] * 4, [0.1, 0.1, 0, 0.1, 0.1]):
        with pytest.raises(ValueError, match=r"sigmas=\[.* give 5 numbers above 0"):
            coco_metrics(truth, results, "keypoints", sigmas=wrong)


def test_coco_has_the_sigmas_that_ultralytics_has():
    assert COCOeval(iouType="keypoints").params.kpt_oks_sigmas == pytest.approx(OKS_SIGMA)


@pytest.mark.parametrize("kind,change,message", [
    ("segm", {"segmentation": [[1, 1, 5, 1, 5, 5]]}, "give a dict of size and counts"),
    ("segm", {"segmentation": {"size": [4, 4], "counts": [16]}}, "give a dict of size and counts"),
    ("keypoints", {"keypoints": None}, "a detection lacks keypoints"),
])  # fmt: skip
def test_malformed_predictions_are_refused(tmp_path, kind, change, message):
    truth, results = files(tmp_path, kind)
    found = json.loads(results.read_text())
    found[0] = {k: v for k, v in {**found[0], **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        coco_metrics(truth, found, kind)


@pytest.fixture(scope="module", params=TASKS)
def of_task(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A task, a model that was trained for it and a data set of it."""
    task = request.param
    return task, CHECKPOINTS / f"{task}.pt", compose(tmp_path_factory.mktemp(task) / "set", 1, 40, 96, task=task)


def test_ultralytics_says_the_same(of_task, tmp_path):
    """Of uncut predictions within half a point, and the column beside it is what `yolo val` itself gives."""
    task, model, data = of_task
    kind = TASKS[task]
    result = evaluate(model, data, batch=8, device="cpu", clip=False)
    own = result["ultralytics"][kind]
    assert result["coco"].keys() == result["ultralytics"].keys() == {"bbox", kind} and result["imgsz"] == 96
    assert result["coco"][kind]["AP"] == pytest.approx(own["map50_95"], abs=0.005)
    assert result["coco"][kind]["AP50"] == pytest.approx(own["map50"], abs=0.005)
    assert 0.05 < result["coco"][kind]["AP"] < 0.9 and result["coco"][kind]["AP"] != result["coco"]["bbox"]["AP"]

    settings = dict(data=str(data), batch=8, device="cpu", plots=False, verbose=False, project=str(tmp_path))
    whole = dict(save_txt=True, overlap_mask=False, mask_ratio=1) if task == "segment" else {}
    metrics = YOLO(model).val(**settings, **whole)
    of_kind = metrics.seg if task == "segment" else metrics.pose
    assert (of_kind.map, of_kind.map50) == (own["map50_95"], own["map50"])
    if task == "segment":  # small masks, of which the smaller object takes what two share, are another thing
        assert YOLO(model).val(**settings).seg.map < own["map50_95"] - 0.01


def test_predictions_are_those_of_predict(of_task):
    """Masks and keypoints of the surest predictions, in pixels of images that the network sees smaller and padded."""
    task, model, data = of_task
    image = data.parent / "images" / "val" / "00003.jpg"
    wide = data.parent / "wide"
    for folder in ("images", "labels"):
        (wide / folder).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(wide / "images/a.png"), cv2.copyMakeBorder(cv2.resize(cv2.imread(str(image)), None, fx=2, fy=2),
                                                               0, 0, 30, 120, cv2.BORDER_REPLICATE))  # fmt: skip
    yaml = wide / "wide.yaml"
    yaml.write_text(data.read_text().replace(str(data.parent), str(wide)).replace("images/val", "images"))
    yaml.write_text(yaml.read_text().replace("images/train", "images"))
    (wide / "labels/a.txt").write_text("")
    _, results, _ = detect(model, yaml, 96, device="cpu", rect=False)
    (predicted,) = YOLO(model).predict(wide / "images/a.png", imgsz=96, rect=False, conf=0.05, retina_masks=True,
                                       device="cpu", verbose=False)  # fmt: skip
    compared = 0
    for i, (box, c) in enumerate(zip(predicted.boxes.xyxy.numpy(), predicted.boxes.cls.tolist())):
        # in a validation, several classes of a box take part in its suppression of others: some are not there
        of_class = [r for r in results if r["category_id"] == c + 1]
        same = [r for r in of_class if np.abs(r["bbox"] - np.r_[box[:2], box[2:] - box[:2]]).max() < 0.05]
        if not same:
            continue
        compared, result = compared + 1, same[0]
        if task == "pose":
            expected = predicted.keypoints.xy[i].numpy()
            assert np.reshape(result["keypoints"], (-1, 3))[:, :2] == pytest.approx(expected, abs=0.5)
        else:
            expected = predicted.masks.data[i].numpy()
            assert list(expected.shape) == result["segmentation"]["size"]
            overlap = coco_metrics(
                {"images": [{"id": 1, "width": 1, "height": 1}], "categories": [{"id": 1, "name": "x"}],
                 "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **encode(expected)}]},
                [{"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": result["segmentation"]}], "segm",
            )  # fmt: skip
            assert overlap["AP75"] == pytest.approx(1)
    assert compared > 1


def test_compare_takes_what_a_task_is_for(of_task, tmp_path, capsys):
    task, model, data = of_task
    arguments = [f"a={model}", f"b={model}", f"data={data}", "resamples=5", f"json={tmp_path / 'out.json'}"]
    assert main(["compare", *arguments]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    expected = evaluate(model, data, device="cpu")["coco"][TASKS[task]]["AP"]
    assert result["ap"] == pytest.approx([100 * expected] * 2) and result["difference"] == 0
    assert {"segment": "(masks):", "pose": "(keypoints):"}[task] in capsys.readouterr().out
    assert main(["compare", f"a={model}", f"b={CHECKPOINTS / 'float.pt'}", f"data={data}"]) == 1
    assert f"of task '{task}', b=" in capsys.readouterr().err


@pytest.mark.parametrize("name,task", [("yolov8n-obb", "obb"), ("yolov8n-cls", "classify")])
def test_other_tasks_are_refused(name, task, tmp_path, capsys):
    assert main(["eval", f"model={name}.yaml", f"data={tmp_path / 'absent.yaml'}"]) == 1
    error = capsys.readouterr().err
    assert f"of task '{task}'; pycocotools has metrics for YOLO models of the tasks detect, segment, pose" in error
    assert error.count("\n") == 1


def test_labels_of_masks_and_keypoints(tmp_path):
    """In pixels; an area is a mask's, of keypoints a share of the box; what is not marked does not count."""
    masks = coco_ground_truth(compose(tmp_path / "masks", 1, 3, 64, task="segment"), task="segment")
    boxes = coco_ground_truth(compose(tmp_path / "boxes", 1, 3, 64))
    points = coco_ground_truth(compose(tmp_path / "points", 1, 3, 64, task="pose"), task="pose")
    assert masks["info"]["description"] == "labels" and len(masks["annotations"]) == len(boxes["annotations"]) > 3
    for mask, box, of_points in zip(masks["annotations"], boxes["annotations"], points["annotations"], strict=True):
        width, height = box["bbox"][2:]
        assert 0.3 * width * height < mask["area"] <= (width + 1) * (height + 1)  # a convex outline and its border
        assert of_points["area"] == pytest.approx(0.53 * of_points["bbox"][2] * of_points["bbox"][3])
        x, y, seen = np.reshape(of_points["keypoints"], (-1, 3)).T
        assert of_points["num_keypoints"] == 4 and seen.all()
        left, top, width, _ = of_points["bbox"]
        assert (x > left - 1).all() and (x < left + width + 1).all() and (y > top - 1).all()


def test_chance_is_judged_of_what_a_task_is_for(of_task):
    """Its masks or keypoints alone are another's: that is no chance, and boxes are as they were."""
    task, model, data = of_task
    expected = measure(YOLO(model), {"data": data, "imgsz": 96, "batch": 8, "device": "cpu"})
    kind, name = TASKS[task], {"segment": "mask_AP", "pose": "pose_AP"}[task]
    assert list(expected.figures) == [name, f"{name}50", "AP", "AP50"] and expected.figures[name] > 0.05
    evaluated = evaluate(model, data, batch=8, device="cpu")["coco"]
    assert (expected.figures[name], expected.figures["AP"]) == (evaluated[kind]["AP"], evaluated["bbox"]["AP"])

    def held(change):
        found = [{**d, **change(d, other)} for d, other in zip(expected.detections, expected.detections[1:])]
        figures = {of: coco_metrics(expected.truth, found, k)["AP"] for of, k in ((name, kind), ("AP", "bbox"))}
        return held_against(expected, replace(expected, detections=found, figures=figures), 0.01)

    exchanged = held(lambda d, other: {RESULT[kind]: other[RESULT[kind]]})
    assert exchanged["intervals"].keys() == {name} and exchanged["intervals"][name][1] < 0
    assert exchanged["points"] > 1 and not is_as_accurate(exchanged, 0.1)
    rng = np.random.default_rng(0)
    moved = held(lambda d, other: {"score": d["score"] * (1 + 0.05 * rng.normal())})
    assert moved["points"] > 0.01 and moved["intervals"] and is_as_accurate(moved, 0.01)
