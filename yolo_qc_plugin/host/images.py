# yolo_qc_plugin, AGPL-3.0
"""A few training images as a model takes them, without labels, augmentation or random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils.patches import imread

from ..config import QCError


def spread_out(files: Sequence[Path], count: int) -> list[Path]:
    """So many of the files, or all where there are fewer, at equal distances in their order."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def read_images(files: Sequence[Path], imgsz: int, channels: int = 3) -> Tensor:
    """Images padded to a square, of shape (n, channels, imgsz, imgsz) in [0, 1], RGB or grey.

    Raises:
        QCError: If one cannot be read, or has other channels than the model takes.
    """
    pad = LetterBox((imgsz, imgsz), auto=False)
    flags = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    images = []
    for file in files:
        image = imread(str(file), flags)
        if image is None:
            raise QCError(f"QC: {file} cannot be read as an image.")
        image = pad(image=image).reshape(imgsz, imgsz, -1)[..., ::-1]  # BGR as OpenCV reads it
        if image.shape[2] != channels:
            raise QCError(f"QC: {file} has {image.shape[2]} channels; the model takes {channels}.")
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    return torch.stack(images).float().div_(255)
