# yolo_qc_plugin, AGPL-3.0
"""The ONNX files: the checkpoint's integers, every layer's exact values in ONNX Runtime, the host's export options.

Most tests judge layer by layer: PyTorch's layers get the codes that ONNX Runtime computed. That holds for models whose
outputs stay float too. With snapped outputs all codes agree end to end, in every runtime, which is a test of its own.
"""

import ast
import copy
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_fold import DOUBLE, build, correct, deviation, randomize, write_trained
from torch import nn
from ultralytics import YOLO, cfg
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import choose_onnx_kind
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.exported import RUNTIMES, ExportedONNX
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.deploy.graph import write_graph
from yolo_qc_plugin.deploy.pack import pack_weights, shorten_names
from yolo_qc_plugin.deploy.snap import snap
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.quant.calibrate import calibrate, calibrate_outputs
from yolo_qc_plugin.quant.inject import inject, quantize_outputs
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.startup.command import wrap_entrypoint

onnx = pytest.importorskip("onnx", reason="needs the extra export")
ort = pytest.importorskip("onnxruntime", reason="needs the extra export")

KINDS = ("packed", "int8", "int4")  # what CPUs run; the others have files of their own

# A layer's deviation from the exact value, relative to the sum of its terms' magnitudes: some 16 roundings of FP32,
# for sums of up to 2,000 terms in an order of the runtime's choice.
LAYER = 1e-6

# What lies between two layers (SiLU, additions, attention) deviates by 1e-6 of values of up to some hundred steps; so
# far from a rounding threshold, in steps, a code may be either neighbour.
NEAR = 1e-3

# The decoded output behind equal layers, relative to the largest: a softmax, a sum and a product.
DECODED = 1e-5


def session(model, optimised=True, **options):
    """A session on one core."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level, chosen.intra_op_num_threads = 3, 1
    if not optimised:
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in options.items():
        setattr(chosen, key, value)
    return ort.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])


def run(model, x, optimised=True, tensors=None):
    """Name -> tensor of the graph's outputs and of inner tensors, given as name -> ONNX type."""
    model, names = copy.deepcopy(model), {}
    for name, kind in (tensors or {}).items():
        shown = name
        if kind == onnx.TensorProto.UINT4:  # has no NumPy type in ONNX Runtime
            shown, kind = f"{name}_shown", onnx.TensorProto.UINT8
            model.graph.node.append(onnx.helper.make_node("Cast", [name], [shown], to=kind))
        names[shown] = name
        if shown not in {o.name for o in model.graph.output}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(shown, kind, None))
    values = session(model, optimised).run(None, {model.graph.input[0].name: x.numpy()})
    return {names.get(o.name, o.name): torch.from_numpy(v) for o, v in zip(model.graph.output, values)}


