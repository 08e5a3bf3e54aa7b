# yolo_qc_plugin, AGPL-3.0
"""Accuracy of whatever computes a model's outputs, and whether two of them differ by more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from ultralytics import YOLO

from ..coco.metrics import coco_metrics
from ..report.record import figures_of
from .evaluate import detect, validate
from .intervals import interval, resampled_ap

MAIN_FIGURES = ("AP", "mask_map50_95", "pose_map50_95", "map50_95", "top1")  # a task's first is what it is for


@dataclass(frozen=True)
class Accuracy:
    """Of one validation.

    Attributes:
        figures: By name, in 0..1; None where there is no ground truth. AP and AP50 by pycocotools of detection, those
            of `report.figures_of` of other tasks.
        truth: Of detection the ground truth in COCO form, else None.
        detections: Of detection COCO results, else empty.
    """

    figures: dict[str, float | None]
    truth: dict[str, Any] | None
    detections: list[dict[str, Any]]

    @cached_property
    def resampled(self) -> np.ndarray:
        """Of detection, AP in points of each resample of the images, the same resamples for all models."""
        return 100 * resampled_ap(self.truth or {}, self.detections)[1:]


def measure(yolo: YOLO, settings: dict[str, Any]) -> Accuracy:
    """Validate what computes the model's outputs now; settings as of `evaluate`."""
    if yolo.task == "detect":
        truth, detections, _ = detect(yolo, **settings)
        coco = coco_metrics(truth, detections)
        return Accuracy({name: coco[name] for name in ("AP", "AP50")}, truth, detections)
    found = figures_of(validate(yolo, **settings).metrics.results_dict)
    return Accuracy({name: value for name, value in found.items() if name != "fitness"}, None, [])


def held_against(expected: Accuracy, found: Accuracy, limit: float) -> dict[str, Any]:
    """The figures found, and how far they are from others of the same images.

    Args:
        expected: The others.
        found: Those to be judged.
        limit: In points; of detection, what is farther off gets an interval.

    Returns:
        The figures; "points", the largest difference of the main ones, where no ground truth at all counts as 0; and
        "interval" of the difference of AP in points (see `intervals`), where it was asked for.
    """
    a, b = found.figures, expected.figures
    points = max(100 * abs((a[name] or 0.0) - (b[name] or 0.0)) for name in a if name in MAIN_FIGURES)
    if points <= limit or found.truth is None:
        return {**a, "points": points}
    return {**a, "points": points, "interval": interval(found.resampled - expected.resampled)}


def is_chance(entry: dict[str, Any]) -> bool:
    """Whether a difference is none that the images can tell: 0 lies within the interval of what `held_against` gave.

    At its end 0 lies where few images make all of a difference, whatever its cause. That passes where the entry tells
    of codes that have flipped, as "changed_end_to_end".
    """
    if "interval" not in entry:
        return False
    low, high = entry["interval"]
    return low < 0 < high or (low <= 0 <= high and entry.get("changed_end_to_end", 0) > 0)


def is_as_accurate(entry: dict[str, Any], limit: float) -> bool:
    """Whether figures are within a limit, in points, or differ by chance; without figures too."""
    return entry.get("points", 0) <= limit or is_chance(entry)
