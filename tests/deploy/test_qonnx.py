# yolo_qc_plugin, AGPL-3.0
"""The qonnx kind: the trained widths are in the graph, its codes are the model's, and the qonnx package runs it."""

import shutil
from pathlib import Path

import pytest
import torch
from test_fold import build
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import choose_onnx_kind, model_yaml
from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.exported_qonnx import ExportedQONNX, open_onnx
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.host.record import QuantRecord

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OUTPUT = 1e-4  # of the largest output: FP32 rounding of decoded boxes
FAMILIES = {"yolov5n.yaml": {"act_bits": 8}, "yolov8n.yaml": {"bits": 3}, "yolov7-tiny": {"bits": 2, "act_bits": 6}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a family: exported(name) -> (model in the deployed form, file)."""

    def write(name, imgsz=64):
        path = tmp_path_factory.mktemp("family") / "model.pt"
        yaml = model_yaml(name) if name == "yolov7-tiny" else name
        model = build(yaml, outputs=True, act_offset=False, per_channel=True, **FAMILIES[name])
        model.names, model.qc = {0: "red", 1: "white", 2: "platelet"}, QuantRecord(QCConfig(target="fpga").to_dict())
        torch.save({"model": model.half(), "train_args": {"imgsz": 64, "task": "detect"}}, path)
        file = YOLO(path).export(format="onnx", imgsz=imgsz, device="cpu")
        return load_checkpoint(path)[0].float().fuse(verbose=False), Path(file)

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_and_codes(exported, name):
    """Written for target fpga without being asked; every Quant has the width that was trained."""
    model, file = exported(name)
    graph, layers = open_onnx(file), deployed_convs(model)
    assert graph.kind == "qonnx" and graph.weights.keys() == layers.keys() and graph.differing_weights(layers) == []
    writer = {n.output[0]: n for n in graph.model.graph.node}
    for conv in (n for n in graph.model.graph.node if n.op_type == "Conv" and n.input[1] in writer):
        x, weight = writer[conv.input[0]], writer[conv.input[1]]
        layer = layers[weight.output[0].removesuffix(".weight")]
        assert (x.op_type, weight.op_type) == ("Quant", "Quant")
        assert graph.values[weight.input[3]] == layer.bits and graph.values[x.input[3]] == layer.act_quant.bits
        assert graph.values[weight.input[1]].shape == (layer.out_channels, 1, 1, 1)
    known = {n.name for n in graph.model.graph.value_info}
    assert all(out in known for n in graph.model.graph.node[:-1] for out in n.output)  # shapes
    found = compare_codes(model, graph, "onnxruntime", torch.rand(1, 3, 64, 64))
    assert found["steps"] == found["changed_end_to_end"] == 0 and len(graph.outputs) > 20


def test_the_qonnx_package_runs_cleans_and_counts(exported, tmp_path):
    pytest.importorskip("qonnx", reason="qonnx, of the extra fpga, is missing")
    from qonnx.util.cleanup import cleanup

    model, file = exported("yolov7-tiny", (64, 96))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        largest = model(x)[0].abs().max().item()
    found = compare_codes(model, open_onnx(file), "qonnx", x)
    assert found["steps"] == found["changed_end_to_end"] == 0 and found["output"] < OUTPUT * largest
    clean = tmp_path / "clean.onnx"
    cleanup(str(file), out_file=str(clean))
    assert len(onnx.load(clean).graph.node) <= len(onnx.load(file).graph.node)
    cost = open_onnx(file).cost()
    layers = deployed_convs(model).values()
    assert cost["weight_bits"] == sum(m.weight_codes.numel() * m.bits for m in layers) + 32 * 16  # DFL's in float
    assert 2 * 6 < cost["bops"] / cost["macs"] < 64


def test_a_changed_width_is_seen(exported, tmp_path):
    model, file = exported("yolov5n.yaml")
    changed = onnx.load(file)
    width = next(i for i in changed.graph.initializer if i.name.endswith("model.2.cv1.conv.weight_bits"))
    width.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(width) - 1, width.name))
    other = shutil.copy(file, tmp_path / "changed.onnx")
    onnx.save(changed, other)
    assert compare_codes(model, ExportedQONNX(other), "onnxruntime", torch.rand(1, 3, 64, 64))["steps"] > 1


def test_batches_of_any_size_are_not_for_the_qonnx_package(exported, tmp_path):
    _, file = exported("yolov5n.yaml")
    yolo = YOLO(file.with_suffix(".pt"))
    choose_onnx_kind(yolo, "qonnx")
    graph = open_onnx(Path(yolo.export(format="onnx", imgsz=64, dynamic=True, device="cpu")))
    assert "any size" in graph.obstacle("qonnx") and graph.obstacle("onnxruntime") is None
