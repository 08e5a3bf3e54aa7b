# yolo_qc_plugin, AGPL-3.0
"""The QONNX graph of a deployed model: `Quant` nodes of the true widths, for the tools of FPGAs (FINN, hls4ml).

Quant(x, scale, zero point, width) is scale * (clip(round(x / scale + zero point), low, high) - zero point), with low
and high of that many bits. Weights are floats, code * scale, with such a node behind them, whose codes are the trained
ones.
https://github.com/fastmachinelearning/qonnx/blob/main/docs/qonnx-custom-ops/quant_op.md
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from .fold import DeployedConv2d
from .rewrite import Rewriter

QONNX_DOMAIN = "qonnx.custom_op.general"


class QONNX(Rewriter):
    """The qonnx kind."""

    moved = 0  # zero points other than 0

    def quantize(self, name: str, node, a: dict) -> str:
        """One Quant, unsigned where no code is negative."""
        self.moved += a["zero_point"] != 0
        bits = (a["quant_max"] - a["quant_min"]).bit_length()
        self._quant(node.input[0], name, a["scale"], a["zero_point"], bits, signed=a["quant_min"] < 0)
        return name

    def convolve(self, node, layer: DeployedConv2d) -> None:
        """Quant of the weight, one scale per output channel, then Conv with a float bias."""
        codes, scale = self._codes(layer)
        weight = f"{layer.name}.weight"
        by_channel = scale.view(-1, 1, 1, 1)
        if f"{weight}_float" not in self.writer:  # a layer that the model runs twice has one weight
            self.writer.constant(f"{weight}_float", codes * by_channel)
            self._quant(f"{weight}_float", weight, by_channel, 0.0, layer.bits, signed=True)
        bias = self.writer.constant(f"{layer.name}.bias", layer.shift.detach().float())
        self.writer.add("Conv", [node.input[0], weight, bias], node.output[0], **self.geometry(layer))

    def summary(self) -> str:
        """Layers by width of weight and input."""
        widths = sorted({(m.bits, m.act_quant.bits) for m in self.layers.values()})
        zero_points = (
            f"; {self.moved} zero points other than 0, which FINN refuses: train with callbacks=qc qc_target=fpga"
        )
        return (
            f"{len(self.layers)} convolutions (qonnx) of {', '.join(f'W{w}A{a}' for w, a in widths)}"
            f"{zero_points if self.moved else ''}"
        )

    def _quant(self, x: str, name: str, scale, zero_point: float, bits: int, signed: bool) -> None:
        grid = [
            self.writer.constant(f"{name}_scale", scale),
            self.writer.constant(f"{name}_zero_point", zero_point),
            self.writer.constant(f"{name}_bits", float(bits)),
        ]
        attributes = dict(signed=int(signed), narrow=0, rounding_mode="ROUND")
        self.writer.add("Quant", [x, *grid], name, domain=QONNX_DOMAIN, **attributes)

    @staticmethod
    def _codes(layer: DeployedConv2d) -> tuple[Tensor, Tensor]:
        """Codes and scale; a scale is negative where a negated code would not fit the width."""
        half = 2 ** (layer.bits - 1)
        codes, scale, sign = layer.positive_scale(-half, half - 1)
        return codes.float(), (scale if sign is None else scale * sign).detach().float()


def write_shapes(file: str | Path) -> None:
    """Write the type and shape of every tensor into a file of the qonnx kind, in place: tools that read it ask that.

    They are those of a run, with an Identity for each Quant: inference by rules ends at nodes that it does not know,
    and where sizes are computed.
    """
    import onnx
    import onnxruntime

    model, plain = onnx.load(file), onnx.load(file)
    for node in (n for n in plain.graph.node if n.op_type == "Quant"):
        node.CopyFrom(onnx.helper.make_node("Identity", [node.input[0]], node.output, name=node.name))
    given = {o.name for o in plain.graph.output}
    names = [name for n in plain.graph.node for name in n.output if name and name not in given]
    plain.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    image = plain.graph.input[0]
    zeros = np.zeros([d.dim_value for d in image.type.tensor_type.shape.dim], np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = onnx.helper.np_dtype_to_tensor_dtype
    del model.graph.value_info[:]
    for name, value in zip(names, session.run(names, {image.name: zeros})):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, types(value.dtype), value.shape))
    onnx.save(model, file)
