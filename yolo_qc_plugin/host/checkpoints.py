# yolo_qc_plugin, AGPL-3.0
"""Checkpoints that an option of a command names."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from ultralytics import YOLO

from ..config import QCError
from ..quant.layers import is_quantized
from .evaluate import load_model


def load_checkpoint(option: str, file: str | Path, quantized: bool) -> YOLO:
    """A checkpoint in FP32 and eval mode.

    Args:
        option: That names it, for the messages.
        file: Of the checkpoint.
        quantized: Whether it is to be one of a quantized model, or of a float one.

    Raises:
        QCError: If it is missing, unreadable or the other.
    """
    try:
        yolo = load_model(file)
    except FileNotFoundError as e:
        raise QCError(f"QC: {e}") from None
    except Exception as e:  # a truncated or foreign file: torch, zip and pickle errors alike
        raise QCError(f"QC: {option}={file} cannot be read as a checkpoint: {e}") from None
    if not isinstance(yolo.model, nn.Module):
        raise QCError(f"QC: {option}={file} is an exported file; accepted: checkpoints.")
    if quantized and not is_quantized(yolo.model):
        raise QCError(f"QC: {option}={file} is not quantized; accepted: checkpoints trained with callbacks=qc.")
    if not quantized and is_quantized(yolo.model):
        raise QCError(f"QC: {option}={file} is quantized; accepted: float checkpoints.")
    yolo.model.float().eval()
    return yolo
