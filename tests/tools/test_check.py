# yolo_qc_plugin, AGPL-3.0
"""Parity of a checkpoint and its exported file: it holds, it is noticed where it does not, bad files are refused."""

import importlib
import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT, TINY
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_qc_plugin import add_qc_callbacks, choose_litert_kind, choose_onnx_kind
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.coco.metrics import coco_metrics
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.deploy import kinds
from yolo_qc_plugin.deploy.exported_qonnx import open_onnx
from yolo_qc_plugin.deploy.fold import FixedQuantizer, deployed_convs
from yolo_qc_plugin.deploy.nodes import pack4
from yolo_qc_plugin.deploy.snap import MULTIPLIER_BITS
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.quant.taps import taps
from yolo_qc_plugin.tools.accuracy import Accuracy, is_as_accurate, measure
from yolo_qc_plugin.tools.check import check, format_check
from yolo_qc_plugin.tools.evaluate import evaluate, takes_oblong

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

checking = importlib.import_module("yolo_qc_plugin.tools.check")  # of the package it is the function

FINDS = 0.05  # AP of a model that finds digits: below, all figures could be 0 and equal


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A quantized checkpoint of one short epoch that finds digits, and its file of the packed kind."""
    folder = tmp_path_factory.mktemp("trained")
    model = YOLO(FLOAT)
    add_qc_callbacks(model, bits=4, budget=None)
    options = {**TINY, "nbs": 8, "optimizer": "Adam", "lr0": 1e-3, "mosaic": 0.0}
    model.train(data=str(digits), project=str(folder), name="run", **options)
    checkpoint = folder / "best.pt"
    shutil.copy(folder / "run" / "weights" / "best.pt", checkpoint)
    return checkpoint, YOLO(checkpoint).export(format="onnx", imgsz=64, device="cpu")


def test_a_file_of_ours_passes(trained, digits, tmp_path, capsys):
    checkpoint, file = trained
    target = tmp_path / "check.json"
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={digits}", f"json={target}", "images=4"]) == 0
    assert "passed" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert result["weights"] == [] and result["images"] == 4 and result["imgsz"] == 64
    assert result["checkpoint"]["AP"] == pytest.approx(result["pytorch"]["AP"], abs=1e-4)
    assert result["checkpoint"]["steps"] == result["checkpoint"]["changed_end_to_end"] == 0
    assert result["pytorch"]["AP"] > FINDS
    for runtime in result["runtimes"]:
        if "skipped" not in runtime:
            # what snapping is for: all codes agree, end to end; boxes differ in their last digits, so AP hardly does
            assert runtime["steps"] == 0 and runtime["changed_end_to_end"] == 0 and runtime["points"] < 0.01, runtime


def test_a_checkpoint_that_computes_something_else_fails(trained, digits, monkeypatch):
    """Than its own deployed form: the first row is of what was trained, fake-quantized. All is computed on the CPU."""
    checkpoint, file = trained
    load, measure, devices = checking._load_quantized, checking.measure, []
    monkeypatch.setattr(checking, "measure", lambda yolo, s: devices.append(s["device"]) or measure(yolo, s))

    def changed(*args):
        yolo, fake_quantized = load(*args)
        with torch.no_grad():
            next(conv for name, conv in quant_convs(fake_quantized) if name == "model.2.cv1.conv").weight.neg_()
        return yolo, fake_quantized

    monkeypatch.setattr(checking, "_load_quantized", changed)
    result = check(checkpoint, file, digits, images=1)
    assert (
        not result["passed"] and not result["weights"] and result["checkpoint"]["AP"] < result["pytorch"]["AP"] - 0.01
    )
    assert all(r.get("steps", 0) == 0 for r in result["runtimes"])
    assert result["checkpoint"]["steps"] > 1 and result["checkpoint"]["changed_end_to_end"] > 0.01
    assert result["checkpoint"]["intervals"]["AP"][1] < 0 and "points are more than chance" in format_check(result)
    assert len(devices) > 2 and set(devices) == {"cpu"}


def test_an_image_that_finds_nothing_is_not_chance(trained, digits, monkeypatch):
    """As trained; in resamples without it there is no difference, so that 0 is the end of the interval."""
    checkpoint, file = trained
    measured: list[Accuracy] = []

    def without_one_image(yolo, settings):
        found = measure(yolo, settings)
        if len(measured) == 1:
            kept = [d for d in found.detections if d["image_id"] != 1]
            found = replace(
                found, detections=kept, figures={**found.figures, "AP": coco_metrics(found.truth, kept)["AP"]}
            )
        measured.append(found)
        return found

    monkeypatch.setattr(checking, "measure", without_one_image)
    result = check(checkpoint, file, digits, images=1)
    low, high = result["checkpoint"]["intervals"]["AP"]
    assert result["checkpoint"]["points"] > 0.1 and low < 0 == high and not result["passed"], result["checkpoint"]
    assert all("intervals" not in r for r in result["runtimes"])
    found = format_check(result)
    assert f"checkpoint: {result['checkpoint']['points']:.2f} points are more than chance: 95% of" in found
    assert "FAILED (accepted: 1 step layer by layer over 1 images, 0.1 points of the main figures, or chance)" in found


def test_a_file_that_is_not_square_passes(trained, digits, tmp_path):
    """PyTorch sees the images that Ultralytics itself gives such a file."""
    checkpoint = shutil.copy(trained[0], tmp_path / "best.pt")
    file = YOLO(checkpoint).export(format="onnx", imgsz=[64, 96], device="cpu")
    if not takes_oblong():
        with pytest.raises(QCError, match=r"imgsz=\[64, 96\] is not square, which ultralytics .* cannot validate"):
            check(checkpoint, file, digits, images=2)
        return
    result = check(checkpoint, file, digits, images=2)
    assert result["passed"] and result["imgsz"] == [64, 96] and result["pytorch"]["AP"] > FINDS
    assert all(r["changed_end_to_end"] == 0 for r in result["runtimes"] if "skipped" not in r)
    stock = evaluate(file, digits)
    assert stock["imgsz"] == [64, 96] and stock["coco"]["bbox"]["AP"] == result["runtimes"][0]["AP"]
    assert evaluate(checkpoint, digits, imgsz=96, rect=False)["coco"]["bbox"]["AP"] != result["pytorch"]["AP"]


def test_without_an_object_accuracy_is_not_compared(trained, digits, tmp_path, capsys):
    checkpoint, file = trained
    bare = shutil.copytree(digits.parent, tmp_path / "bare")
    shutil.rmtree(bare / "labels" / "val")
    data = bare / digits.name
    data.write_text(digits.read_text().replace(str(digits.parent), str(bare)))
    for cache in bare.rglob("*.cache"):
        cache.unlink()
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={data}", "images=1"]) == 0
    said = capsys.readouterr().out
    assert (
        f"no object in the labels of {data}: accuracy was not compared" in said and " 0.00 " not in said.split("\n")[3]
    )
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={data}", "images=0"]) == 1
    assert "images=0 is not accepted" in capsys.readouterr().err
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={bare / 'images'}"]) == 1
    assert f"data={bare / 'images'} is a folder; give a data YAML" in capsys.readouterr().err
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={bare}", "images=1"]) == 0  # with a YAML in it


@pytest.mark.skipif(not takes_oblong(), reason="this Ultralytics cannot validate an oblong file")
def test_the_int4_kind_passes_without_openvino(trained, digits, tmp_path):
    checkpoint = tmp_path / "best.pt"
    shutil.copy(trained[0], checkpoint)
    model = YOLO(checkpoint)
    choose_onnx_kind(model, "int4")
    # as wide as it takes for a file of 100 kB: Ultralytics refuses to write smaller ones
    result = check(checkpoint, model.export(format="onnx", imgsz=[64, 640], device="cpu"), digits, images=2)
    assert result["passed"] and "skipped" in result["runtimes"][-1] and "skipped" not in result["runtimes"][0]
    assert result["runtimes"][0]["AP"] > FINDS


def test_openvino_gets_the_integer_graph(trained, digits, tmp_path):
    """`format=openvino` as Ultralytics names it: all but 8-bit edges and DFL run on 8-bit codes, and it predicts."""
    openvino = pytest.importorskip("openvino", reason="needs the extra export")
    checkpoint = tmp_path / "best.pt"
    shutil.copy(trained[0], checkpoint)
    folder = YOLO(checkpoint).export(format="openvino", imgsz=64, device="cpu")
    compiled = openvino.compile_model(f"{folder}/best.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) == "Convolution":
            kinds.append(info["runtimePrecision"].astype(str))
    # weights of large codes, which would overflow in pairs on some processors, are computed in float
    layers = deployed_convs(YOLO(checkpoint).model.float().fuse(verbose=False)).values()
    edges = sum(layer.bits == 8 for layer in layers)
    assert edges and len(kinds) == len(layers) + 1 and kinds.count("u8") == len(layers) - edges
    assert len(YOLO(folder)(str(digits.parent / "images" / "val"), imgsz=64, verbose=False)) == 8


@pytest.mark.parametrize("what", ["weight_codes", "weight_scale"])
def test_a_changed_file_fails(trained, digits, tmp_path, what):
    """One code, or one scale, of one layer."""
    checkpoint, file = trained
    model = onnx.load(file)
    name = f"model.2.cv1.conv.{what}{'_packed' * (what == 'weight_codes')}"
    value = next(i for i in model.graph.initializer if i.name == name)
    if what == "weight_codes":
        value.raw_data = bytes([value.raw_data[0] ^ 1]) + value.raw_data[1:]  # two codes of 4 bits a byte
    else:
        value.CopyFrom(onnx.numpy_helper.from_array(3 * onnx.numpy_helper.to_array(value), name))
    changed = tmp_path / "changed.onnx"
    onnx.save(model, changed)
    assert main(["check", f"model={checkpoint}", f"file={changed}", f"data={digits}", "images=1"]) == 1
    result = check(checkpoint, changed, digits, images=1)
    assert not result["passed"] and result["weights"] == (["model.2.cv1.conv"] if what == "weight_codes" else [])
    assert what == "weight_codes" or result["runtimes"][0]["steps"] > 1


@pytest.mark.parametrize("imgsz", [64, [64, 96]], ids=str)
def test_a_litert_file_passes(trained, digits, tmp_path, small_files, imgsz):
    """With XNNPACK all codes are PyTorch's; LiteRT's own kernels are a step off at most."""
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    if not takes_oblong() and imgsz != 64:
        pytest.skip("this Ultralytics cannot validate an oblong file")
    model = YOLO(shutil.copy(trained[0], tmp_path / "best.pt"))
    choose_litert_kind(model, "int8")
    file = model.export(format="litert", imgsz=imgsz, device="cpu")
    result = check(tmp_path / "best.pt", file, digits, images=2)
    xnnpack, built_in = result["runtimes"]
    assert result["weights"] == [] and result["imgsz"] == imgsz and result["pytorch"]["AP"] > FINDS
    assert xnnpack["changed_end_to_end"] == xnnpack["steps"] == 0 and xnnpack["points"] < 0.01, xnnpack
    assert built_in["steps"] <= 1 and built_in["changed"] < 0.05, built_in
    assert result["passed"] == is_as_accurate(built_in, 0.3)
    assert evaluate(file, digits)["coco"]["bbox"]["AP"] == xnnpack["AP"]  # Ultralytics' own validation of the file


def test_a_qonnx_file_passes(digits, tmp_path, small_files):
    """Trained for FPGAs; where the qonnx package is, it runs the first images, and their outputs are the model's."""
    model = YOLO(FLOAT)
    add_qc_callbacks(model, target="fpga", budget=None)
    options = {**TINY, "nbs": 8, "optimizer": "Adam", "lr0": 1e-3, "mosaic": 0.0}
    model.train(data=str(digits), project=str(tmp_path), name="run", **options)
    best = tmp_path / "run" / "weights" / "best.pt"
    result = check(best, YOLO(best).export(format="onnx", imgsz=64, device="cpu"), digits, images=2)
    assert result["passed"] and result["weights"] == [] and result["pytorch"]["AP"] > FINDS
    own, *others = result["runtimes"]
    assert own["name"] == "onnxruntime" and own["AP"] == pytest.approx(result["pytorch"]["AP"], abs=1e-3)
    judged = [r for r in (own, *others) if "skipped" not in r]
    assert len(judged) == 1 + (find_spec("qonnx") is not None) and bool(result["cost"]) == (len(judged) == 2)
    for runtime in judged:
        flipped = runtime["changed_end_to_end"] > 0  # outputs are float, so that a value may lie at a threshold
        assert runtime["steps"] <= 1 and (flipped or runtime["output"] < 1e-4 * 64), runtime


