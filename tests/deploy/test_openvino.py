# yolo_qc_plugin, AGPL-3.0
"""What is trained for OpenVINO: the same codes in every runtime, and nothing between two convolutions in OpenVINO."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fold import build, write_trained
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import choose_onnx_kind
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.exported import RUNTIMES, ExportedONNX
from yolo_qc_plugin.deploy.fold import FixedQuantizer
from yolo_qc_plugin.deploy.nodes import links, moves
from yolo_qc_plugin.quant.activations import HeadOutput, RoundedSiLU

pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")
ov = pytest.importorskip("openvino", reason="needs the extra export")

FAMILIES = ("yolov5n.yaml", "yolov8n.yaml")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
LAYER = ("layerType", "originalLayersNames", "primitiveType")
INTEGERS = (ov.Type.i4, ov.Type.i8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a family: exported(yaml, target, format) -> (checkpoint, file)."""

    @cache
    def write(yaml, target="openvino", format="onnx"):
        config = QCConfig.from_options({"target": target, "scale_init": "lsq"})
        model = build(yaml, outputs=True, **{name: getattr(config, name) for name in ("target", "per_channel")})
        path = write_trained(model, tmp_path_factory.mktemp("openvino") / "model.pt", config)
        return path, Path(YOLO(path).export(format=format, imgsz=64, device="cpu"))

    return write


def images(count=2):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("yaml", FAMILIES)
def test_all_codes_agree_end_to_end(exported, yaml, runtime):
    path, file = exported(yaml)
    graph = ExportedONNX(file)
    model, _ = load_checkpoint(path)
    model.float().fuse(verbose=False)
    assert graph.kind == "openvino" and len(graph.outputs) > 50
    assert sum(isinstance(m, (RoundedSiLU, HeadOutput)) for m in model.modules()) == len(graph.outputs)
    found = compare_codes(model, graph, runtime, images())
    assert found["changed_end_to_end"] == found["changed"] == found["steps"] == 0, found


@pytest.mark.parametrize("name", ["per_step", "step", "low", "high"])
def test_the_comparison_sees_a_changed_grid(exported, tmp_path, name):
    """Of one layer's output."""
    import onnx

    path, file = exported("yolov5n.yaml")
    model = onnx.load(file)
    chain = [next(n for n in model.graph.node if n.op_type == "Clip")]
    for node in model.graph.node:
        chain += [node] if node.input[0] == chain[0].output[0] else []
    before = {out: n for n in model.graph.node for out in n.output}
    per_step = before[before[chain[0].input[0]].input[0]]
    read = {"per_step": (per_step, 1), "low": (chain[0], 1), "high": (chain[0], 2), "step": (chain[1], 1)}
    node, i = read[name]
    values = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    changed = values[node.input[i]] + 100 if name == "low" else values[node.input[i]] / 2
    model.graph.initializer.append(onnx.numpy_helper.from_array(changed.astype(np.float32), "changed"))
    node.input[i] = "changed"
    onnx.save(model, tmp_path / "changed.onnx")
    model, _ = load_checkpoint(path)
    model.float().fuse(verbose=False)
    assert compare_codes(model, ExportedONNX(tmp_path / "changed.onnx"), "onnxruntime", images())["changed"] > 0


@pytest.mark.parametrize("yaml", FAMILIES)
def test_openvino_computes_grids_and_silu_in_the_convolution(exported, yaml):
    """No Round is in a node of its own, and all quantized convolutions are of integers."""
    _, file = exported(yaml)
    within, apart, integers = rounds_in_openvino(file)
    assert apart == 0 and within > 1.9 * len(ExportedONNX(file).outputs) > 100
    assert integers == len(ExportedONNX(file).codes)


