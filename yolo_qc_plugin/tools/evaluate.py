# yolo_qc_plugin, AGPL-3.0
"""Detection metrics of a model by pycocotools, for any data set in YOLO layout.

Ultralytics' own mAP interpolates the precision-recall curve a little differently from COCOeval. Here one validation by
Ultralytics feeds both, on the same images, labels and detections, so that the two can be held side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO, __version__
from ultralytics.data.base import BaseDataset
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import ops
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from ..config import QCError
from .coco import coco_metrics, to_coco, to_results


def evaluate(
    model: str | Path | YOLO,
    data: str | Path,
    *,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 16,
    device: str | None = None,
    split: str = "val",
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    clip: bool = True,
    rect: bool = True,
) -> dict[str, Any]:
    """Validate a detector once with Ultralytics and score the very same detections by COCOeval too.

    COCO's AP differs from Ultralytics' mAP50-95 by two rules. COCOeval counts at most 100 detections per image and
    class (its maxDets[-1]), whatever `max_det` lets through. And the boxes that predict() returns, and that a COCO
    server is sent, are cut off at the image's border, while Ultralytics' own metric compares them uncut: where many
    objects touch the border, COCO's AP is higher for that (blood cells at 320 pixels: by 1.3 points). With `clip=False`
    COCOeval gets the uncut boxes too, and what is left is how the two interpolate, 0.1 to 0.3 points so far.

    Nothing is written to the runs folder, and a YOLO object that is given keeps its callbacks.

    Args:
        model: Checkpoint, exported model or model YAML, of the task "detect", or a YOLO object of one.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels, or height and width, to which all images are then padded; None takes the one the
            checkpoint was trained with.
        batch: Images a batch.
        device: "cpu", "0", ...; None lets Ultralytics choose.
        split: "train", "val" or "test".
        conf: Lowest confidence kept, 0..1.
        iou: Overlap from which non-maximum suppression drops the weaker box, 0..1.
        max_det: Detections kept per image.
        clip: Cut boxes off at the image's border for COCOeval, detections and ground truth alike.
        rect: Pad batches of images of like shape as little as can be, as Ultralytics validates a checkpoint; False
            pads all to a square, as it does with exported models of fixed size.

    Returns:
        "model", "data", "imgsz", "split", "clip"; "coco", see `coco_metrics`; "ultralytics" with map50_95 and map50, in
        0..1; "images" and "instances", how many were evaluated.

    Raises:
        FileNotFoundError: The model or the data is missing.
        ValueError: The model is no YOLO detector.
    """
    settings = dict(batch=batch, device=device, split=split, conf=conf, iou=iou, max_det=max_det, rect=rect)
    truth, detections, validator = detect(model, data, imgsz, clip, **settings)
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


def detect(
    model: str | Path | YOLO,
    data: str | Path,
    imgsz: int | Sequence[int] | None = None,
    clip: bool = True,
    **settings,
) -> tuple[dict[str, Any], list[dict[str, Any]], BaseValidator]:
    """Validate a detector once with Ultralytics; see `evaluate` for the arguments.

    Returns:
        The ground truth in COCO form, with images in the order of their files, COCO results, and the validator.
    """
    yolo = model if isinstance(model, YOLO) else load_detector(model)
    validator = validate(yolo, data, imgsz, kind=_RecordingValidator, **settings)
    # The loader reads its data set in order, so labels and records pair up by position. The labels know no shape here:
    # Ultralytics takes it out when it sorts images into rectangular batches. Numbered by file, images are the same for
    # models that are validated in other batches.
    pairs = sorted(zip(validator.dataloader.dataset.labels, validator.records), key=lambda pair: pair[0]["im_file"])
    labels = [{**label, "shape": shape} for label, (shape, _) in pairs]
    truth = to_coco(labels, validator.names, validator.data["path"], clip)
    detections = []
    for image_id, (_, (shape, rows)) in enumerate(pairs, 1):
        detections += to_results(image_id, ops.clip_boxes(rows, shape) if clip else rows)
    return truth, detections, validator


def takes_oblong() -> bool:
    """Whether data sets of the installed Ultralytics can be padded to a height and a width."""
    return "tuple" in str(signature(BaseDataset).parameters["imgsz"].annotation)


def validate(
    yolo: YOLO,
    data: str | Path,
    imgsz: int | Sequence[int] | None = None,
    kind: type[BaseValidator] | None = None,
    **arguments,
) -> BaseValidator:
    """Run `yolo.val` without pictures, and without a folder that stays.

    Args:
        yolo: The model; its callbacks stay as they are.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels, or height and width; None takes the model's own.
        kind: Class of the validator; the task's own if None.
        **arguments: Of `yolo val`.

    Returns:
        The validator, with the metrics and the data set of this run.

    Raises:
        QCError: On a size that is not square, where this Ultralytics pads to squares alone.
    """
    kind = kind or yolo.task_map[yolo.task]["validator"]
    oblong = list(imgsz) if isinstance(imgsz, Sequence) else None
    if oblong and not takes_oblong():
        raise QCError(f"QC: imgsz={oblong} is not square, which ultralytics {__version__} cannot validate; update it.")
    size = {} if imgsz is None else {"imgsz": max(imgsz) if isinstance(imgsz, Sequence) else imgsz}
    made: list[BaseValidator] = []

    def make(args: dict[str, Any], _callbacks: dict) -> BaseValidator:
        made.append(kind(args=args, _callbacks=_callbacks))
        if oblong:  # a validator takes one side alone, but pads to height and width for exported models, set as here
            made[0].args.imgsz, made[0].args.rect = oblong, False
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        yolo.val(validator=make, data=str(data), plots=False, verbose=False, project=folder, **size, **arguments)
    return made[0]


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
    """Ultralytics' validation that also records, per image in the data set's order, its size and its detections.

    Ultralytics' predictions.json knows an image by its file's stem alone, which two folders may share, and rounds.
    """

    def init_metrics(self, model: torch.nn.Module) -> None:
        """Start the records; `save_json`, which Ultralytics turns on for COCO and LVIS, would install a package."""
        super().init_metrics(model)
        self.args.save_json = False
        self.records: list[tuple[tuple[int, int], np.ndarray]] = []  # (h, w), (n, 6) of x1, y1, x2, y2, score, class

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        """Record what the metrics are given, with boxes in pixels of the original image."""
        super().update_metrics(preds, batch)
        for i, pred in enumerate(preds):
            shape = batch["ori_shape"][i]
            boxes = ops.xyxy2xywh(pred["bboxes"])  # scale_boxes clips corners, but not centres and sizes
            boxes = ops.scale_boxes(batch["img"].shape[2:], boxes, shape, batch["ratio_pad"][i], xywh=True)
            rows = torch.cat([ops.xywh2xyxy(boxes), pred["conf"][:, None], pred["cls"][:, None]], dim=1)
            self.records.append((shape, rows.cpu().numpy().astype(float)))
