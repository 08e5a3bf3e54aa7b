# yolo_qc_plugin, AGPL-3.0
"""ONNX nodes that compute new values, in FLOAT32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..nodes import attributes
from .layout import NHWC, Geometry, Tensor, as_filter
from .translation import Translation, unknown

UNARY = {
    "Sigmoid": "LOGISTIC",
    "Relu": "RELU",
    "Tanh": "TANH",
    "Exp": "EXP",
    "Sqrt": "SQRT",
    "Neg": "NEG",
    "Sin": "SIN",
    "Cos": "COS",
}
BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV", "Pow": "POW"}


def compute(t: Translation, node, name: str) -> Tensor:
    """Values of the output of a node.

    Raises:
        QCError: If the node is of a kind that is not known here.
    """
    if node.op_type not in COMPUTED:
        raise unknown(node)
    return COMPUTED[node.op_type](t, node, name)


def _unary(t: Translation, node, name: str) -> Tensor:
    x = t.value(node.input[0])
    return t.like(UNARY[node.op_type], [x.index], x, name)


def _binary(t: Translation, node, name: str) -> Tensor:
    constants = [a for i in node.input if (a := t.constant(i)) is not None]
    widest = max((t.value(i) for i in node.input if t.constant(i) is None), key=lambda x: len(x.shape))
    rank = max(len(widest.shape), *(a.ndim for a in constants), 0)
    order = widest.order if len(widest.shape) == rank else tuple(range(rank))
    tensors = [_broadcastable(t, i, order) for i in node.input]
    out = t.new(name, np.broadcast_shapes(*(x.shape for x in tensors)), order)
    t.file.add(BINARY[node.op_type], [x.index for x in tensors], out.index, f"{node.op_type}Options")
    return out


def _broadcastable(t: Translation, name: str, order: tuple[int, ...]) -> Tensor:
    """An operand with as many axes as there are in `order`, in that order."""
    array = t.constant(name)
    if array is not None:
        array = array.reshape((1,) * (len(order) - array.ndim) + array.shape).astype(np.float32)
        return Tensor(t.file.constant(name, array.transpose(order)), array.shape, order)
    x = t.value(name)
    if len(x.shape) < len(order):
        x = t.reshaped(name, x, (1,) * (len(order) - len(x.shape)) + x.shape)
    return t.arranged(x, order)


def _softmax(t: Translation, node, name: str) -> Tensor:
    x = t.value(node.input[0])
    axis = attributes(node).get("axis", -1) % len(x.shape)
    x = t.arranged(x, [*(a for a in x.order if a != axis), axis])
    return t.like("SOFTMAX", [x.index], x, name, "SoftmaxOptions", beta=1.0)


def _leaky_relu(t: Translation, node, name: str) -> Tensor:
    x, alpha = t.value(node.input[0]), attributes(node).get("alpha", 0.01)
    return t.like("LEAKY_RELU", [x.index], x, name, "LeakyReluOptions", alpha=alpha)


def _matmul(t: Translation, node, name: str) -> Tensor:
    """Products of the last two axes; a factor whose last two lie swapped is read so."""
    factors = [t.value(i) for i in node.input]
    rank = len(factors[0].shape)
    swaps = [x.order == (*range(rank - 2), rank - 1, rank - 2) for x in factors]
    a, b = (x if swap else t.arranged(x) for x, swap in zip(factors, swaps))
    out = t.new(name, (*a.shape[:-1], b.shape[-1]))
    t.file.add("BATCH_MATMUL", [a.index, b.index], out.index, "BatchMatMulOptions", adjX=swaps[0], adjY=swaps[1])
    return out


def _global_average_pool(t: Translation, node, name: str) -> Tensor:
    x = t.arranged(t.value(node.input[0]), NHWC)
    out = t.new(name, (*x.shape[:2], 1, 1), NHWC)
    axes = t.file.constant("axes", np.array([1, 2], np.int32))
    t.file.add("MEAN", [x.index, axes], out.index, "ReducerOptions", keepDims=True)
    return out


def _gemm(t: Translation, node, name: str) -> Tensor:
    weight = t.given(node, 1) if attributes(node).get("transB") else t.given(node, 1).T
    x = t.arranged(t.value(node.input[0]))
    out = t.new(name, (x.shape[0], len(weight)))
    constants = [_float(t, node.input[1], weight), _float(t, node.input[2], t.given(node, 2))]
    t.file.add("FULLY_CONNECTED", [x.index, *constants], out.index, "FullyConnectedOptions")
    return out


def _conv(t: Translation, node, name: str) -> Tensor:
    a, weight, x = attributes(node), t.given(node, 1), t.value(node.input[0])
    groups = a.get("group", 1)
    filters = _float(t, node.input[1], as_filter(weight, groups, x.shape[1]))
    return t.convolve(x, filters, _bias(t, node, len(weight)), Geometry.of(a), groups, name)


def _conv_transpose(t: Translation, node, name: str) -> Tensor:
    a, weight = attributes(node), t.given(node, 1)
    x = t.arranged(t.value(node.input[0]), NHWC)
    plain = not any([*a.get("pads", []), *a.get("output_padding", [])]) and a.get("group", 1) == 1
    if not plain or any(d != 1 for d in a.get("dilations", [])):
        raise unknown(node, "with padding, groups or dilation")
    (height, width), kernel = a["strides"], a["kernel_shape"]
    sides = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], a["strides"], kernel)]
    out = t.new(name, (x.shape[0], weight.shape[1], *sides), NHWC)
    shape = t.file.constant("shape", np.array(out.placed, np.int32))
    filters = _float(t, node.input[1], weight.transpose(1, 2, 3, 0))
    inputs = [shape, filters, x.index, _bias(t, node, weight.shape[1])]
    options = dict(padding=t.padding("VALID"), strideH=height, strideW=width)
    t.file.add("TRANSPOSE_CONV", inputs, out.index, "TransposeConvOptions", **options)
    return out


def _bias(t: Translation, node, channels: int) -> int:
    bias = t.given(node, 2) if len(node.input) > 2 else np.zeros(channels)
    return _float(t, f"{node.output[0]}_bias", bias)


def _float(t: Translation, name: str, array: np.ndarray) -> int:
    return t.file.constant(name, array.astype(np.float32))


# op -> (translation, node, name of its output) -> the output
COMPUTED: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    "AveragePool": lambda t, node, name: t.pooled("AVERAGE_POOL_2D", node, name, t.value(node.input[0])),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "LeakyRelu": _leaky_relu,
    "MatMul": _matmul,
    "Softmax": _softmax,
}
