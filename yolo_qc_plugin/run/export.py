# yolo_qc_plugin, AGPL-3.0
"""The kind of ONNX graph that an export writes, where the user chooses one."""

from __future__ import annotations

from ..config import QCError
from ..deploy.fold import deployed_convs
from ..deploy.kinds import check_kind


class ChosenKind:
    """A callback for an export that names the kind of ONNX graph, and refuses a float model.

    Args:
        onnx: One of deploy.kinds.ONNX_KINDS, or None for that of the model's target.

    Attributes:
        qc_onnx: The kind, which `host.exporting` reads before the export begins.
    """

    def __init__(self, onnx: str | None):
        if onnx is not None:
            check_kind(onnx)
        self.qc_onnx = onnx

    def __call__(self, exporter) -> None:
        """Refuse a model that is not quantized."""
        if not deployed_convs(exporter.model):
            raise QCError(f"QC: {exporter.file} is not quantized; callbacks=qc exports checkpoints trained with it.")


def export_events(onnx: str | None = None) -> dict:
    """Event name -> callback for an export.

    Args:
        onnx: Kind of ONNX graph, one of deploy.kinds.ONNX_KINDS, or None for that of the model's target.

    Raises:
        QCError: On another kind.
    """
    return {"on_export_start": ChosenKind(onnx)}


def choose_onnx_kind(model, kind: str) -> None:
    """Choose the kind of graph that `model.export(format="onnx")` writes of a quantized model.

    Args:
        model: An `ultralytics.YOLO` object with a quantized model.
        kind: "packed" (small and fast), "int8" (for older runtimes), "int4" (for converters that look for 4-bit types),
            "tensorrt", or "qonnx" (for FPGAs); docs/deployment.md says which runs where.

    Raises:
        QCError: On another kind.

    Examples:
        >>> from yolo_qc_plugin import choose_onnx_kind
        >>> choose_onnx_kind(model, "int4")
        >>> model.export(format="onnx")
    """
    for event, callback in export_events(kind).items():
        model.add_callback(event, callback)
