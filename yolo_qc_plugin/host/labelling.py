# yolo_qc_plugin, AGPL-3.0
"""A float checkpoint's predictions as labels: the rows of Ultralytics' label files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ultralytics.engine.results import Keypoints, Results
from ultralytics.utils import TQDM

from ..config import QCError
from ..files import replacing
from ..quant.layers import is_quantized
from .architecture import MODELS
from .checkpoints import open_checkpoint
from .photographs import Photographs

TASKS = [task for task in MODELS if task != "classify"]  # whose labels are files of rows
VISIBLE = 0.5  # a keypoint's confidence from which Ultralytics draws it


class Labeller:
    """A trained float checkpoint whose predictions become labels.

    Args:
        model: The checkpoint.
        confidence: Least confidence of a prediction that becomes a label, in (0, 1).
        imgsz: Size at which to predict, in pixels; by default that of the checkpoint's training, or else `otherwise`.
        device: Where to compute.
        otherwise: Size where the checkpoint does not tell its own.

    Attributes:
        task: Of the model.
        names: Class index -> name.
        settings: What the labels depend on, as plain values: model, sha256, confidence, imgsz.

    Raises:
        QCError: If it is not a trained float model of a task whose labels are files.
    """

    def __init__(
        self,
        model: str | Path,
        confidence: float,
        imgsz: int | None = None,
        device: str | torch.device | None = None,
        otherwise: int = 640,
    ):
        if Path(model).suffix != ".pt":
            raise QCError(f"QC: model={model} is not trained and cannot label photographs; give a trained .pt file.")
        self.yolo = open_checkpoint("model", model)
        of_training = (self.yolo.ckpt or {}).get("train_args")
        if not of_training:
            raise QCError(f"QC: model={model} was never trained and cannot label photographs; give a trained .pt file.")
        if is_quantized(self.yolo.model):
            raise QCError(f"QC: model={model} is already quantized; give the float checkpoint.")
        self.task: str = self.yolo.task
        if self.task not in TASKS:
            raise QCError(
                f"QC: model={model} is for {self.task}, whose labels are no files; to label photographs give a model "
                f"for {', '.join(TASKS)}."
            )
        self.names: dict[int, str] = dict(self.yolo.names)
        self.device = device
        file = Path(self.yolo.ckpt_path)
        self.settings = {
            "model": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "confidence": confidence,
            "imgsz": imgsz or of_training.get("imgsz") or otherwise,
        }

    def description(self, photographs: Photographs) -> dict:
        """What a data YAML says beside its paths: the classes and, for poses, the keypoints, which are the model's.

        Raises:
            QCError: If the data set's are others; the message names the first difference.
        """
        theirs = self.names if photographs.names is None else photographs.names
        for i in sorted({*self.names, *theirs}):
            ours, given = (f"{n[i]!r}" if i in n else "missing" for n in (self.names, theirs))
            if ours != given:
                raise QCError(
                    f"QC: class {i} is {given} in data={photographs.data} and {ours} in {self.settings['model']}; give "
                    f"the model's {len(self.names)} names in their order, or leave `names` out."
                )
        told = {"names": self.names, **photographs.others}
        if self.task == "pose":
            shape = list(self.yolo.model.model[-1].kpt_shape)
            if list(told.setdefault("kpt_shape", shape)) != shape:
                raise QCError(
                    f"QC: kpt_shape is {told['kpt_shape']} in data={photographs.data} and {shape} in "
                    f"{self.settings['model']}; leave it out."
                )
        return told

    def write(self, labels: Mapping[Path, Path]) -> None:
        """Predict each photograph and write its rows, with a progress bar; one that cannot be read gets no file.

        Args:
            labels: Photograph, by its absolute path -> label file to write; its folder exists.
        """
        for path, rows in self._predictions(list(labels)) if labels else ():
            with replacing(labels[path]) as temporary:
                temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def _predictions(self, photographs: list[Path]) -> Iterator[tuple[Path, list[str]]]:
        with TemporaryDirectory() as folder:
            listed = Path(folder) / "photographs.txt"  # files of a list would all be opened at once
            listed.write_text("\n".join(map(str, photographs)), encoding="utf-8")
            results = self.yolo.predict(
                str(listed),
                stream=True,
                verbose=False,
                save=False,
                conf=self.settings["confidence"],
                imgsz=self.settings["imgsz"],
                device=self.device,
            )
            what = f"QC: labels by {self.settings['model']}"
            for result in TQDM(results, total=len(photographs), desc=what):
                yield Path(result.path), label_rows(result)


def label_rows(result: Results) -> list[str]:
    """Rows of a label file: the class, then coordinates as shares of the image's width and height, within [0, 1].

    These are a box's centre and size; the points of a polygon, or the corners of an oriented box; or a box and its
    keypoints, of which those that the model is not sure of count as not labelled (0 0 0).

    Args:
        result: Predictions in one image, of a task in TASKS.
    """
    result = result.cpu()
    boxes = result.boxes if result.obb is None else result.obb
    if boxes is None or not len(boxes):
        return []
    if result.masks is not None:
        shapes = [polygon.reshape(-1) for polygon in result.masks.xyn]
    else:
        shapes = list((boxes.xywhn if result.obb is None else boxes.xyxyxyxyn.flatten(1)).numpy())
    rows = [[c, *shape.clip(0, 1)] for c, shape in zip(boxes.cls.int().tolist(), shapes)]
    if result.keypoints is not None:
        rows = [[*row, *points] for row, points in zip(rows, _keypoints(result.keypoints).flatten(1).tolist())]
    fewest = 7 if result.masks is not None else 1  # a mask of fewer than three points is no polygon
    return [" ".join(f"{value:.6g}" for value in row) for row in rows if len(row) >= fewest]


def _keypoints(found: Keypoints) -> torch.Tensor:
    """Keypoints of shape (boxes, points, 2 or 3); the third value is 2, visible, or 0, not labelled."""
    points = found.xyn.clip(0, 1)
    if not found.has_visible:
        return points
    sure = (found.conf >= VISIBLE).unsqueeze(-1)
    return torch.cat((points, torch.full_like(points[..., :1], 2)), -1) * sure
