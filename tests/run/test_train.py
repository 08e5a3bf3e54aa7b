# yolo_qc_plugin, AGPL-3.0
"""Real runs of the stock training loop with the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import FLOAT, TINY, TINY_YAML, last_epoch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.qat.ema import ConstantEMA
from yolo_qc_plugin.quant.activations import quant_activations
from yolo_qc_plugin.quant.layers import is_quantized, quant_convs, scale_parameters
from yolo_qc_plugin.startup import hook


def report_of(folder: Path) -> dict:
    return json.loads((folder / "qc" / "report.json").read_text())


def codes_of(model) -> dict[str, torch.Tensor]:
    return {name: conv.weight_codes() for name, conv in quant_convs(model)}


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter that imports nothing of ours by itself."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_epochs_through_the_stock_program(digits, tmp_path):
    """`yolo train ... callbacks=qc` as a subprocess, then the checkpoint in a fresh process."""
    assert "enabled" in hook.status(), "install the package, or run `yolo-qc hook action=install` if it is editable"
    host = {k: v for k, v in TINY.items() if k != "epochs"} | {"data": digits, "project": tmp_path, "name": "run"}
    command = [
        str(Path(sys.executable).with_name("yolo")), "train", "model=yolov5n.yaml", "epochs=2", "callbacks=qc",
        "qc_bits=3", "qc_layer_bits=model.1.*:5", *(f"{k}={v}" for k, v in host.items()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "75 convolutions quantized" in done.stdout and "QC 1/1" in done.stdout and "float start" in done.stdout

    run = tmp_path / "run"
    report = report_of(run)
    assert report["config"]["bits"] == 3 and report["kept"] in {"qat", "qc"}
    assert all(
        set(report["metrics"][k]) == {"map50_95", "map50", "fitness"} for k in ("float", "float_outputs", "qat", "qc")
    )
    assert len(report["outputs"]) == 75 and {x["bits"] for x in report["outputs"]} == {8}
    layers = {x["name"]: x for x in report["layers"]}
    assert layers["model.1.conv"]["weight_bits"] == 5 and layers["model.0.conv"]["act_bits"] == 8
    assert all(x["weight_codes"] <= 2 ** x["weight_bits"] for x in report["layers"])
    assert 0 < report["size_mb"]["quantized"] < report["size_mb"]["float32"] / 6
    found = report["operations"]
    assert found["bops"] == sum(x["macs"] * x["weight_bits"] * x["act_bits"] for x in layers.values())
    assert found["percent_of_8_bits"] == pytest.approx(100 * found["bops"] / (64 * found["macs"]))
    assert layers["model.0.conv"]["macs"] == 3 * 16 * 6 * 6 * 32 * 32  # yolov5n's stem: 6 x 6, stride 2, at 64 px

    out = python(
        "import sys\nfrom ultralytics import YOLO\nfrom copy import deepcopy\n"
        f"model = YOLO({str(run / 'weights' / 'best.pt')!r})\n"
        "assert sum(type(m).__name__ == 'QuantConv2d' for m in model.model.modules()) == 75\n"
        f"model.val(data={str(digits)!r}, imgsz=64, plots=False, device='cpu', verbose=False, project='v')\n"
        f"model.predict({str(digits.parent / 'images' / 'val')!r}, imgsz=64, verbose=False, device='cpu')\n"
        "assert deepcopy(model.model).fuse().is_fused()\n"
        f"YOLO(model.ckpt_path).train(data={str(digits)!r}, imgsz=64, epochs=1, plots=False, device='cpu', batch=8, "
        "project='f')\nprint('all', 'work')",
        tmp_path,
    )
    assert "all work" in out


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": "SGD", "freeze": 5, "cos_lr": True, "batch": 4, "nbs": 8},
        {"optimizer": "AdamW", "multi_scale": 0.5, "batch": 4, "nbs": 16},
        {"optimizer": "MuSGD", "close_mosaic": 1, "epochs": 3, "patience": 1, "save_period": 1, "plots": True},
        {"optimizer": "auto", "warmup_epochs": 1, "epochs": 2, "nbs": 8},
    ],
    ids=lambda a: a["optimizer"],
)
def test_stock_features_keep_working(train, arguments):
    """Every optimizer, with freezing, schedules, accumulation, early stopping and periodic saving."""
    seen = {}

    def start(trainer):
        seen["before"] = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
        seen["steps"] = 0
        trainer.optimizer.register_step_post_hook(lambda *_: seen.__setitem__("steps", seen["steps"] + 1))

    def end(trainer):
        group = trainer.optimizer.param_groups[-1]
        assert group["param_group"] == "scale" and group["weight_decay"] == 0 and not group.get("use_muon")
        assert {id(p) for p in group["params"]} == {id(p) for p in scale_parameters(trainer.model)}
        seen["moved"] = {k: not torch.equal(v, seen["before"][k]) for k, v in trainer.model.named_parameters()}
        seen["updates"], seen["ema"] = trainer.ema.updates, type(trainer.ema)
        seen["lr"] = group["lr"] / group["initial_lr"]
        seen["batches"] = len(trainer.train_loader) * (trainer.epoch + 1)

    yolo = train({"bits": 4, "correction": "off"}, {"on_train_start": start, "on_train_end": end}, **arguments)
    scales = {k for k in seen["moved"] if k.endswith((".scale", ".offset"))}
    frozen = {k for k in scales if k.split(".")[1] in map(str, range(arguments.get("freeze", 0)))}
    assert scales and not any(seen["moved"][k] for k in frozen)
    weight_scales = [k for k in scales - frozen if k.endswith("weight_quant.scale")]
    # not all: codes of a layer may lie so that its gradient is 0 in so short a run
    assert sum(seen["moved"][k] for k in weight_scales) > 0.8 * len(weight_scales)
    assert all((conv.weight_quant.scale > 0).all() and conv.act_quant.scale > 0 for _, conv in quant_convs(yolo.model))
    assert seen["ema"] is ConstantEMA and seen["updates"] == seen["steps"] > 0
    if arguments.get("nbs", 0) > arguments.get("batch", 8):  # accumulation: fewer steps than batches
        assert seen["steps"] < seen["batches"]
    if "save_period" in arguments:
        assert is_quantized(load_checkpoint(yolo.trainer.wdir / "epoch1.pt")[0])
    assert seen["lr"] <= 1


def test_ema_is_the_model_that_is_saved(train):
    """Decay 0 saves the model as trained; a positive decay saves an average that differs from it."""
    for decay, equal in ((0.0, True), (0.9, False)):
        seen = {}
        yolo = train(
            {"ema_decay": decay, "correction": "off", "output_bits": None},
            {"on_train_end": lambda t, seen=seen: seen.update(deepcopy(t.model.state_dict()), lr=None)},
            name=f"decay{decay}",
            nbs=8,  # a step each batch, in any version
        )
        saved = yolo.model.state_dict()
        for name in ("model.3.conv.weight", "model.3.conv.weight_quant.scale", "model.3.conv.act_quant.scale"):
            assert torch.equal(saved[name], seen[name]) is equal


def test_saving_in_half_precision_flips_no_code(train):
    """Weights on rounding thresholds when the checkpoint is written have the same codes when it is read."""
    seen = {}

    def place_on_thresholds(trainer):
        for _, conv in quant_convs(trainer.ema.ema):
            s = conv.weight_quant.scale.view(-1, 1, 1, 1)
            edge = (conv.weight_quant.codes(conv.weight) + 0.5) * s
            above, below = torch.nextafter(edge, edge * 2), torch.nextafter(edge, edge * 0)
            conv.weight.copy_(torch.where(torch.rand_like(edge) < 0.5, above, below))
        seen["codes"] = codes_of(trainer.ema.ema)
        seen["half"] = {n: c.weight_quant.codes(c.weight.half().float()) for n, c in quant_convs(trainer.ema.ema)}

    # after the last averaging of the epoch, before validation and saving
    yolo = train({"bits": 4, "correction": "off"}, {"on_train_epoch_end": torch.no_grad()(place_on_thresholds)})
    assert any(not torch.equal(seen["half"][n], c) for n, c in seen["codes"].items()), "the test must be able to fail"
    for file in ("last.pt", "best.pt", "qat.pt"):
        model, _ = load_checkpoint(yolo.trainer.wdir / file)
        for name, codes in codes_of(model).items():
            assert torch.equal(codes, seen["codes"][name])
    for name, conv in quant_convs(yolo.model):
        assert seen["codes"][name].unique().numel() <= 2**conv.weight_quant.bits


def test_reloaded_model_computes_what_was_corrected(train, digits):
    """The file, fused or not, computes the outputs of the model that QC ended with."""
    yolo = train({"bits": 4, "correction_lr": 0.05, "correction_epochs": 2})
    wdir = yolo.trainer.wdir
    assert (wdir / "qat.pt").exists()
    x = torch.rand(2, 3, 64, 64)
    model, _ = load_checkpoint(wdir / "best.pt")
    with torch.no_grad():
        plain = model(x)[0]
        fused = deepcopy(model).fuse(verbose=False)(x)[0]
    torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_other_families(train, name):
    """The whole course, end-to-end heads included: inject, train, correct, save, reload, fuse."""
    yolo = train({"bits": 4, "correction_lr": 0.05}, model=f"{name}.yaml", nbs=8)
    report = report_of(yolo.trainer.save_dir)
    assert report["metrics"]["qc"] and len(report["layers"]) == len(dict(quant_convs(yolo.model)))
    assert {8} == {x["weight_bits"] for x in report["layers"]} - {4}
    model, _ = load_checkpoint(yolo.trainer.best)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = [m(x)[1] for m in (model, deepcopy(model).fuse(verbose=False))]
    head = "one2one" if model.model[-1].end2end else "one2many"  # fusing leaves the branch in use alone
    plain, fused = (o.get(head, o) for o in outputs)
    for key in ("boxes", "scores"):
        torch.testing.assert_close(plain[key], fused[key], rtol=1e-3, atol=1e-3)


def test_what_is_saved_is_what_was_measured(train):
    """Nothing is rounded on the way to a file, and every validation is in FP32, with mixed precision too."""
    seen, precisions = {}, []

    def as_on_a_gpu(validator):
        validator.args.quantize = 16 if validator.training else validator.args.quantize

    def end_of_epoch(trainer):
        seen.update({k: v.clone() for k, v in trainer.ema.ema.state_dict().items()})

    yolo = train(
        {"bits": 4, "correction": "off", "output_bits": None, "skip": ["model.2.cv1.conv"]},
        {
            "on_train_start": lambda trainer: trainer.callbacks["on_val_start"].insert(0, as_on_a_gpu),
            "on_val_end": lambda validator: precisions.append(validator.args.quantize),
            "on_fit_epoch_end": end_of_epoch,
        },
        nbs=8,  # a step at each batch, for older versions of the host drop what an epoch has accumulated at its end
    )
    rounded = {k for k, v in seen.items() if v.is_floating_point() and not torch.equal(v.half().float(), v)}
    assert {"model.2.cv1.conv.weight", "model.0.bn.running_var"} < rounded, "the test must be able to fail"
    for file in ("last.pt", "qat.pt"):
        saved = load_checkpoint(yolo.trainer.wdir / file)[0].state_dict()
        assert seen.keys() == saved.keys() and all(torch.equal(saved[k], v) for k, v in seen.items()), file
    assert precisions == [None] * 3  # the float start, the epoch, the file


def test_one_number(train, digits, tmp_path):
    """Training, its report, what train() returns and a fresh process agree; QC is kept where it is better."""
    yolo = train({"bits": 4}, model=FLOAT, optimizer="Adam", lr0=5e-4, nbs=8)
    run = tmp_path / "run"
    report = report_of(run)
    metrics, kept = report["metrics"], report["kept"]
    assert metrics["float"]["map50_95"] > 0.3 and metrics["qat"]["map50_95"] > 0.2
    assert kept == ("qc" if metrics["qc"]["fitness"] > metrics["qat"]["fitness"] else "qat")
    assert yolo.returned.box.map == metrics[kept]["map50_95"]
    assert last_epoch(run)["metrics/mAP50-95(B)"] == round(metrics["float_outputs"]["map50_95"], 5)
    out = python(
        "from ultralytics import YOLO\n"
        "for file in ('best.pt', 'qat.pt'):\n"
        f"    r = YOLO({str(run / 'weights')!r} + '/' + file).val(data={str(digits)!r}, "
        "imgsz=64, batch=16, plots=False, device='cpu', verbose=False, project='v')\n    print('\\nmap', r.box.map)",
        tmp_path,
    )
    found = [float(line.split()[1]) for line in out.splitlines() if line.startswith("map ")]
    assert found == pytest.approx([metrics[kept]["map50_95"], metrics["qat"]["map50_95"]], abs=1e-6)


def test_outputs_can_stay_in_float(train, tmp_path):
    """`output_bits=None` adds nothing: qat.pt is the host's best.pt, with the figures that the host measured."""
    options = {"bits": 4, "act_offset": False, "output_bits": None, "correction": "off"}  # plain LSQ
    yolo = train(options, model=FLOAT, optimizer="Adam", lr0=5e-4)
    report = report_of(yolo.trainer.save_dir)
    assert report["metrics"]["qat"]["map50_95"] > 0.1, "the test must be able to fail"
    assert report["outputs"] == [] and report["metrics"]["qat"] == report["metrics"]["float_outputs"]
    model, _ = load_checkpoint(yolo.trainer.wdir / "qat.pt")
    assert not any(m.correction for _, m in quant_convs(model)) and not list(quant_activations(model))


