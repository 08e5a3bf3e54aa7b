# yolo_qc_plugin, AGPL-3.0
"""What an export will write is decided before it begins, and what cannot be written or run is said in one line."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yolo_qc_plugin import choose_litert_kind, choose_onnx_kind
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.deploy import kinds
from yolo_qc_plugin.deploy.kinds import ONNX_KINDS, check_runtime, choose_kind, runtime_obstacle
from yolo_qc_plugin.host.exporting import in_one_line, prepare_export
from yolo_qc_plugin.host.record import QuantRecord
from yolo_qc_plugin.quant.calibrate import calibrate
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.tools.exported_whole import ExportedOpenVINO


def exporter(format, **arguments):
    """What of Ultralytics' Exporter is read."""
    return SimpleNamespace(
        args=SimpleNamespace(**{"format": format, "quantize": None, "opset": None, "dynamic": False, **arguments}),
        callbacks={},
    )


def quantized(**options):
    config = QCConfig.from_options(options)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    inject(model, config, set(), set())
    calibrate(model, [torch.rand(1, 3, 8, 8)], model)
    model.qc = QuantRecord(config.to_dict())
    return model


@pytest.mark.parametrize("format,target,asked,kind", [
    ("onnx", None, None, "packed"), ("onnx", "cpu", None, "packed"), ("onnx", "litert", None, "packed"),
    ("onnx", "tensorrt", None, "tensorrt"), ("onnx", "fpga", None, "qonnx"), ("onnx", "fpga", "int8", "int8"),
    ("ONNX", "cpu", "int4", "int4"), ("openvino", "tensorrt", None, "packed"), ("openvino", "cpu", "int8", "int8"),
    ("onnx", "openvino", None, "openvino"), ("openvino", "openvino", None, "openvino"),
    ("engine", "tensorrt", None, "tensorrt"), ("trt", None, None, "tensorrt"), ("torchscript", "cpu", None, None),
    ("tflite", "litert", None, None),
])  # fmt: skip
def test_the_target_chooses_the_kind_and_the_user_another(format, target, asked, kind):
    assert choose_kind(format, target, asked) == kind


@pytest.mark.parametrize("format,asked,message", [
    ("openvino", "int4", "onnx='int4' is not accepted with format='openvino'; give 'packed' or 'int8'"),
    ("engine", "packed", "onnx='packed' is not accepted with format='engine'; give 'tensorrt'"),
    ("torchscript", "int8", "onnx='int8' is not accepted with format='torchscript'; leave it out"),
    ("paddle", None, "format='paddle' cannot carry the quantizers of this model; accepted: onnx, "),
])  # fmt: skip
def test_kinds_that_a_format_is_not_made_from(format, asked, message):
    with pytest.raises(QCError, match=message):
        choose_kind(format, None, asked)


@pytest.mark.skipif(bool(find_spec("tensorrt")), reason="TensorRT is installed")
@pytest.mark.parametrize("options,message", [
    ({"target": "tensorrt"}, "format='engine' needs tensorrt, which is not installed: pip install 'yolo-qc-plugin"),
    ({"target": "cpu"}, "TensorRT takes INT8 codes with zero points of 0, but .*; train with callbacks=qc qc_target=t"),
])  # fmt: skip
def test_an_engine_is_refused_before_any_work(options, message):
    with pytest.raises(QCError, match=message):
        prepare_export(exporter("engine"), quantized(**options))


def test_the_line_of_an_export_names_kind_and_target(caplog):
    prepare_export(exporter("onnx"), quantized(target="cpu"))
    assert "onnx, packed kind, of a model trained for cpu" in caplog.text
    prepare_export(exporter("onnx"), quantized())
    assert "onnx, packed kind, of a model trained for no target in particular" in caplog.text


