# yolo_qc_plugin, AGPL-3.0
"""A QONNX file: what it holds, and what ONNX Runtime and the qonnx package make of it."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .exported import ExportedONNX, Run, session
from .qonnx import QONNX_DOMAIN

# What Quant means, for ONNX Runtime, which does not know it. Its attribute `signed` is 0 or 1; ours are never `narrow`.
QUANT = f"""
<domain: "{QONNX_DOMAIN}", opset_import: ["" : 18]>
Quant <signed, narrow, rounding_mode> (x, scale, zero_point, bits) => (y) {{
    two = Constant <value_float: float = 2.0> ()
    one = Constant <value_float: float = 1.0> ()
    sign = Constant <value_int: int = @signed> ()
    negative = Cast <to = 1> (sign)
    levels = Pow (two, bits)
    half = Div (levels, two)
    below = Mul (half, negative)
    low = Neg (below)
    end = Add (low, levels)
    high = Sub (end, one)
    steps = Div (x, scale)
    moved = Add (steps, zero_point)
    whole = Round (moved)
    above = Max (whole, low)
    codes = Min (above, high)
    from_zero = Sub (codes, zero_point)
    y = Mul (from_zero, scale)
}}
"""


class ExportedQONNX(ExportedONNX):
    """A file of the qonnx kind.

    Its tensors are floats on their grids; what `open` gives of `with_codes` are their codes.
    """

    runtimes = ("onnxruntime", "qonnx")
    slow = frozenset({"qonnx"})  # it runs node by node in Python
    kind = "qonnx"

    def _read(self, sources: dict, readers: dict) -> None:
        self.grids: dict[str, tuple[float, int, type]] = {}  # tensor -> scale, zero point, type of its codes
        for conv in (n for n in self.model.graph.node if n.op_type == "Conv"):
            weight, x = sources.get(conv.input[1]), sources.get(conv.input[0])
            if weight is None or x is None or {weight.op_type, x.op_type} != {"Quant"}:
                continue
            layer = weight.output[0].removesuffix(".weight")
            codes, scale = self.values[weight.input[0]] / self.values[weight.input[1]], f"{layer}.codes"
            self.values[scale], self.weights[layer] = np.rint(codes).astype(np.int8), scale
            self.codes[layer] = conv.input[0], self._grid(x)[1]
            for n in readers.get(conv.output[0], []):
                if n.op_type == "Quant" and self.values[n.input[3]] == 8:
                    self.outputs[layer] = n.output[0], *self._grid(n)[:2]

    def _grid(self, quant: Any) -> tuple[float, int, type]:
        scale, zero_point = (self.values[name].item() for name in quant.input[1:3])
        signed = next(a.i for a in quant.attribute if a.name == "signed")
        return self.grids.setdefault(quant.output[0], (scale, round(zero_point), np.int8 if signed else np.uint8))

    def obstacle(self, name: str) -> str | None:
        """Why a runtime is not tried, or None."""
        if name not in self.runtimes:
            return "not tried: made for FINN and hls4ml"
        missing = name == "qonnx" and not find_spec("qonnx")
        return "not installed: pip install 'yolo-qc-plugin[fpga]'" if missing else None

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The file, or what `with_codes` made of it, in a runtime."""
        import onnx

        model = onnx.load_from_string(content) if content else self.model
        run = run_qonnx(model, self.model) if runtime == "qonnx" else session(_with_function(model), runtime)
        names = [o.name for o in model.graph.output][len(self.model.graph.output) :]
        return lambda images: self._codes_of(run(images), names)

    def cost(self) -> dict[str, float]:
        """What the qonnx package counts in the file, where that is installed.

        Returns:
            "bops", bits of weight times bits of input, summed over all multiplications; "macs", multiplications;
            "weight_bits", of all weights.
        """
        if self.obstacle("qonnx"):
            return {}
        from qonnx.analysis.inference_cost import inference_cost
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.infer_datatypes import InferDataTypes
        from qonnx.util.inference_cost import assign_mem_bits_and_elems, compute_bops_and_macs

        # its own command folds constants first, which takes minutes and changes no count
        typed = ModelWrapper(str(self.path)).transform(InferDataTypes(allow_scaledint_dtypes=True))
        found = typed.analysis(partial(inference_cost, discount_sparsity=False))["total_cost"]
        bops, macs = compute_bops_and_macs(found)
        return {"bops": bops, "macs": macs, "weight_bits": assign_mem_bits_and_elems(found)["total_mem_w_bits"]}

    def _codes_of(self, values: list[np.ndarray], names: list[str]) -> list[np.ndarray]:
        for i, name in enumerate(names, len(values) - len(names)):
            scale, zero_point, kind = self.grids[name]
            values[i] = (np.rint(values[i] / scale) + zero_point).astype(kind)
        return values


def run_qonnx(model: Any, shaped: Any) -> Run:
    """The qonnx package runs a graph.

    Args:
        model: Names the outputs.
        shaped: The same with the shape of every tensor, which the package wants.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    wrapped, names = ModelWrapper(shaped), [o.name for o in model.graph.output]

    def run(images: np.ndarray) -> list[np.ndarray]:
        found = execute_onnx(wrapped, {"images": images}, return_full_exec_context=True)
        return [found[name] for name in names]

    return run


def open_onnx(path: Path) -> ExportedONNX:
    """An ONNX file of any kind.

    Raises:
        QCError: See `ExportedONNX`.
    """
    qonnx = path.is_file() and QONNX_DOMAIN.encode() in path.read_bytes()
    return (ExportedQONNX if qonnx else ExportedONNX)(path)


def _with_function(model: Any) -> bytes:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.functions.append(onnx.parser.parse_function(QUANT))
    return copy.SerializeToString()
