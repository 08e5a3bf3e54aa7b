# yolo_qc_plugin, AGPL-3.0
"""How sure a difference of COCO's AP is: paired bootstrap over images.

A resample draws as many images as there are, with repetition; an image drawn k times counts k times, its detections and
its ground truth alike. Both models see the same resamples, so that what all models find hard or easy cancels in their
difference. Of 1,000 differences, the middle 95% are the interval.

COCOeval matches detections to ground truth image by image, so one pass serves all resamples: only the counts along the
order of scores change. AP needs precision at true positives alone, for precision only falls from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..coco.metrics import IouType, matched, read_json
from ..coco.records import COMPARED
from .evaluate import NAMES, detect, load_scored

RESAMPLES = 1000
PERCENTILES = 2.5, 97.5
ROWS = 100  # resamples computed together, which bounds the memory


@dataclass(frozen=True)
class ClassMatches:
    """What COCOeval found of one class, at every size of objects.

    Attributes:
        truth: (images,), objects of each image that count.
        image: (n,), index of each detection's image, by falling score.
        hit: (thresholds, n), whether a detection is a true positive at an overlap.
        ignored: (thresholds, n), whether it counts neither as a true nor as a false positive.
    """

    truth: np.ndarray
    image: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray

    def ap(self, weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
        """AP of each row of image weights (rows, images), in 0..1; NaN where no object has weight."""
        objects = (weights @ self.truth)[:, None]
        weight = weights[:, self.image]
        seen = None if self.ignored.any() else weight.cumsum(axis=1)
        total = np.zeros(len(weights))
        for hit, ignored in zip(self.hit, self.ignored):
            counted = (weight * ~ignored).cumsum(axis=1) if seen is None else seen
            true = weight[:, hit].cumsum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                recall = true / objects
            precision = true / (counted[:, hit] + np.spacing(1))  # as COCOeval has it: 0 where nothing counts yet
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(recalls, recall, side="right")  # points at or below each recall
            total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
        return np.where(objects[:, 0] > 0, total / (len(self.hit) * len(recalls)), np.nan)


def matches(
    annotations: dict[str, Any] | str | Path, detections: list[dict] | str | Path, **rules
) -> Iterator[ClassMatches]:
    """What COCOeval found of each class that has detections or ground truth; arguments as of `coco_metrics`."""
    run = matched(annotations, detections, **rules)
    index = {image: i for i, image in enumerate(run.params.imgIds)}
    for category in range(len(run.params.catIds)):
        start = category * len(run.params.areaRng) * len(index)  # evalImgs: by class, then by size, then by image
        found = [e for e in run.evalImgs[start : start + len(index)] if e is not None]
        if not found:
            continue
        truth = np.zeros(len(index), dtype=int)
        for e in found:
            truth[index[e["image_id"]]] = np.count_nonzero(np.asarray(e["gtIgnore"]) == 0)
        scores = np.concatenate([e["dtScores"] for e in found])
        order = np.argsort(-scores, kind="mergesort")  # stable, as COCOeval's
        image = np.concatenate([np.full(len(e["dtScores"]), index[e["image_id"]]) for e in found])[order]
        match = np.concatenate([e["dtMatches"] for e in found], axis=1)[:, order]
        ignored = np.concatenate([e["dtIgnore"] for e in found], axis=1)[:, order].astype(bool)
        yield ClassMatches(truth, image, (match != 0) & ~ignored, ignored)


def own_matches(stats: Mapping[str, Sequence[np.ndarray]]) -> list[ClassMatches]:
    """What Ultralytics found of each class, where pycocotools knows no such objects, as rotated boxes.

    Args:
        stats: "tp", "conf", "pred_cls" and "target_cls" of its metrics, in each an array for every image.
    """
    truth, conf, predicted = (np.concatenate(stats[key]) for key in ("target_cls", "conf", "pred_cls"))
    of_truth, of_found = (
        np.repeat(np.arange(len(stats[key])), [len(a) for a in stats[key]]) for key in ("target_cls", "conf")
    )
    hit, images = np.concatenate(stats["tp"]).astype(bool), len(stats["conf"])
    found = []
    for name in np.unique(truth):
        rows = np.flatnonzero(predicted == name)
        rows = rows[np.argsort(-conf[rows], kind="mergesort")]
        objects = np.bincount(of_truth[truth == name], minlength=images)
        found.append(ClassMatches(objects, of_found[rows], hit[rows].T, np.zeros_like(hit[rows].T)))
    return found


def weighted_ap(
    annotations: dict[str, Any] | str | Path, detections: list[dict] | str | Path, weights: np.ndarray, **rules
) -> np.ndarray:
    """COCO's AP of a data set in which images are repeated.

    Args:
        annotations: Ground truth, as of `coco_metrics`.
        detections: Results, as of `coco_metrics`.
        weights: (rows, images), whole numbers: how often each image counts, in the order of their ids.
        **rules: `iou_type` and `sigmas` of `coco_metrics`.

    Returns:
        As of `mean_ap`.
    """
    return mean_ap(list(matches(annotations, detections, **rules)), weights)


def mean_ap(classes: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """AP of each row of image weights, by COCO's interpolation.

    Returns:
        (rows,), in 0..1: the mean over the classes that have ground truth in a row; NaN where none has.
    """
    recalls = np.linspace(0.0, 1.0, 101)
    if not classes:
        return np.full(len(weights), np.nan)
    parts = [weights[i : i + ROWS] for i in range(0, len(weights), ROWS)]
    by_class = np.concatenate([np.stack([c.ap(part, recalls) for c in classes], axis=1) for part in parts])
    there = ~np.isnan(by_class)
    with np.errstate(invalid="ignore"):
        return np.where(there, by_class, 0.0).sum(axis=1) / there.sum(axis=1)


def resampled_ap(
    annotations: dict[str, Any], detections: list[dict], resamples: int = RESAMPLES, seed: int = 0, **rules
) -> np.ndarray:
    """COCO's AP of all images, then of each resample: (1 + resamples,), in 0..1; see `bootstrap`, `weighted_ap`.

    Raises:
        ValueError: There is no ground truth, or what `coco_metrics` refuses.
    """
    images = len(annotations.get("images", [])) if isinstance(annotations, dict) else 0
    if not images:
        raise ValueError("the ground truth has no images: COCO form has images, annotations, categories")
    found = weighted_ap(annotations, detections, image_weights(images, resamples, seed), **rules)
    if np.isnan(found[0]):
        raise ValueError("the ground truth has no objects: there is no AP to compare")
    return found


def check_resamples(resamples: int) -> None:
    """Refuse a number of resamples below 1, by ValueError."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples} is not accepted: it must be >= 1")