def test_what_openvino_leaves_out_of_a_file_of_dynamic_sizes_is_said(caplog):
    prepare_export(exporter("openvino", dynamic=True), quantized(target="cpu"))
    prepare_export(exporter("onnx"), quantized(target="cpu"))
    assert "leaves biases out" not in caplog.text
    prepare_export(exporter("onnx", dynamic=True), quantized(target="cpu"))
    assert "OpenVINO (2026.4) leaves biases out" in caplog.text


def test_a_kind_is_chosen_until_another_is():
    """None gives it back; what else hears of exports stays."""
    model = SimpleNamespace(callbacks={"on_export_start": [print]})
    model.add_callback = lambda event, callback: model.callbacks[event].append(callback)
    choose_litert_kind(model, "int8")
    for kind in "int4", "int8", None:
        choose_onnx_kind(model, kind)
        first, *chosen = model.callbacks["on_export_start"]
        assert first is print and [c.qc_onnx for c in chosen] == [None, *filter(None, [kind])]
    choose_litert_kind(model, None)
    assert model.callbacks == {"on_export_start": [print]}
    with pytest.raises(QCError, match="int3"):
        choose_onnx_kind(model, "int3")


def test_a_model_for_openvino_with_outputs_in_floats(caplog):
    """It has no SiLU on a grid, and no obstacle."""
    prepare_export(exporter("openvino"), quantized(target="openvino", output_bits="none"))
    assert "openvino, openvino kind, of a model trained for openvino" in caplog.text


def test_an_onnx_runtime_of_another_name(monkeypatch):
    """As onnxruntime-gpu, of which the package onnxruntime comes too."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")

    def version(name):
        raise kinds.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kinds.metadata, "version", version)
    check_runtime("packed")
    monkeypatch.setattr(runtime, "__version__", "1.22.0")
    with pytest.raises(QCError, match=r"ONNX Runtime 1\.22\.0 is too old for the packed kind"):
        check_runtime("packed")


@pytest.mark.parametrize("kind", ONNX_KINDS)
def test_an_older_onnx_runtime(kind, monkeypatch, caplog):
    """It is told of at the export, where another machine may run the file, and refused where it is to run here."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    assert runtime_obstacle(kind) is None
    monkeypatch.setattr(kinds.metadata, "version", lambda name: "1.22.0")
    if kind not in {"packed", "openvino"}:
        check_runtime(kind)
        return
    if kind == "openvino":
        with pytest.raises(QCError, match=r"ONNX Runtime 1\.22\.0 is too old for the openvino kind; install .*>=1\.23"):
            check_runtime(kind)
        return
    message = (
        "ONNX Runtime 1.22.0 is too old for the packed kind; install onnxruntime>=1.23; or export with callbacks=qc"
    )
    with pytest.raises(QCError, match=f"{message} qc_onnx=int8"):
        check_runtime(kind)
    prepare_export(exporter("onnx"), quantized(target="cpu"))
    assert f"{message} qc_onnx=int8" in caplog.text


def test_an_older_openvino(monkeypatch, tmp_path):
    """It is not tried, with a reason; with a folder that is made for it, refused."""
    pytest.importorskip("openvino", reason="needs the extra export")
    assert runtime_obstacle("packed", "openvino") is None
    monkeypatch.setattr(kinds.metadata, "version", lambda name: "2024.6.0")
    reason = "OpenVINO 2024.6.0 is too old for the packed kind; install openvino>=2025.0; or export with callbacks=qc"
    assert runtime_obstacle("packed", "openvino") == f"{reason} qc_onnx=int8, which older ones run"
    assert runtime_obstacle("int8", "openvino") is None
    with pytest.raises(QCError, match=r"cannot be run: OpenVINO 2024\.6\.0 is too old for this model; install"):
        ExportedOpenVINO(tmp_path)


@pytest.mark.parametrize("program,raised", [("yolo", SystemExit), ("C:/yolo.exe", SystemExit), ("train.py", QCError)])
def test_the_program_yolo_ends_with_one_line(program, raised, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(raised, match=r"^QC: no$"), in_one_line():
        raise QCError("QC: no")
