# yolo_qc_plugin, AGPL-3.0
"""Which differences of accuracy are chance."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import FLOAT
from test_evaluate import perfect, random_case
from ultralytics import YOLO

from yolo_qc_plugin.coco.metrics import coco_metrics
from yolo_qc_plugin.tools import accuracy
from yolo_qc_plugin.tools.accuracy import Accuracy, held_against, is_as_accurate, is_chance
from yolo_qc_plugin.tools.intervals import mean_ap, own_matches


def measured(truth, detections):
    return Accuracy({"AP": coco_metrics(truth, detections)["AP"]}, truth, detections)


def test_what_the_images_cannot_tell_is_chance():
    """Scores that move a little here and there; not a loss in all images, nor one that few images make."""
    truth, detections = random_case(0)
    expected, rng = measured(truth, detections), np.random.default_rng(1)
    moved = measured(truth, [{**d, "score": d["score"] + 0.05 * rng.normal()} for d in detections])
    entry = held_against(expected, moved, 0.0)
    low, high = entry["intervals"]["AP"]
    assert entry["points"] > 0.1 and low < 0 < high and is_chance(entry) and is_as_accurate(entry, 0.1)
    assert not is_as_accurate({k: v for k, v in entry.items() if k != "intervals"}, 0.1)
    assert "intervals" not in held_against(expected, moved, entry["points"])

    whole = measured(truth, perfect(truth))
    halved = held_against(whole, measured(truth, whole.detections[::2]), 0.1)
    assert halved["intervals"]["AP"][1] < 0 and not is_as_accurate(halved, 0.1)
    assert not is_chance({**halved, "changed_end_to_end": 0.1})

    first = min(image["id"] for image in truth["images"])
    one = held_against(whole, measured(truth, [d for d in whole.detections if d["image_id"] != first]), 0.1)
    assert one["points"] > 0.1 and one["intervals"]["AP"][1] == 0 and not is_as_accurate(one, 0.1)
    assert is_as_accurate({**one, "changed_end_to_end": 0.1}, 0.1)  # flips, of which one image shows something
    assert not is_as_accurate({**one, "changed_end_to_end": 0.0}, 0.1)


def test_what_pycocotools_does_not_know_is_resampled_by_ultralytics_matches(digits, monkeypatch):
    """Of boxes, which both know: its own mAP but for how the curve is interpolated, and the same intervals."""
    by_coco = accuracy.measure(YOLO(FLOAT), {"data": digits})
    monkeypatch.setattr(accuracy, "COMPARED", {})  # as of rotated boxes
    own = accuracy.measure(YOLO(FLOAT), {"data": digits})
    (ap,) = mean_ap(own_matches(own.stats), np.ones((1, 8), int))
    assert own.truth is None and ap == pytest.approx(own.figures["map50_95"], abs=0.01) and ap > 0.05
    ours, theirs = own.resampled("map50_95"), by_coco.resampled("AP")
    assert ours.std() > 1 and np.corrcoef(ours, theirs)[0, 1] > 0.95

    doubt = Accuracy({"map50_95": 0.0}, stats={**own.stats, "conf": [c[::-1] for c in own.stats["conf"]]})
    entry = held_against(own, doubt, 0.1)  # the least certain first
    assert entry["intervals"]["map50_95"][1] < 0 and not is_as_accurate(entry, 0.1)
    assert is_as_accurate(held_against(own, own, 0.1), 0.1)


def test_what_a_task_is_for_is_its_main_figure():
    """By Ultralytics too, of which benchmark shows one."""
    of = {"mask_map50_95": {"map50_95", "mask_map50_95"}, "pose_map50_95": {"map50_95", "pose_map50_95"}}
    of |= {"map50_95": {"map50_95", "map50"}, "top1": {"top5", "top1"}, "mask_AP": {"AP", "mask_AP"}}
    for main, found in of.items():
        assert next(name for name in accuracy.MAIN_FIGURES if name in found) == main
