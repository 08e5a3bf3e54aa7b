# yolo_qc_plugin, AGPL-3.0
"""COCO metrics: ground truth in pixels, COCOeval's own numbers, and agreement with Ultralytics' mAP."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import FLOAT, SHARED
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics import YOLO

from yolo_qc_plugin.coco.metrics import coco_metrics
from yolo_qc_plugin.coco.truth import coco_ground_truth
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.tools.evaluate import evaluate, format_table

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def write_image(file: Path, width: int, height: int) -> None:
    """A plain image that the host accepts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.full((height, width, 3), 90, np.uint8))


def write_label(file: Path, text: str) -> None:
    """A label file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def odd_data(tmp_path: Path) -> Path:
    """A data set with every kind of image and label that needs care; two images share a stem."""
    images, labels = tmp_path / "images/val", tmp_path / "labels/val"
    write_image(images / "a/1.png", 200, 100)
    write_label(labels / "a/1.txt", "1 0.5 0.5 0.1 0.2\n0 0.25 0.5 0.5 1.0\n1 0.5 0.5 0.1 0.2\n")  # a row twice
    write_image(images / "b/1.png", 100, 100)
    write_label(labels / "b/1.txt", "2 0.1 0.2 0.5 0.2 0.5 0.9 0.1 0.9\n")  # a polygon
    write_image(images / "empty.png", 50, 40)
    write_label(labels / "empty.txt", "")
    write_image(images / "missing.png", 64, 64)
    write_image(images / "outside.png", 100, 100)
    write_label(labels / "outside.txt", "0 0.9 0.5 0.4 0.2\n")  # reaches 10 pixels out of the image
    (images / "corrupt.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees: stored 80x40, shown 40x80
    Image.new("RGB", (80, 40)).save(images / "turned.jpg", exif=exif)
    write_label(labels / "turned.txt", "0 0.5 0.5 0.5 0.5\n")
    yaml = tmp_path / "odd.yaml"
    yaml.write_text(f"path: {tmp_path}\ntrain: images/val\nval: images/val\nnames: [cat, dog, cow]\n")
    return yaml


def by_file(truth: dict) -> dict[str, list[tuple[int, list[float]]]]:
    """(class index, box) of every image, by file name, in a fixed order."""
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    boxes = {name: [] for name in names.values()}
    for annotation in truth["annotations"]:
        boxes[names[annotation["image_id"]]].append((annotation["category_id"] - 1, annotation["bbox"]))
    return {name: sorted(rows) for name, rows in boxes.items()}


def test_ground_truth_in_pixels(odd_data: Path):
    truth = coco_ground_truth(odd_data)
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in truth["images"]}
    assert sizes == {
        "images/val/a/1.png": (200, 100),
        "images/val/b/1.png": (100, 100),
        "images/val/empty.png": (50, 40),
        "images/val/missing.png": (64, 64),
        "images/val/outside.png": (100, 100),
        "images/val/turned.jpg": (40, 80),
    }
    expected = {
        "images/val/a/1.png": [(0, [0, 0, 100, 100]), (1, [90, 40, 20, 20])],
        "images/val/b/1.png": [(2, [10, 20, 40, 70])],
        "images/val/empty.png": [],
        "images/val/missing.png": [],
        "images/val/outside.png": [(0, [70, 40, 30, 20])],
        "images/val/turned.jpg": [(0, [10, 20, 20, 40])],
    }
    found = by_file(truth)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert [c for c, _ in found[name]] == [c for c, _ in rows]
        for (_, box), (_, wanted) in zip(found[name], rows):
            assert box == pytest.approx(wanted, abs=1e-4)
    assert truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    assert [annotation["id"] for annotation in truth["annotations"]] == [1, 2, 3, 4, 5]
    assert all(a["iscrowd"] == 0 and a["area"] == a["bbox"][2] * a["bbox"][3] for a in truth["annotations"])
    json.dumps(truth)


def test_uncut_ground_truth(odd_data: Path):
    ((_, box),) = by_file(coco_ground_truth(odd_data, clip=False))["images/val/outside.png"]
    assert box == pytest.approx([70, 40, 40, 20], abs=1e-4)


def test_a_missing_split_or_file_is_refused(odd_data: Path):
    with pytest.raises(FileNotFoundError, match="test"):
        coco_ground_truth(odd_data, split="test")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        coco_ground_truth(odd_data.with_name("nowhere.yaml"))


def perfect(truth: dict) -> list[dict]:
    """Detections that are the ground truth itself."""
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: a[key] for key in keys}, "score": 0.9} for a in truth["annotations"]]


def test_a_perfect_detector_scores_one(odd_data: Path):
    truth = coco_ground_truth(odd_data)
    metrics = coco_metrics(truth, perfect(truth))
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["AR100"] == pytest.approx(1)
    assert metrics["per_class"] == {name: pytest.approx(1) for name in ("cat", "dog", "cow")}
    assert metrics["APl"] == pytest.approx(1) and metrics["APs"] == pytest.approx(1)


def test_no_detections_score_zero(odd_data: Path):
    truth = coco_ground_truth(odd_data)
    metrics = coco_metrics(truth, [])
    assert all(metrics[key] == 0 for key in KEYS)
    assert coco_metrics({**truth, "annotations": []}, [])["AP"] is None


def test_hand_computed_example():
    """Four boxes in one image; the detector finds two at IoU 1, one at IoU 0.6, and makes one false alarm.

    By falling score: hit (1.0), false alarm, hit (1.0), hit (0.6). At IoU 0.5, 0.55 and 0.6 the precision envelope is
    1 up to recall 1/4 and 3/4 up to recall 3/4; above, it is 1 up to 1/4 and 2/3 up to 1/2. COCO samples recall at
    0, 0.01, ..., 1: 26 points up to 1/4, 25 for each further quarter.
    """
    boxes = [[0, 0, 100, 100], [200, 0, 100, 100], [0, 200, 100, 100], [200, 200, 100, 100]]
    truth = {
        "images": [{"id": 7, "width": 400, "height": 400}],
        "annotations": [
            {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": box, "area": 10000, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 3, "name": "thing"}, {"id": 4, "name": "never"}],
    }
    found = [(boxes[0], 0.9), ([350, 350, 40, 40], 0.8), (boxes[1], 0.7), ([0, 200, 100, 60], 0.6)]
    detections = [{"image_id": 7, "category_id": 3, "bbox": box, "score": score} for box, score in found]
    metrics = coco_metrics(truth, detections)
    low = (26 + 50 * 3 / 4) / 101
    high = (26 + 25 * 2 / 3) / 101
    assert metrics["AP50"] == pytest.approx(low)
    assert metrics["AP75"] == pytest.approx(high)
    assert metrics["AP"] == pytest.approx((3 * low + 7 * high) / 10)
    assert metrics["AR1"] == pytest.approx(1 / 4)
    assert metrics["AR100"] == pytest.approx((3 * 3 / 4 + 7 * 2 / 4) / 10)
    assert metrics["APl"] is not None and metrics["APs"] is None and metrics["ARm"] is None
    assert metrics["per_class"] == {"thing": metrics["AP"], "never": None}


def random_case(seed: int) -> tuple[dict, list[dict]]:
    """Ground truth over 12 images and 3 classes, and detections that half hit it."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 12)):
            box = np.concatenate([rng.uniform(0, 300, 2), np.exp(rng.uniform(np.log(8), np.log(200), 2))])
            category = int(rng.integers(1, 4))
            annotations.append({"image_id": image, "category_id": category, "bbox": box.tolist(), "iscrowd": 0})
            annotations[-1] |= {"id": len(annotations), "area": float(box[2] * box[3])}
            for _ in range(rng.integers(0, 4)):
                near = box + rng.normal(0, 0.08, 4) * np.repeat(box[2:].mean(), 4)
                near[2:] = near[2:].clip(1)
                detections.append({"image_id": image, "category_id": category, "bbox": near.tolist()})
                detections[-1]["score"] = float(rng.random())
    images = [{"id": image, "width": 500, "height": 500} for image in range(1, 13)]
    categories = [{"id": category, "name": f"c{category}"} for category in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("seed", range(3))
def test_equals_cocoeval_called_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture, seed: int):
    truth, detections = random_case(seed)
    truth_file, results_file = tmp_path / "truth.json", tmp_path / "results.json"
    truth_file.write_text(json.dumps(truth))
    results_file.write_text(json.dumps(detections))
    capsys.readouterr()
    metrics = coco_metrics(truth_file, results_file)
    assert capsys.readouterr().out == ""
    assert coco_metrics(truth, detections) == metrics
    assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"}  # the caller's list is left as it was
    assert "ignore" not in truth["annotations"][0]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth_file))
        run = COCOeval(coco, coco.loadRes(str(results_file)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert [metrics[key] for key in KEYS] == [None if value == -1 else value for value in run.stats.tolist()]
    assert 0.1 < metrics["AP"] < 0.9


def test_max_det_counts():
    truth, _ = random_case(0)
    single = [a for a in truth["annotations"] if a["category_id"] == 1]
    truth["annotations"] = single
    wrong = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": [400, 400, 5, 5], "score": 0.99} for a in single[:1]
    ] * 10
    detections = wrong + perfect(truth)
    assert coco_metrics(truth, detections, max_det=10)["AR100"] < coco_metrics(truth, detections)["AR100"] == 1
    with pytest.raises(ValueError, match="max_det=5"):
        coco_metrics(truth, detections, max_det=5)


def test_malformed_input_is_refused(tmp_path: Path):
    truth, detections = random_case(0)
    with pytest.raises(ValueError, match="image_id 99"):
        coco_metrics(truth, [{**detections[0], "image_id": 99}])
    with pytest.raises(ValueError, match="category_id 9"):
        coco_metrics(truth, [{**detections[0], "category_id": 9}])
    with pytest.raises(ValueError, match="detection lacks score"):
        coco_metrics(truth, [{key: value for key, value in detections[0].items() if key != "score"}])
    with pytest.raises(ValueError, match="lacks categories"):
        coco_metrics({"images": [], "annotations": []}, [])
    with pytest.raises(ValueError, match="id 0"):
        coco_metrics({**truth, "annotations": [{**truth["annotations"][0], "id": 0}]}, [])
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        coco_metrics(tmp_path / "absent.json", [])
    (tmp_path / "no.json").write_text("#!")
    with pytest.raises(ValueError, match=r"no\.json' is no JSON file"):
        coco_metrics(tmp_path / "no.json", [])


def check_result(result: dict) -> None:
    """Every number is there, fits JSON and shows in the table."""
    assert json.loads(json.dumps(result)) == result
    assert tuple(key for key in result["coco"]["bbox"] if key != "per_class") == KEYS
    table = format_table(result).splitlines()
    assert f"{result['images']} images, {result['instances']} instances, ground truth: labels" in table
    own = result["ultralytics"]["bbox"]
    ap = next(line.split() for line in table if line.startswith("AP "))
    assert ap == ["AP", f"{100 * result['coco']['bbox']['AP']:.2f}", f"{100 * own['map50_95']:.2f}"]


def test_a_detector_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of uncut boxes only the interpolation of the curve differs; cut ones fit digits at the border better."""
    monkeypatch.chdir(tmp_path)
    data = compose(tmp_path / "set", 1, 24, 64)
    result, cut = (evaluate(FLOAT, data, batch=4, device="cpu", clip=clip) for clip in (False, True))
    rows = sum(len(file.read_text().splitlines()) for file in (tmp_path / "set/labels/val").glob("*.txt"))
    assert (result["images"], result["instances"], result["imgsz"]) == (24, rows, 64)
    assert cut["coco"]["bbox"]["AP"] > result["coco"]["bbox"]["AP"] > 0.2
    assert result["coco"]["bbox"]["AP"] == pytest.approx(result["ultralytics"]["bbox"]["map50_95"], abs=0.005)
    assert result["coco"]["bbox"]["AP50"] == pytest.approx(result["ultralytics"]["bbox"]["map50"], abs=0.005)
    check_result(result)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # no runs folder


def test_a_model_keeps_its_callbacks(digits):
    """Nothing that an evaluation makes stays on the caller's object."""
    yolo = YOLO(FLOAT)
    settings = dict(data=str(digits), imgsz=64, plots=False, verbose=False)
    yolo.val(**settings)  # Ultralytics adds callbacks of its own
    before = {event: list(callbacks) for event, callbacks in yolo.callbacks.items()}
    assert evaluate(yolo, digits, imgsz=64)["coco"]["bbox"]["AP"] > 0.05
    assert yolo.callbacks == before


def test_a_missing_or_unfit_model_is_refused(tmp_path: Path):
    with pytest.raises(QCError, match=r"absent\.pt does not exist"):
        evaluate(tmp_path / "absent.pt", tmp_path / "absent.yaml")
    with pytest.raises(QCError, match=r"model=.* is a folder"):
        evaluate(tmp_path, tmp_path / "absent.yaml")
    (tmp_path / "torn.pt").write_bytes(FLOAT.read_bytes()[:20_000])
    with pytest.raises(QCError, match=r"torn\.pt cannot be read as a checkpoint"):
        evaluate(tmp_path / "torn.pt", tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="task 'classify'"):
        evaluate("yolov8n-cls.yaml", tmp_path / "absent.yaml")


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shared trained checkpoint and a copy of its validation images, two of them with one stem."""
    weights, source = SHARED / "weights/bccd-yolov5n-320.pt", SHARED / "data/bccd"
    if not weights.is_file() or not source.is_dir():
        pytest.skip("the shared checkpoint or its data is not here")
    root = tmp_path_factory.mktemp("bccd")
    files = sorted((source / "images/val").iterdir())[:40]
    for i, file in enumerate(files):
        for kind, name in (("images", file.name), ("labels", f"{file.stem}.txt")):
            target = root / kind / "val" / ("b" if i % 2 else "a")
            target.mkdir(parents=True, exist_ok=True)
            stem = "1" if i < 2 else file.stem
            shutil.copyfile(source / kind / "val" / name, target / f"{stem}{Path(name).suffix}")
    yaml = root / "bccd.yaml"
    yaml.write_text(f"path: {root}\ntrain: images/val\nval: images/val\nnames: [Platelets, RBC, WBC]\n")
    return weights, yaml


@pytest.fixture(scope="module")
def bccd_result(bccd: tuple[Path, Path]) -> dict:
    return evaluate(*bccd, batch=8, device="cpu", clip=False)


def test_uncut_boxes_agree_with_ultralytics(bccd_result: dict):
    """The same boxes, so only the interpolation of the curve and COCO's limit of 100 detections differ."""
    check_result(bccd_result)
    assert bccd_result["imgsz"] == 320  # the checkpoint's own
    assert bccd_result["images"] == 40
    assert bccd_result["ultralytics"]["bbox"]["map50_95"] > 0.5
    assert bccd_result["coco"]["bbox"]["AP"] == pytest.approx(bccd_result["ultralytics"]["bbox"]["map50_95"], abs=0.005)
    assert bccd_result["coco"]["bbox"]["AP50"] == pytest.approx(bccd_result["ultralytics"]["bbox"]["map50"], abs=0.005)


def test_cut_boxes_are_what_predict_returns(bccd: tuple[Path, Path], bccd_result: dict):
    """Detections by the host's predict(), an independent way to the numbers of the default."""
    weights, data = bccd
    result = evaluate(weights, data, batch=1, device="cpu")
    truth = coco_ground_truth(data)
    ids = {str(data.parent / image["file_name"]): image["id"] for image in truth["images"]}
    detections = []
    for prediction in YOLO(weights).predict(
        list(ids), imgsz=320, batch=1, device="cpu", conf=0.001, iou=0.7, max_det=300, verbose=False, stream=True
    ):
        for (x1, y1, x2, y2), score, c in zip(
            prediction.boxes.xyxy.tolist(), prediction.boxes.conf.tolist(), prediction.boxes.cls.tolist()
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            detections.append(
                {"image_id": ids[prediction.path], "category_id": int(c) + 1, "bbox": box, "score": score}
            )
    by_predict = coco_metrics(truth, detections)
    # predict() takes one class a box and pads less at rect shapes: close, not equal.
    assert result["coco"]["bbox"]["AP"] == pytest.approx(by_predict["AP"], abs=0.02)
    assert result["coco"]["bbox"]["AP"] > bccd_result["coco"]["bbox"]["AP"]  # cells at the border
    assert math.isclose(
        result["ultralytics"]["bbox"]["map50_95"], bccd_result["ultralytics"]["bbox"]["map50_95"], abs_tol=0.01
    )
