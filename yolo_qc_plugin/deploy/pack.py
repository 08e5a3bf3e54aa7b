# yolo_qc_plugin, AGPL-3.0
"""Pack the weights of a finished ONNX file of the int8 kind: INT4 constants, each with a Cast to INT8 behind it.

Runtimes fold the Cast when they load the file, and compute what they computed before. It comes last, because what
simplifies graphs at the export would fold it too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .kinds import INT4_OPSET
from .nodes import pack4


def pack_weights(file: str | Path) -> str:
    """Pack, in place, every INT8 weight whose codes fit into 4 bits.

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
            raw = pack4(torch.from_numpy(codes))
            packed = f"{name}_packed"
            constant.CopyFrom(helper.make_tensor(packed, TensorProto.INT4, codes.shape, raw, raw=True))
            casts.append(helper.make_node("Cast", [packed], [name], name=f"{name}/Cast", to=TensorProto.INT8))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    del model.graph.value_info[:]  # shapes, which runtimes infer themselves; a thirtieth of the file
    raise_opset(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return f"{len(casts)} weights packed into 4 bits, {Path(file).stat().st_size / 1e6:.2f} MB"


def raise_opset(model) -> None:
    """Rename an opset from kinds.SAME_OPSET on that of the 4-bit types, in place.

    Opsets 19 to 21 added types and attributes to the nodes of our traces, and changed no meaning.
    """
    standard = next(o for o in model.opset_import if not o.domain)
    standard.version = max(standard.version, INT4_OPSET)
    model.ir_version = max(model.ir_version, 10)
