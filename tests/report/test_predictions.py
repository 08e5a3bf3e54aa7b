# yolo_qc_plugin, AGPL-3.0
"""What of two models' predictions is the same object, of every kind of result."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, FLOAT
from ultralytics.engine.results import Results

from yolo_qc_plugin.host.teacher import FILE as TEACHER
from yolo_qc_plugin.report import predictions
from yolo_qc_plugin.run.drawing import float_checkpoint

NAMES = {0: "cat", 1: "dog"}
IMAGE = np.full((60, 80, 3), 90, np.uint8)


def result(**found) -> Results:
    return Results(IMAGE, "a.jpg", NAMES, **found)


def objects(first: Results, second: Results) -> dict:
    return {side: predictions._objects(of) for side, of in zip(predictions.SIDES, (first, second))}


def test_boxes_are_the_same_where_class_and_place_are():
    first = result(boxes=torch.tensor([[10, 10, 30, 30, 0.9, 0], [40, 10, 60, 30, 0.8, 1], [10, 40, 30, 55, 0.5, 0]]))
    second = result(boxes=torch.tensor([[41, 10, 60, 30, 0.9, 1], [12, 10, 30, 31, 0.7, 0], [10, 40, 30, 55, 0.6, 1]]))
    found = objects(first, second)
    assert predictions._alone(found) == {"float": {2}, "quantized": {2}}
    assert found["float"][2].label == "cat 0.50" and found["quantized"][2].label == "dog 0.60"


def test_a_box_has_one_twin():
    one = result(boxes=torch.tensor([[10, 10, 30, 30, 0.9, 0]]))
    two = result(boxes=torch.tensor([[10, 14, 30, 34, 0.9, 0], [10, 10, 30, 30, 0.4, 0]]))
    assert predictions._alone(objects(one, two)) == {"float": set(), "quantized": {0}}
    assert predictions._alone(objects(two, one)) == {"float": {1}, "quantized": set()}  # the surest chooses first
    assert predictions._alone(objects(result(boxes=torch.zeros(0, 6)), one)) == {"float": set(), "quantized": {0}}


def test_oriented_boxes_and_classes():
    turned = torch.tensor([[40, 30, 30, 10, 0.5, 0.9, 1]])
    found = objects(result(obb=turned), result(obb=turned + torch.tensor([0, 0, 1, 0, 0, 0, 0])))
    assert predictions._alone(found) == {"float": set(), "quantized": set()}
    assert not np.allclose(found["float"][0].corners[0, 0], found["float"][0].corners[3, 0])
    first, second = (result(probs=torch.tensor(p)) for p in ([0.9, 0.1], [0.3, 0.7]))
    assert predictions._alone(objects(first, first)) == {"float": set(), "quantized": set()}
    assert predictions._alone(objects(first, second)) == {"float": {0}, "quantized": {0}}


def test_masks_and_keypoints_are_drawn():
    """In the colour of their object, within its box; a keypoint that is not seen, or not sure, is not."""
    boxes = torch.tensor([[10, 20, 30, 40, 0.9, 0], [50, 20, 70, 40, 0.8, 1]])
    masks = torch.zeros(2, 60, 80)
    masks[0, 25:35, 15:25] = masks[1, 25:35, 55:65] = 1
    points = torch.tensor([[[20, 30, 0.9], [28, 22, 0.2]], [[60, 30, 0.8], [0, 0, 0.9]]])
    plain, masked, pointed = (
        predictions._draw(IMAGE, predictions._objects(result(boxes=boxes, **more)), {1}, "#D55E00").astype(int)
        for more in ({}, {"masks": masks}, {"keypoints": points})
    )
    inside = np.zeros(plain.shape[:2], bool)
    for x in (15, 55):
        inside[133:187, round(x * 5.333) : round((x + 10) * 5.333)] = True
    changed = {name: (image != plain).any(-1) for name, image in (("mask", masked), ("points", pointed))}
    assert changed["mask"][inside].mean() > 0.8 and changed["points"][160, 107] and changed["points"][160, 320]
    assert all(of[~inside].mean() < 0.01 for of in changed.values())
    assert masked[160, 107, 2] == masked[160, 107, 0] and masked[160, 320, 2] > masked[160, 320, 0] + 40  # grey, orange
    seen = predictions._objects(result(boxes=boxes, keypoints=points))
    assert [found.points.tolist() for found in seen] == [[[20, 30]], [[60, 30]]]


def test_what_changed_is_drawn_in_its_colour():
    found = predictions._objects(result(boxes=torch.tensor([[10, 20, 30, 40, 0.9, 0]])))
    same, changed = (predictions._draw(IMAGE, found, alone, "#D55E00") for alone in (set(), {0}))
    assert same.shape == changed.shape == (320, 427, 3)
    in_colour = [(image == (0x00, 0x5E, 0xD5)).all(-1).sum() for image in (same, changed)]
    assert in_colour[0] == 0 and in_colour[1] > 1000 and (same != 90).any(-1).sum() > 300


@pytest.mark.parametrize("start,names,found", [
    (FLOAT, range(10), True), (FLOAT, range(9), False), ("tiny.yaml", range(10), False),
    (CHECKPOINTS / "quantized.pt", range(10), False), ("missing.pt", range(10), False),
])  # fmt: skip
def test_the_float_model_is_the_start_if_it_knows_the_classes(start, names, found, tmp_path):
    trainer = SimpleNamespace(wdir=tmp_path, data={"names": {i: str(i) for i in names}})
    assert float_checkpoint(trainer, str(start)) == (start if found else None)
    (tmp_path / TEACHER).touch()
    assert float_checkpoint(trainer, str(start)) == tmp_path / TEACHER
