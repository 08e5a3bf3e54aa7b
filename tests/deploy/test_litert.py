# yolo_qc_plugin, AGPL-3.0
"""The LiteRT files: the checkpoint's integers, PyTorch's codes in every layer, Ultralytics' own use of the file."""

import inspect
import math
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold import build, write_trained
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.export import engine

from yolo_qc_plugin import choose_litert_kind, choose_onnx_kind, model_yaml
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy import kinds
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.deploy.litert import exported
from yolo_qc_plugin.deploy.litert.exported import LITERT_RUNTIMES, ExportedLiteRT, litert_obstacle
from yolo_qc_plugin.deploy.litert.flatbuffer import Flatbuffer, Grid
from yolo_qc_plugin.deploy.litert.graph import LITERT_KINDS, adds_exactly, write_litert
from yolo_qc_plugin.deploy.litert.layout import Geometry, Tensor, regrouped
from yolo_qc_plugin.deploy.litert.weights import rounds_twice
from yolo_qc_plugin.deploy.snap import snap
from yolo_qc_plugin.host import exporting
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.tools.benchmark import _obstacle
from yolo_qc_plugin.tools.exports import File

pytest.importorskip("onnx", reason="needs the extra litert")
interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="needs the extra litert")

SMALL = """
nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepConv, [16, 16]]
  - [-1, 1, C3, [32]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, SPPF, [64, 5]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, DWConv, [64, 3, 1]]
head:
  - [-1, 1, ConvTranspose, [64, 2, 2]]
  - [[-1, 5], 1, Concat, [1]]
  - [[9, 7], 1, Detect, [nc]]
"""
TRAINED_FOR_IT = dict(target="litert", outputs=True, per_channel=True, act_bits=8)
FAMILIES = {  # (YAML, options of build)
    "small": ("small", dict(outputs=True, scale_init="mse")),  # of which a code of -8 has no negative in INT4
    "small, float outputs": ("small", dict(outputs=False)),
    "yolov5n": ("yolov5n.yaml", dict(outputs=True, per_channel=True, act_bits=8)),
    "yolov8n": ("yolov8n.yaml", dict(outputs=True)),
    "yolo11n": ("yolo11n.yaml", dict(outputs=True, act_offset=False)),
    "yolo26n": ("yolo26n.yaml", dict(outputs=True)),
    "yolo11n, target": ("yolo11n.yaml", TRAINED_FOR_IT),
}
TASKS = {
    "segment": "yolov8n-seg.yaml",
    "pose": "yolov8n-pose.yaml",
    "obb": "yolov8n-obb.yaml",
    "classify": "yolov8n-cls.yaml",
}
OTHERS = {  # what they compute in floats between convolutions, sums of branches and attention, may lie at thresholds
    name: (name if "tiny" in name else f"{name}.yaml", dict(outputs=True))
    for name in ("yolov6n", "yolov7-tiny", "yolov9t", "yolov10n", "yolo12n")
}
OTHERS |= {"yolov9t, target": ("yolov9t.yaml", TRAINED_FOR_IT), "yolov10n, target": ("yolov10n.yaml", TRAINED_FOR_IT)}
FAMILIES_OF_INT8 = FAMILIES | {task: (yaml, dict(outputs=True, task=task)) for task, yaml in TASKS.items()}
SNAPPED = [name for name in FAMILIES_OF_INT8 if "float" not in name]
FLIPPED = 1e-4  # share of codes
# Shares of codes that LiteRT's built-in kernels may move by one step. Twice rounded, a multiplier below 1 / 2^s errs in
# 2^-(s + 1) of all sums at most; those of YOLOs are some hundredths.
MOVED = 0.05
DECODED = 1e-3  # pixels of 64, behind equal codes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a quantized checkpoint as training does: checkpoint(name) -> path."""
    folder = tmp_path_factory.mktemp("litert")
    (folder / "small.yaml").write_text(SMALL)

    @cache
    def write(name):
        yaml, options = (FAMILIES_OF_INT8 | OTHERS)[name]
        files = {"small": folder / "small.yaml", "yolov7-tiny": model_yaml("yolov7-tiny")}
        model = build(str(files.get(yaml, yaml)), **options)
        path = folder / f"model{len(list(folder.iterdir()))}.pt"  # Ultralytics renames a yolov5n.pt
        return write_trained(model, path, QCConfig(), half=False, task=options.get("task", "detect"))

    return write