def test_a_changed_litert_file_fails(trained, digits, tmp_path, small_files):
    """One code of one layer."""
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    from yolo_qc_plugin.deploy.litert.exported import ExportedLiteRT

    checkpoint = shutil.copy(trained[0], tmp_path / "best.pt")
    file = Path(YOLO(checkpoint).export(format="litert", imgsz=64, device="cpu"))
    graph, layer = ExportedLiteRT(file), "model.2.cv1.conv"
    tensor = next(t for t in graph.graph.tensors if t.name.decode() == f"{layer}.weight_codes")
    codes = bytes(graph.model.buffers[tensor.buffer].data)
    content = file.read_bytes()
    assert content.count(codes) == 1
    file.write_bytes(content.replace(codes, bytes([codes[0] ^ 1]) + codes[1:]))
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={digits}", "images=1"]) == 1
    result = check(checkpoint, file, digits, images=1)
    assert not result["passed"] and result["weights"] == [layer]


def test_a_model_for_tensorrt_passes(digits, tmp_path, small_files):
    """Its residual sums have quantizers of their own, and its outputs lie anywhere: a code may flip by one step."""
    model = YOLO(FLOAT)
    add_qc_callbacks(model, target="tensorrt", weight_bits=4, correction="off")
    model.train(**TINY, data=str(digits), project=str(tmp_path), name="run")
    checkpoint = tmp_path / "run" / "weights" / "best.pt"
    result = check(checkpoint, YOLO(checkpoint).export(format="onnx", imgsz=64, device="cpu"), digits, images=2)
    assert result["weights"] == [] and result["pytorch"]["AP"] > FINDS
    assert result["checkpoint"]["AP"] == pytest.approx(result["pytorch"]["AP"], abs=1e-2)  # flips change AP a little
    assert result["checkpoint"]["steps"] <= 1 and result["checkpoint"]["changed"] < 1e-3
    assert all(r["steps"] <= 1 and r["changed"] < 1e-3 for r in result["runtimes"] if "skipped" not in r)


