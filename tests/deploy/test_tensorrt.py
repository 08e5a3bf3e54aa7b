# yolo_qc_plugin, AGPL-3.0
"""TensorRT's rules, read from the nodes of each family's graph; and the model that keeps them is the one exported."""

import copy
import io
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from test_fold import correct, images, randomize, write_trained
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.exporter import Exporter
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import torch_utils
from ultralytics.utils.export import engine

from yolo_qc_plugin import choose_onnx_kind, model_yaml
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.exported import ExportedONNX
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.deploy.symmetric import obstacles
from yolo_qc_plugin.host import architecture, exporting
from yolo_qc_plugin.quant.calibrate import act_quantizers, calibrate
from yolo_qc_plugin.quant.inject import inject, remove
from yolo_qc_plugin.quant.share import share_quantizers
from yolo_qc_plugin.quant.taps import tap_sums, taps

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

# residual sums by the modules that add (Bottleneck, RepBottleneck, CIB, SPPF, PSA, ABlock), less one for each block of
# attention: what its second sum adds to is itself a sum, which no block gave
SUMS = {
    "yolov5n.yaml": 7, "yolov6n.yaml": 0, "yolov7-tiny.yaml": 0, "yolov8n.yaml": 6, "yolov9t.yaml": 42,
    "yolov10n.yaml": 9 - 1, "yolo11n.yaml": 13 - 1, "yolo12n.yaml": 26 - 8, "yolo26n.yaml": 18 - 2,
}  # fmt: skip


def build(yaml, **options):
    """A model of the target as training leaves it, and the number of its quantized sums."""
    torch.manual_seed(0)
    model = DetectionModel(model_yaml("yolov7-tiny") if "tiny" in yaml else yaml, nc=3, verbose=False)
    randomize(model).eval()
    config = QCConfig.from_options({"target": "tensorrt", "scale_init": "lsq", **options})
    inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
    image = architecture.blank_image(model)
    sums = tap_sums(model, image, config, architecture.sums_of_branches(model))
    share_quantizers(model, image, joined=True)
    calibrate(model, [images(2)], model, config.scale_init)
    correct(model)
    return model, config, sums


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a family: exported(yaml, **options) -> (checkpoint, file, number of sums)."""

    @cache
    def write(yaml, **options):
        folder = tmp_path_factory.mktemp("family")
        model, config, sums = build(yaml, **options)
        path = write_trained(model, folder / "model.pt", config)
        return path, YOLO(path).export(format="onnx", imgsz=64, device="cpu"), sums

    return write


class Graph:
    """An ONNX graph as TensorRT's parser sees it: values of constants, writers and readers of tensors."""

    def __init__(self, file):
        graph = onnx.load(file).graph
        self.nodes = list(graph.node)
        self.values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        self.writer = {out: n for n in self.nodes for out in n.output}
        self.readers = {}
        for n in self.nodes:
            for name in n.input:
                self.readers.setdefault(name, []).append(n)

    def of(self, *ops):
        return [n for n in self.nodes if n.op_type in ops]

    def is_pair(self, name):
        """Whether a tensor comes out of Q -> DQ, as a whole or as a part of what does."""
        node = self.writer.get(name)
        while node is not None and node.op_type in {"Split", "Slice"}:
            node = self.writer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear" and node.input[0] in self.writer

    def scales(self, name):
        """Scales of all Q that a tensor's values go into, through what moves values alone."""
        moves, found, seen, todo = {"Concat", "Split", "MaxPool", "Resize", "Slice"}, set(), {name}, [name]
        while todo:
            for n in self.readers.get(todo.pop(), []):
                if n.op_type == "QuantizeLinear":
                    found.add(float(self.values[n.input[1]]))
                elif n.op_type in moves:
                    todo += {*n.output} - seen
                    seen.update(n.output)
        return found


