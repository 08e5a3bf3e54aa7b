# yolo_qc_plugin, AGPL-3.0
"""The qonnx kind: the trained widths are in the graph, its codes are the model's, and the qonnx package runs it."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fold import build, write_trained
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import model_yaml
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy.codes import compare_codes
from yolo_qc_plugin.deploy.exported_qonnx import open_onnx
from yolo_qc_plugin.deploy.fold import deployed_convs
from yolo_qc_plugin.report.record import described, operations
from yolo_qc_plugin.targets import TARGETS

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

OUTPUT = 1e-4  # of the largest output: FP32 rounding of decoded boxes
OPTIONS = QCConfig.from_options({"target": "fpga"})
FLIPPED = 1e-4  # share of codes: outputs are float, so that a value may lie at a threshold
FAMILIES = {"yolov5n.yaml": {"act_bits": 8}, "yolov8n.yaml": {"bits": 3}, "yolov7-tiny": {"bits": 2, "act_bits": 6}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a family, once: exported(name) -> (model in the deployed form, file)."""

    @cache
    def write(name, imgsz=64):
        yaml = model_yaml(name) if name == "yolov7-tiny" else name
        model = build(yaml, **TARGETS["fpga"].fills, **FAMILIES[name])
        path = write_trained(model, tmp_path_factory.mktemp("family") / "model.pt", OPTIONS)
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
    assert found["steps"] <= 1 and found["changed"] < FLIPPED
    zero_points = [float(graph.values[n.input[2]]) for n in graph.model.graph.node if n.op_type == "Quant"]
    assert zero_points and not any(zero_points)  # which FINN would refuse


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clean_up_of_the_qonnx_package_keeps_every_quantizer(exported, tmp_path, name):
    """It infers all shapes once more and folds what it can; grids and widths stay."""
    pytest.importorskip("qonnx", reason="needs the extra fpga")
    from qonnx.util.cleanup import cleanup

    _, file = exported(name)
    cleanup(str(file), out_file=str(tmp_path / "clean.onnx"))
    before, after = (onnx.load(path).graph for path in (file, tmp_path / "clean.onnx"))
    grids = []
    for graph in (before, after):  # whose tensors have other names
        values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        quants = [n for n in graph.node if n.op_type == "Quant"]
        grids.append(sorted(str([values[name].tolist() for name in n.input[1:]]) for n in quants))
    assert len(grids[0]) > 100 and grids[0] == grids[1]
    assert len(after.node) <= len(before.node)


def test_the_qonnx_package_runs_and_counts(exported):
    pytest.importorskip("qonnx", reason="needs the extra fpga")

    model, file = exported("yolov7-tiny", (64, 96))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        largest = model(x)[0].abs().max().item()
    found = compare_codes(model, open_onnx(file), "qonnx", x)
    assert found["steps"] <= 1 and found["changed"] < FLIPPED
    assert found["changed_end_to_end"] or found["output"] < OUTPUT * largest
    cost = open_onnx(file).cost()
    layers = deployed_convs(model).values()
    assert cost["weight_bits"] == sum(m.weight_codes.numel() * m.bits for m in layers) + 32 * 16  # DFL's in float
    trained, _ = load_checkpoint(file.with_suffix(".pt"))
    ours = operations(described(trained.float(), x))
    float_macs = 16 * 4 * (8 * 12 + 4 * 6 + 2 * 3)  # DFL's, which weighs 16 bins of 4 sides at each place
    assert 2 * 6 < cost["bops"] / cost["macs"] < 64
    assert cost["macs"] == ours["macs"] + float_macs and cost["bops"] == ours["bops"] + 32 * 32 * float_macs


def test_a_changed_width_is_seen(exported, tmp_path):
    model, file = exported("yolov5n.yaml")
    changed = onnx.load(file)
    weight = next(n for n in changed.graph.node if "model.2.cv1.conv.weight" in n.output)
    changed.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "narrower"))
    weight.input[3] = "narrower"
    other = tmp_path / "changed.onnx"
    onnx.save(changed, other)
    assert compare_codes(model, open_onnx(other), "onnxruntime", torch.rand(1, 3, 64, 64))["steps"] > 1


def test_batches_of_any_size_are_refused(exported):
    _, file = exported("yolov5n.yaml")
    with pytest.raises(QCError, match="dynamic=True is not accepted for the qonnx kind"):
        YOLO(file.with_suffix(".pt")).export(format="onnx", imgsz=64, dynamic=True, device="cpu")