def test_failure_of_the_correction_stops_the_run_and_loses_nothing(train, tmp_path, caplog):
    """A diverging correction raises with its reason; the checkpoints of QAT are in place."""
    with pytest.raises(FloatingPointError, match="QC: the loss became"):
        train({"correction_lr": 1e37, "correction_epochs": 2, "output_bits": None})  # a grid would keep it finite
    for file in ("best.pt", "last.pt", "qat.pt"):
        assert is_quantized(load_checkpoint(tmp_path / "run" / "weights" / file)[0])
    assert not list((tmp_path / "run" / "weights").glob("*.tmp"))
    assert "FloatingPointError after training had ended" in caplog.text and "best.pt, qat.pt, last.pt." in caplog.text


def test_float_runs_are_not_changed(digits, tmp_path):
    """With the patches installed, a run that does not ask for the plugin ends with the same bytes of weights."""
    code = (
        "import sys, torch\nfrom ultralytics import YOLO\n"
        "if sys.argv[1] == 'attached':\n    from yolo_qc_plugin.run.callbacks import attach; attach()\n"
        f"YOLO({str(TINY_YAML)!r}).train(data={str(digits)!r}, project={str(tmp_path)!r}, name=sys.argv[1], "
        f"**{TINY!r})\n"
    )
    for name in ("attached", "stock"):
        done = subprocess.run(
            [sys.executable, "-c", code, name], cwd=tmp_path, env=dict(os.environ), capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    a, b = (load_checkpoint(tmp_path / n / "weights" / "last.pt")[0].state_dict() for n in ("attached", "stock"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantize": 8}, "quantize=8"),
        ({"compile": True}, "compile=True"),
    ],
)
def test_refused_before_training(train, arguments, message):
    with pytest.raises(QCError, match=message):
        train({}, **arguments)


def test_quantized_models_are_refused(train):
    yolo = train({"correction": "off"})
    with pytest.raises(QCError, match="already quantized"):
        add_qc_callbacks(YOLO(yolo.trainer.best))


def test_config_or_options(digits):
    with pytest.raises(QCError, match="config or options"):
        add_qc_callbacks(YOLO("yolov5n.yaml"), QCConfig(), bits=3)
