# yolo_qc_plugin, AGPL-3.0
"""Paired bootstrap: AP of repeated images is COCOeval's, intervals hold what they are to hold."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
from conftest import FLOAT
from test_evaluate import perfect, random_case
from ultralytics import YOLO

from yolo_qc_plugin.cli import main
from yolo_qc_plugin.coco.metrics import coco_metrics
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.tools.evaluate import detect
from yolo_qc_plugin.tools.intervals import bootstrap, compare, image_weights, weighted_ap

CHECKPOINT = FLOAT.with_name("quantized.pt")
EXACT = {"rel": 1e-12, "abs": 1e-12}  # other orders of sums alone


def crowded_case(seed: int) -> tuple[dict, list[dict]]:
    """A random case with crowds, which are not counted, and a class that one image alone has."""
    truth, detections = random_case(seed)
    for annotation in truth["annotations"][::7]:
        annotation["iscrowd"] = 1
    rare = {"image_id": 3, "category_id": 4, "bbox": [5.0, 5.0, 50.0, 50.0]}
    truth["annotations"].append({**rare, "id": len(truth["annotations"]) + 1, "area": 2500.0, "iscrowd": 0})
    truth["categories"] += [{"id": 4, "name": "rare"}, {"id": 5, "name": "never"}]
    return truth, [*detections, {**rare, "score": 0.4}, {**rare, "category_id": 5, "score": 0.3}]


def repeated(truth: dict, detections: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """The data set written out, in which image i is there weights[i] times."""
    images, annotations, found = [], [], []
    for image, times in zip(truth["images"], weights):
        for _ in range(times):
            images.append({**image, "id": len(images) + 1})
            place = {"image_id": len(images)}
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append({**a, **place, "id": len(annotations) + 1})
            found += [{**d, **place} for d in detections if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("case,seed", [(random_case, 0), (random_case, 1), (crowded_case, 2), (crowded_case, 3)])
def test_ap_of_repeated_images_is_cocoevals(case, seed):
    """Of all once, and of resamples, with the classes that are missing in one left out."""
    truth, detections = case(seed)
    weights = image_weights(12, 6, seed)
    expected = [coco_metrics(*repeated(truth, detections, row))["AP"] for row in weights]
    assert weighted_ap(truth, detections, weights) == pytest.approx(expected, **EXACT)
    assert len(set(expected)) == 7 and expected[0] == coco_metrics(truth, detections)["AP"]


def test_ap_of_real_detections_is_cocoevals(digits):
    truth, detections, _ = detect(FLOAT, digits)
    assert len(detections) > 100
    (ap,) = weighted_ap(truth, detections, np.ones((1, 8), int))
    assert ap == pytest.approx(coco_metrics(truth, detections)["AP"], **EXACT) and ap > 0.05


def test_more_than_a_hundred_detections_of_a_class():
    """COCO counts a hundred an image."""
    truth, detections = random_case(0)
    wrong = {"image_id": 1, "category_id": 1, "bbox": [400, 400, 5, 5], "score": 0.99}
    flooded = [wrong] * 150 + detections
    (ap,) = weighted_ap(truth, flooded, np.ones((1, 12), int))
    assert ap == pytest.approx(coco_metrics(truth, flooded)["AP"], **EXACT)
    assert ap < coco_metrics(truth, detections)["AP"]


def test_nothing_found_and_nothing_there():
    truth, _ = random_case(0)
    assert weighted_ap(truth, [], np.ones((2, 12), int)).tolist() == [0, 0]
    assert np.isnan(weighted_ap(truth, perfect(truth), np.zeros((1, 12), int))).all()
    with pytest.raises(ValueError, match="no objects"):
        bootstrap({**truth, "annotations": []}, [], [])


def test_an_interval_is_of_the_difference():
    """A model less itself: 0. A better one: an interval above 0 around the difference, the same for the same seed."""
    truth, detections = random_case(0)
    same = bootstrap(truth, detections, detections, resamples=50)
    assert (same["difference"], same["interval"], same["images"], same["resamples"]) == (0, [0, 0], 12, 50)
    result = bootstrap(truth, perfect(truth), detections, resamples=200)
    low, high = result["interval"]
    assert 0 < low < result["difference"] < high < 100
    assert result["ap"] == pytest.approx([100, 100 * coco_metrics(truth, detections)["AP"]])
    other = bootstrap(truth, detections, perfect(truth), resamples=200)
    assert other["interval"] == pytest.approx([-high, -low]) and other["difference"] == -result["difference"]
    assert bootstrap(truth, perfect(truth), detections, resamples=200, seed=1)["interval"] != [low, high]
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap(truth, detections, detections, resamples=0)


def test_two_models_of_other_classes_are_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="have other classes: give two models of the same classes"):
        other = YOLO("yolov5n.yaml")
        other.save(tmp_path / "other.pt")
        compare(FLOAT, tmp_path / "other.pt", digits)
    with pytest.raises(ValueError, match="the ground truth has no images"):
        bootstrap({"images": [], "annotations": [], "categories": []}, [], [])


@pytest.mark.usefixtures("small_files")
def test_a_checkpoint_beside_its_file_is_given_the_same_images(tmp_path):
    """Photographs that are not square are padded to squares for both."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    data = compose(tmp_path / "oblong", train=1, val=8, imgsz=64, seed=0)
    for image in (tmp_path / "oblong" / "images" / "val").iterdir():
        cv2.imwrite(str(image), cv2.imread(str(image))[:52])
    shutil.copy(FLOAT, tmp_path / "float.pt")
    file = YOLO(tmp_path / "float.pt").export(format="onnx", imgsz=64)
    found = compare(tmp_path / "float.pt", file, data, imgsz=64, resamples=2)
    assert found["difference"] == pytest.approx(0, abs=1e-6) and found["ap"][0] > 1
    alone = compare(tmp_path / "float.pt", FLOAT, data, imgsz=64, resamples=2)
    assert alone["ap"][0] != pytest.approx(found["ap"][0], abs=1e-6)  # in rectangles
    with pytest.raises(ValueError, match="resamples=0"):
        compare(tmp_path / "none.pt", file, data, resamples=0)


def test_compare_from_the_command_line(digits, tmp_path, capsys):
    arguments = [f"a={FLOAT}", f"b={CHECKPOINT}", f"data={digits}", "imgsz=64", "resamples=20"]
    assert main(["compare", *arguments, f"json={tmp_path / 'out.json'}"]) == 0
    result, told = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    a, b = (coco_metrics(*detect(model, digits, 64)[:2])["AP"] for model in (FLOAT, CHECKPOINT))
    assert result["ap"] == pytest.approx([100 * a, 100 * b]) and a != b
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert f"AP of {FLOAT}: {100 * a:.2f}" in told and f"difference: {100 * (a - b):+.2f}, 95%" in told
