# yolo_qc_plugin, AGPL-3.0
"""A few training images as a model takes them, without labels, augmentation or random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils.patches import imread

from ..config import QCError
from . import log

FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}  # as Ultralytics reads them; more channels as they are


def spread_out(files: Sequence[Path], count: int) -> list[Path]:
    """So many of the files, or all where there are fewer, at equal distances in their order."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def read_images(files: Sequence[Path], imgsz: int, channels: int = 3) -> Tensor:
    """Images padded to a square, of shape (n, channels, imgsz, imgsz) in [0, 1], RGB, grey or of further channels.

    Files that cannot be read are left out, as Ultralytics leaves them out of training.

    Raises:
        QCError: If none can be read, or one has other channels than the model takes.
    """
    pad = LetterBox((imgsz, imgsz), auto=False)
    images = []
    for file in files:
        image = _read(file, channels)
        if image is None:
            log.warning(f"{file} cannot be read as an image and is left out")
            continue
        image = pad(image=image).reshape(imgsz, imgsz, -1)
        if image.shape[2] != channels:
            raise QCError(f"QC: {file} has {image.shape[2]} channels; the model takes {channels}.")
        if channels == 3:
            image = image[..., ::-1]  # BGR as OpenCV reads it
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    if not images:
        raise QCError(f"QC: of {len(files)} images none can be read, such as {files[0]}.")
    return torch.stack(images).float().div_(255)


def _read(file: Path, channels: int) -> Any:
    """An image as an array (height, width, ...), or None."""
    try:
        return imread(str(file), FLAGS.get(channels, cv2.IMREAD_UNCHANGED))
    except (OSError, cv2.error):  # a file that is missing; an empty one
        return None
