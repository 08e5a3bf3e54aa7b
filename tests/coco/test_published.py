# yolo_qc_plugin, AGPL-3.0
"""COCO's own annotations as the ground truth: found where Ultralytics looks, with crowds, areas and its categories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHARED
from test_masks_and_keypoints import by_hand
from ultralytics.data.utils import check_det_dataset

from yolo_qc_plugin.coco.truth import annotations_file, coco_ground_truth, published, published_categories
from yolo_qc_plugin.tools.evaluate import detect, evaluate

NAMES = [f"class {i}" for i in range(80)]


@pytest.mark.parametrize("task,images,names,there,found", [
    ("detect", "coco/val2017.txt", NAMES, "instances_val2017.json", True),
    ("segment", "coco/val2017.txt", NAMES, "instances_val2017.json", True),
    ("pose", "coco-pose/val2017.txt", ["person"], "person_keypoints_val2017.json", True),
    ("pose", "coco-pose/val2017.txt", ["person"], "instances_val2017.json", False),  # the file of another task
    ("detect", "coco/test-dev2017.txt", NAMES, "instances_val2017.json", False),  # whose annotations nobody has
    ("detect", "coco/images/val2017", NAMES, "instances_val2017.json", False),
    ("detect", "mine/val2017.txt", NAMES, "instances_val2017.json", False),
    ("detect", "coco/val2017.txt", ["cat", "dog"], "instances_val2017.json", False),  # trained on some classes
    ("detect", ["coco/val2017.txt"], NAMES, "instances_val2017.json", False),
])  # fmt: skip
def test_the_file_is_found_where_the_data_is_coco(tmp_path, task, images, names, there, found):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / there
    file.write_text("{}")
    info = {"path": tmp_path, "val": images, "names": dict(enumerate(names))}
    assert annotations_file(info, "val", task) == (file if found else None)
    file.unlink()
    assert annotations_file(info, "val", task) is None


def test_what_is_not_evaluated_is_left_out(tmp_path):
    images = [{"id": 10 * i, "file_name": f"{i:012d}.jpg"} for i in (1, 2, 3)]
    boxes = [{"id": i, "image_id": image} for i, image in ((1, 10), (2, 20), (3, 20), (4, 30))]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}))
    paths = [f"/data/images/val2017/{i:012d}.jpg" for i in (2, 3)]
    truth, ids = published(file, paths)
    assert [a["id"] for a in truth["annotations"]] == [2, 3, 4] and ids == dict(zip(paths, (20, 30)))
    with pytest.raises(ValueError, match=r"truth\.json does not have the image /data/other\.jpg"):
        published(file, ["/data/other.jpg"])


def test_classes_have_the_numbers_of_coco():
    assert published_categories(80)[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert published_categories(80)[-1] == 90 and published_categories(1) == [1]


def test_a_detector_of_coco_is_held_against_the_file(tmp_path):
    """Its labels made into such a file, with areas that are not the boxes' and a crowd, which labels cannot tell."""
    weights, source = SHARED / "weights/yolov5nu-coco.pt", SHARED / "data/coco"
    if not weights.is_file() or not source.is_dir():
        pytest.skip("the shared checkpoint or its data is not here")
    root = tmp_path / "coco"
    yaml = next(source.glob("*.yaml")).read_text()
    names = yaml[yaml.index("names:") :]
    files = sorted((source / "images/val2017").glob("*.jpg"))[:16]
    for kind, paths in (("images", files), ("labels", [source / "labels/val2017" / f"{f.stem}.txt" for f in files])):
        (root / kind / "val2017").mkdir(parents=True)
        for path in paths:
            shutil.copyfile(path, root / kind / "val2017" / path.name)
    (root / "val2017.txt").write_text("".join(f"./images/val2017/{f.name}\n" for f in files))
    data = root / "coco.yaml"
    data.write_text(f"path: {root}\ntrain: val2017.txt\nval: val2017.txt\n{names}")
    by_labels = evaluate(weights, data, imgsz=320, device="cpu")
    assert by_labels["ground_truth"] == "labels" and by_labels["coco"]["bbox"]["AP"] > 0.1

    truth = coco_ground_truth(data, clip=False)
    numbers = published_categories(80)
    for image in truth["images"]:
        image["file_name"], image["id"] = Path(image["file_name"]).name, int(Path(image["file_name"]).stem)
    ids = sorted(image["id"] for image in truth["images"])
    for a in truth["annotations"]:
        a |= {"area": 0.5 * a["area"], "image_id": ids[a["image_id"] - 1], "category_id": numbers[a["category_id"] - 1]}
    truth["annotations"][0]["iscrowd"] = 1
    truth["images"].append({"id": 7, "file_name": "000000000007.jpg", "width": 9, "height": 9})
    truth["annotations"].append({**truth["annotations"][1], "id": 10**6, "image_id": 7})
    truth["categories"] = [{"id": numbers[c["id"] - 1], "name": c["name"]} for c in truth["categories"]]
    file = root / "annotations/instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(truth))

    result = evaluate(weights, data, imgsz=320, device="cpu")
    assert result["ground_truth"] == str(file) and result["images"] == 16
    assert annotations_file(check_det_dataset(data), "val", "detect") == file
    found, results, _ = detect(weights, data, 320, device="cpu")
    (tmp_path / "truth.json").write_text(json.dumps(found))
    (tmp_path / "results.json").write_text(json.dumps(results))
    stats = by_hand(tmp_path / "truth.json", tmp_path / "results.json", "bbox")
    assert [result["coco"]["bbox"][key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")] == stats[:6]
    assert stats[0] != by_labels["coco"]["bbox"]["AP"] and stats[3] != by_labels["coco"]["bbox"]["APs"]
    assert {a["iscrowd"] for a in found["annotations"]} == {0, 1} and 7 not in {i["id"] for i in found["images"]}
