# yolo_qc_plugin, AGPL-3.0
"""The ONNX graph of a deployed model: integer weights, QuantizeLinear and DequantizeLinear.

Every convolution reads Q -> DQ of its input and DQ of its integer weight, with one scale per output channel. Two kinds:

    int8  8-bit containers. Where a convolution's output is quantized too, runtimes fuse Q/DQ and convolution into one
          integer convolution; its bias is INT32 for that.
    int4  4-bit containers (opset 21) for weights and activations of up to 4 bits, 8-bit ones for the rest.

Activation codes of a grid narrower than its container are shifted to the container's top (4 bits in UINT8: 240 to 255),
so that saturation cuts off values above the grid. A Max before Q cuts off those below. It is left out where the input
cannot be that low: SiLU is never below -0.281, LeakyReLU never below its slope times the lowest code's value.

Weights are signed and symmetric, in INT8; those with codes beyond +-64 in UINT8 with a zero point of 128. On processors
without VNNI, runtimes add the products of UINT8 activations and INT8 weights in pairs of 16 bits, which 2 * 255 * 65
overflows; with UINT8 weights they compute exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..config import QCError
from .bounds import LowerBounds
from .fold import DeployedConv2d
from .nodes import Writer, links
from .trace import CONVOLVE, DOMAIN, QUANTIZE

ONNX_KINDS = ("int8", "int4")
INT4_OPSET = 21  # the first with 4-bit types
MIN_OPSET = {"int8": 13, "int4": 18}  # per-channel DequantizeLinear; nodes that mean the same in opset 21
PAIRED = 64  # the largest code of a weight for which the sum of two products with UINT8 codes fits into 16 bits


def write_qdq(file: str | Path, layers: Mapping[str, DeployedConv2d], kind: str) -> str:
    """Replace what tracing marked in an ONNX file by the integer graph, in place.

    Args:
        file: Written by torch.onnx.export of a deployed model.
        layers: Its convolutions by name.
        kind: One of ONNX_KINDS.

    Returns:
        One line that says what was written.

    Raises:
        QCError: From `check_kind`.
    """
    import onnx

    model = onnx.load(file)
    opset = next(o.version for o in model.opset_import if not o.domain)
    check_kind(kind, opset)
    graph = _Graph(model.graph, layers, kind)
    graph.rewrite()
    standard = [o for o in model.opset_import if o.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    if kind == "int4" and opset < INT4_OPSET:
        # opsets 19 to 21 added types and attributes to the nodes of our traces, and changed no meaning
        next(o for o in model.opset_import if not o.domain).version = INT4_OPSET
        model.ir_version = max(model.ir_version, 10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    unsigned = f"{len(graph.unsigned)} of them with UINT8 weights, which OpenVINO computes in float"
    return (
        f"{len(layers)} integer convolutions ({kind}), {unsigned}; "
        f"{graph.clips} of {graph.quantizers} quantizers bounded"
    )


def check_kind(kind: str, opset: int = INT4_OPSET) -> None:
    """Refuse an unknown kind, or an opset below that which the kind needs.

    Raises:
        QCError: Naming what is accepted.
    """
    if kind not in ONNX_KINDS:
        raise QCError(f"QC: onnx={kind!r} is not accepted; give {' or '.join(map(repr, ONNX_KINDS))}.")
    if opset < MIN_OPSET[kind]:
        raise QCError(f"QC: opset={opset} is too old for the {kind} kind; accepted: {MIN_OPSET[kind]} and later.")


class _Graph:
    """A graph being rewritten."""

    def __init__(self, graph, layers: Mapping[str, DeployedConv2d], kind: str):
        self.graph, self.layers, self.kind = graph, layers, kind
        self.writer = Writer(graph)
        self.sources, self.readers = links(graph)
        self.bounds = LowerBounds(self.sources)
        self.act_scale: dict[str, float] = {}  # fake-quantized tensor -> scale
        self.quantized: dict[tuple, str] = {}  # (tensor, grid) -> fake-quantized tensor, shared by all who read it
        self.renamed: dict[str, str] = {}
        self.unsigned: set[str] = set()  # layers
        self.quantizers = self.clips = 0

    def rewrite(self) -> None:
        """Replace every marker, in order."""
        for node in list(self.graph.node):
            for i, name in enumerate(node.input):
                node.input[i] = self.renamed.get(name, name)
            if node.domain != DOMAIN:
                self.writer.nodes.append(node)
            elif node.op_type == QUANTIZE:
                self.renamed[node.output[0]] = self._quantize(node)
            else:
                self._convolve(node)
        stale = {v.name: v for v in self.graph.value_info}
        del self.graph.node[:]
        self.graph.node.extend(self.writer.nodes)
        written = {out for n in self.writer.nodes for out in n.output}
        del self.graph.value_info[:]
        self.graph.value_info.extend(v for name, v in stale.items() if name in written)

    def _quantize(self, node) -> str:
        """Q -> DQ in a container, and a Max where the container is wider below; the output's name."""
        from onnx import TensorProto, helper

        x = node.input[0]
        a = {p.name: helper.get_attribute_value(p) for p in node.attribute}
        scale, low, high = a["scale"], a["quant_min"], a["quant_max"]
        # ONNX Runtime fuses a convolution of INT8 weights between 4-bit codes, and a MaxPool before such, into nodes
        # that it then refuses
        beside = [*self.readers.get(node.output[0], []), *filter(None, [self.sources.get(node.input[0])])]
        wide = any((n.op_type == CONVOLVE and self._layer(n).bits > 4) or n.op_type == "MaxPool" for n in beside)
        narrow = self.kind == "int4" and high - low < 16 and not wide
        key = (x, scale, low, high, a["zero_point"], narrow)
        if key in self.quantized:
            return self.quantized[key]
        top = 15 if narrow else 255
        shift = top - high  # codes move to the container's top
        name = node.output[0]
        self.quantizers += 1
        if low + shift > 0 and self.bounds.of(x) < (low - a["zero_point"] - 0.5) * scale:
            bound = self.writer.constant(f"{name}_low", (low - a["zero_point"]) * scale)
            # Max, not Clip: ONNX Runtime 1.32 fails where it fuses a Clip with a 4-bit QuantizeLinear
            self.writer.add("Max", [x, bound], f"{name}_clipped")
            x, self.clips = f"{name}_clipped", self.clips + 1
        container = TensorProto.UINT4 if narrow else TensorProto.UINT8
        grid = [
            self.writer.constant(f"{name}_scale", scale),
            self.writer.constant(f"{name}_zero_point", a["zero_point"] + shift, container),
        ]
        self.writer.add("QuantizeLinear", [x, *grid], f"{name}_codes")
        self.writer.add("DequantizeLinear", [f"{name}_codes", *grid], name)
        self.act_scale[name], self.quantized[key] = scale, name
        return name

    def _layer(self, node) -> DeployedConv2d:
        return self.layers[node.attribute[0].s.decode()]

    def _convolve(self, node) -> None:
        """A convolution of dequantized integers."""
        from onnx import TensorProto

        layer, out, x = self._layer(node), node.output[0], node.input[0]
        layer_name = layer.name
        narrow = self.kind == "int4" and layer.bits <= 4
        codes, scale, sign = layer.positive_scale(*((-8, 7) if narrow else (-128, 127)))
        scale = scale.float()
        kind = TensorProto.INT4 if narrow else TensorProto.INT8
        if codes.abs().max() > PAIRED:
            kind, codes = TensorProto.UINT8, codes + 128
            self.unsigned.add(layer_name)
            self.writer.constant(f"{layer_name}.weight_zero_point", torch.full_like(scale, 128), kind)
        self.writer.constant(f"{layer_name}.weight_codes", codes, kind)
        self.writer.constant(f"{layer_name}.weight_scale", scale)
        weight = self.writer.dequantize(f"{layer_name}.weight")

        attributes = dict(
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=layer.pads,
            dilations=list(layer.dilation),
            group=layer.groups,
        )
        shift = layer.shift.detach().float()
        if sign is None:
            bias = self._bias(layer_name, shift, self.act_scale[x] * scale, fused=self._output_quantized(out))
            self.writer.add("Conv", [x, weight, bias], out, **attributes)
            return
        # codes that cannot be negated in their container: the sign is multiplied behind the convolution
        self.writer.add("Conv", [x, weight], f"{out}_unsigned", **attributes)
        self.writer.constant(f"{layer_name}.sign", sign.float().view(-1, 1, 1))
        self.writer.constant(f"{layer_name}.bias", shift.view(-1, 1, 1))
        self.writer.add("Mul", [f"{out}_unsigned", f"{layer_name}.sign"], f"{out}_signed")
        self.writer.add("Add", [f"{out}_signed", f"{layer_name}.bias"], out)

    def _bias(self, layer_name: str, shift, unit, fused: bool) -> str:
        """The bias, in whole units of the integer sums where runtimes fuse the convolution, else as floats."""
        from onnx import TensorProto

        if self.kind != "int8" or not fused:
            return self.writer.constant(f"{layer_name}.bias", shift)
        units = (shift.double() / unit.double()).round()
        self.writer.constant(f"{layer_name}.bias_codes", units.long(), TensorProto.INT32)
        self.writer.constant(f"{layer_name}.bias_scale", unit)
        return self.writer.dequantize(f"{layer_name}.bias")

    def _output_quantized(self, name: str) -> bool:
        readers = self.readers.get(name, [])
        return bool(readers) and all(n.domain == DOMAIN and n.op_type == QUANTIZE for n in readers)
