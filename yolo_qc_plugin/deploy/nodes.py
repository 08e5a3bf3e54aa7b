# yolo_qc_plugin, AGPL-3.0
"""Nodes and constants of an ONNX graph: which node writes and reads a tensor, and how new ones are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, as_tensor


def links(graph) -> tuple[dict, dict[str, list]]:
    """Tensor -> the node that writes it, and tensor -> the nodes that read it, of an ONNX graph."""
    sources = {out: n for n in graph.node for out in n.output}
    readers: dict[str, list] = {}
    for n in graph.node:
        for name in n.input:
            readers.setdefault(name, []).append(n)
    return sources, readers


def attributes(node) -> dict:
    """Name -> value of a node's attributes."""
    from onnx import helper

    return {p.name: helper.get_attribute_value(p) for p in node.attribute}


def moves(node) -> bool:
    """Whether a node gives values of its first input (of Concat all) and no others; of those between convolutions."""
    nearest = node.op_type == "Resize" and attributes(node).get("mode") == b"nearest"
    return nearest or node.op_type in {"Concat", "MaxPool", "Split"}


class Writer:
    """Writes nodes and constants.

    Args:
        graph: Gets the constants.

    Attributes:
        nodes: The nodes so far, in order. They are not in the graph.
    """

    def __init__(self, graph):
        self.graph, self.nodes = graph, []
        self._written: set[str] = set()  # names of constants, and of those that a node dequantizes

    def __contains__(self, name: str) -> bool:
        """Whether a constant of that name has been written, or one that a node makes of constants."""
        return name in self._written

    def add(self, op: str, inputs: list[str], output: str, **attributes) -> None:
        """Write a node."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))

    def constant(self, name: str, value: Tensor | float, kind: int | None = None) -> str:
        """Write a constant, unless one of that name has been written; returns the name.

        Args:
            name: Its name.
            value: Whole numbers for the integer types.
            kind: ONNX type, FLOAT by default.
        """
        from onnx import TensorProto, helper

        if name not in self._written:
            kind = TensorProto.FLOAT if kind is None else kind
            value = as_tensor(value).detach().cpu()
            if kind in {TensorProto.INT4, TensorProto.UINT4}:
                raw = pack4(value.numpy()).tobytes()
            else:
                raw = value.numpy().astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
            self.graph.initializer.append(helper.make_tensor(name, kind, value.shape, raw, raw=True))
            self._written.add(name)
        return name

    def dequantize(self, name: str) -> str:
        """Write the node that makes NAME of the constants NAME_codes, NAME_scale and any NAME_zero_point, by channel.

        A layer that the model runs twice has one such node, which both runs read.
        """
        if name not in self._written:
            parts = [f"{name}_{part}" for part in ("codes", "scale", "zero_point")]
            self.add("DequantizeLinear", [part for part in parts if part in self._written], name, axis=0)
            self._written.add(name)
        return name


def pack4(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low half, as ONNX and LiteRT store 4-bit types."""
    nibbles = codes.reshape(-1).astype(np.int16) & 15
    if nibbles.size % 2:
        nibbles = np.append(nibbles, 0)
    return (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8)


def unpack4(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The signed codes that `pack4` packed, int8, of a shape."""
    nibbles = np.stack([packed.reshape(-1) & 15, packed.reshape(-1) >> 4], axis=1).reshape(-1)
    codes = ((nibbles ^ 8).astype(np.int16) - 8).astype(np.int8)
    return codes[: np.prod(shape)].reshape(shape)
