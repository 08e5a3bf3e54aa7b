# yolo_qc_plugin, AGPL-3.0
"""From what tracing wrote to the ONNX file of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .fold import DeployedConv2d
from .kinds import check_kind
from .pack import pack_weights, raise_opset
from .qdq import QDQ
from .qonnx import QONNX, QONNX_DOMAIN, write_shapes
from .trace import DOMAIN


def write_graph(file: str | Path, layers: Mapping[str, DeployedConv2d], kind: str) -> str:
    """Replace what tracing marked in an ONNX file by the integer graph, in place.

    Args:
        file: Written by torch.onnx.export of a deployed model.
        layers: Its convolutions by name.
        kind: One of ONNX_KINDS.

    Returns:
        One line that says what was written.

    Raises:
        QCError: From `check_kind`.
    """
    import onnx

    model = onnx.load(file)
    opset = next(o.version for o in model.opset_import if not o.domain)
    check_kind(kind, opset)
    graph = (QONNX if kind == "qonnx" else QDQ)(model.graph, layers, kind)
    graph.rewrite()
    kept = [o for o in model.opset_import if o.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if kind == "qonnx":
        model.opset_import.append(onnx.helper.make_opsetid(QONNX_DOMAIN, 1))
    if kind == "int4":
        raise_opset(model)
    onnx.checker.check_model(model, full_check=kind != "qonnx")  # which ONNX's own inference does not see through
    onnx.save(model, file)
    return graph.summary()


def finish_graph(file: str | Path, kind: str) -> str:
    """Do, in place, what a kind needs last: what simplifies graphs at the export would undo it.

    Returns:
        One line that says what was done, empty where there is nothing to do.
    """
    if kind in {"packed", "openvino"}:
        return pack_weights(file)
    if kind == "qonnx":
        write_shapes(file)
    return ""
