# yolo_qc_plugin, AGPL-3.0
"""COCOeval's metrics of boxes, masks and keypoints in COCO form."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IouType = Literal["bbox", "segm", "keypoints"]  # as COCOeval names what is compared
RESULT = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # -> key of a COCO result
NEEDED = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("bbox", "keypoints", "num_keypoints")}
LIMIT = {"bbox": 100, "segm": 100, "keypoints": 20}  # detections per image and class that count, by COCO's rule


def coco_metrics(
    annotations: dict[str, Any] | str | Path,
    detections: list[dict[str, Any]] | str | Path,
    iou_type: IouType = "bbox",
    max_det: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> dict[str, Any]:
    """COCOeval's metrics.

    Args:
        annotations: Ground truth in COCO form, or a JSON file of it.
        detections: COCO results, dicts of image_id, category_id, score and bbox [x, y, w, h] in pixels, segmentation
            (run lengths, a dict of size and counts) or keypoints [x, y, score, ...], or a JSON file of them; may be
            empty. Of each, what `iou_type` compares is read alone.
        iou_type: What is compared: "bbox" and "segm" by the intersection over the union, "keypoints" by COCO's object
            keypoint similarity (OKS).
        max_det: Detections per image and class that count; None takes COCO's own, 100, or 20 of keypoints. Of boxes and
            masks >= 10, and another number also enters the key "AR100".
        sigmas: Spread of each keypoint as a share of the object's size, for OKS; None takes COCO's of 17 keypoints, and
            of n others 1 / n, as Ultralytics does.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as COCOeval defines them, of keypoints AP, AP50,
        AP75, APm, APl, AR, AR50, AR75, ARm, ARl, in 0..1; and "per_class", AP by category name. None stands for
        COCOeval's -1: there is no ground truth of that kind.

    Raises:
        ValueError: max_det is too small, an entry lacks a key, an annotation has id 0, a detection names an unknown
            image or category, or `sigmas` are not as many as keypoints.
        FileNotFoundError: A JSON file is missing.
    """
    run = matched(annotations, detections, iou_type, max_det, sigmas)
    with contextlib.redirect_stdout(io.StringIO()):
        run.accumulate()

    # COCOeval.summarize looks its numbers up by the value 100; these are the same means for any max_det.
    precision, recall = run.eval["precision"], run.eval["recall"]  # [iou, recall, class, area, max], [iou, class, ...]
    at = {name: np.isclose(run.params.iouThrs, iou) for name, iou in (("50", 0.5), ("75", 0.75))}
    sizes = {label[0]: i for i, label in enumerate(run.params.areaRngLbl) if label != "all"}  # s, m, l
    metrics: dict[str, Any] = {"AP": _mean(precision[..., 0, -1])}
    metrics |= {f"AP{name}": _mean(precision[iou, ..., 0, -1]) for name, iou in at.items()}
    metrics |= {f"AP{size}": _mean(precision[..., i, -1]) for size, i in sizes.items()}
    if iou_type == "keypoints":
        metrics["AR"] = _mean(recall[..., 0, -1])
        metrics |= {f"AR{name}": _mean(recall[iou, ..., 0, -1]) for name, iou in at.items()}
    else:
        metrics |= {f"AR{limit}": _mean(recall[..., 0, i]) for i, limit in enumerate((1, 10, 100))}
    metrics |= {f"AR{size}": _mean(recall[..., i, -1]) for size, i in sizes.items()}
    metrics["per_class"] = {
        run.cocoGt.cats[category]["name"]: _mean(precision[:, :, k, 0, -1])
        for k, category in enumerate(run.params.catIds)
    }
    return metrics


def matched(
    annotations: dict[str, Any] | str | Path,
    detections: list[dict[str, Any]] | str | Path,
    iou_type: IouType = "bbox",
    max_det: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> COCOeval:
    """COCOeval after its `evaluate()`, which matches detections to ground truth; see `coco_metrics`."""
    limit, least = LIMIT[iou_type] if max_det is None else max_det, 1 if iou_type == "keypoints" else 10
    if limit < least:
        because = "" if least == 1 else ", for AR10 counts that many"
        raise ValueError(f"max_det={max_det} is not accepted: it must be >= {least}{because}")
    truth, found = _index_truth(read_json(annotations), iou_type), read_json(detections)
    _check_detections(truth, found, iou_type)
    # of a result with a box beside its mask, loadRes would take the box's area for the mask's
    found = [{key: d[key] for key in ("image_id", "category_id", "score", RESULT[iou_type])} for d in found]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        results = truth.loadRes(found) if found else _index({**truth.dataset, "annotations": []})  # fails on no entry
        run = COCOeval(truth, results, iouType=iou_type)
        run.params.maxDets = [limit] if iou_type == "keypoints" else [1, 10, limit]
        if iou_type == "keypoints":
            run.params.kpt_oks_sigmas = _sigmas(truth, sigmas, run.params.kpt_oks_sigmas)
        run.evaluate()
    return run


def format_metrics(metrics: dict[str, Any]) -> str:
    """The result of `coco_metrics` as plain text, without classes, and "-" where there is no ground truth."""
    rows = [(name, value) for name, value in metrics.items() if name != "per_class"]
    return "\n".join(f"{name:<8}{'-' if value is None else f'{value:.4f}'}" for name, value in rows)


def read_json(source: Any) -> Any:
    """What a JSON file holds, or `source` itself if it is no path."""
    if not isinstance(source, (str, Path)):
        return source
    if not Path(source).is_file():
        raise FileNotFoundError(f"'{source}' does not exist: pass a JSON file in COCO form")
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"'{source}' is no JSON file: {e}") from None


def _index(dataset: dict[str, Any]) -> COCO:
    """A COCO object over `dataset`, without a file."""
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _index_truth(dataset: dict[str, Any], iou_type: IouType) -> COCO:
    """The checked ground truth as a COCO object; COCOeval writes into the annotations, so they are copied."""
    _check_keys(dataset, ("images", "annotations", "categories"), "the ground truth")
    keys = ("id", "image_id", "category_id", *NEEDED[iou_type], "area", "iscrowd")
    for annotation in dataset["annotations"]:
        _check_keys(annotation, keys, "an annotation")
        if annotation["id"] == 0:
            raise ValueError("an annotation has id 0, which COCOeval reads as 'not matched': number them from 1")
    with contextlib.redirect_stdout(io.StringIO()):
        return _index({**dataset, "annotations": [dict(a) for a in dataset["annotations"]]})


def _check_keys(entry: dict[str, Any], keys: tuple[str, ...], what: str) -> None:
    """Raise a ValueError unless `entry` is in COCO form as far as its keys go."""
    lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if lacking:
        raise ValueError(f"{what} lacks {', '.join(lacking)}: COCO form has {', '.join(keys)}")


def _check_detections(truth: COCO, detections: list[dict[str, Any]], iou_type: IouType) -> None:
    """Raise a ValueError for detections that COCOeval cannot read, or of images or categories that are not there."""
    for detection in detections:
        _check_keys(detection, ("image_id", "category_id", "score", RESULT[iou_type]), "a detection")
        mask = detection["segmentation"] if iou_type == "segm" else {"counts": ""}
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (str, bytes)):
            raise ValueError("a detection's segmentation is no RLE: give a dict of size and counts, the latter as text")
    for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
        unknown = {d[key] for d in detections} - set(known)
        if unknown:
            raise ValueError(f"detections name the {key} {min(unknown, key=str)!r}, which the annotations do not have")


def _sigmas(truth: COCO, given: Sequence[float] | None, of_coco: np.ndarray) -> np.ndarray:
    """A sigma for each keypoint of the ground truth."""
    count = next((len(a["keypoints"]) // 3 for a in truth.anns.values()), len(of_coco))
    if given is None:
        return of_coco if count == len(of_coco) else np.full(count, 1 / count)
    if len(given) != count or min(given) <= 0:
        raise ValueError(f"sigmas={list(given)} is not accepted: give {count} numbers above 0, one for each keypoint")
    return np.asarray(given, float)


def _mean(values: np.ndarray) -> float | None:
    """COCOeval's mean over the entries that have ground truth."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None