def export(path, kind=None, **arguments):
    """The stock export."""
    yolo = YOLO(path)
    if kind:
        choose_litert_kind(yolo, kind)
    return Path(yolo.export(**{"format": "litert", "imgsz": 64, "device": "cpu", **arguments}))


@pytest.fixture(scope="module")
def family(checkpoint):
    """Export a family: family(name, kind) -> (checkpoint, LiteRT file)."""

    @cache
    def write(name, kind):
        path = checkpoint(name)
        file = export(path, kind if kind != "int4" else None)  # int4 is the default
        return path, Path(shutil.move(file, file.with_suffix(f".{kind}.tflite")))

    return write


def deployed(path):
    model, _ = load_checkpoint(path)
    model.end2end = False
    return model.float().fuse(verbose=False)


@pytest.mark.parametrize("name", SNAPPED)
def test_xnnpack_gives_pytorchs_codes(family, name):
    """All of them, end to end, in the file whose weights are INT8."""
    path, file = family(name, "int8")
    found = compare_codes(deployed(path), ExportedLiteRT(file), LITERT_RUNTIMES[0], images(2))
    assert found["changed_end_to_end"] == found["changed"] == found["steps"] == 0, found
    assert found["output"] < DECODED


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(family, name):
    path, file = family(name, "int8")
    found = compare_codes(deployed(path), ExportedLiteRT(file), LITERT_RUNTIMES[0], images(2))
    assert found["steps"] <= 1 and found["changed"] < FLIPPED, found


@pytest.mark.parametrize("name,kind,runtime", [
    *((name, "int4", LITERT_RUNTIMES[0]) for name in FAMILIES_OF_INT8), ("yolov5n", "int8", LITERT_RUNTIMES[1]),
])  # fmt: skip
def test_built_in_kernels_are_a_step_off_at_most(family, name, kind, runtime):
    path, file = family(name, kind)
    found = compare_codes(deployed(path), ExportedLiteRT(file), runtime, images(2))
    assert found["steps"] <= 1 and found["changed"] < MOVED, found


def test_what_is_read_on_one_grid_is_computed_once(family):
    """With the target a product for each sigmoid but those in float; without it more, for tensors of two grids."""
    values = {}
    for name in "yolo11n, target", "yolo11n":
        operators = [
            (op, math.prod(shape)) for op, kind, shape in _operators(family(name, "int8")[1]) if kind is np.int8
        ]
        assert sum(op == "LOGISTIC" for op, _ in operators) == 77
        values[name] = [sum(size for op, size in operators if op == kind) for kind in ("MUL", "LOGISTIC")]
    (products, sigmoids), (others, _) = values["yolo11n, target"], values["yolo11n"]
    assert 0.9 * sigmoids < products <= sigmoids < others


def test_residual_sums_are_integer_where_training_quantizes_their_inputs(family):
    """All eleven of YOLO11n outside attention with the target, none without; the head's sums are in float."""
    sums = {}
    for name in "yolo11n, target", "yolov8n":
        adds = [kind for op, kind, _ in _operators(family(name, "int8")[1]) if op == "ADD"]
        sums[name] = adds.count(np.int8), adds.count(np.float32)
    assert sums == {"yolo11n, target": (11, 5), "yolov8n": (0, 8)}


def _operators(file):
    """Name, and type and shape of the output, of every operator of a file."""
    run = interpreter.Interpreter(str(file))
    made = {t["index"]: (t["dtype"], t["shape"]) for t in run.get_tensor_details()}
    return [(op["op_name"], *made[op["outputs"][0]]) for op in run._get_ops_details()]