class Graph:
    """What an ONNX file says of its quantized convolutions, read from its nodes.

    Attributes:
        values: Initializer name -> array.
        inputs: Layer name -> (tensor of its input's codes, their scale, their zero point).
        outputs: Layer name -> (tensor of what it gives, None), or, where a quantizer alone reads that, (tensor of the
            codes, (scale, zero point, smallest code, largest code)).
        float_convs: Number of other convolutions.
    """

    def __init__(self, model):
        self.model = model
        self.values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        self.sources = {out: n for n in model.graph.node for out in n.output}
        self.readers = {}
        for n in model.graph.node:
            for name in n.input:
                self.readers.setdefault(name, []).append(n)
        self.inputs, self.outputs, self.float_convs = {}, {}, 0
        for conv in (n for n in model.graph.node if n.op_type == "Conv"):
            x, weight = (self.sources.get(name) for name in conv.input[:2])
            if weight is None or weight.op_type != "DequantizeLinear":
                self.float_convs += 1
                continue
            name = weight.input[0].removesuffix(".weight_codes")
            if cast := self.sources.get(weight.input[0]):
                assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.INT8)
                self.values[weight.input[0]] = self.values[cast.input[0]]
            quantize = self.sources[x.input[0]]
            assert (quantize.op_type, x.op_type) == ("QuantizeLinear", "DequantizeLinear")
            assert quantize.input[1:] == x.input[1:] and name not in self.inputs
            self.inputs[name] = x.input[0], *self._grid(x)
            out = conv.output[0]
            if f"{name}.sign" in self.values:
                for op in ("Mul", "Add"):
                    (n,) = self.readers[out]
                    assert n.op_type == op
                    out = n.output[0]
            self.outputs[name] = self._read(out)

    def _is4(self, node):
        return self.values[node.input[2]].dtype.name == "uint4"

    def _grid(self, node):
        return float(self.values[node.input[1]]), int(self.values[node.input[2]])

    def _read(self, out):
        after, low = self.readers.get(out, []), None
        if len(after) == 1 and after[0].op_type == "Max" and after[0].input[1] in self.values:
            low, after = float(self.values[after[0].input[1]]), self.readers[after[0].output[0]]
        if len(after) != 1 or after[0].op_type != "QuantizeLinear":
            return out, None
        scale, zero_point = self._grid(after[0])
        lowest = 0 if low is None else round(low / scale) + zero_point
        return after[0].output[0], (scale, zero_point, lowest, 15 if self._is4(after[0]) else 255)

    def constant(self, name):
        return torch.from_numpy(self.values[name].astype(np.float64))

    def tensors(self):
        """Name -> ONNX type of all these tensors."""
        kinds = {name: onnx.TensorProto.FLOAT for name, grid in self.outputs.values() if grid is None}
        for name in (t for t, *_ in (*self.inputs.values(), *self.outputs.values()) if t not in kinds):
            kinds[name] = onnx.TensorProto.UINT4 if self._is4(self.sources[name]) else onnx.TensorProto.UINT8
        return kinds


def check_codes(theirs, position, slack, lowest, highest):
    """Codes (minus the zero point) must be the exact position's; which of two, is open within the slack.

    Returns:
        Of each code, whether it was open, and whether it is not the exact one.
    """
    low, high = ((position + d).round().clamp(lowest, highest) for d in (-slack, slack))
    assert (low <= theirs).all() and (theirs <= high).all()
    return torch.stack([low != high, theirs != position.round().clamp(lowest, highest)], -1).flatten(0, -2)


def per_channel(v):
    return v.double().view(-1, 1, 1)


def compare(graph, model, x, optimised):
    """Judge every layer in ONNX Runtime against the deployed PyTorch model.

    Each layer gets the codes that ONNX Runtime gave it, in float64, where its sums and products are exact; what lies
    between the layers gets what ONNX Runtime's layers gave.

    Returns:
        The first outputs of both, ONNX Runtime's and PyTorch's; the shares of `check_codes`.
    """
    seen = run(graph.model, x, optimised, graph.tensors())
    quantized = [m for m in model.modules() if isinstance(getattr(m, "act", None), nn.Sequential)]
    snapped = {getattr(m, "conv", m).name for m in quantized}  # of blocks and of the head's bare convolutions
    reached, codes = set(), []

    def before(m, args):
        tensor, scale, zero_point = graph.inputs[m.name]
        theirs, q = seen[tensor].double() - zero_point, m.act_quant
        assert scale == pytest.approx(q.scale, rel=1e-6)
        low, high = q.quant_min - q.zero_point, q.quant_max - q.zero_point
        assert zero_point + high == (15 if graph.tensors()[tensor] == onnx.TensorProto.UINT4 else 255)
        codes.append(check_codes(theirs, args[0].double() / scale, NEAR, low, high))
        return (theirs * q.scale,)

    def after(m, args, _):
        reached.add(m.name)
        wanted = m.scaled_sums(args[0])  # before a grid of its own
        unit = m.act_quant.scale * per_channel(m.scale).abs()
        steps = m.act_quant.steps(args[0])
        terms = m.convolve(steps.abs(), m.weight_codes.abs().double()) * unit + per_channel(m.shift).abs()
        slack, integer = LAYER * terms, m.name in snapped
        if integer and f"{m.name}.bias_codes" in graph.values:
            bias = graph.constant(f"{m.name}.bias_codes") * graph.constant(f"{m.name}.bias_scale")
            moved = (per_channel(bias) - per_channel(m.shift)).abs()
            assert (moved <= unit / 1000 + LAYER * per_channel(m.shift).abs()).all()  # whole already, up to FP32
            slack = slack + moved
        tensor, grid = graph.outputs[m.name]
        if grid is None:
            assert ((seen[tensor].double() - wanted).abs() <= slack).all()
            return seen[tensor]
        if not integer:
            slack = slack + unit / 2  # integer convolutions round the bias to whole units
        scale, zero_point, lowest, highest = grid
        theirs = seen[tensor].double() - zero_point
        codes.append(check_codes(theirs, wanted / scale, slack / scale, lowest - zero_point, highest - zero_point))
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
    return seen[graph.model.graph.output[0].name], mine, torch.cat(codes).double().mean(0)


