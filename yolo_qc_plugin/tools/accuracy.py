# yolo_qc_plugin, AGPL-3.0
"""Accuracy of whatever computes a model's outputs, and whether two of them differ by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from ultralytics import YOLO
from ultralytics.engine.validator import BaseValidator

from ..coco.metrics import IouType
from ..coco.records import COMPARED, all_metrics
from ..report.record import figures_of
from .evaluate import detect, validate
from .intervals import RESAMPLES, image_weights, interval, mean_ap, own_matches, resampled_ap

# what is compared -> what the names of its figures begin with
OF_KIND: dict[IouType, str] = {"segm": "mask_", "keypoints": "pose_", "bbox": ""}
SHOWN = "AP", "AP50"  # of each kind
KINDS = {f"{of}AP": kind for kind, of in OF_KIND.items()}
# what is judged, by pycocotools or by Ultralytics; a task's first is what it is for
MAIN_FIGURES = *KINDS, "mask_map50_95", "pose_map50_95", "map50_95", "top1"


@dataclass(frozen=True)
class Accuracy:
    """Of one validation.

    Attributes:
        figures: By name, in 0..1; None where there is no ground truth. Of boxes, masks and keypoints AP and AP50 by
            pycocotools, of other tasks those of `report.figures_of`.
        truth: The ground truth in COCO form, where pycocotools measures, else None.
        detections: COCO results then, else empty.
        sigmas: Of keypoints; see `coco_metrics`.
        stats: What Ultralytics matched in each image, of another task with boxes; see `own_matches`.
    """

    figures: dict[str, float | None]
    truth: dict[str, Any] | None = None
    detections: list[dict[str, Any]] = field(default_factory=list)
    sigmas: Sequence[float] | None = None
    stats: Mapping[str, Sequence[np.ndarray]] | None = None
    _resampled: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def resampled(self, name: str) -> np.ndarray:
        """A main figure, in points, of each resample of the images, the same ones for all models; computed once."""
        if name not in self._resampled:
            if self.stats:
                weights = image_weights(len(self.stats["conf"]), RESAMPLES, seed=0)
                found = mean_ap(own_matches(self.stats), weights)
            else:
                found = resampled_ap(self.truth or {}, self.detections, iou_type=KINDS[name], sigmas=self.sigmas)
            self._resampled[name] = 100 * found[1:]
        return self._resampled[name]


def measure(yolo: YOLO, settings: Mapping[str, Any]) -> Accuracy:
    """Validate what computes the model's outputs now; settings as of `evaluate`."""
    if yolo.task not in COMPARED:
        stats: dict[str, list[np.ndarray]] = {}
        found = figures_of(validate(yolo, prepare=partial(_keep, stats), **settings).metrics.results_dict)
        return Accuracy({name: value for name, value in found.items() if name != "fitness"}, stats=stats)
    truth, detections, validator = detect(yolo, **settings)
    coco = all_metrics(validator, truth, detections)
    figures = {f"{of}{name}": coco[kind][name] for kind, of in OF_KIND.items() if kind in coco for name in SHOWN}
    return Accuracy(figures, truth, detections, getattr(validator, "sigma", None))


def _keep(stats: dict[str, list[np.ndarray]], validator: BaseValidator) -> None:
    """Have a validator leave what it matched, which it drops with its figures made; a classifier matches nothing."""
    get_stats = validator.get_stats

    def get() -> dict[str, Any]:
        stats.update({name: list(of_images) for name, of_images in getattr(validator.metrics, "stats", {}).items()})
        return get_stats()

    validator.get_stats = get


def held_against(expected: Accuracy, found: Accuracy, limit: float) -> dict[str, Any]:
    """The figures found, and how far they are from others of the same images.

    Args:
        expected: The others.
        found: Those to be judged.
        limit: In points; what is farther off gets an interval, of all tasks but classification.

    Returns:
        The figures; "points", the largest difference of the main ones, where no ground truth at all counts as 0; and,
        if any is beyond the limit, "intervals" of their differences in points, by name (see `intervals`).
    """
    a, b = found.figures, expected.figures
    points = {name: 100 * abs((a[name] or 0.0) - (b[name] or 0.0)) for name in a if name in MAIN_FIGURES}
    entry: dict[str, Any] = {**a, "points": max(points.values())}
    if entry["points"] > limit and (found.stats or found.truth is not None):
        far = [name for name, difference in points.items() if difference > limit]
        entry["intervals"] = {name: interval(found.resampled(name) - expected.resampled(name)) for name in far}
    return entry


def is_chance(entry: Mapping[str, Any]) -> bool:
    """Whether differences are none that the images can tell: 0 lies within each interval of what `held_against` gave.

    At its end 0 lies where few images make all of a difference, whatever its cause. That passes where the entry tells
    of codes that have flipped, as "changed_end_to_end".
    """
    found, flipped = entry.get("intervals", {}).values(), entry.get("changed_end_to_end", 0) > 0
    return bool(found) and all(low < 0 < high or (low <= 0 <= high and flipped) for low, high in found)


def is_as_accurate(entry: Mapping[str, Any], limit: float) -> bool:
    """Whether figures are within a limit, in points, or differ by chance; without figures too."""
    return entry.get("points", 0) <= limit or is_chance(entry)
