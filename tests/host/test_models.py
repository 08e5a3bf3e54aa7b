# yolo_qc_plugin, AGPL-3.0
"""YOLOv7-tiny: its size beside the published model's, how it is found, and LeakyReLU from training to a runtime."""

from __future__ import annotations

import json
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import nn
from ultralytics import YOLO, cfg
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.torch_utils import get_flops

from yolo_qc_plugin import choose_onnx_kind, model_yaml, remove
from yolo_qc_plugin.cfg import MODELS, with_our_models
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.deploy.snap import SCALE_BITS, snap_scale, unit_of_scale
from yolo_qc_plugin.quant.activations import HeadOutput, QuantActivation, in_256ths, quant_activations
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.quant.quantizer import ActQuantizer
from yolo_qc_plugin.startup.command import wrap_entrypoint


@pytest.fixture(autouse=True)
def own_activation(monkeypatch):
    """Older hosts let a model YAML's activation stay the default of all that is built later in the process."""
    monkeypatch.setattr(Conv, "default_act", Conv.default_act)


def test_size_beside_the_published_model():
    """Its own file states the figures; the published ones follow from the layers that both have."""
    file = Path(model_yaml("yolov7-tiny"))
    model = YOLO(file).model
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, model.model[-1])}
    total, body = count[model], count[model] - count[model.model[-1]]
    assert {type(m.act) for m in model.modules() if isinstance(m, Conv)} == {nn.LeakyReLU}
    assert model.stride.tolist() == [8, 16, 32] and model.model[0].act.negative_slope == 0.1
    ours = f"this file   {total / 1e6:.1f} M, of these {body / 1e6:.1f} M in backbone and neck"
    assert f"{ours}       {get_flops(model, 640):.1f} GFLOPs" in file.read_text()

    def published(outputs):
        """With the published head: behind c channels, a 3x3 convolution to 2c and a 1x1 one to anchors' outputs."""
        return body + sum(9 * c * 2 * c + 2 * 2 * c + (2 * c + 1) * outputs for c in (64, 128, 256))

    assert published(3 * (5 + 4)) == 6_022_129  # of 4 classes, as its own program counts (WongKinYiu/yolov7, #958)
    assert f"published   {published(3 * (5 + 80)) / 1e6:.1f} M" in file.read_text()


def test_names_of_models():
    assert [model_yaml(name) for name in MODELS] == [model_yaml(f"{name}.yaml") for name in MODELS]
    assert all(Path(model_yaml(name)).is_file() for name in MODELS)
    with pytest.raises(QCError, match="model 'yolov7' is not one of ours; accepted: yolov7-tiny"):
        model_yaml("yolov7")


def test_command_lines_get_the_path_unless_there_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model_yaml("yolov7-tiny")
    others = ["train", "data=yolov7-tiny.yaml", "model=yolov5n.yaml", "model=cfg/yolov7-tiny.yaml", "yolov7-tiny.yaml"]
    assert with_our_models(others) == others
    for argument in ("model=yolov7-tiny.yaml", "--model=yolov7-tiny.yaml"):
        assert with_our_models(["train", argument]) == ["train", f"model={path}"]
    (tmp_path / "yolov7-tiny.yaml").write_text("nc: 1\n")
    assert with_our_models(["train", "model=yolov7-tiny.yaml"]) == ["train", "model=yolov7-tiny.yaml"]


def yolo(line: str, monkeypatch) -> None:
    """Run the host's own command line with the plugin's hook on it."""
    monkeypatch.setattr(cfg, "entrypoint", cfg.entrypoint)
    wrap_entrypoint(cfg)
    monkeypatch.setattr(cfg, "ARGV", ["yolo", *line.split()])
    cfg.entrypoint()


def test_the_command_line_finds_it_without_callbacks(tmp_path, monkeypatch):
    """Float training is the host's alone: it gets past the model, to data that do not exist."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"missing\.yaml"):
        yolo("train model = yolov7-tiny.yaml data=missing.yaml", monkeypatch)


def test_a_run_from_the_command_line(tmp_path, monkeypatch):
    """QAT, QC, report; the file's deployed form and two runtimes give its outputs. It finds nothing yet: no figures."""
    data = compose(tmp_path / "data", 8, 8, 64)
    monkeypatch.chdir(tmp_path)
    host = {**TINY, "data": data, "project": tmp_path, "name": "run"}
    ours = "callbacks=qc qc_bits=4 qc_correction_lr=0.05 qc_calibration_batches=1"
    yolo(f"train model=yolov7-tiny.yaml {ours} " + " ".join(f"{k}={v}" for k, v in host.items()), monkeypatch)
    report = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())
    assert (len(report["layers"]), len(report["outputs"])) == (70, 70)
    best = tmp_path / "run" / "weights" / "best.pt"

    model, _ = load_checkpoint(best)
    functions = [act.function for _, act in quant_activations(model)]
    slopes = {function.negative_slope for function in functions if not isinstance(function, HeadOutput)}
    assert slopes == {26 / 256} and any(c.act_quant.zero_point > 0 for _, c in quant_convs(model))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain, fused = (m(x)[1] for m in (model, deepcopy(model).fuse(verbose=False)))
    for key in ("boxes", "scores"):
        torch.testing.assert_close(plain[key], fused[key], rtol=1e-3, atol=1e-3)
    assert remove(model) == 70 and {m.act.negative_slope for m in model.modules() if isinstance(m, Conv)} == {0.1}

    pytest.importorskip("onnxruntime", reason="needs the extra export")
    from yolo_qc_plugin.tools.check import check

    checked = check(best, YOLO(best).export(format="onnx", imgsz=64, device="cpu"), data, images=2)
    judged = [r for r in checked["runtimes"] if "skipped" not in r]
    assert checked["passed"] and len(judged) >= 2
    assert all(r["changed_end_to_end"] == 0 and r["output"] < 1e-2 for r in judged)
    four = YOLO(best)
    choose_onnx_kind(four, "int4")
    four = YOLO(four.export(format="onnx", imgsz=64, device="cpu"))  # a MaxPool before 4-bit codes does not load
    assert len(four.predict(data.parent / "images" / "val", imgsz=64, verbose=False)) == 8


def test_no_value_behind_leaky_relu_comes_near_a_threshold():
    """Whatever a learned scale, also one made for a value to hit a threshold; with a slope of 0.1 some do."""

    def nearest(slope):
        slope, distances = Fraction(slope), []
        for steps in range(-255, 0, 2):
            for threshold in (Fraction(-1, 2), Fraction(-3, 2)):
                quant = ActQuantizer(4, offset=True)
                with torch.no_grad():
                    quant.scale.fill_(float(steps * slope / threshold))
                    snap_scale(quant, unit_of_scale(quant))
                distances.append(abs(steps * slope / Fraction(quant.scale.item()) - threshold))
        return min(distances)

    act = QuantActivation(nn.LeakyReLU(0.1), 8)
    assert act.act.negative_slope == 0.1 and act.function.negative_slope == in_256ths(act.act).negative_slope
    assert nearest(act.function.negative_slope) > 2.0 ** -(SCALE_BITS - 3) > nearest(0.1)
