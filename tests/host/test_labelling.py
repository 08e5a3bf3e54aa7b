# yolo_qc_plugin, AGPL-3.0
"""Predictions become rows that Ultralytics reads as labels, and only a trained float model may be the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, FLOAT, TINY_YAML
from PIL import Image
from ultralytics import YOLO
from ultralytics.data.utils import verify_image_label
from ultralytics.engine.results import Results

from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host.labelling import Labeller, label_rows

BOXES = torch.tensor([[10, 20, 30, 60, 0.9, 3], [0, 0, 100, 100, 0.5, 0]])  # of a picture 200 wide and 100 high
ROWS = [[3, 0.1, 0.4, 0.1, 0.4], [0, 0.25, 0.5, 0.5, 1]]


def rows_of(**predictions) -> list[list[float]]:
    picture = np.zeros((100, 200, 3), np.uint8)
    result = Results(picture, "x.jpg", {i: str(i) for i in range(5)}, **predictions)
    return [[float(value) for value in row.split()] for row in label_rows(result)]


def accepted(rows, tmp_path, keypoints=(0, 0)) -> bool:
    """Whether Ultralytics takes them as labels."""
    Image.new("RGB", (200, 100)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("".join(" ".join(f"{v:g}" for v in row) + "\n" for row in rows))
    files = str(tmp_path / "x.png"), str(tmp_path / "x.txt")
    *_, found, _, corrupt, message = verify_image_label((*files, "", keypoints[0] > 0, 5, *keypoints, False))
    assert found and not message
    return not corrupt


def test_boxes(tmp_path):
    rows = rows_of(boxes=BOXES)
    np.testing.assert_allclose(rows, ROWS, rtol=1e-6)
    assert accepted(rows, tmp_path)
    assert rows_of(boxes=BOXES[:0]) == []


def test_polygons(tmp_path):
    """One for each mask; a mask of two points is none."""
    masks = torch.zeros(2, 100, 200)
    masks[0, 20:61, 10:31] = 1
    masks[1, 0, 0:2] = 1
    rows = rows_of(boxes=BOXES, masks=masks)
    assert len(rows) == 1 and rows[0][0] == 3
    corners = {(0.05, 0.2), (0.05, 0.6), (0.15, 0.6), (0.15, 0.2)}
    assert {tuple(p) for p in np.reshape(rows[0][1:], (-1, 2)).round(6)} == corners
    assert accepted(rows, tmp_path)


def test_oriented_boxes_end_at_the_picture(tmp_path):
    rows = rows_of(obb=torch.tensor([[20, 40, 20, 40, 0, 0.9, 3], [0, 50, 100, 20, 0.785, 0.9, 1]]))
    corners = {(0.05, 0.2), (0.15, 0.2), (0.05, 0.6), (0.15, 0.6)}
    assert rows[0][0] == 3 and {tuple(p) for p in np.reshape(rows[0][1:], (-1, 2)).round(6)} == corners
    assert min(rows[1]) == 0 and max(rows[1][1:]) <= 1
    assert accepted(rows, tmp_path)


def test_keypoints_that_the_model_is_not_sure_of_are_not_labelled(tmp_path):
    points = torch.tensor([[[20, 30, 0.9], [100, 50, 0.2]], [[250, -9, 0.5], [60, 60, 0.49]]])
    rows = rows_of(boxes=BOXES, keypoints=points)
    expected = [[*ROWS[0], 0.1, 0.3, 2, 0, 0, 0], [*ROWS[1], 1, 0, 2, 0, 0, 0]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert accepted(rows, tmp_path, keypoints=(2, 3))
    plain = rows_of(boxes=BOXES, keypoints=points[..., :2])
    np.testing.assert_allclose(plain[0], [*ROWS[0], 0.1, 0.3, 0.5, 0.5], rtol=1e-6)
    assert accepted(plain, tmp_path, keypoints=(2, 2))


def test_the_size_is_that_of_the_training(tmp_path):
    assert Labeller(FLOAT, 0.25).settings["imgsz"] == 64
    assert Labeller(FLOAT, 0.25, imgsz=96).settings["imgsz"] == 96
    checkpoint = torch.load(FLOAT, weights_only=False)
    checkpoint["train_args"].pop("imgsz")
    torch.save(checkpoint, tmp_path / "model.pt")
    assert Labeller(tmp_path / "model.pt", 0.25, otherwise=128).settings["imgsz"] == 128


@pytest.mark.parametrize("start, message", [
    ("tiny.yaml", "is not trained"), ("untrained.pt", "was never trained"), ("quantized.pt", "is already quantized"),
    ("classify.pt", "is for classify, .* give a model for detect, segment, pose, obb"),
])  # fmt: skip
def test_what_cannot_label(tmp_path, start, message):
    file = CHECKPOINTS / start
    if start == "untrained.pt":
        YOLO(TINY_YAML).save(file := tmp_path / start)
    elif start == "classify.pt":
        model = YOLO("yolov8n-cls.yaml").model
        torch.save({"model": model, "train_args": {"task": "classify"}}, file := tmp_path / start)
    with pytest.raises(QCError, match=message):
        Labeller(file, 0.25)
