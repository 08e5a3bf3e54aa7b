# yolo_qc_plugin, AGPL-3.0
"""Checkpoints that an option or a command names: opened, or refused in one line that names both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ultralytics  # not YOLO of it: a restricted load imports this file before that exists
from torch import nn
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from ..config import QCError
from ..quant.layers import is_deployed, is_quantized

if TYPE_CHECKING:
    from ultralytics import YOLO

EXPORTED = "_model", ".mlpackage", ".aimodel"  # ends of the names of Ultralytics' folders


def open_checkpoint(option: str, file: str | Path) -> YOLO:
    """What an option names, as Ultralytics opens it; what is missing is refused before it asks the network.

    Args:
        option: For the messages.
        file: A checkpoint, an exported model or a model YAML.

    Raises:
        QCError: If it is missing or unreadable.
    """
    path = Path(file)
    if path.is_dir() and not path.name.endswith(EXPORTED):
        raise QCError(f"QC: {option}={file} is a folder; accepted: a checkpoint, an exported model or a model YAML.")
    known = "://" in str(file) or path.name in GITHUB_ASSETS_NAMES or path.is_file()
    if path.suffix == ".pt" and not known:
        raise QCError(f"QC: {option}={file} does not exist; accepted: a checkpoint, an exported model or a model YAML.")
    try:
        return ultralytics.YOLO(file)
    except Exception as e:  # a truncated or foreign file: torch, zip and pickle errors alike
        raise QCError(f"QC: {option}={file} cannot be read as a checkpoint: {e}") from None


def load_checkpoint(option: str, file: str | Path, quantized: bool) -> YOLO:
    """A checkpoint in FP32 and eval mode.

    Args:
        option: That names it, for the messages.
        file: Of the checkpoint.
        quantized: Whether it is to be one of a quantized model, or of a float one.

    Raises:
        QCError: If it is missing, unreadable or the other.
    """
    yolo = open_checkpoint(option, file)
    if not isinstance(yolo.model, nn.Module):
        raise QCError(f"QC: {option}={file} is a folder or an exported file; accepted: checkpoints.")
    if quantized and not is_quantized(yolo.model):
        raise QCError(f"QC: {option}={file} is not quantized; accepted: checkpoints trained with callbacks=qc.")
    if quantized and is_deployed(yolo.model):
        raise QCError(f"QC: {option}={file} was fused when it was saved; accepted: a run's best.pt, last.pt or qat.pt.")
    if not quantized and is_quantized(yolo.model):
        raise QCError(f"QC: {option}={file} is quantized; accepted: float checkpoints.")
    yolo.model.float().eval()
    return yolo
