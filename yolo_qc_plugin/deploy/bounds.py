# yolo_qc_plugin, AGPL-3.0
"""How low the values of a traced ONNX graph can be: a tensor that stays above its grid's lower end needs no Max."""

from __future__ import annotations

import math

from .nodes import attributes
from .trace import QUANTIZE

SILU_MIN = -0.28097  # the least x * round(256 * sigmoid(x)) / 256, at x = -1.2844; a little below SiLU's own


class LowerBounds:
    """Lower bounds of the tensors of a graph.

    Args:
        sources: Tensor -> the node that writes it, as traced, with markers for quantizers. The nodes' inputs may be
            renamed later, as long as the tensors have the same values.
    """

    def __init__(self, sources: dict):
        self.sources = sources
        self._found: dict[str, float] = {}

    def of(self, name: str) -> float:
        """A lower bound of a tensor's values, -inf where none is known."""
        if name not in self._found:
            self._found[name] = -math.inf  # should the graph have a cycle
            self._found[name] = self._find(self.sources.get(name))
        return self._found[name]

    def _find(self, node) -> float:
        if node is None:
            return -math.inf
        op, inputs = node.op_type, list(node.input)
        a = attributes(node)
        if op == QUANTIZE:
            return (a["quant_min"] - a["zero_point"]) * a["scale"]
        if op == "LeakyRelu" and a["alpha"] > 0:
            return a["alpha"] * min(self.of(inputs[0]), 0.0)
        if op == "Mul" and any(s in self.sources and self._is_sigmoid_of(s, inputs) for s in inputs):
            return SILU_MIN
        if op == "Round":
            return self.of(inputs[0]) - 0.5
        if op == "Mul" and self._factor(inputs[1]) > 0:
            return self._factor(inputs[1]) * self.of(inputs[0])
        if op in {"Sigmoid", "Relu", "Softmax"}:
            return 0.0
        if op in {"MaxPool", "Split", "Slice", "Reshape", "Transpose", "Identity"}:
            return self.of(inputs[0])
        if op == "Resize" and a.get("mode") == b"nearest":
            return self.of(inputs[0])
        if op == "Concat":
            return min(map(self.of, inputs))
        if op == "Add":
            return sum(map(self.of, inputs))
        return -math.inf

    def _factor(self, name: str) -> float:
        """The number that tracing wrote as a constant, 0 where a tensor is none."""
        from onnx.numpy_helper import to_array

        node = self.sources.get(name)
        value = to_array(attributes(node)["value"]) if node is not None and node.op_type == "Constant" else None
        return float(value) if value is not None and value.size == 1 else 0.0

    def _is_sigmoid_of(self, name: str, operands: list[str]) -> bool:
        node = self.sources[name]
        if node.op_type == QUANTIZE:  # of QuantSiLU
            node = self.sources.get(node.input[0], node)
        return node.op_type == "Sigmoid" and node.input[0] in operands