def test_a_model_for_litert_has_the_same_codes(digits, tmp_path, small_files):
    """What is concatenated is on one grid; codes are the same in ONNX and in LiteRT."""
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    model = YOLO(FLOAT)
    add_qc_callbacks(model, target="litert", weight_bits=4)
    model.train(**TINY, data=str(digits), project=str(tmp_path), name="run")
    checkpoint = tmp_path / "run" / "weights" / "best.pt"
    for options in {"format": "onnx"}, {"format": "litert"}:
        exporting = YOLO(checkpoint)
        if options["format"] == "litert":
            choose_litert_kind(exporting, "int8")
        result = check(checkpoint, exporting.export(**options, imgsz=64, device="cpu"), digits, images=2)
        assert result["weights"] == []
        assert result["checkpoint"]["AP"] == result["pytorch"]["AP"] > FINDS
        first = result["runtimes"][0]
        assert first["changed_end_to_end"] == first["points"] == 0, first


def test_a_model_for_litert_passes(digits, tmp_path, small_files):
    """What its residual sums add has grids of its own: codes are the same in ONNX, and in LiteRT, which adds codes."""
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    model = YOLO(FLOAT)
    add_qc_callbacks(model, target="litert", weight_bits=4, act_bits=4)
    model.train(**TINY, data=str(digits), project=str(tmp_path), name="run")
    checkpoint = tmp_path / "run" / "weights" / "best.pt"
    trained = YOLO(checkpoint).model
    assert [tap.act_quant.bits for _, tap in taps(trained)] == [8] * len(list(taps(trained))) != []
    for options in {"format": "onnx"}, {"format": "litert"}:
        exporting = YOLO(checkpoint)
        if options["format"] == "litert":
            choose_litert_kind(exporting, "int8")
        result = check(checkpoint, exporting.export(**options, imgsz=64, device="cpu"), digits, images=2)
        assert result["weights"] == [] and result["passed"]
        assert result["checkpoint"]["AP"] == result["pytorch"]["AP"] > FINDS
        first = result["runtimes"][0]
        assert first["changed_end_to_end"] == first["points"] == 0, first


