# yolo_qc_plugin, AGPL-3.0
"""The ONNX files: the checkpoint's integers, every layer's exact values in ONNX Runtime, the host's export options.

Runtimes are judged layer by layer: PyTorch's layers get the codes that ONNX Runtime computed. End to end no two float
implementations agree, because a value at a rounding threshold moves by a step and what follows moves with it.
"""

import copy
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_deploy import DOUBLE, build, correct, deviation, images, layer, randomize, with_codes
from torch import nn
from ultralytics import YOLO, cfg
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks, host
from yolo_qc_plugin.checkpoint import QuantRecord
from yolo_qc_plugin.cli import wrap_entrypoint
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy import deployed_convs
from yolo_qc_plugin.inject import calibrate, calibrate_outputs, inject, quantize_outputs
from yolo_qc_plugin.layers import quant_convs
from yolo_qc_plugin.qdq import ONNX_KINDS, write_qdq

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

# A layer's deviation from the exact value, relative to the sum of its terms' magnitudes: some 16 roundings of FP32,
# for sums of up to 2,000 terms in an order of the runtime's choice.
LAYER = 1e-6

# What lies between two layers (SiLU, additions, attention) deviates by 1e-6 of values of up to some hundred steps; so
# far from a rounding threshold, in steps, a code may be either neighbour.
NEAR = 1e-3

# The decoded output behind equal layers, relative to the largest: a softmax, a sum and a product.
DECODED = 1e-5


def session(model, optimised=True, **options):
    """A session on one core, with 16-bit sums not saturating on processors that lack VNNI."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level, chosen.intra_op_num_threads = 3, 1
    chosen.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in options.items():
        setattr(chosen, key, value)
    return ort.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])


def run(model, x, optimised=True, tensors=()):
    """The graph's outputs, and a dict of the named inner tensors."""
    model = copy.deepcopy(model)
    shown = [n for n in dict.fromkeys(tensors) if n not in {o.name for o in model.graph.output}]
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for n in shown:
        name = n
        if types[n] == onnx.TensorProto.UINT4:  # has no NumPy type in ONNX Runtime
            name = f"{n}_shown"
            model.graph.node.append(onnx.helper.make_node("Cast", [n], [name], to=onnx.TensorProto.UINT8))
        kind = onnx.TensorProto.UINT8 if name != n else types[n]
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    values = session(model, optimised).run(None, {model.graph.input[0].name: x.numpy()})
    count = len(values) - len(shown)
    return values[:count], {n: torch.from_numpy(v) for n, v in zip(shown, values[count:])}


class Graph:
    """What an ONNX file says of its quantized convolutions, read from its nodes.

    Attributes:
        values: Initializer name -> array.
        inputs: Layer name -> tensor of its input's codes, their scale and zero point.
        outputs: Layer name -> tensor of what it gives, and its grid: (codes, scale, zero point, lowest, highest) where
            a quantizer alone reads it, else None.
    """

    def __init__(self, model):
        self.model = model
        self.values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        sources = {out: n for n in model.graph.node for out in n.output}
        readers = {}
        for n in model.graph.node:
            for name in n.input:
                readers.setdefault(name, []).append(n)
        self.inputs, self.outputs, self.float_convs = {}, {}, 0
        for conv in (n for n in model.graph.node if n.op_type == "Conv"):
            weight, x = sources.get(conv.input[1]), sources.get(conv.input[0])
            if weight is None or weight.op_type != "DequantizeLinear":
                self.float_convs += 1
                continue
            name = weight.input[0].removesuffix(".weight_codes")
            assert x.op_type == "DequantizeLinear" and sources[x.input[0]].op_type == "QuantizeLinear"
            assert list(sources[x.input[0]].input[1:]) == list(x.input[1:])
            self.inputs[name] = x.input[0], *self._grid(x)
            out = conv.output[0]
            if f"{name}.sign" in self.values:
                for op in ("Mul", "Add"):
                    (n,) = readers[out]
                    assert n.op_type == op
                    out = n.output[0]
            self.outputs[name] = out, None
            after, low = readers.get(out, []), None
            if len(after) == 1 and after[0].op_type == "Clip":
                low, after = float(self.values[after[0].input[1]]), readers[after[0].output[0]]
            if len(after) == 1 and after[0].op_type == "QuantizeLinear":
                scale, zero_point = self._grid(after[0])
                top = 15 if self.values[after[0].input[2]].dtype == onnx.helper.tensor_dtype_to_np_dtype(
                    onnx.TensorProto.UINT4
                ) else 255  # fmt: skip
                lowest = 0 if low is None else round(low / scale) + zero_point
                self.outputs[name] = out, (after[0].output[0], scale, zero_point, lowest, top)

    def _grid(self, node):
        return float(self.values[node.input[1]]), int(self.values[node.input[2]])

    def codes(self, name):
        return torch.from_numpy(self.values[f"{name}.weight_codes"].astype(np.int16))

    def tensors(self):
        """Names of the codes, and of outputs that are not quantized."""
        yield from (tensor for tensor, *_ in self.inputs.values())
        yield from (grid[0] if grid else tensor for tensor, grid in self.outputs.values())


def check_codes(theirs, position, slack, lowest, highest):
    """Codes (minus the zero point) must be the exact position's, whose rounding is open within the slack."""
    low, high = ((position + d).round().clamp(lowest, highest) for d in (-slack, slack))
    assert (low <= theirs).all() and (theirs <= high).all()
    assert (low == high).double().mean() > 0.9  # the slack does not excuse everything


