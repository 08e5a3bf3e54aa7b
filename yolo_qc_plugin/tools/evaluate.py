# yolo_qc_plugin, AGPL-3.0
"""Detection metrics by pycocotools, for any data set in YOLO layout.

Ultralytics' own mAP interpolates the precision-recall curve a little differently from COCOeval. Here one stock
validation run feeds both, on the same images, labels and detections, so that the two can be held side by side.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics import YOLO
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import ops
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES


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
    return _to_coco(dataset.labels, info["names"], info["path"], clip)


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
    truth, found = _index_truth(_read_json(annotations)), _read_json(detections)
    _check_detections(truth, found)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        # loadRes writes into the entries it is given, and fails on an empty list
        results = truth.loadRes([dict(d) for d in found]) if found else _index({**truth.dataset, "annotations": []})
        run = COCOeval(truth, results, iouType="bbox")
        run.params.maxDets = [1, 10, max_det]
        run.evaluate()
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
        truth.cats[category]["name"]: _mean(precision[:, :, k, 0, -1]) for k, category in enumerate(run.params.catIds)
    }
    return metrics


def evaluate(
    model: str | Path | YOLO,
    data: str | Path,
    *,
    imgsz: int | None = None,
    batch: int = 16,
    device: str | None = None,
    split: str = "val",
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    clip: bool = True,
    rect: bool = True,
) -> dict[str, Any]:
    """Validate a detector once with stock Ultralytics and score the very same detections by COCOeval too.

    Two rules part COCO's AP from Ultralytics' mAP50-95. COCOeval counts at most 100 detections per image and class
    (its maxDets[-1]), whatever `max_det` lets through. And the boxes that predict() returns, and that a COCO server is
    sent, are cut off at the image's border, while Ultralytics' own metric compares them uncut: where many objects touch
    the border, COCO's AP is higher for that (blood cells at 320 pixels: by 1.3 points). With `clip=False` COCOeval gets
    the uncut boxes too, and what is left is how the two interpolate, 0.1 to 0.3 points so far.

    Nothing is written to the runs folder.

    Args:
        model: Checkpoint, exported model or model YAML, of the task "detect", or a YOLO object of one.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels; None takes the one the checkpoint was trained with.
        batch: Images a batch.
        device: "cpu", "0", ...; None lets Ultralytics choose.
        split: "train", "val" or "test".
        conf: Lowest confidence kept, 0..1.
        iou: Overlap from which non-maximum suppression drops the weaker box, 0..1.
        max_det: Detections kept per image.
        clip: Cut boxes off at the image's border for COCOeval, detections and ground truth alike.
        rect: Batches of images of like shape padded as little as can be, as Ultralytics validates a checkpoint; False
            pads all to a square, as it does with exported models of fixed size.

    Returns:
        "model", "data", "imgsz", "split", "clip"; "coco", see `coco_metrics`; "ultralytics" with map50_95 and map50, in
        0..1; "images" and "instances", how many were evaluated.

    Raises:
        FileNotFoundError: The model or the data is missing.
        ValueError: The model is no YOLO detector.
    """
    yolo = model if isinstance(model, YOLO) else load_detector(model)

    finished: list[_RecordingValidator] = []
    yolo.add_callback("on_val_end", finished.append)
    size = {} if imgsz is None else {"imgsz": imgsz}
    with tempfile.TemporaryDirectory() as folder:
        yolo.val(
            validator=_RecordingValidator,
            data=str(data),
            batch=batch,
            device=device,
            split=split,
            conf=conf,
            iou=iou,
            max_det=max_det,
            rect=rect,
            plots=False,
            verbose=False,
            project=folder,
            **size,
        )
    validator = finished[0]

    # The loader reads its data set in order, so labels and records pair up by position. The labels know no shape here:
    # Ultralytics takes it out when it sorts images into rectangular batches.
    labels = validator.dataloader.dataset.labels
    labels = [{**label, "shape": shape} for label, (shape, _) in zip(labels, validator.records)]
    truth = _to_coco(labels, validator.names, validator.data["path"], clip)
    detections = []
    for image_id, (shape, rows) in enumerate(validator.records, 1):
        detections += _to_results(image_id, ops.clip_boxes(rows, shape) if clip else rows)
    return {
        "model": str(getattr(model, "ckpt_path", model)),
        "data": str(data),
        "imgsz": validator.args.imgsz,
        "split": split,
        "clip": clip,
        "coco": coco_metrics(truth, detections),
        "ultralytics": {"map50_95": float(validator.metrics.box.map), "map50": float(validator.metrics.box.map50)},
        "images": len(truth["images"]),
        "instances": len(truth["annotations"]),
    }


def format_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as plain text, metrics in points (0..100) and "-" where there is no ground truth."""
    points = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
    own = {"AP": result["ultralytics"]["map50_95"], "AP50": result["ultralytics"]["map50"]}
    coco = {name: value for name, value in result["coco"].items() if name != "per_class"}
    rows = [("", "COCOeval", "Ultralytics")]
    rows += [(name, points(value), points(own[name]) if name in own else "") for name, value in coco.items()]
    rows += [(f"AP of {name}", points(value), "") for name, value in result["coco"]["per_class"].items()]
    width = max(len(row[0]) for row in rows)
    head = f"{result['model']} on {result['data']} ({result['split']}), imgsz {result['imgsz']}"
    counts = f"{result['images']} images, {result['instances']} instances"
    return "\n".join([head, counts, *(f"{a:<{width}}  {b:>8}  {c:>11}".rstrip() for a, b, c in rows)])


