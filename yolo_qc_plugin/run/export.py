# yolo_qc_plugin, AGPL-3.0
"""The kind of ONNX graph that an export writes, where the user chooses one."""

from __future__ import annotations

from ..config import QCError
from ..deploy.fold import deployed_convs
from ..deploy.qdq import ONNX_KINDS, check_kind


def export_events(onnx: str = ONNX_KINDS[0]) -> dict:
    """Event name -> callback for an export.

    Args:
        onnx: Kind of ONNX graph, "int8" or "int4".

    Raises:
        QCError: On another kind.
    """
    check_kind(onnx)

    def on_export_start(exporter) -> None:
        if not deployed_convs(exporter.model):
            raise QCError(f"QC: {exporter.file} is not quantized; callbacks=qc exports checkpoints trained with it.")
        exporter.model.qc_onnx = onnx

    return {"on_export_start": on_export_start}


def choose_onnx_kind(model, kind: str) -> None:
    """Choose the kind of graph that `model.export(format="onnx")` writes of a quantized model.

    Args:
        model: An `ultralytics.YOLO` object with a quantized model.
        kind: "int8" (8-bit containers, for speed) or "int4" (packed 4-bit weights, for size).

    Raises:
        QCError: On another kind.

    Examples:
        >>> from yolo_qc_plugin import choose_onnx_kind
        >>> choose_onnx_kind(model, "int4")
        >>> model.export(format="onnx")
    """
    for event, callback in export_events(kind).items():
        model.add_callback(event, callback)