def test_a_model_for_openvino_passes_with_the_same_codes(digits, tmp_path, small_files):
    """SiLU is rounded floats in it; the edges' weights have 7 bits, so that all are integers in OpenVINO."""
    model = YOLO(FLOAT)
    add_qc_callbacks(model, target="openvino", weight_bits=4)
    model.train(**TINY, data=str(digits), project=str(tmp_path), name="run")
    checkpoint = tmp_path / "run" / "weights" / "best.pt"
    result = check(checkpoint, YOLO(checkpoint).export(format="onnx", imgsz=64, device="cpu"), digits, images=2)
    assert result["weights"] == [] and result["passed"]
    widths = {m.weight_quant.bits for _, m in quant_convs(YOLO(checkpoint).model)}
    assert max(widths) == 7 and 4 in widths
    assert result["checkpoint"]["AP"] == result["pytorch"]["AP"] > FINDS
    tried = [r for r in result["runtimes"] if "skipped" not in r]
    assert len(tried) >= 2 and all(r["changed_end_to_end"] == 0 and r["points"] == 0 for r in tried)


@pytest.fixture(params=["openvino", "torchscript"])
def whole(request, trained, tmp_path, small_files):
    """A checkpoint and what a format without codes makes of it."""
    pytest.importorskip("openvino" if request.param == "openvino" else "torch", reason="needs the extra export")
    checkpoint = shutil.copy(trained[0], tmp_path / "best.pt")
    return checkpoint, Path(YOLO(checkpoint).export(format=request.param, imgsz=64, device="cpu"))