@pytest.mark.parametrize("yaml", SUMS)
def test_rules(exported, yaml):
    path, file, sums = exported(yaml)
    graph, model = Graph(file), load_checkpoint(path)[0].float()
    acts = {f"{n}.conv": m.act for n, m in model.named_modules() if isinstance(m, Conv)}
    layers = deployed_convs(model.fuse(verbose=False))
    quantizes, dequantizes = graph.of("QuantizeLinear"), graph.of("DequantizeLinear")

    # INT8 alone, zero points 0, activations by one scale
    assert quantizes and all(n.domain == "" for n in graph.nodes)
    for n in quantizes:
        zero_point = graph.values[n.input[2]]
        assert (zero_point.dtype, zero_point.item(), graph.values[n.input[1]].size) == ("int8", 0, 1)
    # weights: INT8 codes in [-127, 127], one scale per output channel, no zero point, DQ just before the convolution
    quantized = [n for n in graph.of("Conv") if graph.is_pair(n.input[0])]
    assert len(quantized) == len(layers) > 20
    for conv in quantized:
        weight = graph.writer[conv.input[1]]
        codes, scales = graph.values[weight.input[0]], graph.values[weight.input[1]]
        assert (
            weight.op_type == "DequantizeLinear" and len(weight.input) == 2 and graph.readers[conv.input[1]] == [conv]
        )
        assert codes.dtype == "int8" and abs(codes.astype(int)).max() <= 127 and scales.shape == codes.shape[:1]
        assert graph.values[conv.input[2]].dtype == "float32"  # the bias
    assert len(dequantizes) == len(quantizes) + len(quantized)
    # batch norm is folded, and nothing lies between it and the activation function
    assert not graph.of("BatchNormalization", "Max", "Min", "Clip")
    for conv in quantized:
        layer = graph.writer[conv.input[1]].input[0].removesuffix(".weight_codes")
        after = {n.op_type for n in graph.readers.get(conv.output[0], [])}
        assert "QuantizeLinear" not in after or isinstance(acts[layer], nn.Identity), layer
    # both inputs of residual sums, and of pooling
    adds = [n for n in graph.of("Add") if all(map(graph.is_pair, n.input))]
    assert len(adds) == sums == SUMS[yaml]
    assert all(graph.is_pair(n.input[0]) or graph.writer[n.input[0]].op_type == "MaxPool" for n in graph.of("MaxPool"))
    # one scale for all that a concatenation joins
    joined = [n for n in graph.of("Concat") if graph.scales(n.output[0])]
    assert joined
    for n in joined:
        assert len(set.union(*(graph.scales(name) for name in [*n.input, *n.output]))) == 1, n.name


def ultralytics_own(yaml, folder, monkeypatch):
    """What Ultralytics' own QAT (qat=True) exports of the same float model; TensorRT is known to take it."""
    monkeypatch.setattr(torch_utils, "check_requirements", lambda *_, **__: True)  # it would install
    model = randomize(DetectionModel(yaml, nc=3, verbose=False)).eval()
    model = torch_utils.prepare_qat(model, [images(2)], lambda batch: batch).requires_grad_(False)
    model.names, model.task, model.pt_path = {0: "red", 1: "white", 2: "platelet"}, "detect", folder / "own.pt"
    model.args = {"imgsz": 64, "data": ""}
    return Exporter(overrides={"format": "onnx", "imgsz": 64, "device": "cpu", "opset": 18})(model)


def places(graph):
    """Operation -> names of the nodes of which all activations come out of Q -> DQ; convolutions by their weight's."""
    found = {}
    for n in graph.nodes:
        if n.op_type == "Conv" and graph.is_pair(n.input[0]):
            weight = graph.writer[n.input[1]]  # theirs quantize a float weight, where ours hold codes
            name = graph.writer[weight.input[0]].input[0] if weight.input[0] in graph.writer else weight.input[0]
            found.setdefault("Conv", set()).add(name.removesuffix("_codes").removesuffix(".weight"))
        elif n.op_type not in {"Conv", "Split", "Slice", "QuantizeLinear"} and all(map(graph.is_pair, n.input)):
            found.setdefault(n.op_type, set()).add(n.name)
    return found