def image_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image counts: once, then as often as each resample draws it: (1 + resamples, images)."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    return np.concatenate([np.ones((1, images), int), drawn])


def interval(differences: np.ndarray) -> list[float]:
    """The ends of the middle 95%, without resamples that have no ground truth."""
    low, high = np.nanpercentile(differences, PERCENTILES)
    return [float(low), float(high)]


def bootstrap(
    annotations: dict[str, Any] | str | Path,
    detections_a: list[dict[str, Any]] | str | Path,
    detections_b: list[dict[str, Any]] | str | Path,
    resamples: int = RESAMPLES,
    seed: int = 0,
    iou_type: IouType = "bbox",
    sigmas: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Compare two models' AP on the same images, with the 95% interval of the difference.

    Args:
        annotations: Ground truth in COCO form, or a JSON file of it.
        detections_a: COCO results of the first model, or a JSON file of them; see `coco_metrics`.
        detections_b: Those of the second model.
        resamples: Resamples of the images, >= 1.
        seed: Of the resamples.
        iou_type: What is compared: "bbox", "segm" or "keypoints"; see `coco_metrics`.
        sigmas: Of keypoints; see `coco_metrics`.

    Returns:
        In points, 0..100: "ap", the two; "difference", the first's less the second's; "interval", its lower and upper
        end. And "iou_type", "images" and "resamples", how many.

    Raises:
        ValueError: `resamples` is too small, there is no ground truth, or what `coco_metrics` refuses.
        FileNotFoundError: A JSON file is missing.
    """
    check_resamples(resamples)
    truth, found = read_json(annotations), [read_json(d) for d in (detections_a, detections_b)]
    a, b = (100 * resampled_ap(truth, d, resamples, seed, iou_type=iou_type, sigmas=sigmas) for d in found)
    return {
        "ap": [float(a[0]), float(b[0])],
        "difference": float(a[0] - b[0]),
        "interval": interval((a - b)[1:]),
        "iou_type": iou_type,
        "images": len(truth["images"]),
        "resamples": resamples,
    }


def compare(
    a: str | Path,
    b: str | Path,
    data: str | Path,
    *,
    imgsz: int | None = None,
    batch: int = 16,
    device: str | None = None,
    split: str = "val",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Validate two models on the same images and compare them, see `bootstrap`.

    What is compared is what their task is for: boxes, masks of "segment", keypoints of "pose". Beside an exported file
    all images are padded to squares, as such files take them, else to rectangles, as Ultralytics validates checkpoints.

    Args:
        a: The first model: checkpoint, exported model or model YAML, of the task "detect", "segment" or "pose".
        b: The second model, of the same task.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels; None takes the one each checkpoint was trained with.
        batch: Images a batch.
        device: "cpu", "0", ...; None lets Ultralytics choose.
        split: "train", "val" or "test".
        resamples: Resamples of the images, >= 1.
        seed: Of the resamples.

    Returns:
        The result of `bootstrap`, with "a", "b" and "data".

    Raises:
        FileNotFoundError: A model or the data is missing.
        ValueError: A model's task has no such metrics or is not the other's, its classes are not, or `resamples` is too
            small.
    """
    check_resamples(resamples)
    models = [load_scored(model) for model in (a, b)]
    tasks = [model.task for model in models]
    if tasks[0] != tasks[1]:
        raise ValueError(f"a={a} is of task '{tasks[0]}', b={b} of task '{tasks[1]}': give two models of one task")
    if models[0].names != models[1].names:
        raise ValueError(f"a={a} and b={b} have other classes: give two models of the same classes")
    # files mostly have a fixed size: a checkpoint beside one is given the same images
    rect = all(isinstance(model.model, nn.Module) for model in models)
    of_each = [detect(model, data, imgsz, batch=batch, device=device, split=split, rect=rect) for model in models]
    (truth, found_a, validator), (_, found_b, _) = of_each
    *_, iou_type = COMPARED[tasks[0]]
    result = bootstrap(truth, found_a, found_b, resamples, seed, iou_type, getattr(validator, "sigma", None))
    return {"a": str(a), "b": str(b), "data": str(data), **result}


def format_comparison(result: dict[str, Any]) -> str:
    """The result of `compare` or `bootstrap` as plain text."""
    of = "" if result["iou_type"] == "bbox" else f" ({NAMES[result['iou_type']]})"
    rows = [f"AP of {result.get(name, name)}{of}: {ap:.2f}" for name, ap in zip("ab", result["ap"])]
    low, high = result["interval"]
    return "\n".join(
        [
            *rows,
            f"difference: {result['difference']:+.2f}, 95% of resamples within [{low:+.2f}, {high:+.2f}] "
            f"({result['images']} images, {result['resamples']} resamples)",
        ]
    )
