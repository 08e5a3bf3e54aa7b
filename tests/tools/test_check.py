# yolo_qc_plugin, AGPL-3.0
"""Parity of a checkpoint and its exported file: it holds, it is noticed where it does not, bad files are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from ultralytics import YOLO

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from conftest import CHECKPOINTS, TINY  # noqa: E402

from yolo_qc_plugin import add_qc_callbacks, choose_onnx_kind  # noqa: E402
from yolo_qc_plugin.cli import main  # noqa: E402
from yolo_qc_plugin.config import QCError  # noqa: E402
from yolo_qc_plugin.deploy.fold import FixedQuantizer, deployed_convs  # noqa: E402
from yolo_qc_plugin.deploy.snap import MULTIPLIER_BITS  # noqa: E402
from yolo_qc_plugin.tools.check import check  # noqa: E402

EDGES = ["model.0.conv", *(f"model.24.{branch}.{i}.2" for branch in ("cv2", "cv3") for i in range(3))]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A quantized checkpoint of one short epoch, and its file of the int8 kind."""
    folder = tmp_path_factory.mktemp("trained")
    model = YOLO("yolov5n.yaml")
    add_qc_callbacks(model, bits=4)
    model.train(data=str(digits), project=str(folder), name="run", **TINY)
    checkpoint = folder / "best.pt"
    shutil.copy(folder / "run" / "weights" / "best.pt", checkpoint)
    return checkpoint, YOLO(checkpoint).export(format="onnx", imgsz=64, device="cpu")


def test_a_file_of_ours_passes(trained, digits, tmp_path, capsys):
    checkpoint, file = trained
    target = tmp_path / "check.json"
    assert main(["check", f"model={checkpoint}", f"onnx={file}", f"data={digits}", f"json={target}", "images=4"]) == 0
    assert "passed" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert result["weights"] == [] and result["images"] == 4 and result["imgsz"] == 64
    for runtime in result["runtimes"]:
        if "skipped" not in runtime:
            # what snapping is for: all codes agree, end to end, and so does the accuracy
            assert runtime["steps"] == 0 and runtime["changed_end_to_end"] == 0 and runtime["points"] == 0, runtime


def test_a_model_that_finds_something_finds_it_in_each_runtime(digits, tmp_path):
    """AP of two models that find nothing is equal whatever they compute."""
    checkpoint = tmp_path / "best.pt"
    shutil.copy(CHECKPOINTS / "quantized.pt", checkpoint)
    result = check(checkpoint, YOLO(checkpoint).export(format="onnx", imgsz=64, device="cpu"), digits, images=8)
    assert result["passed"] and result["checkpoint"]["AP"] > 0.2 and result["pytorch"]["AP"] > 0.2
    judged = [runtime for runtime in result["runtimes"] if "skipped" not in runtime]
    assert judged and all(runtime["AP"] > 0.2 and runtime["changed_end_to_end"] == 0 for runtime in judged)


def test_the_int4_kind_passes_without_openvino(trained, digits, tmp_path):
    checkpoint = tmp_path / "best.pt"
    shutil.copy(trained[0], checkpoint)
    model = YOLO(checkpoint)
    choose_onnx_kind(model, "int4")
    result = check(checkpoint, model.export(format="onnx", imgsz=64, device="cpu"), digits, images=2)
    assert result["passed"] and "skipped" in result["runtimes"][-1] and "skipped" not in result["runtimes"][0]


def test_openvino_gets_the_integer_graph(trained, digits, tmp_path):
    """`format=openvino` as the host names it: all but the 8-bit edges and DFL run on 8-bit codes, and it predicts."""
    openvino = pytest.importorskip("openvino")
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
    assert len(kinds) == 76 and kinds.count("u8") == 75 - len(EDGES)
    assert len(YOLO(folder)(str(digits.parent / "images" / "val"), imgsz=64, verbose=False)) == 8


@pytest.mark.parametrize("what", ["weight_codes", "weight_scale"])
def test_a_changed_file_fails(trained, digits, tmp_path, what):
    """One code, or one scale, of one layer."""
    checkpoint, file = trained
    model = onnx.load(file)
    value = next(i for i in model.graph.initializer if i.name == f"model.2.cv1.conv.{what}")
    array = onnx.numpy_helper.to_array(value).copy()
    if what == "weight_codes":
        array.flat[0] += 1 if array.flat[0] < 7 else -1
    else:
        array[:] *= 3
    value.CopyFrom(onnx.numpy_helper.from_array(array, value.name))
    changed = tmp_path / "changed.onnx"
    onnx.save(model, changed)
    assert main(["check", f"model={checkpoint}", f"onnx={changed}", f"data={digits}", "images=1"]) == 1
    result = check(checkpoint, changed, digits, images=1)
    assert not result["passed"] and result["weights"] == (["model.2.cv1.conv"] if what == "weight_codes" else [])
    assert what == "weight_codes" or result["runtimes"][0]["steps"] > 1


def bad_files(trained, tmp_path):
    """Kind -> (checkpoint, ONNX file) that cannot be compared."""
    checkpoint, file = trained
    cut, text, torn, other = (tmp_path / n for n in ("cut.onnx", "text.onnx", "torn.pt", "other.onnx"))
    content = open(file, "rb").read()
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not a model")
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "foreign",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), other)
    return {
        "missing": (checkpoint, tmp_path / "none.onnx"),
        "truncated": (checkpoint, cut),
        "text": (checkpoint, text),
        "foreign": (checkpoint, other),
        "torn checkpoint": (torn, file),
        "missing checkpoint": (tmp_path / "none.pt", file),
    }


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "foreign", "torn checkpoint", "missing checkpoint"])
def test_files_that_cannot_be_compared_get_one_message(trained, digits, tmp_path, capsys, kind):
    checkpoint, file = bad_files(trained, tmp_path)[kind]
    assert main(["check", f"model={checkpoint}", f"onnx={file}", f"data={digits}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "yolo-qc check" in line]
    assert len(lines) == 1 and str(checkpoint if "checkpoint" in kind else file) in lines[0]


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
    layers, outputs = deployed_convs(model), 0
    for name, layer in layers.items():
        act = dict(model.named_modules()).get(name.removesuffix("conv") + "act")
        if act is None or not isinstance(act[0], FixedQuantizer):
            continue
        outputs += 1
        multiplier = layer.act_quant.scale * layer.scale.double() / act[0].scale
        q = 2.0 ** (torch.log2(multiplier.abs()) + MULTIPLIER_BITS - 1).ceil().clamp(min=0) / multiplier.abs()
        assert torch.allclose(q, q.round(), rtol=1e-6, atol=0) and (q.round() % 2 == 1).all(), name
        bias = layer.shift.double() / (layer.act_quant.scale * layer.scale.double())
        assert torch.allclose(bias, bias.round(), rtol=1e-6, atol=1e-2), name
    assert outputs == len(layers) - 6  # all but the head's bare outputs
    assert np.isfinite([p.sum().item() for p in model.parameters()]).all()