@pytest.mark.parametrize("yaml", FAMILIES)
def test_what_moves_values_moves_codes(exported, yaml):
    """Behind a quantizer, and none follows; but for what is added up, or is on the way to the head's outputs."""
    import onnx

    path, file = exported(yaml)
    graph = onnx.load(file).graph
    sources, readers = links(graph)
    pools = [n for n in graph.node if n.op_type in {"MaxPool", "Resize"}]
    read = {out: [n.op_type for n in found] for out, found in readers.items()}
    joins = [n for n in graph.node if n.op_type == "Concat" and "Conv" in read.get(n.output[0], [])]
    splits = [n for n in graph.node if n.op_type == "Split" and all(out in readers for out in n.output)]
    residuals = [n for n in splits if any("Add" in read[out] for out in n.output)]
    assert len(pools) == 5 and len(joins) == 13 and (len(splits), len(residuals)) == ((8, 4) if "8" in yaml else (0, 0))
    for node in (*pools, *joins, *(n for n in splits if n not in residuals)):
        for x in node.input if node.op_type == "Concat" else node.input[:1]:
            assert sources[x].op_type == "DequantizeLinear" or moves(sources[x]), (node.name, x)
    of_packed = copy_as(path, "packed")
    assert quantizers(file) < quantizers(of_packed) and subgraphs(file) < subgraphs(of_packed)


@pytest.mark.parametrize("mode,moved", [("nearest", True), ("linear", False), ("cubic", False)])
def test_what_is_enlarged_by_new_values_is_not_moved(mode, moved):
    from onnx import helper

    assert moves(helper.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode)) is moved


def copy_as(path, kind):
    """A file of another kind."""
    copy = shutil.copy(path, path.with_name(f"{kind}.pt"))
    yolo = YOLO(copy)
    choose_onnx_kind(yolo, kind)
    return Path(yolo.export(format="onnx", imgsz=64, device="cpu"))


def quantizers(file):
    """Of an ONNX file."""
    import onnx

    return sum(n.op_type == "QuantizeLinear" for n in onnx.load(file).graph.node)


def subgraphs(file):
    """What OpenVINO computes in passes of its own: elementwise, behind no convolution."""
    ops = ov.compile_model(str(file), "CPU", F32).get_runtime_model().get_ordered_ops()
    return sum(node.rt_info["layerType"].astype(str) == "Subgraph" for node in ops)


@pytest.mark.parametrize("edge_bits,floats", [(None, 0), (8, 7)])
def test_all_convolutions_of_a_model_for_cpus_are_of_integers(tmp_path, edge_bits, floats):
    """Those of the head too; weights of 8 bits, which edges get where that is asked for, are computed in float."""
    config = QCConfig.from_options({"target": "cpu", "edge_bits": edge_bits})
    model = build("yolov5n.yaml", outputs=True, scale_init="mse", target="cpu", edge_bits=edge_bits)
    path = write_trained(model, tmp_path / "model.pt", config)
    file = Path(YOLO(path).export(format="onnx", imgsz=64, device="cpu"))
    *_, integers = rounds_in_openvino(file)
    assert integers == len(ExportedONNX(file).codes) - floats == 75 - floats


def rounds_in_openvino(file):
    """Of an ONNX file in OpenVINO: Rounds within convolutions, nodes of others, and convolutions of integers."""
    import onnx

    op = {out: n.op_type for n in onnx.load(file).graph.node for out in n.output}
    within = apart = integers = 0
    for node in ov.compile_model(str(file), "CPU", F32).get_runtime_model().get_ordered_ops():
        kind, names, primitive = (node.rt_info[key].astype(str) for key in LAYER)
        rounds = sum(op.get(name) == "Round" for name in names.split(","))
        within, apart = within + rounds * (kind == "Convolution"), apart + (rounds > 0) * (kind != "Convolution")
        integers += kind == "Convolution" and primitive.upper().endswith("I8")
    return within, apart, integers


