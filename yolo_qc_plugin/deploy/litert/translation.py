# yolo_qc_plugin, AGPL-3.0
"""What every ONNX node's translation needs: constants, tensors in the right order, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...config import QCError
from ..nodes import attributes, links
from .flatbuffer import Flatbuffer, Grid
from .layout import NHWC, POINTS, Geometry, Tensor, is_depthwise, regrouped

OPSET = 18  # of the ONNX graphs that are translated


class Translation:
    """ONNX tensors as tensors of a LiteRT file, made when they are asked for.

    Args:
        graph: ONNX, with fixed axes.
        file: To write to.

    Attributes:
        sources: ONNX tensor -> the node that writes it.
    """

    def __init__(self, graph, file: Flatbuffer):
        from onnx import numpy_helper

        self.graph, self.file = graph, file
        self.sources, _ = links(graph)
        self._constants: dict[str, np.ndarray] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self._arranged: dict[tuple, Tensor] = {}
        self._cuts: dict[tuple, Tensor] = {}

    def value(self, name: str) -> Tensor:
        """FLOAT32 values of an ONNX tensor."""
        raise NotImplementedError

    def constant(self, name: str) -> np.ndarray | None:
        """An ONNX tensor that depends on no input, or None."""
        if name not in self._constants:
            node = self.sources.get(name)
            if node is None:
                return None
            if node.op_type == "Shape":
                self._constants[name] = np.array(self.value(node.input[0]).shape, np.int64)
            elif not node.domain and all(not i or self.constant(i) is not None for i in node.input):
                self._constants.update(zip(node.output, _evaluated(node, [self._constants.get(i) for i in node.input])))
            else:
                return None
        return self._constants[name]

    def given(self, node, place: int) -> np.ndarray:
        """An input of a node that must be a constant.

        Raises:
            QCError: If it is none.
        """
        found = self.constant(node.input[place]) if len(node.input) > place else None
        if found is None:
            raise unknown(node, "of what is computed")
        return found

    def new(self, name: str, shape: Sequence[int], order: Sequence[int] | None = None, grid: Grid | None = None):
        """A tensor that is computed, its axes in ONNX's order by default."""
        shape, order = tuple(map(int, shape)), tuple(range(len(shape)) if order is None else order)
        return Tensor(self.file.tensor(name, [shape[a] for a in order], grid), shape, order, grid)

    def arranged(self, x: Tensor, order: Sequence[int] | None = None) -> Tensor:
        """The tensor with its axes in another order, ONNX's by default."""
        order = tuple(range(len(x.shape)) if order is None else order)
        if x.order == order:
            return x
        key = x.index, x.order, order  # views of one tensor differ in their order
        if key not in self._arranged:
            out = self.new(self.name_of(x), x.shape, order, x.grid)
            permutation = self.file.constant("order", np.array([x.order.index(a) for a in order], np.int32))
            self.file.add("TRANSPOSE", [x.index, permutation], out.index, "TransposeOptions")
            self._arranged[key] = out
        return self._arranged[key]

    def alike(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of equal rank in the order of the first."""
        return [self.arranged(x, tensors[0].order) for x in tensors]

    def name_of(self, x: Tensor) -> str:
        """A tensor's name."""
        return self.file.graph.tensors[x.index].name

    def like(self, op: str, inputs: Sequence[int], x: Tensor, name: str, options: str = "", **values) -> Tensor:
        """An operator whose output has the shape and the order of `x`, as values."""
        out = self.new(name, x.shape, x.order)
        self.file.add(op, inputs, out.index, options, **values)
        return out

    def cut(self, name: str, x: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
        """A part of a tensor."""
        key = x.index, x.order, *begin, *size
        if key not in self._cuts:
            out = self._cuts[key] = self.new(name, size, x.order, x.grid)
            window = [np.array([v[a] for a in x.order], np.int32) for v in (begin, size)]
            constants = [self.file.constant(k, v) for k, v in zip(("begin", "size"), window)]
            self.file.add("SLICE", [x.index, *constants], out.index, "SliceOptions")
        return self._cuts[key]

    def reshaped(self, name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of another shape, where -1 stands for what is left."""
        rest = math.prod(x.shape) // math.prod(n for n in shape if n > 0)
        shape = [rest if n < 0 else n for n in shape]
        order: Sequence[int] | None = regrouped(x, shape)
        if order is None:
            x, order = self.arranged(x), range(len(shape))
        out = self.new(name, shape, order, x.grid)
        target = self.file.constant("shape", np.array(out.placed, np.int32))
        self.file.add("RESHAPE", [x.index, target], out.index, "ReshapeOptions", newShape=out.placed)
        return out

    def convolve(
        self,
        x: Tensor,
        weight: int,
        bias: int,
        geometry: Geometry,
        groups: int,
        name: str,
        grid: Grid | None = None,
    ) -> Tensor:
        """CONV_2D or DEPTHWISE_CONV_2D.

        Args:
            x: Values, or codes.
            weight: As `layout.as_filter` arranges it.
            bias: FLOAT32, or INT32.
            geometry: Of the convolution.
            groups: Of the convolution; as many as channels makes it a depthwise one.
            name: Of the output.
            grid: Of its codes, if it has any.
        """
        channels = self.file.graph.tensors[bias].shape[0]
        if x.grid or not geometry.is_point or x.order not in POINTS:
            x = self.arranged(x, NHWC)
        x, padding, sides = self._padded(x, geometry, 0.0)
        out = self.new(name, (x.shape[0], channels, *sides), x.order, grid)
        options = dict(
            padding=padding,
            strideH=geometry.stride[0],
            strideW=geometry.stride[1],
            dilationHFactor=geometry.dilation[0],
            dilationWFactor=geometry.dilation[1],
        )
        op, kind = "CONV_2D", "Conv2DOptions"
        if is_depthwise(groups, x.shape[1]):
            op, kind, options["depthMultiplier"] = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", channels // groups
        self.file.add(op, [x.index, weight, bias], out.index, kind, **options)
        return out

    def pooled(self, op: str, node, name: str, x: Tensor) -> Tensor:
        """MAX_POOL_2D or AVERAGE_POOL_2D as an ONNX node's attributes have it."""
        a = attributes(node)
        geometry = Geometry.of(a)
        averaged = op == "AVERAGE_POOL_2D" and any(geometry.pads)
        if a.get("ceil_mode") or geometry.dilation != (1, 1) or averaged:
            raise unknown(node, "with ceil_mode, dilation or padding of an average")
        x, padding, sides = self._padded(self.arranged(x, NHWC), geometry, -math.inf)
        out = self.new(name, (*x.shape[:2], *sides), NHWC, x.grid)
        options = dict(
            padding=padding,
            strideH=geometry.stride[0],
            strideW=geometry.stride[1],
            filterHeight=geometry.kernel[0],
            filterWidth=geometry.kernel[1],
        )
        self.file.add(op, [x.index], out.index, "Pool2DOptions", **options)
        return out

    def _padded(self, x: Tensor, geometry: Geometry, value: float) -> tuple[Tensor, int, tuple[int, ...]]:
        """The input of a window, LiteRT's padding of it, and the output's height and width."""
        sides = geometry.sides(*x.shape[2:])
        if geometry.is_same(*x.shape[2:]):
            return x, self.padding("SAME"), sides
        if any(geometry.pads):
            top, left, bottom, right = geometry.pads
            shape = (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
            out = self.new(f"{self.name_of(x)}_padded", shape, NHWC, x.grid)
            pads = self.file.constant("pads", np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
            if value == 0:
                self.file.add("PAD", [x.index, pads], out.index, "PadOptions")
            else:
                filling = self.lowest(x.grid, -128, f"{self.name_of(x)}_filling")
                self.file.add("PADV2", [x.index, pads, filling], out.index, "PadV2Options")
            x = out
        return x, self.padding("VALID"), sides

    def lowest(self, grid: Grid | None, code: int, name: str) -> int:
        """A constant: a code of a grid, or the lowest number where there is no grid."""
        if grid is None:
            return self.file.constant(name, np.array([np.finfo(np.float32).min]))
        return self.file.constant(name, np.array([code], np.int8), scale=[grid.scale], zero_point=grid.zero_point)

    def padding(self, name: str) -> int:
        """SAME or VALID, as the schema numbers it."""
        return getattr(self.file.schema.Padding, name)


def unknown(node, how: str = "") -> QCError:
    """The refusal of a node."""
    what = " ".join(filter(None, [node.op_type, how, f"({node.name})"]))
    return QCError(f"QC: format=litert cannot carry {what} of this model; accepted: format=onnx.")


def _evaluated(node, inputs: Sequence[np.ndarray | None]) -> Any:
    """The outputs of an ONNX node of constants."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    feeds = {n: v for n, v in zip(node.input, inputs) if v is not None}
    kinds = {n: helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in feeds.items()}
    infos = [helper.make_tensor_value_info(n, kinds[n], v.shape) for n, v in feeds.items()]
    graph = helper.make_graph([node], "constant", infos, [helper.make_empty_tensor_value_info(o) for o in node.output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model).run(None, feeds)
