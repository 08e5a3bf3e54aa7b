# yolo_qc_plugin, AGPL-3.0
"""The LiteRT graph of a deployed model: integer where its grids say so, float elsewhere, the same codes.

It is made from the ONNX graph that tracing marked, tensor by tensor as they are asked for, in one of two forms:

    values  FLOAT32
    codes   INT8 on the grid of the quantizer that reads it

What moves values and makes no new ones (concatenation, MaxPool, Resize to the nearest, Slice, Reshape, Transpose) gives
codes of codes. A convolution gives codes by CONV_2D with INT4 or INT8 weights, a scale for each output channel and an
INT32 bias; SiLU by LOGISTIC, whose 256ths are LiteRT's own output grid, and MUL, which rounds the exact product of
two codes once, to the grid of whoever reads it. A residual sum of what has quantizers is an ADD, if that adds finely
enough (see `adds_exactly`). A tensor that is read on two grids is computed on both. All else is computed in values,
behind DEQUANTIZE and before QUANTIZE: other sums, attention, the head's arithmetic, and convolutions whose outputs
nothing quantizes.

Codes of a grid narrower than 8 bits lie at the container's top, so that saturation cuts off values above the grid; a
MAXIMUM cuts off those below, where the input can be that low (see `bounds`).

LiteRT computes what XNNPACK knows by XNNPACK, whose codes are those of PyTorch. INT4 filters it does not know; the
built-in kernels that take them move less than a twentieth of the codes by one (see `weights.rounds_twice`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...config import QCError
from ..bounds import LowerBounds
from ..fold import DeployedConv2d
from ..nodes import attributes
from ..trace import CONVOLVE, QUANTIZE
from .flatbuffer import Flatbuffer, Grid
from .layout import NHWC, Tensor
from .moves import MOVES, move
from .translation import Translation
from .values import compute
from .weights import Weight, geometry_of, shift_of, write_bias, write_weight

LITERT_KINDS = ("int4", "int8")
OPTIONS = {"MUL": "MulOptions", "ADD": "AddOptions"}
ADD_BITS = 21  # of the larger factor of XNNPACK's ADD
SIGMOID = Grid(2.0**-8, -128)  # the only output grid that LOGISTIC has


def write_litert(traced: str | Path, file: str | Path, layers: Mapping[str, DeployedConv2d], kind: str) -> str:
    """Write the LiteRT file of a deployed model.

    Args:
        traced: Written by torch.onnx.export of that model, with fixed axes.
        file: To write.
        layers: The model's convolutions by name.
        kind: One of LITERT_KINDS: "int4" packs weights of up to 4 bits, "int8" has a byte for every weight.

    Returns:
        One line that says what was written.

    Raises:
        QCError: If the graph has a node that is not known here.
    """
    import onnx

    graph = _Graph(onnx.load(traced).graph, layers, kind)
    Path(file).write_bytes(graph.write())
    weights = graph.weights.values()
    packed, odd = sum(w.kind == "INT4" for w in weights), sum(not w.specified for w in weights)
    line = (
        f"{graph.integer} integer convolutions, {len(weights) - graph.integer} computed in float on their codes; "
        f"weights of {packed} in INT4, of {len(weights) - packed} in INT8"
    )
    return line + f", of {odd} with the code -128, which target=litert leaves out as LiteRT specifies" * bool(odd)


def check_litert_kind(kind: str) -> None:
    """Refuse an unknown kind.

    Raises:
        QCError: Naming what is accepted.
    """
    if kind not in LITERT_KINDS:
        raise QCError(f"QC: litert={kind!r} is not accepted; give {' or '.join(map(repr, LITERT_KINDS))}.")


class _Graph(Translation):
    """A graph being translated."""

    def __init__(self, graph, layers: Mapping[str, DeployedConv2d], kind: str):
        super().__init__(graph, Flatbuffer("yolo_qc_plugin"))
        self.layers, self.kind = layers, kind
        self.bounds = LowerBounds(self.sources)
        self.weights: dict[str, Weight] = {}  # by layer name
        self.integer = 0
        self._values: dict[str, Tensor] = {}
        self._codes: dict[tuple[str, Grid], Tensor] = {}
        self._restored: dict[tuple[str, Grid], Tensor] = {}

    def write(self) -> bytes:
        """The file's content."""
        image = self.graph.input[0]
        shape = tuple(d.dim_value for d in image.type.tensor_type.shape.dim)
        inputs = self.new("images", shape)
        self._values[image.name] = self.arranged(inputs, NHWC)  # XNNPACK is quicker at that in FLOAT32 than in INT8
        for node in self.graph.node:  # in order, for operators to be in order and no call to nest deeply
            if node.op_type == QUANTIZE:
                self.codes(node.input[0], grid_of(node))
        outputs = [self.arranged(self.value(o.name)).index for o in self.graph.output]
        return self.file.finish([inputs.index], outputs)

    def codes(self, name: str, grid: Grid) -> Tensor:
        """INT8 codes of an ONNX tensor on a grid."""
        if (name, grid) not in self._codes:
            self._codes[name, grid] = self._find_codes(name, grid)
        return self._codes[name, grid]

    def _find_codes(self, name: str, grid: Grid) -> Tensor:
        node = self.sources.get(name)
        if node is not None and node.op_type in MOVES:
            if factors := self._factors(node, name):
                return self._bounded(name, self._combined("MUL", factors, name, grid), grid)
            return move(self, node, name, lambda x: self.codes(x, grid))
        if node is not None and node.op_type == QUANTIZE and grid_of(node) == grid:
            return self.codes(node.input[0], grid)
        codes = self._integer(node, grid) or self._quantized(self.value(name), f"{name}_codes", grid)
        return self._bounded(name, codes, grid)

    def _bounded(self, name: str, codes: Tensor, grid: Grid) -> Tensor:
        """Codes at the grid's lower end at least."""
        if grid.low > -128 and self.bounds.of(name) < grid.lowest - grid.scale / 2:
            low = self.lowest(grid, grid.low, f"{name}_low")
            out = self.new(f"{name}_bounded", codes.shape, codes.order, grid)
            self.file.add("MAXIMUM", [codes.index, low], out.index, "MaximumMinimumOptions")
            return out
        return codes

    def _integer(self, node, grid: Grid) -> Tensor | None:
        """Codes that an integer operator gives, or None where there is none."""
        if node is None:
            return None
        if node.op_type == CONVOLVE:
            return self._convolved(node, grid)
        op = {"Sigmoid": "LOGISTIC", "Mul": "MUL", "Add": "ADD"}.get(node.op_type)
        grids = [g for x in node.input if (g := self._grid(x))]
        if op is None or len(grids) < len(node.input) or (op == "LOGISTIC" and grid != SIGMOID):
            return None
        if op == "ADD" and not adds_exactly(grids, grid):
            return None
        inputs = self.alike([self.codes(x, of) for x, of in zip(node.input, grids)])
        return self._combined(op, inputs, node.output[0], grid)

    def _grid(self, name: str) -> Grid | None:
        """The grid of what a quantizer gave, moved or not; None of anything else."""
        node = self.sources.get(name)
        if node is not None and node.op_type in MOVES:
            grids = {self._grid(x) for x in (node.input if node.op_type == "Concat" else node.input[:1])}
            return grids.pop() if len(grids) == 1 else None
        return grid_of(node) if node is not None and node.op_type == QUANTIZE else None

    def _combined(self, op: str, inputs: list[Tensor], name: str, grid: Grid) -> Tensor:
        shape = np.broadcast_shapes(*(x.shape for x in inputs))
        out = self.new(f"{name}_codes", shape, inputs[0].order, grid)
        self.file.add(op, [x.index for x in inputs], out.index, OPTIONS.get(op, ""))
        return out

    def _quantizers(self, node) -> list:
        """The quantizers that a node reads, none if it reads anything else."""
        sources = [self.sources.get(x) for x in node.input]
        return sources if all(s is not None and s.op_type == QUANTIZE for s in sources) else []

    def _convolved(self, node, grid: Grid) -> Tensor | None:
        """CONV_2D of codes, or None where it would need a negative scale."""
        layer, source = self._layer(node), self.sources[node.input[0]]
        weight, given = self._weight(layer), grid_of(source)
        if weight.sign is not None:
            return None
        bias = write_bias(self.file, layer, weight, given.scale, grid.scale)
        self.integer += 1
        x, name = self.codes(source.input[0], given), f"{node.output[0]}_codes"
        return self.convolve(x, weight.index, bias, geometry_of(layer), layer.groups, name, grid)

    def value(self, name: str) -> Tensor:
        """FLOAT32 values of an ONNX tensor."""
        if name not in self._values:
            array = self.constant(name)
            if array is None:
                self._values[name] = self._find_value(self.sources[name], name)
            else:
                index = self.file.constant(name, array.astype(np.float32))
                self._values[name] = Tensor(index, array.shape, tuple(range(array.ndim)))
        return self._values[name]

    def _find_value(self, node, name: str) -> Tensor:
        if node.op_type == QUANTIZE:
            return self._restore(node, name)
        if node.op_type == CONVOLVE:
            return self._convolved_in_float(node, name)
        if node.op_type not in MOVES:
            return compute(self, node, name)
        if factors := self._factors(node, name):
            x, y = (self._dequantized(f, name) for f in factors)
            return self.like("MUL", [x.index, y.index], x, name, "MulOptions")
        return move(self, node, name, self.value)

    def _factors(self, node, name: str) -> list[Tensor]:
        """Codes of what an output is the product of, where a node cuts it out of SiLU's product; else none.

        The product of two parts is less work than a part of their product.
        """
        product = self.sources.get(node.input[0]) if node.op_type in {"Split", "Slice"} else None
        if product is None or product.op_type != "Mul":
            return []
        factors = [self.codes(q.input[0], grid_of(q)) for q in self._quantizers(product)]
        return self.alike([move(self, node, name, {node.input[0]: x}.__getitem__) for x in factors]) if factors else []

    def _restore(self, node, name: str) -> Tensor:
        key = (node.input[0], grid_of(node))
        if key not in self._restored:
            self._restored[key] = self._dequantized(self.codes(*key), name)
        return self._restored[key]

    def _convolved_in_float(self, node, name: str) -> Tensor:
        """A convolution in float of what the codes stand for."""
        layer, source, shift = self._layer(node), self.sources[node.input[0]], shift_of(self._layer(node))
        integers = self._weight(layer)
        weight = self.file.tensor(f"{layer.name}.weight", self.file.graph.tensors[integers.index].shape)
        self.file.add("DEQUANTIZE", [integers.index], weight, "DequantizeOptions")
        bias = self.file.constant(f"{layer.name}.bias", shift if integers.sign is None else np.zeros_like(shift))
        codes = self.codes(source.input[0], grid_of(source))
        x = self.value(node.input[0])
        if codes.order != NHWC:  # codes are to be found in the order of all other convolutions' inputs
            x = self._dequantized(self.arranged(codes, NHWC), node.input[0])
        x = self.convolve(x, weight, bias, geometry_of(layer), layer.groups, name)
        if integers.sign is not None:
            x = self._with("MUL", x, f"{layer.name}.sign", integers.sign)
            x = self._with("ADD", x, f"{layer.name}.shift", shift)
        return x

    def _with(self, op: str, x: Tensor, name: str, channels: np.ndarray) -> Tensor:
        """Values with a constant for each channel, the last axis in the file."""
        return self.like(op, [x.index, self.file.constant(name, channels)], x, name, f"{op.capitalize()}Options")

    def _weight(self, layer: DeployedConv2d) -> Weight:
        if layer.name not in self.weights:
            self.weights[layer.name] = write_weight(self.file, layer, self.kind == "int4")
        return self.weights[layer.name]

    def _quantized(self, x: Tensor, name: str, grid: Grid) -> Tensor:
        out = self.new(name, x.shape, x.order, grid)
        self.file.add("QUANTIZE", [x.index], out.index, "QuantizeOptions")
        return out

    def _dequantized(self, codes: Tensor, name: str) -> Tensor:
        return self.like("DEQUANTIZE", [codes.index], codes, name, "DequantizeOptions")

    def _layer(self, node) -> DeployedConv2d:
        return self.layers[node.attribute[0].s.decode()]


def grid_of(node) -> Grid:
    """The grid of a quantizer's node, at the top of its container."""
    a = attributes(node)
    shift = 127 - a["quant_max"]
    return Grid(a["scale"], a["zero_point"] + shift, a["quant_min"] + shift)


def adds_exactly(inputs: Sequence[Grid], out: Grid) -> bool:
    """Whether XNNPACK's ADD gives the codes of exact sums, whatever the codes of its two inputs.

    It multiplies codes by whole factors, the larger of 21 bits, adds and shifts. A factor is off by half at most, which
    times the largest codes must be less than how near a sum comes to a threshold between two codes.
    """
    factors = [grid.scale / out.scale for grid in inputs]
    if not all(2.0**-10 <= factor < 2.0**8 for factor in factors):  # XNNPACK takes no others
        return False
    codes = [np.arange(grid.low, 128) - grid.zero_point for grid in inputs]
    sums = np.add.outer(*(factor * own for factor, own in zip(factors, codes)))
    off = sum(np.abs(own).max() for own in codes) / 2.0 ** (ADD_BITS - math.frexp(max(factors))[1] + 1)
    return bool(np.abs(sums - np.floor(sums) - 0.5).min() > off)