def test_the_folder_packs_weights_and_computes_the_same(exported):
    path, file = exported("yolov5n.yaml")
    _, folder = exported("yolov5n.yaml", format="openvino")
    (xml,) = folder.glob("*.xml")
    model = ov.Core().read_model(xml)
    constants = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    counts = {kind: sum(int(np.prod(c.shape)) for c in constants if c.get_element_type() == kind) for kind in INTEGERS}
    weights = sum(m.numel() for m in load_checkpoint(path)[0].float().state_dict().values() if m.dim() == 4)
    assert counts[ov.Type.i4] > 0.9 * weights and counts[ov.Type.i8] < 0.1 * weights
    image = images(1).numpy()
    found = [ov.compile_model(str(f), "CPU", F32)([image])[0] for f in (file, xml)]
    assert np.array_equal(*found)
    assert len(YOLO(folder).predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)) == 1


@pytest.mark.parametrize("target,arguments,message", [
    ("cpu", dict(format="onnx", kind="openvino"), "onnx='openvino' is for a model .* qc_target=openvino"),
    ("openvino", dict(format="litert"), "format='litert' computes SiLU in integers, .* qc_target=litert"),
    ("openvino", dict(format="onnx", kind="tensorrt"), "TensorRT takes INT8 codes .* with callbacks=qc qc_target"),
])  # fmt: skip
def test_what_another_target_was_trained_for_is_refused(exported, tmp_path, target, arguments, message):
    from yolo_qc_plugin.run.export import choose_kinds

    checkpoint = shutil.copy(exported("yolov5n.yaml", target)[0], tmp_path / "model.pt")
    yolo, kind = YOLO(checkpoint), arguments.pop("kind", None)
    if kind:
        choose_kinds(yolo, onnx=kind)
    with pytest.raises(QCError, match=message):
        yolo.export(imgsz=64, device="cpu", **arguments)
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt"]


def test_rounded_silu_has_a_lower_bound(tmp_path):
    """So that narrow inputs behind it need no Max of their own, but where a sum comes between."""
    made = {}
    for target in ("cpu", "openvino"):
        path = write_trained(build("yolov5n.yaml", outputs=True, act_bits=4, target=target), tmp_path / f"{target}.pt")
        yolo = YOLO(path)
        choose_onnx_kind(yolo, {"cpu": "packed"}.get(target, target))
        graph = ExportedONNX(Path(yolo.export(format="onnx", imgsz=64, device="cpu")))
        made[target] = sum(n.op_type == "Max" for n in graph.model.graph.node)
    assert made["openvino"] <= made["cpu"] + 2


def test_other_kinds_are_right_though_slow(exported):
    """The packed kind of the same model has the same codes."""
    path, _ = exported("yolov5n.yaml")
    yolo = YOLO(shutil.copy(path, path.with_name("packed.pt")))
    choose_onnx_kind(yolo, "packed")
    graph = ExportedONNX(Path(yolo.export(format="onnx", imgsz=64, device="cpu")))
    model, _ = load_checkpoint(path)
    model.float().fuse(verbose=False)
    found = compare_codes(model, graph, "onnxruntime", images())
    assert graph.kind == "packed" and found["changed_end_to_end"] == 0
    _, apart, _ = rounds_in_openvino(graph.path)
    assert apart > 20  # SiLU behind Q -> DQ is a node of its own


def test_grids_that_simplifying_shortens(tmp_path):
    """A step of 1 is a product by 1, which onnxslim takes out; and narrow grids, whose codes have other bounds."""

    built = build("yolov5n.yaml", outputs=4, target="openvino")
    path = write_trained(built, tmp_path / "model.pt", QCConfig())
    yolo = YOLO(path)
    choose_onnx_kind(yolo, "openvino")
    graph = ExportedONNX(Path(yolo.export(format="onnx", imgsz=64, device="cpu", simplify=True)))
    model, _ = load_checkpoint(path)
    model.float().fuse(verbose=False)
    assert graph.kind == "openvino" and len(graph.lowest) == 75 and not graph.outputs
    assert any(m.scale == 1 for m in model.modules() if isinstance(m, FixedQuantizer))
    found = compare_codes(model, graph, "onnxruntime", images())
    assert found["changed_end_to_end"] == found["steps"] == 0, found
