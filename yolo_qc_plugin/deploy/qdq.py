# yolo_qc_plugin, AGPL-3.0
"""The ONNX graph of a deployed model: integer weights, QuantizeLinear and DequantizeLinear.

Every convolution reads Q -> DQ of its input and DQ of its integer weight, with one scale per output channel. `kinds`
lists the kinds of such graphs; packed ones are written as int8 here, and `pack` comes later. Where a convolution's
output is quantized too, runtimes fuse Q/DQ and convolution into one integer convolution; its bias is INT32 for that.

OpenVINO fuses what is elementwise behind a convolution into it, but takes Q -> DQ there apart. In its kind the grid of
an output is a product, a Round, a Clip and a product: the same values, as its step is a power of two. And what only
moves values moves codes there, where quantizers of one grid read all that it moves: they are then computed within the
convolution before it, in place of in a pass of their own behind it. (ONNX Runtime wants a quantizer there.)

Activation codes of a grid narrower than its container are shifted to the container's top (4 bits in UINT8: 240 to 255),
so that saturation cuts off values above the grid. A Max before Q cuts off those below. It is left out where the input
cannot be that low: SiLU is never below -0.281, LeakyReLU never below its slope times the lowest code's value.

Weights are signed and symmetric, in INT8; those with codes beyond +-64 in UINT8 with a zero point of 128. On processors
without VNNI, runtimes add the products of UINT8 activations and INT8 weights in pairs of 16 bits, which 2 * 255 * 65
overflows; with UINT8 weights they compute exactly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .fold import DeployedConv2d
from .nodes import attributes, moves
from .rewrite import Rewriter
from .trace import CONVOLVE, DOMAIN, QUANTIZE

PAIRED = 64  # the largest code of a weight for which the sum of two products with UINT8 codes fits into 16 bits


class QDQ(Rewriter):
    """The kinds of QuantizeLinear and DequantizeLinear."""

    def __init__(self, *args):
        super().__init__(*args)
        self.act_scale: dict[str, float] = {}  # fake-quantized tensor -> scale
        self.given = {out.name for out in self.graph.output}
        self.unsigned: set[str] = set()  # layers
        self.clips = 0

    def summary(self) -> str:
        """What of the graph a user of runtimes wants to know."""
        unsigned = f", {len(self.unsigned)} of them with UINT8 weights, which OpenVINO computes in float"
        return (
            f"{len(self.layers)} integer convolutions ({self.kind}){unsigned if self.unsigned else ''}; "
            f"{self.clips} of {self.quantizers} quantizers bounded"
        )

    def grid(self, node, a: dict) -> tuple:
        """What tells quantizers of one tensor apart: the container too."""
        return *super().grid(node, a), self._is_narrow(node, a)

    def _is_narrow(self, node, a: dict) -> bool:
        """Whether the codes have a 4-bit container."""
        # ONNX Runtime fuses a convolution of INT8 weights between 4-bit codes, and a MaxPool before such, into nodes
        # that it then refuses
        beside = [*self.readers.get(node.output[0], []), *filter(None, [self.sources.get(node.input[0])])]
        wide = any((n.op_type == CONVOLVE and self.layer(n).bits > 4) or n.op_type == "MaxPool" for n in beside)
        return self.kind == "int4" and a["quant_max"] - a["quant_min"] < 16 and not wide

    def keep(self, node) -> None:
        """Write a node that tracing did not mark."""
        if self.kind == "openvino" and moves(node):
            grids = self._grids_behind(node)
            if len(grids) == 1 and (grid := dict(grids.pop())):
                self._move_codes(node, grid)
        super().keep(node)

    def _grids_behind(self, node) -> set[tuple]:
        """The grids on which a node's outputs are read, also through others that move them; () for values."""
        found: set[tuple] = {() for out in node.output if out in self.given}
        for reader in (n for out in node.output for n in self.readers.get(out, [])):
            if moves(reader):
                found |= self._grids_behind(reader)
            else:
                found.add(tuple(attributes(reader).items()) if reader.op_type == QUANTIZE else ())
        return found

    def _move_codes(self, node, a: dict) -> None:
        """Quantize what a node moves, so that its outputs are quantized."""
        grid = self.grid(node, a)
        for i, x in enumerate(node.input if node.op_type == "Concat" else node.input[:1]):
            write = partial(self._quantize_at_the_top, f"{node.output[0]}_of_{i}", x, a, narrow=False)
            node.input[i] = self.once(x, grid, write)
        for out in node.output:
            self._quantized[out, grid] = out
            self.act_scale[out] = a["scale"]

    def quantize(self, name: str, node, a: dict) -> str:
        """Q -> DQ in a container, behind what bounds the values where the container is wider."""
        self.act_scale[name] = a["scale"]
        if self.kind == "tensorrt":
            return self._quantize_symmetric(name, node.input[0], a)
        if self.kind == "openvino" and self._is_of_output(node):
            return self._round(name, node.input[0], a)
        return self._quantize_at_the_top(name, node.input[0], a, self._is_narrow(node, a))

    def _quantize_at_the_top(self, name: str, x: str, a: dict, narrow: bool) -> str:
        """Codes moved to the top of an unsigned container, and a Max where it is wider below."""
        from onnx import TensorProto

        top, low = 15 if narrow else 255, (a["quant_min"] - a["zero_point"]) * a["scale"]
        shift = top - a["quant_max"]
        if a["quant_min"] + shift > 0 and self.bounds.of(x) < low - 0.5 * a["scale"]:
            bound = self.writer.constant(f"{name}_low", low)
            # Max, not Clip: ONNX Runtime 1.32 fails where it fuses a Clip with a 4-bit QuantizeLinear
            self.writer.add("Max", [x, bound], f"{name}_clipped")
            x, self.clips = f"{name}_clipped", self.clips + 1
        container = TensorProto.UINT4 if narrow else TensorProto.UINT8
        return self._write_pair(name, x, a["scale"], a["zero_point"] + shift, container)

    def _is_of_output(self, node) -> bool:
        """Whether the grid is a convolution's output's, and no convolution's input too."""
        source = self.sources.get(node.input[0])
        readers = self.readers.get(node.output[0], [])
        return source is not None and source.op_type == CONVOLVE and all(n.op_type != CONVOLVE for n in readers)

    def _round(self, name: str, x: str, a: dict) -> str:
        """Whole steps from 0 in floats, within the grid's bounds."""
        numbers = {"per_step": 1 / a["scale"], "step": a["scale"]}
        numbers |= {"low": a["quant_min"] - a["zero_point"], "high": a["quant_max"] - a["zero_point"]}
        per_step, step, *bounds = (self.writer.constant(f"{name}_{key}", value) for key, value in numbers.items())
        self.writer.add("Mul", [x, per_step], f"{name}_position")
        self.writer.add("Round", [f"{name}_position"], f"{name}_rounded")
        self.writer.add("Clip", [f"{name}_rounded", *bounds], f"{name}_codes")
        self.writer.add("Mul", [f"{name}_codes", step], name)
        return name

    def _quantize_symmetric(self, name: str, x: str, a: dict) -> str:
        """Codes around 0 in INT8, behind a Clip to the grid where that is narrower."""
        from onnx import TensorProto

        low, high = a["quant_min"] - a["zero_point"], a["quant_max"] - a["zero_point"]
        if (low, high) != (-128, 127):
            bounds = [self.writer.constant(f"{name}_{k}", v * a["scale"]) for k, v in (("low", low), ("high", high))]
            self.writer.add("Clip", [x, *bounds], f"{name}_clipped")
            x, self.clips = f"{name}_clipped", self.clips + 1
        return self._write_pair(name, x, a["scale"], 0, TensorProto.INT8)

    def _write_pair(self, name: str, x: str, scale: float, zero_point: int, container: int) -> str:
        grid = [
            self.writer.constant(f"{name}_scale", scale),
            self.writer.constant(f"{name}_zero_point", zero_point, container),
        ]
        self.writer.add("QuantizeLinear", [x, *grid], f"{name}_codes")
        self.writer.add("DequantizeLinear", [f"{name}_codes", *grid], name)
        return name

    def convolve(self, node, layer: DeployedConv2d) -> None:
        """A convolution of dequantized integers."""
        out, x = node.output[0], node.input[0]
        scale, sign = self._weight(layer)
        weight = self.writer.dequantize(f"{layer.name}.weight")
        attributes, shift = self.geometry(layer), layer.shift.detach().float()
        if sign is None:
            bias = self._bias(layer.name, shift, self.act_scale[x] * scale, fused=self._output_quantized(out))
            self.writer.add("Conv", [x, weight, bias], out, **attributes)
            return
        # codes that cannot be negated in their container: the sign is multiplied behind the convolution
        self.writer.add("Conv", [x, weight], f"{out}_unsigned", **attributes)
        self.writer.constant(f"{layer.name}.sign", sign.float().view(-1, 1, 1))
        self.writer.constant(f"{layer.name}.bias", shift.view(-1, 1, 1))
        self.writer.add("Mul", [f"{out}_unsigned", f"{layer.name}.sign"], f"{out}_signed")
        self.writer.add("Add", [f"{out}_signed", f"{layer.name}.bias"], out)

    def _weight(self, layer: DeployedConv2d) -> tuple[Any, Any]:
        """Write a weight's codes and scale; returns the scale and the sign (see `positive_scale`)."""
        from onnx import TensorProto

        narrow = self.kind == "int4" and layer.bits <= 4
        codes, scale, sign = layer.positive_scale(*((-8, 7) if narrow else (-128, 127)))
        scale = scale.float()
        kind = TensorProto.INT4 if narrow else TensorProto.INT8
        if codes.abs().max() > PAIRED and self.kind != "tensorrt":
            kind, codes = TensorProto.UINT8, codes + 128
            self.unsigned.add(layer.name)
            self.writer.constant(f"{layer.name}.weight_zero_point", torch.full_like(scale, 128), kind)
        self.writer.constant(f"{layer.name}.weight_codes", codes, kind)
        self.writer.constant(f"{layer.name}.weight_scale", scale)
        return scale, sign

    def _bias(self, layer_name: str, shift, unit, fused: bool) -> str:
        """The bias, in whole units of the integer sums where runtimes fuse the convolution, else as floats."""
        from onnx import TensorProto

        if self.kind in {"int4", "tensorrt"} or not fused:
            return self.writer.constant(f"{layer_name}.bias", shift)
        units = (shift.double() / unit.double()).round()
        self.writer.constant(f"{layer_name}.bias_codes", units.long(), TensorProto.INT32)
        self.writer.constant(f"{layer_name}.bias_scale", unit)
        return self.writer.dequantize(f"{layer_name}.bias")

    def _output_quantized(self, name: str) -> bool:
        readers = self.readers.get(name, [])
        return bool(readers) and all(n.domain == DOMAIN and n.op_type == QUANTIZE for n in readers)
