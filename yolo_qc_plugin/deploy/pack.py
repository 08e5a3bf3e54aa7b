# yolo_qc_plugin, AGPL-3.0
"""Make a finished file of the int8 kind small: weights in 4 bits, in ONNX short names and no constant twice too.

Packed weights are INT4 constants, each with a Cast to INT8 behind it. Runtimes fold the Cast when they load the file,
and compute what they computed before. It comes last, because what simplifies or converts graphs would fold it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .kinds import INT4_OPSET
from .nodes import pack4


def pack_weights(file: str | Path) -> str:
    """Pack, in place, every INT8 weight whose codes fit into 4 bits, and leave out what only takes room.

    Args:
        file: An ONNX file that deploy.graph wrote as int8, whatever has been done to it since.

    Returns:
        One line that says what became of it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    constants, casts = {i.name: i for i in model.graph.initializer}, []
    for name in dict.fromkeys(n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"):
        constant = constants.get(name)
        if constant is None or constant.data_type != TensorProto.INT8 or len(constant.dims) != 4:
            continue
        codes = numpy_helper.to_array(constant).astype(np.int16)
        if codes.min() >= -8 and codes.max() <= 7:
            raw = pack4(codes).tobytes()
            packed = f"{name}_packed"
            constant.CopyFrom(helper.make_tensor(packed, TensorProto.INT4, codes.shape, raw, raw=True))
            casts.append(helper.make_node("Cast", [packed], [name], name=f"{name}/Cast", to=TensorProto.INT8))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    del model.graph.value_info[:]  # shapes, which runtimes infer themselves; a thirtieth of the file
    shorten_names(model.graph)
    raise_opset(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return f"{len(casts)} weights packed into 4 bits, {Path(file).stat().st_size / 1e6:.2f} MB"


def pack_openvino(model) -> None:
    """Pack, in place, the INT8 weights of an OpenVINO model whose codes fit into 4 bits."""
    import openvino as ov
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.i8 or len(node.shape) != 4:
            continue
        codes = node.data
        if codes.min() >= -8 and codes.max() <= 7:
            packed = ov.op.Constant(ov.Type.i4, ov.Shape(list(codes.shape)), codes.ravel().tolist())
            packed.set_friendly_name(f"{node.get_friendly_name()}_packed")
            unpacked = ops.convert(packed, "i8").output(0)
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(unpacked)


def shorten_names(graph) -> None:
    """Number what tracing named, keep one of equal constants, and drop the names of nodes but convolutions', in place.

    Names that begin with a slash are tracing's: paths through the modules, a tenth of a small file. Layers' own
    constants keep theirs, and a convolution gets its layer's.
    """
    inner = set(_read_inside(graph))
    first: dict[bytes, str] = {}  # content of a constant -> its new name
    short: dict[str, str] = {}
    for constant in [c for c in graph.initializer if _is_traced(c.name, inner)]:
        name = constant.name
        constant.ClearField("name")
        content = constant.SerializeToString()
        if content in first:
            graph.initializer.remove(constant)
        short[name] = constant.name = first.setdefault(content, f"c{len(first)}")
    for node in graph.node:
        for names in node.input, node.output:
            for i, name in enumerate(names):
                if _is_traced(name, inner):
                    names[i] = short.setdefault(name, f"t{len(short)}")
        of_layer = node.op_type == "Conv" and node.input[1].endswith(".weight")
        node.name = node.input[1].removesuffix(".weight") if of_layer else ""


def _is_traced(name: str, inner: set[str]) -> bool:
    return name.startswith("/") and name not in inner


def _read_inside(graph) -> Iterator[str]:
    """What the graphs inside nodes, of loops and conditions, read."""
    for node in graph.node:
        for attribute in node.attribute:
            for inside in (attribute.g, *attribute.graphs):
                yield from (name for n in inside.node for name in n.input)
                yield from (out.name for out in inside.output)
                yield from _read_inside(inside)


def raise_opset(model) -> None:
    """Rename an opset from kinds.SAME_OPSET on that of the 4-bit types, in place.

    Opsets 19 to 21 added types and attributes to the nodes of our traces, and changed no meaning.
    """
    standard = next(o for o in model.opset_import if not o.domain)
    standard.version = max(standard.version, INT4_OPSET)
    model.ir_version = max(model.ir_version, 10)