@pytest.mark.parametrize("kind", LITERT_KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_holds_the_checkpoints_integers(family, name, kind):
    path, file = family(name, kind)
    graph, layers = ExportedLiteRT(file), deployed_convs(deployed(path))
    graph.match(layers)
    assert graph.differing_weights(layers) == []
    schema, tensors = graph.schema, {t.name.decode(): t for t in graph.graph.tensors}
    for layer_name, layer in layers.items():
        tensor = tensors[f"{layer_name}.weight_codes"]
        four = kind == "int4" and layer.bits <= 4 and layer.positive_scale(-8, 7)[2] is None
        assert tensor.type == (schema.TensorType.INT4 if four else schema.TensorType.INT8)
        stored = graph.model.buffers[tensor.buffer].data
        assert len(stored) == ((layer.weight_codes.numel() + 1) // 2 if four else layer.weight_codes.numel())
        scale = torch.from_numpy(tensor.quantization.scale.copy())
        assert torch.equal(scale, layer.positive_scale(-8 if four else -128, 7 if four else 127)[1].float())
    packed = any(t.type == schema.TensorType.INT4 for t in tensors.values())
    assert packed == (kind == "int4" and name != "small")  # whose every layer has a code that INT4 cannot negate


def test_equal_vectors_are_written_once():
    """Zero points of two weights with a scale per channel: one vector of them in the file, read by both."""
    flat = Flatbuffer("vectors")
    for name, scale in ("a", 0.25), ("b", 0.5):
        flat.constant(name, np.ones((1000, 1), np.int8), scale=np.full(1000, scale, np.float32))
    content = flat.finish([], [])
    quantization = [t.quantization for t in flat.schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0].tensors]
    assert [q.scale[0] for q in quantization] == [0.25, 0.5]
    assert all(len(q.zeroPoint) == 1000 and not q.zeroPoint.any() for q in quantization)
    once = 2 * 1000 + 2 * 4000 + 8000  # codes, scales, zero points
    assert once < len(content) < once + 2000


def test_constants_are_aligned(family):
    """TensorFlow Lite for Microcontrollers reads them in place."""
    _, file = family("small", "int4")
    content, graph = file.read_bytes(), ExportedLiteRT(file)
    weights = [t.buffer for t in graph.graph.tensors if t.name.endswith(b".weight_codes")]
    large = [np.asarray(graph.model.buffers[i].data, np.uint8).tobytes() for i in weights]
    assert len(large) > 20 and all(content.index(data) % 16 == 0 for data in large)


def images(count, size=(64, 64)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("arguments", [{}, dict(batch=2), dict(imgsz=(96, 64))], ids=str)
def test_ultralytics_predicts_by_the_file(checkpoint, arguments):
    """What it finds is what the checkpoint finds, in the names of the checkpoint."""
    path = checkpoint("small")
    file = export(path, "int8", **arguments)
    size, batch = arguments.get("imgsz", 64), arguments.get("batch", 1)
    image = np.random.default_rng(0).integers(0, 255, (96, 64, 3), np.uint8)
    settings = dict(imgsz=size, conf=0.01, device="cpu", verbose=False, rect=False)
    found, wanted = (YOLO(f).predict([image] * batch, **settings) for f in (file, path))
    assert len(found) == len(wanted) == batch and len(wanted[0].boxes) > 0
    for a, b in zip(found, wanted):
        assert a.names == {0: "red", 1: "white", 2: "platelet"}
        torch.testing.assert_close(a.boxes.data, b.boxes.data, rtol=1e-3, atol=1e-2)


def test_exports_that_are_refused(checkpoint, monkeypatch):
    path = checkpoint("small")
    with pytest.raises(QCError, match="litert='int2' is not accepted; give 'int4' or 'int8'"):
        choose_litert_kind(YOLO(path), "int2")
    with pytest.raises(QCError, match="nms=False puts a top-k into the graph"):
        export(path, nms=False)
    with pytest.raises(QCError, match="quantize=8 would quantize this model a second time"):
        export(path, quantize=8)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "ai_edge_litert" else True)
    with pytest.raises(
        QCError, match=r"format='litert' needs ai_edge_litert.*: pip install 'yolo-qc-plugin\[litert\]'"
    ):
        export(path)


@pytest.mark.parametrize("target", [None, "litert"])
def test_what_is_trained_for_litert_keeps_its_specification(tmp_path, target, caplog):
    """No weight has the code -128."""
    (tmp_path / "small.yaml").write_text(SMALL)
    model = build(str(tmp_path / "small.yaml"), outputs=True, bits=8, per_channel=True, target=target)
    for _, conv in quant_convs(model):
        conv.weight_quant.scale.data /= 16  # which clips the largest weights
    file = ExportedLiteRT(export(write_trained(model, tmp_path / "best.pt", QCConfig(target=target), half=False)))
    assert min(codes.min() for codes in file.values.values()) == (-127 if target else -128)
    assert ("with the code -128" in caplog.text) == (target is None)


def test_a_kind_is_asked_of_its_own_format(checkpoint):
    yolo = YOLO(checkpoint("small"))
    choose_litert_kind(yolo, "int8")
    with pytest.raises(QCError, match="litert='int8' is not accepted with format='onnx'; leave it out"):
        yolo.export(format="onnx", imgsz=64, device="cpu")
    yolo = YOLO(checkpoint("small"))
    choose_onnx_kind(yolo, "int8")
    with pytest.raises(QCError, match="onnx='int8' is not accepted with format='litert'; leave it out"):
        yolo.export(format="litert", imgsz=64, device="cpu")


def test_a_dead_channel_of_a_large_shift(tmp_path):
    """Its shift is many steps of the output's grid, so that XNNPACK would take no scale of the whole of it."""
    (tmp_path / "small.yaml").write_text(SMALL)
    model = build(str(tmp_path / "small.yaml"), outputs=True)
    block = model.model[1]
    with torch.no_grad():
        block.bn.weight[3], block.bn.bias[3] = 0.0, -600 * block.act.quant.scale.item()
    snap(model, images(1))
    path = write_trained(model, tmp_path / "dead.pt", QCConfig(), half=False)
    for kind in LITERT_KINDS:
        graph = ExportedLiteRT(export(path, kind))
        found = compare_codes(deployed(path), graph, LITERT_RUNTIMES[0], images(2))
        assert found["steps"] <= (kind == "int4") and found["changed"] < MOVED, (kind, found)
        assert graph.differing_weights(deployed_convs(deployed(path))) == []


def test_two_views_of_one_tensor(tmp_path):
    """As it lies and transposed: each has its own order of values."""

    class Views(torch.nn.Module):
        def forward(self, x):
            x = x.relu()
            return torch.cat([x.flatten(1), x.transpose(2, 3).flatten(1), x.transpose(1, 2)[:, :2].flatten(1)], 1)

    x = images(1, (8, 8))
    inspect.unwrap(engine.torch2onnx)(Views(), x, str(tmp_path / "views.onnx"), 18)
    write_litert(tmp_path / "views.onnx", tmp_path / "views.tflite", {}, "int8")
    (found,) = exported.litert_session((tmp_path / "views.tflite").read_bytes(), LITERT_RUNTIMES[0])(x.numpy())
    assert np.array_equal(found, Views()(x).numpy())


def test_a_node_without_a_translation_is_named(tmp_path):
    (tmp_path / "gelu.yaml").write_text(SMALL + "activation: torch.nn.GELU()\n")
    model = build(str(tmp_path / "gelu.yaml"), outputs=True)
    write_trained(model, tmp_path / "gelu.pt", QCConfig(), half=False)
    with pytest.raises(QCError, match=r"format=litert cannot carry Erf \(.*\) of this model; accepted: format=onnx"):
        export(tmp_path / "gelu.pt")
    assert not list(tmp_path.glob("*.tflite"))


@pytest.mark.parametrize("content,message", [
    (None, "does not exist"),
    (b"not a model", "is no LiteRT model of Ultralytics"),
    ("half", "is no LiteRT model of Ultralytics"),
    ("without metadata", "is no LiteRT model of Ultralytics"),
    ("float", "has no quantized convolution"),
], ids=str)  # fmt: skip
def test_files_that_are_refused(family, tmp_path, content, message):
    _, file = family("small", "int8")
    bad = tmp_path / "bad.tflite"
    if content == "float":
        import zipfile

        flat = Flatbuffer("foreign")
        x = flat.tensor("x", [1, 3, 64, 64])
        bad.write_bytes(flat.finish([x], [flat.add("RELU", [x], flat.tensor("y", [1, 3, 64, 64]))]))
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(bad, "a") as new:
            new.writestr("metadata.json", old.read("metadata.json"))
    elif content is not None:
        whole = file.read_bytes()
        cut = {"half": whole[: len(whole) // 2], "without metadata": whole[: whole.rindex(b"PK\x03\x04")]}
        bad.write_bytes(cut.get(content, content))
    with pytest.raises(QCError, match=f"file={bad} {message}"):
        ExportedLiteRT(bad)


@pytest.mark.parametrize("found,reason", [
    (None, r"LiteRT is not installed: pip install 'yolo-qc-plugin\[litert\]'"),
    ("2.1.3", r"LiteRT 2\.1\.3 is too old for this file; install ai-edge-litert>=2\.1\.4"),
    ("2.0.0rc1", r"LiteRT 2\.0\.0rc1 is too old"),
])  # fmt: skip
def test_a_file_without_its_runtime_or_with_an_older_one(tmp_path, monkeypatch, found, reason):
    """It is refused; `benchmark` leaves such files out."""
    assert litert_obstacle() is None
    if found:
        monkeypatch.setattr(kinds.metadata, "version", lambda name: found)
    else:
        monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    with pytest.raises(QCError, match=rf"file=.*best\.tflite cannot be run: {reason}"):
        ExportedLiteRT(tmp_path / "best.tflite")
    file = File("ours int8", "litert", tmp_path, (), {"litert": "int8"})
    assert re.match(reason, _obstacle(file, tmp_path / "best.tflite", "ai_edge_litert"))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_reshape_that_moves_nothing(data):
    """Where `regrouped` finds an order, the file's own elements, in their places, are the reshaped tensor."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    factors = [p for n in shape for p in {1: [1], 2: [2], 3: [3], 4: [2, 2]}[n]]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    target = [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)])]
    x = np.arange(math.prod(shape)).reshape(shape)
    placed = x.transpose(order)
    found = regrouped(Tensor(0, tuple(shape), order), target)
    if order == tuple(range(len(shape))):
        assert found is not None
    if found is not None:
        assert sorted(found) == list(range(len(target)))
        wanted = x.reshape(target).transpose(found)
        assert np.array_equal(placed.reshape(wanted.shape), wanted)


@given(
    n=st.integers(7, 30),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 3),
    low=st.integers(0, 3),
    high=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_padding_is_left_to_litert_only_where_it_pads_alike(n, kernel, stride, low, high):
    """LiteRT's own SAME, on ones: the sum over a window counts the pixels inside the image."""
    geometry = Geometry((kernel, kernel), (stride, stride), (1, 1), (low, low, high, high))
    if not geometry.is_same(n, n):
        return
    flat = Flatbuffer("padding")
    x = flat.tensor("x", [1, n, n, 1])
    weight = flat.constant("w", np.ones((1, kernel, kernel, 1), np.float32))
    bias = flat.constant("b", np.zeros(1, np.float32))
    y = flat.tensor("y", [1, *geometry.sides(n, n), 1])
    options = dict(padding=flat.schema.Padding.SAME, strideH=stride, strideW=stride)
    content = flat.finish([x], [flat.add("CONV_2D", [x, weight, bias], y, "Conv2DOptions", **options)])
    run = interpreter.Interpreter(model_content=content)
    run.allocate_tensors()
    run.set_tensor(run.get_input_details()[0]["index"], np.ones((1, n, n, 1), np.float32))
    run.invoke()
    found = run.get_tensor(run.get_output_details()[0]["index"])[0, :, :, 0]
    padded = torch.nn.functional.pad(torch.ones(1, 1, n, n), (low, high, low, high))
    assert np.array_equal(
        found, torch.nn.functional.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)[0, 0]
    )


ODD = st.integers(32, 1023).map(lambda n: 2 * n + 1)


@given(st.tuples(ODD, ODD, ODD), st.tuples(*2 * [st.integers(0, 3)]), st.tuples(*3 * [st.integers(-128, 127)]))
@settings(max_examples=40, deadline=None)
def test_sums_of_codes_are_exact_where_they_are_written(odd, units, zero_points):
    """All pairs of codes, against whole numbers; grids as `snap` makes them are fine enough."""
    scales = odd[0] << units[0], odd[1] << units[1], odd[2]
    *inputs, out = (Grid(scale * 2.0**-12, zero_point) for scale, zero_point in zip(scales, zero_points))
    exact = adds_exactly(inputs, out)
    assert exact or max(scales) >= 2 * odd[2]
    if exact:
        codes = np.arange(-128, 128)
        a, b = ((codes - z) * scale for z, scale in zip(zero_points[:2], scales))
        sums = np.add.outer(a, b)
        wanted = np.clip((2 * sums + odd[2]) // (2 * odd[2]) + zero_points[2], -128, 127)
        assert np.array_equal(_added(codes.astype(np.int8), inputs, out), wanted)


def test_sums_at_thresholds_are_left_to_floats():
    assert not adds_exactly([Grid(3.0, 0), Grid(1.0, 0)], Grid(2.0, 0))  # halves
    assert not adds_exactly([Grid(1.0, 0), Grid(2.0**-8, 0)], Grid(1 - 2.0**-13, 0))  # 2^-14 of a step from one
    assert not adds_exactly([Grid(1.0, 0), Grid(2.0**-11, 0)], Grid(1 + 2.0**-5, 0))  # no ADD of XNNPACK's


def _added(codes, inputs, out):
    """Codes that XNNPACK makes of the sums of all pairs."""
    flat, n = Flatbuffer("sums"), len(codes)
    pair = [flat.tensor(name, [1, n, n, 1], grid) for name, grid in zip("ab", inputs)]
    y = flat.tensor("y", [1, n, n, 1], out)
    run = interpreter.Interpreter(model_content=flat.finish(pair, [flat.add("ADD", pair, y, "AddOptions")]))
    run.allocate_tensors()
    for details, given_codes in zip(run.get_input_details(), np.meshgrid(codes, codes, indexing="ij")):
        run.set_tensor(details["index"], given_codes.reshape(1, n, n, 1))
    run.invoke()
    return run.get_tensor(run.get_output_details()[0]["index"]).reshape(n, n)


@pytest.mark.parametrize("multiplier", [0.9, 0.4, 0.13, 0.021])
def test_what_rounds_twice(multiplier):
    """A built-in kernel's codes with the bias that `rounds_twice` asks for: none above, and fewer off than without."""
    sums, off = np.arange(-4000, 4000), {}
    for kind in ("INT8", "INT4"):  # of one kernel: the first without the correction
        codes = _built_in(sums - (kind == "INT4") * rounds_twice(np.array([multiplier])), multiplier)
        off[kind] = codes - np.clip(np.floor(sums * np.float32(multiplier) + 0.5), -128, 127)
    assert set(np.unique(off["INT8"])) <= {0, 1} and set(np.unique(off["INT4"])) <= {-1, 0}
    assert multiplier > 0.5 or (off["INT4"] != 0).sum() < (off["INT8"] != 0).sum()


def _built_in(sums, multiplier):
    """Codes that LiteRT's own convolution makes of sums, given as its biases."""
    flat, n = Flatbuffer("rounding"), len(sums)
    x = flat.tensor("x", [1, 1, 1, 1], Grid(1.0, 0))
    weight = flat.constant("w", np.zeros((n, 1, 1, 1), np.int8), scale=np.ones(n, np.float32))
    bias = flat.constant("b", sums.astype(np.int32), scale=np.ones(n, np.float32))
    y = flat.tensor("y", [1, 1, 1, n], Grid(1.0 / multiplier, 0))
    flat.add("CONV_2D", [x, weight, bias], y, "Conv2DOptions", padding=1, strideH=1, strideW=1)
    run = interpreter.Interpreter(
        model_content=flat.finish([x], [y]),
        experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    run.allocate_tensors()
    run.invoke()
    return run.get_tensor(run.get_output_details()[0]["index"]).reshape(-1).astype(int)
