# yolo_qc_plugin, AGPL-3.0
"""COCO form of labels and detections, and COCOeval's metrics of them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import ops


def coco_ground_truth(data: str | Path, split: str = "val", clip: bool = True) -> dict[str, Any]:
    """Convert the labels of one split to COCO form.

    Ultralytics' own data set reads them, so that what it skips (corrupt images, duplicate rows) is skipped here and
    what it converts (polygons to boxes, EXIF rotation) is converted here. As in any training or validation it may
    write its label cache beside the labels.

    Args:
        data: Data YAML, as Ultralytics accepts it.
        split: Key of the YAML: "train", "val" or "test".
        clip: Cut boxes off at the image's border, as Ultralytics does when it builds such a file.

    Returns:
        "images" with id, file_name (relative to the data set's root where it lies below it), width and height in
        pixels; "annotations" with bbox [x, y, w, h] in pixels, area w * h and iscrowd 0; "categories" with id (class
        index + 1) and name. Ids count from 1, for COCOeval reads 0 as "not matched".

    Raises:
        FileNotFoundError: The YAML, the split's key or its images are missing.
        RuntimeError: No image of the split is valid.
    """
    info = check_det_dataset(data, split=split)
    dataset = YOLODataset(img_path=info[split], data=info, task="detect", augment=False, rect=False)
    return to_coco(dataset.labels, info["names"], info["path"], clip)


def coco_metrics(
    annotations: dict[str, Any] | str | Path, detections: list[dict[str, Any]] | str | Path, max_det: int = 100
) -> dict[str, Any]:
    """COCOeval's box metrics.

    Args:
        annotations: Ground truth in COCO form, or a JSON file of it.
        detections: COCO results, dicts of image_id, category_id, bbox [x, y, w, h] in pixels and score, or a JSON file
            of them; may be empty.
        max_det: Detections per image and class that count, >= 10. COCO's own rule is 100; a larger number also
            enters the key "AR100".

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as COCOeval defines them, in 0..1, and
        "per_class", AP by category name. None stands for COCOeval's -1: there is no ground truth of that kind.

    Raises:
        ValueError: max_det is too small, an entry lacks a key, an annotation has id 0, or a detection names an unknown
            image or category.
        FileNotFoundError: A JSON file is missing.
    """
    if max_det < 10:
        raise ValueError(f"max_det={max_det} is not accepted: it must be >= 10, for AR10 counts that many")
    run = matched(annotations, detections, max_det)
    with contextlib.redirect_stdout(io.StringIO()):
        run.accumulate()

    # COCOeval.summarize looks its numbers up by the value 100; these are the same means for any max_det.
    precision, recall = run.eval["precision"], run.eval["recall"]  # [iou, recall, class, area, max], [iou, class, ...]
    metrics: dict[str, Any] = {"AP": _mean(precision[..., 0, -1])}
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        metrics[name] = _mean(precision[np.isclose(run.params.iouThrs, iou), ..., 0, -1])
    for name, area in (("APs", 1), ("APm", 2), ("APl", 3)):
        metrics[name] = _mean(precision[..., area, -1])
    for name, limit in (("AR1", 0), ("AR10", 1), ("AR100", 2)):
        metrics[name] = _mean(recall[..., 0, limit])
    for name, area in (("ARs", 1), ("ARm", 2), ("ARl", 3)):
        metrics[name] = _mean(recall[..., area, -1])
    metrics["per_class"] = {
        run.cocoGt.cats[category]["name"]: _mean(precision[:, :, k, 0, -1])
        for k, category in enumerate(run.params.catIds)
    }
    return metrics


def matched(
    annotations: dict[str, Any] | str | Path, detections: list[dict[str, Any]] | str | Path, max_det: int = 100
) -> COCOeval:
    """COCOeval after its `evaluate()`, which matches detections to ground truth; see `coco_metrics`."""
    truth, found = _index_truth(read_json(annotations)), read_json(detections)
    _check_detections(truth, found)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        # loadRes writes into the entries it is given, and fails on an empty list
        results = truth.loadRes([dict(d) for d in found]) if found else _index({**truth.dataset, "annotations": []})
        run = COCOeval(truth, results, iouType="bbox")
        run.params.maxDets = [1, 10, max_det]
        run.evaluate()
    return run


def format_metrics(metrics: dict[str, Any]) -> str:
    """The result of `coco_metrics` as plain text, without classes, and "-" where there is no ground truth."""
    rows = [(name, value) for name, value in metrics.items() if name != "per_class"]
    return "\n".join(f"{name:<8}{'-' if value is None else f'{value:.4f}'}" for name, value in rows)


def to_results(image_id: int, boxes: np.ndarray) -> list[dict[str, Any]]:
    """COCO results of one image from rows (n, 6) of x1, y1, x2, y2 in pixels, score, class."""
    return [
        {"image_id": image_id, "category_id": int(c) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for x1, y1, x2, y2, score, c in boxes.tolist()
    ]


def to_coco(labels: Iterable[dict[str, Any]], names: dict[int, str], root: str | Path, clip: bool) -> dict[str, Any]:
    """COCO form of Ultralytics' labels: im_file, shape (h, w), cls (n, 1), bboxes (n, 4) as normalized x, y, w, h."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, label in enumerate(labels, 1):
        file, (height, width) = Path(label["im_file"]), label["shape"]
        file = file.relative_to(root) if file.is_relative_to(root) else file
        images.append({"id": image_id, "file_name": file.as_posix(), "width": int(width), "height": int(height)})
        boxes = ops.xywh2xyxy(label["bboxes"].astype(float)) * (width, height, width, height)
        boxes = ops.xyxy2ltwh(ops.clip_boxes(boxes, (height, width)) if clip else boxes)
        for c, box in zip(label["cls"][:, 0], boxes.tolist()):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(c) + 1}
            annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": int(c) + 1, "name": name} for c, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_json(source: Any) -> Any:
    """What a JSON file holds, or `source` itself if it is no path."""
    if not isinstance(source, (str, Path)):
        return source
    if not Path(source).is_file():
        raise FileNotFoundError(f"'{source}' does not exist: pass a JSON file in COCO form")
    return json.loads(Path(source).read_text(encoding="utf-8"))