def check_rows(theirs, mine):
    """Rows of a box each, sorted by scores of which many are equal: of those with the last one any may be left out."""
    assert deviation(theirs[..., 4], mine[..., 4]) < DECODED
    scores = mine[0, :, 4]
    higher = scores > scores.min() * (1 + DECODED)
    assert higher.sum() > 10
    distance = torch.cdist(theirs, mine, p=torch.inf)[0] / mine.abs().max()
    assert distance.min(1)[0][higher].max() < DECODED and distance.min(0)[0][higher].max() < DECODED


def check_both(file, model, x):
    """`compare` with ONNX Runtime's optimisations off and on."""
    graph = Graph(onnx.load(file))
    for optimised in (False, True):
        theirs, mine, shares = compare(graph, model, x, optimised)
        if isinstance(mine, tuple):  # a whole detector
            if model.end2end:
                check_rows(theirs, mine[0])
            else:
                assert deviation(theirs, mine[0]) < DECODED
            assert shares[0] < 0.005 and shares[1] < 1e-4  # hardly a code is open, and hardly one of these has moved


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
    quantize_outputs({block: block.act for block, b in zip(made, blocks) if b["quantized"]}, output_bits)
    calibrate_outputs(stack, [x], stack)
    if correction != "off":
        correct(stack, correction == "channel")
    snap(stack, x)
    return stack, x


def write_onnx(stack, x, kind, file):
    """Deploy a stack in place, write its ONNX file, and return it."""
    architecture.deploy_model(stack)
    torch.onnx.export(stack, x, file, dynamo=False, opset_version=18)
    write_graph(file, deployed_convs(stack), kind)
    if kind == "packed":
        pack_weights(file)
    return file


@given(
    st.lists(BLOCKS, min_size=1, max_size=3), OPTIONS, st.sampled_from([8, 8, 5, 4]), CORRECTIONS, st.integers(0, 99)
)
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
def test_three_forms_of_a_stack_agree(tmp_path_factory, blocks, options, output_bits, correction, seed):
    """Fake-quantized = deployed = ONNX of both kinds, with ONNX Runtime's optimisations and without."""
    stack, x = stack_of(blocks, options, output_bits, correction, seed)
    double = copy.deepcopy(stack).double()
    with torch.no_grad():
        wanted = double(x.double())
        architecture.deploy_model(double)
        assert deviation(double(x.double()), wanted) < DOUBLE
    for kind in KINDS:
        deployed = copy.deepcopy(stack)
        check_both(write_onnx(deployed, x, kind, tmp_path_factory.mktemp("stack") / "stack.onnx"), deployed, x)


ONE = dict(groups=1, width=3, kernel=3, stride=1, bias=False, act="silu", quantized=True)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_of_layers_reach_the_file(tmp_path, kind):
    """Weights and activations apart: a layer of 6 and 8 bits between one of 4 and one of 4 and 3."""
    stack, x = stack_of([ONE] * 3, dict(bits=4, layer_bits={"1.conv": "W6A8", "2.conv": "A3"}), 8, "off", 0)
    assert [conv.act_quant.quant_max for _, conv in quant_convs(stack)] == [15, 255, 7]
    file = write_onnx(stack, x, kind, tmp_path / "stack.onnx")
    assert [layer.bits for layer in deployed_convs(stack).values()] == [4, 6, 4]
    check_both(file, stack, x)