def test_a_file_that_shows_no_codes_passes(whole, digits, capsys):
    """Weights, outputs and figures are compared all the same."""
    checkpoint, file = whole
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={digits}", "images=2"]) == 0
    assert "passed (accepted: 1 step layer by layer over 2 images, 0.1 points" in capsys.readouterr().out
    result = check(checkpoint, file, digits, images=2)
    (runtime,) = result["runtimes"]
    assert "steps" not in runtime and runtime["output"] < 1e-3 and runtime["points"] < 0.01
    assert runtime["AP"] > FINDS
    if not file.is_dir():  # Ultralytics lets OpenVINO compute float layers in BF16, where the processor has it
        assert runtime["AP"] == evaluate(file, digits, imgsz=64, rect=False)["coco"]["bbox"]["AP"]


def test_a_changed_file_that_shows_no_codes_fails(whole, digits):
    """One code of one layer."""
    checkpoint, file = whole
    layer = "model.2.cv1.conv"
    if file.is_dir():
        layers = deployed_convs(YOLO(checkpoint).model.float().fuse(verbose=False))
        codes = pack4(layers[layer].positive_scale(-128, 127)[0].numpy()).tobytes()
        content = (file / "best.bin").read_bytes()
        assert content.count(codes) == 1
        (file / "best.bin").write_bytes(content.replace(codes, bytes([codes[0] ^ 1]) + codes[1:]))
    else:
        about = {"config.txt": ""}
        model = torch.jit.load(file, _extra_files=about)
        dict(model.named_parameters())[f"{layer}.weight_codes"].view(-1)[0] ^= 1
        model.save(str(file), _extra_files=about)
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={digits}", "images=1"]) == 1
    assert check(checkpoint, file, digits, images=1)["weights"] == [layer]


def test_a_folder_with_nms_is_refused_at_once(whole, digits):
    checkpoint, file = whole
    if file.is_dir():
        about = YAML.load(file / "metadata.yaml")
        about["args"]["nms"] = True
        YAML.save(file / "metadata.yaml", about)
        with pytest.raises(QCError, match="has nms=True in it"):
            check(checkpoint, file, digits, images=1)


