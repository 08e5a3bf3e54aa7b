# yolo_qc_plugin, AGPL-3.0
"""What a float model and the quantized one find on the same photographs, side by side, with what changed marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import ultralytics  # not YOLO of it: a restricted load imports this package before that exists
from ultralytics.engine.results import Results
from ultralytics.utils.metrics import box_iou

from ..files import replacing
from .pictures import COLORS, MARK

FILE = "predictions.json"
SIDES = "float", "quantized"
CONFIDENCE = 0.25  # from which `yolo predict` shows a box
OVERLAP = 0.5  # from which two boxes of a class are the same object
HEIGHT = 320  # of a picture, in pixels
FILLED = 0.35  # of a mask's colour over the photograph
SAME, CHANGED = "#D0D0D0", {"float": COLORS[1], "quantized": COLORS[3]}


@dataclass(frozen=True)
class Found:
    """One object.

    Attributes:
        corners: In pixels, shape (4, 2).
        box: The upright box around it, x1, y1, x2, y2, in pixels.
        label: Its class and confidence, as text.
        kind: Index of its class.
        outline: Of its mask, in pixels, shape (n, 2).
        points: Its keypoints that are seen, in pixels, shape (n, 2).
    """

    corners: np.ndarray
    box: list[float]
    label: str
    kind: int
    outline: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    points: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))


def compare_predictions(
    models: Mapping[str, Path], photographs: Sequence[Path], imgsz: int, device: torch.device | str, out: Path
) -> list[Path]:
    """Predict with both models and write a picture for each photograph, and what they show to predictions.json.

    Args:
        models: "float" and "quantized" -> checkpoint.
        photographs: Image files.
        imgsz: Size at which to predict, in pixels.
        device: Where to compute.
        out: Folder to write to; it exists.

    Returns:
        The files.
    """
    by = {side: _predict(models[side], photographs, imgsz, device) for side in SIDES}
    told = []
    for number, (photograph, *results) in enumerate(zip(photographs, *by.values()), 1):
        objects = {side: _objects(result) for side, result in zip(SIDES, results)}
        alone = _alone(objects)
        file = out / f"predictions_{number}.jpg"
        sides = [_draw(results[0].orig_img, objects[side], alone[side], CHANGED[side]) for side in SIDES]
        gap = np.full((HEIGHT, 6, 3), 255, np.uint8)
        whole = cv2.imencode(".jpg", np.hstack([sides[0], gap, sides[1]]), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        file.write_bytes(whole.tobytes())
        both = len(objects["float"]) - len(alone["float"])
        told.append({
            "photograph": photograph.name, "picture": file.name, "both": both,
            **{f"{side}_alone": [objects[side][i].label for i in sorted(alone[side])] for side in SIDES},
        })  # fmt: skip
    with replacing(out / FILE) as temporary:
        temporary.write_text(json.dumps({"by": MARK, "confidence": CONFIDENCE, "images": told}, indent=1), "utf-8")
    return [*(out / image["picture"] for image in told), out / FILE]


def _predict(file: Path, photographs: Sequence[Path], imgsz: int, device: torch.device | str) -> list[Results]:
    settings: dict[str, Any] = {"imgsz": imgsz, "conf": CONFIDENCE, "device": device, "verbose": False, "save": False}
    return [r.cpu() for r in ultralytics.YOLO(file).predict(list(map(str, photographs)), **settings)]


def _objects(result: Results) -> list[Found]:
    """What is found in a photograph; of a classifier its first choice, which is the whole photograph."""
    height, width = result.orig_shape
    if result.probs is not None:
        rows = [([0.0, 0.0, width, height], int(result.probs.top1), float(result.probs.top1conf))]
        shapes = None
    else:
        found = result.boxes if result.obb is None else result.obb
        rows = list(zip(found.xyxy.tolist(), found.cls.int().tolist(), found.conf.tolist()))
        shapes = None if result.obb is None else result.obb.xyxyxyxy.numpy()
    objects = []
    for i, (box, kind, confidence) in enumerate(rows):
        x1, y1, x2, y2 = box
        corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]) if shapes is None else shapes[i]
        more = {}
        if result.masks is not None:
            more["outline"] = np.reshape(result.masks.xy[i], (-1, 2))
        if result.keypoints is not None:
            more["points"] = _seen(result.keypoints.data[i].numpy())
        objects.append(Found(corners, box, f"{result.names[kind]} {confidence:.2f}", kind, **more))
    return objects


def _seen(keypoints: np.ndarray) -> np.ndarray:
    """x and y of the keypoints that `yolo predict` shows: those surer than a half, if that is known, and not at 0."""
    shown = (keypoints[:, :2] != 0).all(1)
    if keypoints.shape[1] == 3:
        shown &= keypoints[:, 2] >= 0.5
    return keypoints[shown, :2]


def _alone(objects: Mapping[str, list[Found]]) -> dict[str, set[int]]:
    """Side -> places of the objects that the other side has not: none of the class overlaps enough, or each has a twin.

    Objects come by falling confidence, and the surest takes its nearest twin first.
    """
    first, second = (objects[side] for side in SIDES)
    left = set(range(len(second)))
    alone = set()
    overlaps = box_iou(*(torch.tensor([f.box for f in side]).reshape(-1, 4) for side in (first, second)))
    for i, found in enumerate(first):
        twins = [j for j in left if second[j].kind == found.kind and overlaps[i, j] >= OVERLAP]
        if twins:
            left.remove(max(twins, key=lambda j: float(overlaps[i, j])))
        else:
            alone.add(i)
    return {SIDES[0]: alone, SIDES[1]: left}


def _draw(photograph: np.ndarray, objects: list[Found], alone: set[int], color: str) -> np.ndarray:
    """A photograph, BGR, of `HEIGHT` with its objects; those alone are thick and have their label."""
    ratio = HEIGHT / photograph.shape[0]
    image = cv2.resize(photograph, (max(round(photograph.shape[1] * ratio), 1), HEIGHT), interpolation=cv2.INTER_AREA)
    image = np.ascontiguousarray(
        image if image.ndim == 3 and image.shape[2] == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    )
    for i, found in sorted(enumerate(objects), key=lambda pair: pair[0] in alone):  # what changed lies above
        shade = _bgr(color if i in alone else SAME)
        corners, outline, points = (
            (part * ratio).round().astype(np.int32) for part in (found.corners, found.outline, found.points)
        )
        if len(outline):
            filled = cv2.fillPoly(image.copy(), [outline], shade)
            image = cv2.addWeighted(filled, FILLED, image, 1 - FILLED, 0)
        cv2.polylines(image, [corners], True, shade, 3 if i in alone else 1, cv2.LINE_AA)
        for point in points.tolist():
            cv2.circle(image, point, 3, shade, -1, cv2.LINE_AA)
        if i in alone:
            _write(image, found.label, corners.min(0), shade)
    return image


def _write(image: np.ndarray, text: str, corner: np.ndarray, color: tuple[int, ...]) -> None:
    """White text on a colour, above a corner, or where that is outside of the image, at its edge."""
    text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no other letters
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    (width, height), below = cv2.getTextSize(text, font, size, 1)
    x = int(np.clip(corner[0], 0, max(image.shape[1] - width, 0)))
    y = int(max(corner[1] - below, height + 1))
    cv2.rectangle(image, (x, y - height - 1), (x + width, y + below), color, -1)
    cv2.putText(image, text, (x, y), font, size, (255, 255, 255), 1, cv2.LINE_AA)


def _bgr(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (5, 3, 1))
