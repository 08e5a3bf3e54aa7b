# yolo_qc_plugin, AGPL-3.0
"""What an export of a quantized model may write: formats, and kinds of ONNX graph.

Kinds of graph, by their containers (deploy.qdq and deploy.qonnx write them):

    packed    INT4 weights of up to 4 bits, which a Cast makes INT8: as small as int4 and as fast as int8.
    int8      8-bit containers alone, for runtimes that do not fold such a Cast.
    openvino  As packed, but grids of outputs are in floats, where OpenVINO computes them inside the convolution.
    int4      4-bit containers for weights and activations of up to 4 bits, for converters that look for them.
    tensorrt  INT8 alone, every zero point 0.
    qonnx     Quant nodes of the true widths, for FINN and hls4ml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

from ..config import TARGETS, QCError

INT4_OPSET = 21  # the first with 4-bit types
INT8_OPSET = 13  # the first whose DequantizeLinear takes one scale per channel
SAME_OPSET = 18  # nodes of our traces mean the same from here to INT4_OPSET
OPENVINO = 2025, 0  # the first that takes weights of 4 bits
PACKAGES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ai_edge_litert": "LiteRT"}  # runtimes, in words
EXTRAS = {"onnxruntime": "export", "openvino": "export", "ai_edge_litert": "litert"}  # that bring them


@dataclass(frozen=True)
class Kind:
    """A kind of ONNX graph.

    Attributes:
        min_opset: The least opset to trace with.
        runtime: The first ONNX Runtime that runs it as it is meant.
        openvino: The first OpenVINO that does; empty for any.
    """

    min_opset: int = INT8_OPSET
    runtime: tuple[int, ...] = (1, 20)
    openvino: tuple[int, ...] = ()


ONNX_KINDS = {
    "packed": Kind(SAME_OPSET, runtime=(1, 23), openvino=OPENVINO),
    "int8": Kind(),
    "openvino": Kind(SAME_OPSET, runtime=(1, 23), openvino=OPENVINO),
    "int4": Kind(SAME_OPSET),
    "tensorrt": Kind(),
    "qonnx": Kind(),
}
# format of `yolo export` -> the kinds of graph that it can be made from, the target's own or else the first; none where
# no ONNX graph is on the way
FORMATS: dict[str, tuple[str, ...]] = {
    "onnx": tuple(ONNX_KINDS),
    "openvino": ("packed", "int8", "openvino"),
    "torchscript": (),
    "litert": (),
    "engine": ("tensorrt",),
}

# names that Ultralytics takes for another
ALIASES = {"trt": "engine", "tensorrt": "engine", "tflite": "litert", "tfjs": "litert"}


def canonical(format: str) -> str:
    """A format's own name, in small letters."""
    return ALIASES.get(format.lower(), format.lower())


def choose_kind(format: str, target: str | None, asked: str | None) -> str | None:
    """The kind of graph that an export writes, or None where it writes none.

    Args:
        format: Of `yolo export`.
        target: What the model was trained for, or None.
        asked: The kind that the user named, or None.

    Raises:
        QCError: On a format that cannot carry the quantizers, an unknown kind, or one that the format is not made from.
    """
    if canonical(format) not in FORMATS:
        raise QCError(
            f"QC: format={format!r} cannot carry the quantizers of this model; accepted: {', '.join(FORMATS)}. "
            "(For a float model, export the checkpoint that this one began with.)"
        )
    if asked is not None:
        check_kind(asked)
    kinds = FORMATS[canonical(format)]
    if asked is not None and asked not in kinds:
        accepted = f"give {' or '.join(map(repr, kinds))}" if kinds else "leave it out"
        raise QCError(f"QC: onnx={asked!r} is not accepted with format={format!r}; {accepted}.")
    own = TARGETS[target].onnx if target else None
    return asked or (own if own in kinds else next(iter(kinds), None))


def check_kind(kind: str, opset: int | None = None) -> None:
    """Refuse an unknown kind, or an opset below that which the kind needs.

    Raises:
        QCError: Naming what is accepted.
    """
    if kind not in ONNX_KINDS:
        raise QCError(f"QC: onnx={kind!r} is not accepted; give {' or '.join(map(repr, ONNX_KINDS))}.")
    least = ONNX_KINDS[kind].min_opset
    if opset is not None and opset < least:
        older = " (callbacks=qc qc_onnx=int8 takes 13 and later)" if least > INT8_OPSET else ""
        raise QCError(f"QC: opset={opset} is too old for the {kind} kind; accepted: {least} and later{older}.")


def check_runtime(kind: str) -> None:
    """Refuse to run a kind without ONNX Runtime, or with one that does not run it as it is meant.

    Raises:
        QCError: Naming the version that is needed, and the kind for older ones.
    """
    if reason := missing("onnxruntime") or runtime_obstacle(kind):
        raise QCError(f"QC: {reason}.")


def runtime_obstacle(kind: str, runtime: str = "onnxruntime") -> str | None:
    """Why a runtime that is installed does not run a kind as it is meant, and what helps; None where it does.

    Args:
        kind: One of ONNX_KINDS.
        runtime: Its package, "onnxruntime" or "openvino".
    """
    needed = ONNX_KINDS[kind].runtime if runtime == "onnxruntime" else ONNX_KINDS[kind].openvino
    reason = too_old(runtime, needed, f"the {kind} kind")
    return reason and reason + "; or export with callbacks=qc qc_onnx=int8, which older ones run" * (kind == "packed")


def missing(package: str) -> str | None:
    """That a runtime, one of PACKAGES, is not installed, and how one gets it; None where it is."""
    if find_spec(package):
        return None
    return f"{PACKAGES[package]} is not installed: pip install 'yolo-qc-plugin[{EXTRAS[package]}]'"


def too_old(package: str, needed: tuple[int, ...], what: str) -> str | None:
    """Why the version of a runtime that is installed does not do, and which does; None where it does, or none is here.

    Args:
        package: One of PACKAGES.
        needed: The first version that does.
        what: It is needed for.
    """
    found = _version(package) if find_spec(package) else ""
    if not found or tuple(map(int, re.findall(r"\d+", found)))[: len(needed)] >= needed:
        return None
    version = ".".join(map(str, needed))
    return f"{PACKAGES[package]} {found} is too old for {what}; install {package.replace('_', '-')}>={version}"


def _version(package: str) -> str:
    """A package's version, empty where it cannot tell; ONNX Runtime has several names, such as onnxruntime-gpu."""
    try:
        return metadata.version(package)  # without loading it
    except metadata.PackageNotFoundError:
        return getattr(import_module(package), "__version__", "")