def _index(dataset: dict[str, Any]) -> COCO:
    """A COCO object over `dataset`, without a file."""
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _index_truth(dataset: dict[str, Any]) -> COCO:
    """The checked ground truth as a COCO object; COCOeval writes into the annotations, so they are copied."""
    _check_keys(dataset, ("images", "annotations", "categories"), "the ground truth")
    for annotation in dataset["annotations"]:
        _check_keys(annotation, ("id", "image_id", "category_id", "bbox", "area", "iscrowd"), "an annotation")
        if annotation["id"] == 0:
            raise ValueError("an annotation has id 0, which COCOeval reads as 'not matched': number them from 1")
    with contextlib.redirect_stdout(io.StringIO()):
        return _index({**dataset, "annotations": [dict(a) for a in dataset["annotations"]]})


def _check_keys(entry: dict[str, Any], keys: tuple[str, ...], what: str) -> None:
    """Raise a ValueError unless `entry` is in COCO form as far as its keys go."""
    lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if lacking:
        raise ValueError(f"{what} lacks {', '.join(lacking)}: COCO form has {', '.join(keys)}")


def _check_detections(truth: COCO, detections: list[dict[str, Any]]) -> None:
    """Raise a ValueError for detections of images or categories that the ground truth does not have."""
    for detection in detections:
        _check_keys(detection, ("image_id", "category_id", "bbox", "score"), "a detection")
    for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
        unknown = {d[key] for d in detections} - set(known)
        if unknown:
            raise ValueError(f"detections name the {key} {min(unknown, key=str)!r}, which the annotations do not have")


def _mean(values: np.ndarray) -> float | None:
    """COCOeval's mean over the entries that have ground truth."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None