def load_model(model: str | Path) -> YOLO:
    """The model; a missing checkpoint is refused before Ultralytics asks the network for it."""
    name = Path(model).name
    known = "://" in str(model) or name in GITHUB_ASSETS_NAMES or Path(model).is_file()
    if name.endswith(".pt") and not known:
        raise FileNotFoundError(f"model '{model}' does not exist: pass a checkpoint, an exported model or a model YAML")
    return YOLO(model)


def load_detector(model: str | Path) -> YOLO:
    """The model, if it is a detector."""
    yolo = load_model(model)
    if yolo.task_map[yolo.task]["validator"] is not DetectionValidator:
        kind = f"{type(yolo).__name__} of task '{yolo.task}'"
        raise ValueError(f"model '{model}' is a {kind}, only YOLO models of task 'detect' are accepted")
    return yolo


class _RecordingValidator(DetectionValidator):
    """Stock validation that also keeps, per image in the data set's order, its size and its detections.

    Ultralytics' predictions.json knows an image by its file's stem alone, which two folders may share, and rounds.
    """

    def init_metrics(self, model: torch.nn.Module) -> None:
        """Start the records; `save_json`, which Ultralytics turns on for COCO and LVIS, would install a package."""
        super().init_metrics(model)
        self.args.save_json = False
        self.records: list[tuple[tuple[int, int], np.ndarray]] = []  # (h, w), (n, 6) of x1, y1, x2, y2, score, class

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        """Record what the stock metrics were given, with boxes in pixels of the original image."""
        super().update_metrics(preds, batch)
        for i, pred in enumerate(preds):
            shape = batch["ori_shape"][i]
            boxes = ops.xyxy2xywh(pred["bboxes"])  # scale_boxes clips corners, but not centres and sizes
            boxes = ops.scale_boxes(batch["img"].shape[2:], boxes, shape, batch["ratio_pad"][i], xywh=True)
            rows = torch.cat([ops.xywh2xyxy(boxes), pred["conf"][:, None], pred["cls"][:, None]], dim=1)
            self.records.append((shape, rows.cpu().numpy().astype(float)))


def _to_results(image_id: int, boxes: np.ndarray) -> list[dict[str, Any]]:
    """COCO results of one image from rows (n, 6) of x1, y1, x2, y2 in pixels, score, class."""
    return [
        {"image_id": image_id, "category_id": int(c) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for x1, y1, x2, y2, score, c in boxes.tolist()
    ]


def _to_coco(labels: Iterable[dict[str, Any]], names: dict[int, str], root: str | Path, clip: bool) -> dict[str, Any]:
    """COCO form of Ultralytics' labels: im_file, shape (h, w), cls (n, 1), bboxes (n, 4) as normalized x, y, w, h."""
    images, annotations = [], []
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


def _read_json(source: Any) -> Any:
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
