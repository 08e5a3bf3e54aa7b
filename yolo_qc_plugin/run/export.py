# yolo_qc_plugin, AGPL-3.0
"""The kind of graph that an export writes, where the user chooses one."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import QCError
from ..deploy.fold import deployed_convs
from ..deploy.kinds import check_kind
from ..deploy.litert.graph import check_litert_kind


class ChosenKind:
    """A callback for an export that names the kind of graph, and refuses a float model.

    Args:
        onnx: One of deploy.kinds.ONNX_KINDS, or None for that of the model's target.
        litert: One of deploy.litert.graph.LITERT_KINDS, or None for the first.

    Attributes:
        qc_onnx: The kind of ONNX graph, which `host.exporting` reads before the export begins.
        qc_litert: The kind of LiteRT graph, which it reads too.
    """

    def __init__(self, onnx: str | None = None, litert: str | None = None):
        if onnx is not None:
            check_kind(onnx)
        if litert is not None:
            check_litert_kind(litert)
        self.qc_onnx, self.qc_litert = onnx, litert

    def __call__(self, exporter) -> None:
        """Refuse a model that is not quantized."""
        if not deployed_convs(exporter.model):
            raise QCError(f"QC: {exporter.file} is not quantized; callbacks=qc exports checkpoints trained with it.")


def export_events(onnx: str | None = None, litert: str | None = None) -> dict:
    """Event name -> callback for an export; arguments as of `ChosenKind`.

    Raises:
        QCError: On another kind.
    """
    return {"on_export_start": ChosenKind(onnx, litert)}


def choose_onnx_kind(model, kind: str | None) -> None:
    """Choose the kind of graph that `model.export(format="onnx")` writes of a quantized model.

    Args:
        model: An `ultralytics.YOLO` object with a quantized model.
        kind: "packed" (small and fast), "int8" (for older runtimes), "int4" (for converters that look for 4-bit types),
            "openvino", "tensorrt", or "qonnx" (for FPGAs); docs/deployment.md says which runs where. None for
            that of the model's target again.

    Raises:
        QCError: On another kind.

    Examples:
        >>> from yolo_qc_plugin import choose_onnx_kind
        >>> choose_onnx_kind(model, "int4")
        >>> model.export(format="onnx")
    """
    choose_kinds(model, onnx=kind)


def choose_litert_kind(model, kind: str | None) -> None:
    """Choose the kind of graph that `model.export(format="litert")` writes of a quantized model.

    Args:
        model: An `ultralytics.YOLO` object with a quantized model.
        kind: "int4" (packed weights of up to 4 bits, for size) or "int8" (a byte for every weight, for speed).
            None for the first again.

    Raises:
        QCError: On another kind.

    Examples:
        >>> from yolo_qc_plugin import choose_litert_kind
        >>> choose_litert_kind(model, "int8")
        >>> model.export(format="litert")
    """
    choose_kinds(model, litert=kind)


def choose_kinds(model, **kinds: str | None) -> None:
    """Give a model the callbacks of `export_events`, in place of those that named a kind of the same.

    Args:
        model: An `ultralytics.YOLO` object with a quantized model.
        **kinds: Arguments of `export_events`.
    """
    for event, callback in export_events(**kinds).items():
        model.callbacks[event] = [c for c in model.callbacks[event] if not _names(c, kinds)]
        if _names(callback, kinds):
            model.add_callback(event, callback)


def _names(callback, kinds: Iterable[str]) -> bool:
    """Whether a callback chooses one of these."""
    return isinstance(callback, ChosenKind) and any(getattr(callback, f"qc_{name}") for name in kinds)
