# yolo_qc_plugin, AGPL-3.0
"""What is decided before Ultralytics exports a quantized model: whether it can, and what the file will hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import QCError
from ..deploy.kinds import canonical, check_kind, choose_kind, runtime_obstacle
from ..deploy.litert.graph import LITERT_KINDS
from ..deploy.symmetric import check_symmetric
from ..quant.activations import silu_is_rounded
from . import log
from .record import record_of

PROGRAMS = {"yolo", "ultralytics"}  # console scripts of Ultralytics
NEEDS = {  # format, or kind -> packages without which nothing of it is written, and how one gets them
    "onnx": (("onnx",), "pip install 'yolo-qc-plugin[export]'"),
    "openvino": (("onnx", "openvino"), "pip install 'yolo-qc-plugin[export]'"),
    "qonnx": (("onnx", "onnxruntime"), "pip install 'yolo-qc-plugin[fpga]'"),
    "litert": (("onnx", "ai_edge_litert"), "pip install 'yolo-qc-plugin[litert]'"),
    "engine": (("onnx", "tensorrt"), "pip install 'yolo-qc-plugin[export]' tensorrt"),
}


def prepare_export(exporter: Any, model: nn.Module) -> str | None:
    """Refuse what a quantized model cannot be exported to, and let the exporter choose the kind of graph.

    Args:
        exporter: Ultralytics' Exporter, before it has begun.
        model: Quantized, or in the deployed form already.

    Returns:
        The kind, or None where no graph is on the way.

    Raises:
        QCError: Naming the argument, what it was, and what is accepted.
    """
    args, record = exporter.args, record_of(model)
    format = canonical(args.format)
    callbacks = exporter.callbacks.get("on_export_start", [])
    onnx, litert = (_asked(callbacks, name) for name in ("qc_onnx", "qc_litert"))
    target = record.config.get("target") if record else None
    kind = choose_kind(args.format, target, onnx)
    if litert and format != "litert":
        raise QCError(f"QC: litert={litert!r} is not accepted with format={args.format!r}; leave it out.")
    if format == "litert" and args.nms is False:
        raise QCError("QC: nms=False puts a top-k into the graph, which format='litert' cannot carry; leave it out.")
    if args.quantize not in {None, 32}:
        raise QCError(
            f"QC: quantize={args.quantize!r} would quantize this model a second time; leave it out (half=True is 16, "
            "int8=True is 8). Its own widths are exported; callbacks=qc qc_onnx=... chooses the ONNX container."
        )
    if kind:
        check_kind(kind, args.opset)
    if kind == "tensorrt":
        check_symmetric(model)
    if kind == "openvino" and silu_is_rounded(model) is False:
        raise QCError(
            "QC: onnx='openvino' is for a model whose SiLU OpenVINO computes in floats; train with callbacks=qc "
            "qc_target=openvino, or leave it out."
        )
    if format == "litert" and silu_is_rounded(model):
        raise QCError(
            "QC: format='litert' computes SiLU in integers, and this model was trained for floats; train with "
            "callbacks=qc qc_target=litert or qc_target=cpu."
        )
    if kind == "qonnx" and args.dynamic:
        raise QCError(
            "QC: dynamic=True is not accepted for the qonnx kind, whose tools want fixed shapes; leave it out."
        )
    packages, install = NEEDS["qonnx"] if kind == "qonnx" else NEEDS.get(format, ((), ""))
    if missing := [name for name in packages if not find_spec(name)]:
        raise QCError(f"QC: format={format!r} needs {' and '.join(missing)}, which is not installed: {install}.")
    if format == "engine" and not torch.cuda.is_available():
        raise QCError("QC: format='engine' is built on the GPU that it is to run on; this machine has none for torch.")
    litert = litert or LITERT_KINDS[0]
    named = litert if format == "litert" else kind
    log.info(
        f"{format}{f', {named} kind' if named else ''}, of a model trained for {target or 'no target in particular'}"
    )
    if format == "onnx" and (reason := runtime_obstacle(kind or "int8")):
        log.warning(f"{reason}.")
    if format == "onnx" and args.dynamic and kind in {"packed", "int8"}:
        log.warning(
            "OpenVINO (2026.4) leaves biases out where it reads a file of dynamic sizes by itself: export "
            "format=openvino for it, or load the file by openvino.convert_model. ONNX Runtime computes all of it."
        )
    begin = partial(_begin, kind=kind, litert=litert)
    exporter.callbacks = {**exporter.callbacks, "on_export_start": [*callbacks, begin]}
    return kind


def _asked(callbacks: Sequence[Any], name: str) -> str | None:
    """The kind that the user named last, or None."""
    return next((getattr(c, name) for c in reversed(callbacks) if getattr(c, name, None)), None)


def _begin(exporter: Any, kind: str | None, litert: str) -> None:
    """Tell the tracing of the kind, and the builder of an engine that the graph has all ranges."""
    exporter.model.qc_onnx, exporter.model.qc_litert = kind, litert
    if canonical(exporter.args.format) == "engine":
        exporter.qat = True  # Ultralytics' word for a model that needs no calibration
        # before TensorRT 11 a flag allows INT8; from then on the graph alone says it, and the argument would have
        # ModelOpt rewrite it
        exporter.args.quantize = 8 if int(import_module("tensorrt").__version__.split(".")[0]) < 11 else None


def kind_of(model: nn.Module, name: str = "qc_onnx") -> str:
    """The kind of graph that the export in progress writes of a model, which may be wrapped for its NMS."""
    return next(str(getattr(m, name)) for m in model.modules() if hasattr(m, name))


@contextmanager
def in_one_line() -> Iterator[None]:
    """Let a refusal end the program `yolo` with one line and exit status 1; anywhere else it stays an exception."""
    try:
        yield
    except QCError as error:
        name = Path(sys.argv[0]).name.removesuffix(".exe").removesuffix("-script.py")
        if name not in PROGRAMS:
            raise
        raise SystemExit(str(error)) from None
