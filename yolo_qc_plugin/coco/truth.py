# yolo_qc_plugin, AGPL-3.0
"""Ground truth in COCO form: of COCO's own annotations file where the data set is COCO, else of labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths
from ultralytics.data.converter import coco80_to_coco91_class
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset, polygon2mask
from ultralytics.utils import ops

from .metrics import read_json

# task -> COCO's annotations of val2017 in the data set's folder, where Ultralytics looks for them, and its classes
PUBLISHED = {
    "detect": ("instances_val2017.json", 80),
    "segment": ("instances_val2017.json", 80),
    "pose": ("person_keypoints_val2017.json", 1),
}
LABELS = "labels"  # a ground truth's description where it is not of a file
POINTS = 1000  # of an outline, before it is drawn: Ultralytics' number
BODY = 0.53  # area of an object with keypoints over its box's, as Ultralytics' OKS takes it


def coco_ground_truth(data: str | Path, split: str = "val", clip: bool = True, task: str = "detect") -> dict[str, Any]:
    """Convert the labels of one split to COCO form.

    Ultralytics' own data set reads them, so that what it skips (corrupt images, duplicate rows) is skipped here and
    what it converts (polygons to boxes, EXIF rotation) is converted here. As in any training or validation it may
    write its label cache beside the labels.

    Args:
        data: Data YAML, as Ultralytics accepts it.
        split: Key of the YAML: "train", "val" or "test".
        clip: Cut boxes off at the image's border, as Ultralytics does when it builds such a file.
        task: "detect", "segment" or "pose".

    Returns:
        "info", whose description is "labels"; "images" with id, file_name (relative to the data set's root where it
        lies below it), width and height in pixels; "annotations" with bbox [x, y, w, h] in pixels, area and iscrowd 0,
        of "segment" also segmentation (run lengths), of "pose" keypoints [x, y, visibility, ...] and num_keypoints;
        "categories" with id (class index + 1) and name. Ids count from 1, for COCOeval reads 0 as "not matched". An
        area is that of the mask, of an object with keypoints 0.53 of the box's, else the box's.

    Raises:
        FileNotFoundError: The YAML, the split's key or its images are missing.
        RuntimeError: No image of the split is valid.
        ValueError: The task is "segment" and there are boxes without masks, which Ultralytics refuses.
    """
    info = check_det_dataset(data, split=split)
    dataset = YOLODataset(img_path=info[split], data=info, task=task, augment=False, rect=False)
    return to_coco(dataset.labels, info["names"], info["path"], clip, task)


def annotations_file(info: dict[str, Any], split: str, task: str) -> Path | None:
    """COCO's own annotations of a split, where Ultralytics would look for them; None where the data set is another.

    Args:
        info: What Ultralytics' `check_det_dataset` makes of a data YAML.
        split: Key of the YAML.
        task: "detect", "segment" or "pose".
    """
    name, classes = PUBLISHED[task]
    file, images = Path(info["path"]) / "annotations" / name, info.get(split)
    is_coco = isinstance(images, str) and "coco" in images and Path(images).name == "val2017.txt"
    return file if is_coco and len(info["names"]) == classes and file.is_file() else None


def published(file: Path, images: Iterable[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """COCO's annotations of some images, with crowds and areas as they are there.

    Args:
        file: See `annotations_file`.
        images: Paths of the images' files.

    Returns:
        The ground truth of these images, and the id of each by its path.

    Raises:
        ValueError: The file has nothing on one of them.
    """
    truth = read_json(file)
    known = {image["file_name"]: image["id"] for image in truth["images"]}
    paths = list(images)
    if missing := [path for path in paths if Path(path).name not in known]:
        raise ValueError(f"{file} does not have the image {missing[0]}: its images are those of COCO's val2017")
    ids = {path: known[Path(path).name] for path in paths}
    chosen = set(ids.values())
    return {
        "info": {"description": str(file)},
        "images": [image for image in truth["images"] if image["id"] in chosen],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in chosen],
        "categories": truth["categories"],
    }, ids


def published_categories(classes: int) -> list[int]:
    """Class index -> category id in COCO's own files, which leave numbers out."""
    return coco80_to_coco91_class()[:classes]


def to_coco(
    labels: Iterable[dict[str, Any]], names: dict[int, str], root: str | Path, clip: bool, task: str = "detect"
) -> dict[str, Any]:
    """COCO form of Ultralytics' labels; see `coco_ground_truth`.

    Args:
        labels: Dicts of im_file, shape (h, w), cls (n, 1), bboxes (n, 4) as x, y, w, h, segments, n polygons (k, 2),
            and keypoints (n, k, 3); all over the image's sides.
        names: Class index -> name.
        root: Folder of the data set.
        clip: Cut boxes off at the image's border.
        task: Whose labels they are.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, label in enumerate(labels, 1):
        file, (height, width) = Path(label["im_file"]), label["shape"]
        file = file.relative_to(root) if file.is_relative_to(root) else file
        images.append({"id": image_id, "file_name": file.as_posix(), "width": int(width), "height": int(height)})
        boxes = ops.xywh2xyxy(label["bboxes"].astype(float)) * (width, height, width, height)
        boxes = ops.xyxy2ltwh(ops.clip_boxes(boxes, (height, width)) if clip else boxes)
        more = _of_task(label, boxes, task)
        for c, box, of_task in zip(label["cls"][:, 0], boxes.tolist(), more, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(c) + 1}
            annotations.append({**annotation, "bbox": box, "iscrowd": 0, **of_task})
    categories = [{"id": int(c) + 1, "name": name} for c, name in names.items()]
    info = {"description": LABELS}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _of_task(label: dict[str, Any], boxes: np.ndarray, task: str) -> list[dict[str, Any]]:
    """What a task's annotations of one image hold beside the box."""
    height, width = label["shape"]
    areas = (boxes[:, 2] * boxes[:, 3]).tolist()
    if task == "segment":
        polygons = ops.resample_segments([np.array(s) for s in label["segments"]], POINTS) if len(boxes) else []
        return [_mask(polygon * (width, height), (height, width)) for polygon in polygons]
    if task == "pose":
        points = label["keypoints"].astype(float) * (width, height, 1)
        seen = np.count_nonzero(points[..., 2], axis=1).tolist()
        return [
            {"keypoints": of_one.flatten().tolist(), "num_keypoints": n, "area": BODY * area}
            for of_one, n, area in zip(points, seen, areas)
        ]
    return [{"area": area} for area in areas]


def _mask(polygon: np.ndarray, shape: tuple[int, int]) -> dict[str, Any]:
    """A polygon in pixels as run lengths and their area, drawn as Ultralytics draws what models are trained on."""
    return encode(polygon2mask(shape, [polygon.reshape(-1)]))


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (h, w) of 0 and 1 as COCO's "segmentation", run lengths in text, and its "area" in pixels."""
    found = run_lengths.encode(np.asfortranarray(mask, np.uint8))
    area = int(run_lengths.area(found))
    return {"segmentation": {"size": found["size"], "counts": found["counts"].decode()}, "area": area}
