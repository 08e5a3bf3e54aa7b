# yolo_qc_plugin, AGPL-3.0
"""ONNX nodes that move values and make no new ones, of values or of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..nodes import attributes
from .layout import NHWC, Tensor
from .translation import Translation, unknown

Get = Callable[[str], Tensor]  # name of an ONNX tensor -> its values, or its codes on one grid


def move(t: Translation, node, name: str, get: Get) -> Tensor:
    """An output of a node of a kind in MOVES.

    Args:
        t: The translation.
        node: Of ONNX.
        name: Of the output.
        get: Gives the node's inputs.
    """
    if node.op_type == "Concat":
        return _concat(t, node, name, [get(i) for i in node.input])
    if node.op_type == "Slice" and (part := _part(t, node, get)):
        return part
    return MOVES[node.op_type](t, node, name, get(node.input[0]))


def _concat(t: Translation, node, name: str, tensors: Sequence[Tensor]) -> Tensor:
    tensors, axis = t.alike(tensors), attributes(node)["axis"]
    shape = list(tensors[0].shape)
    shape[axis] = sum(x.shape[axis] for x in tensors)
    out = t.new(name, shape, tensors[0].order, tensors[0].grid)
    t.file.add("CONCATENATION", [x.index for x in tensors], out.index, "ConcatenationOptions", axis=out.at(axis))
    return out


def _part(t: Translation, node, get: Get) -> Tensor | None:
    """The input of a concatenation that a Slice cuts out of it again, or None."""
    source = t.sources.get(node.input[0])
    if source is None or source.op_type != "Concat":
        return None
    parts, axis = [get(i) for i in source.input], attributes(source)["axis"]
    shape = list(parts[0].shape)
    shape[axis] = sum(x.shape[axis] for x in parts)
    begin, size = _window(t, node, shape)
    for x in parts:
        if begin[axis] == 0 and size == list(x.shape):
            return x
        begin[axis] -= x.shape[axis]
    return None


def _window(t: Translation, node, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where a Slice of a shape begins, and its size."""
    starts, ends = t.given(node, 1), t.given(node, 2)
    axes = t.given(node, 3) if len(node.input) > 3 else range(len(starts))
    if len(node.input) > 4 and any(t.given(node, 4) != 1):
        raise unknown(node, "with steps")
    begin, size = [0] * len(shape), list(shape)
    for axis, start, end in zip(axes, starts, ends):
        begin[axis], stop, _ = slice(int(start), int(end)).indices(shape[axis])
        size[axis] = stop - begin[axis]
    return begin, size


def _split(t: Translation, node, name: str, x: Tensor) -> Tensor:
    axis, which = attributes(node).get("axis", 0), list(node.output).index(name)
    count = len(node.output)
    sizes = t.given(node, 1) if len(node.input) > 1 else [x.shape[axis] // count] * count
    begin, size = [0] * len(x.shape), list(x.shape)
    begin[axis], size[axis] = int(sum(sizes[:which])), int(sizes[which])
    return t.cut(name, x, begin, size)


def _resize(t: Translation, node, name: str, x: Tensor) -> Tensor:
    sizes = t.given(node, 3) if len(node.input) > 3 else np.floor(np.array(x.shape) * t.given(node, 2))
    if attributes(node)["mode"] != b"nearest" or any(n % m for n, m in zip(sizes, x.shape)):
        raise unknown(node, "of another mode than nearest or by no whole factor")
    x = t.arranged(x, NHWC)
    out = t.new(name, list(sizes), NHWC, x.grid)
    size = t.file.constant("size", np.array(out.shape[2:], np.int32))
    t.file.add("RESIZE_NEAREST_NEIGHBOR", [x.index, size], out.index, "ResizeNearestNeighborOptions")
    return out


def _transpose(t: Translation, node, name: str, x: Tensor) -> Tensor:
    permutation = list(attributes(node)["perm"])
    shape = tuple(x.shape[a] for a in permutation)
    return replace(x, shape=shape, order=tuple(permutation.index(a) for a in x.order))


def _reshape(t: Translation, node, name: str, x: Tensor) -> Tensor:
    return t.reshaped(name, x, [int(n) or x.shape[i] for i, n in enumerate(t.given(node, 1))])


def _flatten(t: Translation, node, name: str, x: Tensor) -> Tensor:
    axis = attributes(node).get("axis", 1)
    return t.reshaped(name, x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _unsqueeze(t: Translation, node, name: str, x: Tensor) -> Tensor:
    return t.reshaped(name, x, np.expand_dims(np.empty(x.shape), tuple(t.given(node, 1))).shape)


def _squeeze(t: Translation, node, name: str, x: Tensor) -> Tensor:
    return t.reshaped(name, x, np.squeeze(np.empty(x.shape), tuple(t.given(node, 1))).shape)


# op -> (translation, node, name of its output, its input) -> the output
MOVES: dict[str, Callable] = {
    "Concat": _concat,
    "Flatten": _flatten,
    "Identity": lambda t, node, name, x: x,
    "MaxPool": lambda t, node, name, x: t.pooled("MAX_POOL_2D", node, name, x),
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": lambda t, node, name, x: t.cut(name, x, *_window(t, node, x.shape)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
