# yolo_qc_plugin, AGPL-3.0
"""What a model predicts in a validation by Ultralytics, in COCO form beside the ground truth.

Ultralytics' own predictions.json knows an image by its file's stem alone, which two folders may share, and rounds; and
to score it installs a package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import ops

from .metrics import IouType, coco_metrics
from .truth import annotations_file, encode, published, published_categories, to_coco

# task -> what is compared there, and where Ultralytics' metrics hold their own figures of it
COMPARED: dict[str, dict[IouType, str]] = {
    "detect": {"bbox": "box"},
    "segment": {"bbox": "box", "segm": "seg"},
    "pose": {"bbox": "box", "keypoints": "pose"},
}


@dataclass
class Record:
    """What was predicted in one image, in pixels of its file.

    Attributes:
        file: Path of the image.
        shape: Its height and width.
        rows: (n, 6) of x1, y1, x2, y2, score, class; boxes are not cut off at the border.
        more: Of each row what its task has beside the box, in COCO form.
    """

    file: str
    shape: tuple[int, int]
    rows: np.ndarray
    more: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def recording(validator: BaseValidator, whole_masks: bool = False) -> Iterator[list[Record]]:
    """Within the context, what the validator measures is recorded as well, image by image.

    Masks are recorded at the size of the network's input and scaled to the image, as Ultralytics' own predictions.json
    has them. Its own metrics compare smaller ones unless told otherwise: at a quarter of that size, and of two objects
    that overlap in the labels the smaller one has the pixels.

    Args:
        validator: Before its run.
        whole_masks: Have its own metrics compare the masks that are recorded, and whole objects of the labels.
    """
    if whole_masks:
        validator.args.overlap_mask, validator.args.mask_ratio = False, 1
    records: list[Record] = []
    large: list[torch.Tensor] = []  # masks of a batch's images, where the validator's own are small
    init_metrics, update_metrics = validator.init_metrics, validator.update_metrics

    @wraps(init_metrics)
    def init(model):
        init_metrics(model)
        process = getattr(validator, "process", None)
        if whole_masks and process:
            validator.process = ops.process_mask_native
        elif process not in (None, ops.process_mask_native):

            def process_twice(protos, coefficients, boxes, shape):
                large.append(ops.process_mask_native(protos, coefficients, boxes, shape).cpu())  # 0.1 GB an image
                return process(protos, coefficients, boxes, shape)

            validator.process = process_twice

    @wraps(update_metrics)
    def update(preds, batch):
        update_metrics(preds, batch)
        for i, pred in enumerate(preds):
            whole = {"masks": large[i].to(pred["conf"].device)} if large else {}
            records.append(_record(validator, {**pred, **whole}, batch, i))
        large.clear()

    validator.init_metrics, validator.update_metrics = init, update
    try:
        yield records
    finally:
        del validator.init_metrics, validator.update_metrics


def _record(validator: BaseValidator, pred: dict[str, torch.Tensor], batch: dict[str, Any], i: int) -> Record:
    """One image's record."""
    imgsz, shape, ratio_pad = batch["img"].shape[2:], batch["ori_shape"][i], batch["ratio_pad"][i]
    # scale_boxes clips corners, but not centres and sizes
    centred = lambda boxes: ops.scale_boxes(imgsz, boxes, shape, ratio_pad, xywh=True)  # noqa: E731
    boxes = ops.xywh2xyxy(centred(ops.xyxy2xywh(pred["bboxes"])))
    rows = torch.cat([boxes, pred["conf"][:, None], pred["cls"][:, None]], dim=1)
    record = Record(batch["im_file"][i], tuple(shape), rows.cpu().numpy().astype(float))
    if "masks" in pred:
        place = {"imgsz": imgsz, "ori_shape": shape, "ratio_pad": ratio_pad}
        masks = validator.scale_preds(pred, place)["masks"].cpu().numpy() if len(rows) else []
        record.more = [{"segmentation": encode(mask)["segmentation"]} for mask in masks]
    elif "keypoints" in pred:
        points = pred["keypoints"].clone()
        points[..., :2] = centred(torch.nn.functional.pad(points[..., :2], (0, 2)))[..., :2]
        if points.shape[-1] == 2:
            points = torch.nn.functional.pad(points, (0, 1), value=1.0)
        record.more = [{"keypoints": flat} for flat in points.cpu().flatten(1).double().tolist()]
    return record


def in_coco_form(
    validator: BaseValidator, records: list[Record], clip: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and COCO results of a validation.

    Args:
        validator: After its run; its data set has the labels.
        records: Of this run, of all processes.
        clip: Cut boxes and keypoints off at the image's border, as `predict` does; of labels too.

    Returns:
        The ground truth in COCO form, of COCO's own annotations file or of labels, as its "info" says (images of labels
        are in the order of their files), and COCO results with a box and what the task has beside it.

    Raises:
        ValueError: COCO's annotations lack an image.
    """
    task, records = validator.args.task, sorted(records, key=lambda r: r.file)
    file = None if validator.args.single_cls else annotations_file(validator.data, validator.args.split, task)
    if file:
        truth, ids = published(file, [r.file for r in records])
        categories, images = published_categories(len(validator.names)), [ids[r.file] for r in records]
    else:
        # Numbered by file, images are the same for models that are validated in other batches. Labels know no shape
        # here: Ultralytics takes it out when it sorts images into rectangular batches.
        labels = sorted(validator.dataloader.dataset.labels, key=lambda label: label["im_file"])
        labels = [{**label, "shape": r.shape} for label, r in zip(labels, records, strict=True)]
        truth = to_coco(labels, validator.names, validator.data["path"], clip, task)
        categories, images = list(range(1, len(validator.names) + 1)), list(range(1, len(records) + 1))
    results = []
    for image_id, record in zip(images, records):
        rows = ops.clip_boxes(record.rows.copy(), record.shape) if clip else record.rows
        for row, more in zip(rows.tolist(), record.more or [{}] * len(rows)):
            x1, y1, x2, y2, score, c = row
            result = {"image_id": image_id, "category_id": categories[int(c)], "score": score}
            results.append({**result, "bbox": [x1, y1, x2 - x1, y2 - y1], **_cut(more, record.shape, clip)})
    return truth, results


def _cut(more: dict[str, Any], shape: tuple[int, int], clip: bool) -> dict[str, Any]:
    """Keypoints within the image; all else as it is."""
    if not clip or "keypoints" not in more:
        return more
    points = ops.clip_coords(np.array(more["keypoints"]).reshape(-1, 3), shape)
    return {"keypoints": points.flatten().tolist()}


def all_metrics(validator: BaseValidator, truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Kind of what is compared -> `coco_metrics`, for all that the validator's task has."""
    sigmas = getattr(validator, "sigma", None)
    return {kind: coco_metrics(truth, results, kind, sigmas=sigmas) for kind in COMPARED[validator.args.task]}