def test_a_packed_file_has_short_names_and_no_constant_twice(tmp_path):
    """Nothing but names and weights' containers tells it from the int8 kind; what graphs inside nodes read stays."""
    stack, x = stack_of([ONE] * 3, dict(bits=4), 8, "off", 0)
    files = {kind: write_onnx(copy.deepcopy(stack), x, kind, tmp_path / f"{kind}.onnx") for kind in ("int8", "packed")}
    wide, small = (onnx.load(file).graph for file in files.values())
    assert [n.op_type for n in small.node if n.op_type != "Cast"] == [n.op_type for n in wide.node]
    assert {n.name for n in small.node} == {"0.conv", "1.conv", "2.conv", ""}
    assert [n.name for n in small.node if n.op_type == "Conv"] == ["0.conv", "1.conv", "2.conv"]
    assert not [name for n in small.node for name in (*n.input, *n.output) if name.startswith("/")]
    constants = [(i.data_type, i.raw_data) for i in small.initializer if not i.name[0].isdigit()]
    assert len(set(constants)) == len(constants) < len(wide.initializer) - len(small.initializer) + len(constants)

    named = onnx.helper.make_tensor("/kept", onnx.TensorProto.FLOAT, [1], [1.0])
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["/x", "/kept"], ["/inside"])], "then", [], [onnx.ValueInfoProto(name="/inside")]
    )
    branch = onnx.helper.make_node("If", ["/condition"], ["/y"], "/If", then_branch=then, else_branch=then)
    graph = onnx.helper.make_graph([branch], "outer", [], [onnx.ValueInfoProto(name="y")], [named])
    shorten_names(graph)
    assert graph.initializer[0].name == "/kept" and graph.node[0].attribute[0].g.node[0].input == ["/x", "/kept"]
    assert graph.node[0].input[0][0] == graph.node[0].output[0][0] == "t"


@pytest.mark.parametrize("name", ["weight_codes", "weight_scale", "bias_codes", "zero_point", "scale"])
def test_the_comparison_sees_a_changed_number(tmp_path, name):
    """Negative control: one number of the file changed by one unit, a scale by 1%."""
    stack, x = stack_of([ONE] * 2, dict(bits=4), 8, "off", 0)
    file = write_onnx(stack, x, "int8", tmp_path / "stack.onnx")
    check_both(file, stack, x)
    model = onnx.load(file)
    names = f"0.conv.{name}", f"/0/conv/act_quant/FakeQuantize_output_0_{name}"
    (changed,) = (i for i in model.graph.initializer if i.name in names)
    value = onnx.numpy_helper.to_array(changed).copy()
    value.flat[0] = value.flat[0] * 1.01 if value.dtype.kind == "f" else value.flat[0] - 1
    changed.CopyFrom(onnx.numpy_helper.from_array(value, changed.name))
    onnx.save(model, file)
    with pytest.raises(AssertionError):
        check_both(file, stack, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 1e-10])
def test_a_dead_channel_keeps_its_shift(tmp_path, kind, weight):
    """Batch norm's weight is 0 or nearly so; what the channel gives is batch norm's bias."""
    stack, x = stack_of([ONE], dict(bits=4), 8, "off", 0)
    with torch.no_grad():
        stack[0].bn.weight[0], stack[0].bn.bias[0] = weight, 0.5
    snap(stack, x)
    model = onnx.load(write_onnx(stack, x, kind, tmp_path / "stack.onnx"))
    wanted = stack(x)[:, 0]
    for optimised in (False, True):
        assert deviation(run(model, x, optimised)[model.graph.output[0].name][:, 0], wanted) < DECODED


@pytest.mark.parametrize("act,options", [
    ("leaky", dict(bits=3)),  # a Clip before a UINT4 QuantizeLinear
    ("identity", dict(weight_bits=8, act_bits=4)),  # an INT8 weight between UINT4 codes
])  # fmt: skip
def test_what_onnx_runtime_1_32_would_not_load(tmp_path, act, options):
    """Two graphs that it breaks when it optimises; ours go around them."""
    stack, x = stack_of([{**ONE, "act": act, "quantized": False}] * 2, options, 8, "off", 0)
    check_both(write_onnx(stack, x, "int4", tmp_path / "stack.onnx"), stack, x)