@pytest.mark.parametrize("yaml", ["yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml"])
def test_places_beside_those_of_ultralytics_own(exported, yaml, tmp_path, monkeypatch):
    """Ours quantize the head's bare convolutions and residual sums besides; all else in the same places."""
    pytest.importorskip("modelopt", reason="needs the extra nvidia")
    path, file, sums = exported(yaml)
    ours, theirs = places(Graph(file)), places(Graph(ultralytics_own(yaml, tmp_path, monkeypatch)))
    bare = architecture.edge_convs(load_checkpoint(path)[0]) - {"model.0.conv"}
    assert ours["Conv"] - theirs["Conv"] == bare and theirs["Conv"] < ours["Conv"]
    assert ours.pop("Conv") and theirs.pop("Conv") and len(ours.pop("Add")) == sums and ours == theirs


class OnGPU:
    """An exporter's example image, as if it lay on a GPU."""

    device = torch.device("cuda")

    def __init__(self, image):
        self.image, self.shape = image, image.shape


@pytest.mark.parametrize("yaml", ["yolov5n.yaml", "yolo11n.yaml"])
def test_engine_by_ultralytics_own_builder(exported, yaml, monkeypatch):
    """NVIDIA's builder for RTX, which needs no GPU to build, in TensorRT's place: weights stay INT8 in its engine.

    What Ultralytics hands to it is this graph alone: no images to calibrate by, and nothing that quantizes again.
    """
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra nvidia")
    path, *_ = exported(yaml)
    monkeypatch.setattr(rtx, "__version__", "11.4.0")  # of the TensorRT with the same rules: Ultralytics asks for 7
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(exporting, "find_spec", lambda name: True)
    monkeypatch.setattr(exporting.torch.cuda, "is_available", lambda: True)
    for name in ("get_int8_calibration_dataloader", "modelopt_quantize_onnx"):
        owner = Exporter if hasattr(Exporter, name) else engine
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("it quantizes again"))
    export_engine, export_onnx = Exporter.export_engine, Exporter.export_onnx

    def from_gpu(self, *args, **kwargs):
        self.im = OnGPU(self.im)
        return export_engine(self, *args, **kwargs)

    def on_cpu(self, *args, **kwargs):
        on_gpu, self.im = self.im, self.im.image
        try:
            return export_onnx(self, *args, **kwargs)
        finally:
            self.im = on_gpu

    monkeypatch.setattr(Exporter, "export_engine", from_gpu)
    monkeypatch.setattr(Exporter, "export_onnx", on_cpu)
    file = Path(YOLO(path).export(format="engine", imgsz=64, device="cpu"))
    content = file.read_bytes()
    size = int.from_bytes(content[:4], "little")
    about = json.loads(content[4 : 4 + size])
    assert file.name == "model.engine" and about["imgsz"] == [64, 64] and about["names"]["1"] == "white"
    graph = Graph(file.with_suffix(".onnx"))
    quantized = [n for n in graph.of("Conv") if graph.is_pair(n.input[0])]
    constant = rb"const_payload_size=\d+ dims=\{ (\d+ \d+ \d+ \d+) \} [^}]*\} [^}]*\} type=int8"
    integers = Counter(tuple(map(int, dims.split())) for dims in re.findall(constant, content[size:]))
    shapes = [graph.values[graph.writer[n.input[1]].input[0]].shape for n in quantized]
    # it makes channels of inputs a multiple of four, the image's and those of depthwise convolutions too
    wanted = Counter((out, -(-channels // 4) * 4, *kernel) for out, channels, *kernel in shapes)
    assert len(shapes) > 60 and wanted - integers == Counter()


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_grids_are_bounded_within_int8(exported, bits):
    """W4A4 and W2A2: a Clip to the grid before each Q of fewer than 8 bits."""
    path, file, _ = exported("yolov5n.yaml", bits=bits, act_bits=bits)
    graph, model = Graph(file), load_checkpoint(path)[0]
    narrow = {q.scale.item(): q for q in act_quantizers(model).values() if q.bits < 8}
    clips = graph.of("Clip")
    quantize = [q for q in graph.of("QuantizeLinear") if float(graph.values[q.input[1]]) in narrow]
    assert len(quantize) >= len(narrow) > 20 and {q.input[0] for q in quantize} == {clip.output[0] for clip in clips}
    for clip in clips:
        (q,) = graph.readers[clip.output[0]]
        scale = float(graph.values[q.input[1]])
        low, high = (round(float(graph.values[name]) / scale) for name in clip.input[1:])
        assert (low, high) == (narrow[scale].quant_min, narrow[scale].quant_max) and high - low == 2**bits - 1


def test_codes_are_the_models(exported):
    """Layer by layer; outputs are float, so that a value may lie at a threshold and go on from there."""
    for options in ({}, {"act_bits": 4}):
        path, file, _ = exported("yolov5n.yaml", **options)
        model, _ = load_checkpoint(path)
        model.float().fuse(verbose=False)
        graph = ExportedONNX(Path(file))
        assert graph.kind == "tensorrt" and graph.differing_weights(deployed_convs(model)) == []
        for runtime in ("onnxruntime", "onnxruntime, not optimised"):
            found = compare_codes(model, graph, runtime, images(2))
            assert found["steps"] <= 1 and found["changed"] < 1e-4, found


def test_a_checkpoint_keeps_its_taps_and_remove_leaves_none(exported):
    path, *_ = exported("yolov5n.yaml")
    model, _ = load_checkpoint(path)
    assert len(list(taps(model))) == 7 + 7 - 3 + 4  # chains of sums share one place: outputs, and one pooling
    x = images()
    with torch.no_grad():
        wanted = model.float()(x)[0]
        assert torch.equal(copy.deepcopy(model)(x)[0], wanted)
        stored = io.BytesIO()
        torch.save(model.half(), stored)
        stored.seek(0)
        assert torch.equal(torch.load(stored, weights_only=False).float()(x)[0], wanted)
        for _, tap in taps(model):
            tap.act_quant.enabled = False
        assert not torch.equal(model.float()(x)[0], wanted)
    remove(model)
    assert not list(taps(model)) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("options,reason", [
    (dict(act_offset=True), r"the input of model.0.conv has codes from 0 to 255 around its zero point \(and \d+ more"),
    (dict(act_offset=False), r"the input of model.0.conv has codes from 0 to 255"),
])  # fmt: skip
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_another_target_is_refused(tmp_path, options, reason, fused):
    model = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    config = QCConfig.from_options({"target": "cpu", **options})
    inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
    share_quantizers(model, architecture.blank_image(model))
    calibrate(model, [images(2)], model)
    yolo = YOLO(write_trained(model, tmp_path / "model.pt", config))
    if fused:
        yolo.model.float().fuse(verbose=False)
    choose_onnx_kind(yolo, "tensorrt")
    with pytest.raises(QCError, match=f"{reason}.*train with callbacks=qc qc_target=tensorrt"):
        yolo.export(format="onnx", imgsz=64, device="cpu")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_quantized_outputs_are_an_obstacle(fused):
    """Those of the head's bare convolutions too."""
    from test_fold import build as of_cpus

    model = of_cpus("yolov5n.yaml", outputs=True, act_offset=False)
    found = list(obstacles(model.fuse(verbose=False) if fused else model))
    assert sum("activation function" in text for text in found) == 69
    bare = {f"model.24.cv{branch}.{i}.2" for branch in (2, 3) for i in range(3)}
    assert {f"the output of {name} is quantized" for name in bare} <= set(found)