def bad_files(trained, tmp_path):
    """Kind -> (checkpoint, ONNX file) that cannot be compared."""
    checkpoint, file = trained
    cut, text, torn, other = (tmp_path / n for n in ("cut.onnx", "text.onnx", "torn.pt", "other.onnx"))
    content = Path(file).read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not a model")
    empty = tmp_path / "empty_openvino_model"
    empty.mkdir()
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "foreign",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), other)
    theirs = tmp_path / "theirs.onnx"  # whose zero points are left out, as ONNX allows
    model = onnx.load(file)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.input[2:]
    onnx.save(model, theirs)
    return {
        "missing": (checkpoint, tmp_path / "none.onnx"),
        "truncated": (checkpoint, cut),
        "text": (checkpoint, text),
        "foreign": (checkpoint, other),
        "another exporter's": (checkpoint, theirs),
        "another format": (checkpoint, tmp_path / "best.engine"),
        "empty folder": (checkpoint, empty),
        "torn TorchScript": (checkpoint, shutil.copy(cut, tmp_path / "cut.torchscript")),
        "torn checkpoint": (torn, file),
        "missing checkpoint": (tmp_path / "none.pt", file),
    }


@pytest.mark.parametrize("kind", [
    "missing", "truncated", "text", "foreign", "another exporter's", "another format", "empty folder",
    "torn TorchScript", "torn checkpoint", "missing checkpoint",
])  # fmt: skip
def test_files_that_cannot_be_compared_get_one_message(trained, digits, tmp_path, capsys, kind):
    checkpoint, file = bad_files(trained, tmp_path)[kind]
    assert main(["check", f"model={checkpoint}", f"file={file}", f"data={digits}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "yolo-qc check" in line]
    assert len(lines) == 1 and str(checkpoint if "checkpoint" in kind else file) in lines[0]


def test_an_older_onnx_runtime_is_refused_before_any_work(trained, digits, monkeypatch):
    checkpoint, file = trained
    monkeypatch.setattr(kinds.metadata, "version", lambda name: "1.22.0")
    monkeypatch.setattr(checking, "measure", lambda *_: pytest.fail("validated"))
    reason = r"ONNX Runtime 1\.22\.0 is too old for the packed kind"
    with pytest.raises(QCError, match=reason):
        check(checkpoint, file, digits)
    if find_spec("openvino"):
        assert re.match(r"OpenVINO 1\.22\.0 is too old for the packed", open_onnx(Path(file)).obstacle("openvino"))
    assert re.match(reason, open_onnx(Path(file)).obstacle("onnxruntime"))  # for which benchmark leaves the file out


def test_float_models_are_refused(trained, digits, tmp_path):
    checkpoint, file = trained
    floating = tmp_path / "float.pt"
    model = YOLO("yolov5n.yaml")
    model.save(floating)
    exported = YOLO(floating).export(format="onnx", imgsz=64, device="cpu")
    with pytest.raises(QCError, match="no quantized convolution"):
        check(checkpoint, exported, digits)
    with pytest.raises(QCError, match="is not quantized"):
        check(floating, file, digits)


def test_outputs_of_a_finished_model_lie_where_runtimes_agree(trained):
    """Multipliers are powers of two over odd numbers, biases whole, up to FP32 rounding of the folding."""
    model = YOLO(trained[0]).model.float().fuse(verbose=False)
    modules = dict(model.named_modules())
    for name, layer in deployed_convs(model).items():
        act = modules[f"{name.removesuffix('.conv')}.act"]  # of a block, or of a bare convolution of the head
        assert isinstance(act[0], FixedQuantizer), name
        multiplier = layer.act_quant.scale * layer.scale.double() / act[0].scale
        q = 2.0 ** (torch.log2(multiplier.abs()) + MULTIPLIER_BITS - 1).ceil().clamp(min=0) / multiplier.abs()
        assert torch.allclose(q, q.round(), rtol=1e-6, atol=0) and (q.round() % 2 == 1).all(), name
        bias = layer.shift.double() / (layer.act_quant.scale * layer.scale.double())
        assert torch.allclose(bias, bias.round(), rtol=1e-6, atol=1e-2), name
    assert np.isfinite([p.sum().item() for p in model.parameters()]).all()