@pytest.mark.parametrize("act,bounds", [("silu", 0), ("leaky", 1)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_code_lies_outside_the_grid(tmp_path, bits, act, bounds):
    """Codes of few bits use the top of their container alone, for inputs that reach far below the grid too."""
    stack, x = stack_of([{**ONE, "act": act, "quantized": False}] * 2, dict(bits=bits), 8, "off", 0)
    for kind in KINDS:
        deployed = copy.deepcopy(stack)
        graph = Graph(onnx.load(write_onnx(deployed, x, kind, tmp_path / "stack.onnx")))
        top = 15 if kind == "int4" else 255
        seen = run(graph.model, 100 * x, optimised=False, tensors=graph.tensors())
        for name, (tensor, *_) in graph.inputs.items():
            codes = seen[tensor]
            assert codes.min() == top + 1 - 2**bits or (name == "1.conv" and not bounds)
            assert codes.min() >= top + 1 - 2**bits and codes.max() == top
        found = sum(n.op_type == "Max" for n in graph.model.graph.node)
        assert found == (0 if bits == 4 and kind == "int4" else 1 + bounds)


@pytest.mark.parametrize("reach,bounds", [(0.9, 1), (1.1, 0)])
def test_leaky_relu_is_bounded_only_where_it_can_leave_the_grid(tmp_path, reach, bounds):
    """A grid that ends a little before, or behind, what LeakyReLU makes of the lowest code of its input."""
    stack, x = stack_of([{**ONE, "act": "leaky"}] * 2, dict(bits=4), 8, "off", 0)
    act, quant = stack[0].act, stack[1].conv.act_quant
    with torch.no_grad():
        quant.scale.copy_(reach * act.quant.zero_point * act.quant.scale * act.function.negative_slope / 1.5)
        quant.offset.copy_(-quant.scale)  # rounds to its lowest code down to 1.5 steps below 0
    graph = Graph(onnx.load(write_onnx(stack, x, "int8", tmp_path / "stack.onnx")))
    codes = run(graph.model, 100 * x, optimised=False, tensors=graph.tensors())[graph.inputs["1.conv"][0]]
    assert codes.min() == 240 and codes.max() == 255
    assert sum(n.op_type == "Max" for n in graph.model.graph.node) == 1 + bounds  # one of them at the stack's input


@pytest.mark.parametrize("odd", ["shared", "same"])
def test_convolutions_unlike_the_hosts(tmp_path, odd):
    torch.manual_seed(0)
    block, x = Conv(4, 4, 3), torch.randn(1, 4, 8, 8)
    if odd == "same":
        block.conv = nn.Conv2d(4, 4, 3, padding="same")
    stack = randomize(nn.Sequential(*[block] * (1 + (odd == "shared")))).eval()
    inject(stack, QCConfig())
    calibrate(stack, [x], stack, "lsq")
    with torch.no_grad():
        wanted = stack(x)
        model = onnx.load(write_onnx(stack, x, "int8", tmp_path / "stack.onnx"))
        assert deviation(run(model, x)[model.graph.output[0].name], wanted) < 1e-2  # one code may move


SMALL = """
nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepConv, [16, 16]]
  - [-1, 1, C3, [32]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv2, [64, 64]]
head:
  - [-1, 1, ConvTranspose, [64, 2, 2]]
  - [[-1, 4], 1, Concat, [1]]
  - [[8, 6], 1, Detect, [nc]]
"""

MSE = dict(outputs=True, scale_init="mse")  # which uses the code -8: its negative does not fit into INT4
FAMILIES = {  # (options of build, arguments of the export)
    "small": (MSE, dict(simplify=True)),
    "yolov5n.yaml": (dict(outputs=True), dict(simplify=False)),
    "yolov8n.yaml": (dict(per_channel=True, outputs=True), dict(simplify=False)),
    "yolov10n.yaml": (dict(outputs=False), dict(simplify=False)),
    "yolo11n.yaml": (dict(outputs=True, act_offset=False), dict(simplify=False)),
    "yolo26n.yaml": (dict(outputs=True), dict(nms=False, simplify=False)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a quantized checkpoint as training does: checkpoint(yaml, **options of build) -> path."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "small.yaml").write_text(SMALL)

    @cache
    def write(yaml, **options):
        model = build(str(folder / "small.yaml") if yaml == "small" else yaml, **options)
        path = folder / f"model{len(list(folder.iterdir()))}.pt"
        return write_trained(model, path, QCConfig() if options.get("quantize", True) else None)

    return write


def export(path, kind=None, **arguments):
    """The stock export; the file is the caller's to move."""
    yolo = YOLO(path)
    if kind:
        choose_onnx_kind(yolo, kind)
    return yolo.export(**{"format": "onnx", "imgsz": 64, "device": "cpu", "simplify": False, **arguments})


@pytest.fixture(scope="module")
def family(checkpoint):
    """Export a family: family(yaml, kind) -> (checkpoint, ONNX file)."""

    @cache
    def write(yaml, kind):
        path = checkpoint(yaml, **FAMILIES[yaml][0])
        file = export(path, kind if kind != "packed" else None, **FAMILIES[yaml][1])  # packed is the default
        return path, shutil.move(file, f"{file}.{kind}.onnx")

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("yaml", FAMILIES)
def test_exported_families(family, yaml, kind):
    """The file is valid, holds the checkpoint's integers, and every layer computes what PyTorch's does."""
    (options, arguments), (path, file) = FAMILIES[yaml], family(yaml, kind)
    onnx.checker.check_model(file, full_check=True)
    graph = Graph(onnx.load(file))
    assert {o.domain for o in graph.model.opset_import} == {""}

    model, _ = load_checkpoint(path)
    codes = {name: m.weight_codes() for name, m in quant_convs(model)}
    model.end2end = arguments.get("nms") is False
    model.fuse(verbose=False)
    assert graph.inputs.keys() == deployed_convs(model).keys()
    signed = 0
    for name, m in deployed_convs(model).items():
        (initializer,) = (i for i in graph.model.graph.initializer if i.name.startswith(f"{name}.weight_codes"))
        written = m.positive_scale(*((-8, 7) if kind == "int4" and m.bits <= 4 else (-128, 127)))[0]  # off: zeros
        fits = written.min() >= -8 and written.max() <= 7  # a negated -8 does not
        packed = kind != "int8" and fits and (kind == "packed" or m.bits <= 4)
        large = written.abs().max() > 64  # a sum of two products with 255 leaves 16 bits
        wide = onnx.TensorProto.UINT8 if large else onnx.TensorProto.INT8
        assert m.bits > 7 or not large
        assert initializer.data_type == (onnx.TensorProto.INT4 if packed else wide)
        assert len(initializer.raw_data) == (codes[name].numel() + 1) // 2 if packed else codes[name].numel()
        sign = torch.where(m.scale < 0, -1, 1)
        if f"{name}.sign" in graph.values:
            signed += 1
            assert torch.equal(graph.constant(f"{name}.sign").flatten(), sign.double())
            sign = torch.ones_like(sign)
        (node,) = graph.readers[f"{name}.weight_codes"]
        assert (initializer.name != f"{name}.weight_codes") == (kind == "packed" and packed)
        assert len(node.input) == (3 if large else 2)
        zero_point = graph.constant(node.input[2]).unique() if large else torch.zeros(1)
        weight = graph.constant(f"{name}.weight_codes") - zero_point
        assert torch.equal(weight, codes[name].double() * sign.view(-1, 1, 1, 1)) and (zero_point == 128 * large).all()
        assert torch.equal(graph.constant(f"{name}.weight_scale"), m.scale.abs().double())
    assert signed > 0 or kind != "int4" or options.get("scale_init") != "mse"

    check_both(file, model, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("yaml,kind", [
    ("yolov5n.yaml", "packed"), ("yolov5n.yaml", "int8"), ("yolov5n.yaml", "int4"), ("yolov8n.yaml", "packed"),
])  # fmt: skip
def test_all_codes_agree_end_to_end(family, yaml, kind, runtime):
    """Of snapped models, whose activation function is SiLU, without attention: no code differs from PyTorch's."""
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="needs the extra export")
        if kind == "int4":
            pytest.skip("OpenVINO has no 4-bit activations")
    path, file = family(yaml, kind)
    model, _ = load_checkpoint(path)
    snap(model.float(), images())
    model.fuse(verbose=False)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    found = compare_codes(model, ExportedONNX(Path(file)), runtime, x)
    assert found["changed_end_to_end"] == found["changed"] == found["steps"] == 0, found


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_integer_kernels(family, tmp_path, kind):
    """ONNX Runtime computes every convolution by an integer kernel, as every output is quantized."""
    _, file = family("yolov5n.yaml", kind)
    session(onnx.load(file), optimized_model_filepath=str(tmp_path / "optimised.onnx"))
    ops = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    floats = sum(op in {"Conv", "FusedConv", "NhwcFusedConv"} for op in ops)
    assert ops.count("QLinearConv") == 75 and floats == 1  # DFL's
    assert "Cast" not in ops  # folded


def test_a_checkpoint_without_grids_of_the_head(family, tmp_path):
    """As earlier versions wrote them: the head's bare convolutions give floats, and all else is as it was."""
    path = family("yolov5n.yaml", "packed")[0]
    new, _ = load_checkpoint(path)
    new.float()
    old, checkpoint = copy.deepcopy(new), torch.load(path, weights_only=False)
    bare = {name for name, conv in quant_convs(old) if conv._modules.pop("act", None)}
    torch.save({**checkpoint, "model": old}, tmp_path / "old.pt")
    file = Path(export(tmp_path / "old.pt"))
    model, _ = load_checkpoint(tmp_path / "old.pt")
    assert deviation(model.fuse(verbose=False)(images())[0], old(images())[0]) < DECODED
    graph, written = Graph(onnx.load(file)), ExportedONNX(file)
    assert {name for name, (_, grid) in graph.outputs.items() if grid is None} == bare and len(bare) == 6
    assert written.outputs.keys() == deployed_convs(model).keys() - bare
    assert ExportedONNX(Path(family("yolov5n.yaml", "packed")[1])).outputs.keys() == deployed_convs(model).keys()
    found = compare_codes(model, written, "onnxruntime", images())
    assert found["changed_end_to_end"] == found["steps"] == 0, found


def images():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def metadata(file):
    found = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    return {k: ast.literal_eval(found[k]) for k in ("stride", "names", "imgsz", "batch", "end2end")} | {
        "task": found["task"], "dynamic": ast.literal_eval(found["args"])["dynamic"]
    }  # fmt: skip


@pytest.mark.parametrize("kind,arguments", [
    *((kind, dict(dynamic=True)) for kind in KINDS),
    ("packed", dict(simplify=True)),
    ("int8", dict(batch=2)),
    ("packed", dict(imgsz=(96, 64))),
    ("packed", dict(nms=True, conf=0.01)),
    ("int4", dict(nms=True, conf=0.01, simplify=True, batch=2)),
    ("int4", dict(opset=18)),
], ids=str)  # fmt: skip
def test_options_of_the_host(checkpoint, kind, arguments):
    """Every file keeps the host's metadata, and the host predicts by it."""
    file = export(checkpoint("small", **MSE), kind, **arguments)
    assert len(Graph(onnx.load(file)).inputs) == 25
    batch = arguments.get("batch", 1)
    assert metadata(file) == {
        "stride": 16, "names": {0: "red", 1: "white", 2: "platelet"}, "imgsz": list(arguments.get("imgsz", (64, 64))),
        "batch": batch, "end2end": False, "task": "detect", "dynamic": arguments.get("dynamic", False),
    }  # fmt: skip
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for size in (arguments.get("imgsz", 64), *([128] if "dynamic" in arguments else [])):
        results = YOLO(file).predict([image] * batch, imgsz=size, conf=0.01, device="cpu", verbose=False)
        assert len(results) == batch and all(r.names[2] == "platelet" and len(r.boxes) > 0 for r in results)
        assert all(torch.isfinite(r.boxes.data).all() for r in results)


@pytest.mark.parametrize("kind", ["packed", "int4"])
def test_4_bit_types_with_nms_and_an_old_opset(checkpoint, kind):
    """Opsets below 18 cannot be renamed 21: ReduceMax takes its axes otherwise."""
    accepted = r"18 and later \(callbacks=qc qc_onnx=int8 takes 13 and later\)"
    with pytest.raises(QCError, match=f"opset=17 is too old for the {kind} kind; accepted: {accepted}"):
        export(checkpoint("small", **MSE), kind, nms=True, opset=17)


@pytest.mark.parametrize("arguments,message", [
    *((dict(format=f), f"format='{f}' cannot carry the quantizers of this model; accepted: onnx, openvino, torch")
      for f in ("ncnn", "coreml", "saved_model", "imx", "NCNN")),
    (dict(quantize=8), "quantize=8 would quantize this model a second time"),
    (dict(quantize=16), "quantize=16 would quantize this model a second time"),
    (dict(int8=True), "quantize=8 would quantize this model a second time"),
    (dict(half=True), "quantize=16 would quantize this model a second time"),
    (dict(opset=12, kind="int8"), "opset=12 is too old for the int8 kind; accepted: 13 and later"),
], ids=str)  # fmt: skip
def test_exports_that_are_refused(checkpoint, arguments, message):
    with pytest.raises(QCError, match=message):
        export(checkpoint("small", **MSE), **arguments)


def test_a_refused_export_leaves_no_file(checkpoint, tmp_path):
    path = shutil.copy(checkpoint("small", **MSE), tmp_path / "model.pt")
    with pytest.raises(QCError):
        export(path, opset=12)
    assert not (tmp_path / "model.onnx").exists()


def command(line):
    """Run a `yolo` line, as the start-up hook lets the host see it."""
    module = SimpleNamespace(
        entrypoint=cfg.entrypoint, ARGV=["yolo", *line.split()], merge_equals_args=cfg.merge_equals_args
    )
    original, cfg.ARGV = cfg.ARGV, module.ARGV
    try:
        wrap_entrypoint(module)
        module.entrypoint()
    finally:
        cfg.ARGV = original


def test_the_command_line_chooses_the_kind(checkpoint):
    path = checkpoint("small", **MSE)
    for options, opset in (("callbacks=qc qc_onnx=int8", 18), ("callbacks=qc", 21), ("", 21)):
        path.with_suffix(".onnx").unlink(missing_ok=True)
        command(f"export model={path} format=onnx imgsz=64 device=cpu simplify=False {options}")
        assert onnx.load(path.with_suffix(".onnx")).opset_import[0].version == opset


@pytest.mark.parametrize("options,message", [
    ("qc_onnx=int2", "onnx='int2' is not accepted; give 'packed' or 'int8' or 'openvino' or 'int4' or 'tensorrt' or "),
    ("qc_bits=4", "qc_bits is of training; export takes qc_onnx"),
    ("qc_onnx=int4", "is not quantized; callbacks=qc exports checkpoints trained with it"),
])  # fmt: skip
def test_command_lines_that_are_refused(checkpoint, options, message):
    """The last because the checkpoint is a float one."""
    path = checkpoint("yolov5n.yaml", quantize=False)
    path.with_suffix(".onnx").unlink(missing_ok=True)  # of another test
    with pytest.raises(SystemExit, match=message):
        command(f"export model={path} format=onnx imgsz=64 device=cpu simplify=False callbacks=qc {options}")
    assert not path.with_suffix(".onnx").exists()


def test_kinds_that_are_refused(checkpoint, tmp_path):
    with pytest.raises(QCError, match="onnx='int2' is not accepted; give 'packed' or 'int8' or 'openvino' or"):
        choose_onnx_kind(YOLO("yolov5n.yaml"), "int2")
    with pytest.raises(QCError, match="is not quantized"):
        export(checkpoint("yolov5n.yaml", quantize=False), "int4")
    export(checkpoint("yolov5n.yaml", quantize=False))  # a float model is exported as ever
    stack, x = stack_of([ONE], dict(bits=4), 8, "off", 0)
    with pytest.raises(QCError, match="onnx='int2' is not accepted"):
        write_onnx(stack, x, "int2", tmp_path / "stack.onnx")