def compare(file, model, x, optimised):
    """Judge every layer in ONNX Runtime against the deployed PyTorch model.

    Each layer gets the codes that ONNX Runtime gave it, in float64, where its sums and products are exact; what lies
    between the layers gets what ONNX Runtime's layers gave.

    Returns:
        The outputs of both: ONNX Runtime's first and PyTorch's.
    """
    graph = Graph(onnx.load(file))
    outputs, seen = run(graph.model, x, optimised, graph.tensors())
    reached = set()

    def before(m, args):
        tensor, scale, zero_point = graph.inputs[m.name]
        theirs = seen[tensor].double() - zero_point
        assert scale == pytest.approx(m.act_quant.scale, rel=1e-6)
        low, high = (bound - m.act_quant.zero_point for bound in (m.act_quant.quant_min, m.act_quant.quant_max))
        check_codes(theirs, args[0].double() / scale, NEAR, low, high)
        return (theirs * m.act_quant.scale,)

    def after(m, args, wanted):
        reached.add(m.name)
        steps, unit = args[0] / m.act_quant.scale, m.act_quant.scale * m.scale.double().abs().view(-1, 1, 1)
        terms = m.convolve(steps.abs(), m.weight_codes.abs().double()) * unit + m.shift.double().abs().view(-1, 1, 1)
        slack = LAYER * terms
        if f"{m.name}.bias_codes" in graph.values:
            slack = slack + unit / 2  # the bias is rounded to whole units
        tensor, grid = graph.outputs[m.name]
        if grid is None:
            assert ((seen[tensor].double() - wanted).abs() <= slack).all(), m.name
            return seen[tensor]
        tensor, scale, zero_point, lowest, highest = grid
        theirs = seen[tensor].double() - zero_point
        check_codes(theirs, wanted / scale, slack / scale, lowest - zero_point, highest - zero_point)
        return (theirs * scale).float()

    layers = deployed_convs(model)
    assert graph.inputs.keys() == layers.keys()
    hooks = [h for m in layers.values() for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        with torch.no_grad():
            mine = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    assert reached == layers.keys()
    return outputs[0], mine


# --- any stack of layers -----------------------------------------------------------------------------------------

ACTS = {"silu": nn.SiLU, "identity": nn.Identity, "leaky": lambda: nn.LeakyReLU(0.1)}


BLOCKS = st.fixed_dictionaries(dict(
    groups=st.sampled_from([1, 2, "depthwise"]), width=st.integers(2, 8), kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]), bias=st.booleans(), act=st.sampled_from(sorted(ACTS)), quantized=st.booleans(),
))  # fmt: skip
OPTIONS = st.fixed_dictionaries(dict(
    weight_bits=st.integers(2, 8), act_bits=st.integers(2, 8), per_channel=st.booleans(), act_offset=st.booleans(),
))  # fmt: skip
CORRECTIONS = st.sampled_from(["channel", "tensor", "off"])


def stack_of(blocks, options, output_bits, correction, seed):
    """A quantized and calibrated stack, and its input."""
    torch.manual_seed(seed)
    x = torch.randn(2, 2 * blocks[0]["width"], 9, 8)
    made, width = [], x.shape[1]
    for b in blocks:
        groups = width if b["groups"] == "depthwise" else b["groups"]
        out = width if b["groups"] == "depthwise" else 2 * b["width"]
        block = Conv(width, out, b["kernel"], b["stride"], g=groups, act=ACTS[b["act"]]())
        if b["bias"]:  # the host's blocks have none
            block.conv = nn.Conv2d(width, out, b["kernel"], b["stride"], b["kernel"] // 2, groups=groups)
        made, width = [*made, block], out
    stack = randomize(nn.Sequential(*made)).eval()
    inject(stack, QCConfig(**options))
    calibrate(stack, [x], stack, "lsq")
    quantize_outputs([block for block, b in zip(made, blocks) if b["quantized"]], output_bits)
    calibrate_outputs(stack, [x], stack)
    if correction != "off":
        correct(stack, correction == "channel")
    return stack, x


@given(st.lists(BLOCKS, min_size=1, max_size=3), OPTIONS, st.sampled_from([8, 8, 5, 4]), CORRECTIONS, st.integers(0, 99))
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
def test_three_forms_of_a_stack_agree(tmp_path_factory, blocks, options, output_bits, correction, seed):
    """Fake-quantized = deployed = ONNX of both kinds, with ONNX Runtime's optimisations and without."""
    stack, x = stack_of(blocks, options, output_bits, correction, seed)
    deployed, double = copy.deepcopy(stack), copy.deepcopy(stack).double()
    host.deploy_model(deployed)
    with torch.no_grad():
        wanted = double(x.double())
        host.deploy_model(double)
        assert deviation(double(x.double()), wanted) < DOUBLE

    file = tmp_path_factory.mktemp("stack") / "stack.onnx"
    torch.onnx.export(deployed, x, file, dynamo=False, opset_version=18)
    traced = file.read_bytes()
    for kind in ONNX_KINDS:
        file.write_bytes(traced)
        write_qdq(file, deployed_convs(deployed), kind)
        for optimised in (False, True):
            compare(file, deployed, x, optimised)
