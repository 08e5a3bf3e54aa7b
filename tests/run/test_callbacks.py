# yolo_qc_plugin, AGPL-3.0
"""How callbacks come and go: one run each, refused early wherever they are added, gone when the run has ended."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT, TINY, TINY_YAML
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.run import callbacks as module
from yolo_qc_plugin.run.callbacks import QCCallbacks
from yolo_qc_plugin.run.start import check_file, warn_of_options

QUICK = {"correction": "off", "output_bits": None, "telemetry": False}


def quantized_layers(model) -> int:
    return sum(type(m).__name__ == "QuantConv2d" for m in model.modules())


def test_the_callbacks_go_when_their_run_has_ended(train, digits, tmp_path):
    """A second training of the same object is a float one, from the latent weights."""
    yolo = train(QUICK)
    assert quantized_layers(yolo.model) == 15
    latent = yolo.model.state_dict()["model.3.conv.weight"].clone()
    seen = {}
    yolo.add_callback("on_train_start", lambda t: seen.update(weight=t.model.model[3].conv.weight.detach().clone()))
    yolo.train(**TINY, data=str(digits), project=str(tmp_path), name="later")
    assert quantized_layers(yolo.model) == 0 and torch.equal(seen["weight"], latent)
    assert not (tmp_path / "later" / "qc").exists()


def test_the_callbacks_go_when_their_run_was_interrupted(train, digits, tmp_path):
    def stop(trainer):
        raise KeyboardInterrupt

    yolo = YOLO(TINY_YAML)
    add_qc_callbacks(yolo, **QUICK)
    yolo.add_callback("on_train_batch_end", stop)
    arguments = {**TINY, "data": str(digits), "project": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        yolo.train(**arguments, name="interrupted")
    yolo.callbacks["on_train_batch_end"].remove(stop)
    yolo.train(**arguments, name="later")
    assert quantized_layers(yolo.model) == 0


def test_the_callbacks_go_when_other_processes_had_their_run(monkeypatch):
    """The process that starts those of several devices is not told of the run's end."""
    labelled = []
    monkeypatch.setattr(module, "label_for_run", lambda trainer, config: labelled.append(trainer))
    yolo = YOLO("yolov5n.yaml")
    add_qc_callbacks(yolo, **QUICK)
    (ours,) = [c.__self__ for c in yolo.callbacks["teardown"] if isinstance(getattr(c, "__self__", None), QCCallbacks)]
    runs = [SimpleNamespace(ddp=True, callbacks=dict(yolo.callbacks)) for _ in range(2)]
    for trainer in runs:
        ours.on_dataset(trainer)
    of_ours = [
        [c for cs in holder.callbacks.values() for c in cs if c in ours.events().values()] for holder in (*runs, yolo)
    ]
    assert labelled == runs[:1] and of_ours[0] and not of_ours[1] and not of_ours[2]


def test_what_is_not_validated_is_put_back():
    """Of several processes one may get no image: its epoch's end comes without a batch's."""
    model = YOLO(FLOAT).model
    layers = model.model
    callbacks = QCCallbacks(QCConfig())
    callbacks.state.steps = SimpleNamespace(scalars={})
    callbacks.validation._averaged, callbacks.validation._layers = model, layers
    model.model = copy.deepcopy(layers)
    callbacks.on_fit_epoch_end(None)
    assert model.model is layers


def test_what_a_run_was_refused_for_can_be_mended(digits, tmp_path):
    """A refusal before training is not the end of a run: the callbacks wait for the next one."""
    yolo = YOLO(TINY_YAML)
    add_qc_callbacks(yolo, **QUICK)
    arguments = {**TINY, "data": str(digits), "project": str(tmp_path)}
    with pytest.raises(QCError, match="compile=True"):
        yolo.train(**arguments, compile=True)
    yolo.train(**arguments)
    assert quantized_layers(yolo.model) == 15


@pytest.mark.parametrize("arguments, message", [
    ({"quantize": 8}, "quantize=8"), ({"compile": True}, "compile=True"), ({"model": "best.pt"}, "already quantized"),
    ({"pretrained": "best.pt"}, "pretrained=.* is already quantized"),
    ({"device": "mps"}, "device='mps' is not accepted: it lacks"),
])  # fmt: skip
def test_callbacks_added_to_a_trainer_are_refused_as_early(train, digits, tmp_path, arguments, message):
    if "best.pt" in arguments.values():
        arguments = dict.fromkeys(arguments, str(train(QUICK).trainer.best))
    overrides = {"model": "yolov5n.yaml", **TINY, "data": str(digits), "project": str(tmp_path), **arguments}
    device = overrides.pop("device") if arguments.get("device") else None
    trainer = DetectionTrainer(overrides=overrides)
    if device:  # which this machine has not
        trainer.device, trainer.args.device = torch.device(device), device
    with pytest.raises(QCError, match=message):
        add_qc_callbacks(trainer, **QUICK)


@pytest.mark.parametrize("model, arguments, message", [
    ("yolov5n.yaml", {}, "model='yolov5n.yaml' is not accepted; give an ultralytics.YOLO object"),
    (None, {"config": {"bits": 4}}, "config={'bits': 4} is not accepted; give a QCConfig, or options by name"),
])  # fmt: skip
def test_what_callbacks_cannot_be_added_to_is_refused(model, arguments, message):
    with pytest.raises(QCError, match=message):
        add_qc_callbacks(model or YOLO("yolov5n.yaml"), **arguments)


def test_a_start_that_cannot_be_read_is_refused_by_name(tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(FLOAT.read_bytes()[:20_000])
    with pytest.raises(QCError, match=r"model=.*torn\.pt cannot be read as a checkpoint"):
        check_file(str(torn))
    for other in (str(FLOAT), "yolo11n.pt", "yolov5n.yaml", ""):  # or Ultralytics' own to find
        check_file(other)


@pytest.mark.parametrize("options, said", [
    ({"target": "cpu"}, []), ({"target": "cpu", "act_bits": 4}, ["fewer than 8"]), ({"act_bits": 4}, []),
    ({"target": "cpu", "budget": "90%ops"}, ["fewer than 8"]), ({"target": "cpu", "budget": "90%size"}, []),
    ({"target": "fpga", "act_bits": 4}, []), ({"target": "litert", "output_bits": None}, ["output_bits=None"]),
    ({"target": "cpu", "preset": "paper"}, ["output_bits=None"]), ({"target": "tensorrt"}, []),
])  # fmt: skip
def test_options_that_a_target_gains_nothing_by_are_named(options, said, caplog):
    warn_of_options(QCConfig.from_options(options))
    assert len(caplog.messages) == len(said) and all(map(str.__contains__, caplog.messages, said))


def test_callbacks_added_to_a_trainer_train(digits, tmp_path):
    overrides = {"model": TINY_YAML, **TINY, "data": str(digits), "project": str(tmp_path), "name": "run"}
    trainer = DetectionTrainer(overrides=overrides)
    add_qc_callbacks(trainer, **QUICK)
    trainer.train()
    assert quantized_layers(load_checkpoint(tmp_path / "run" / "weights" / "best.pt")[0]) == 15


def test_float_outputs_keep_their_scales_in_the_correction(train):
    """QC against QAT is gamma and beta alone: both are compared on the same scales."""
    seen = {}

    def correct_again(trainer):
        from yolo_qc_plugin.run import qc

        seen["qc"] = qc.train_qc(trainer, QCConfig(output_bits=None), trainer.wdir / "qat.pt").state_dict()

    yolo = train({"preset": "paper"}, {"on_train_end": correct_again})
    qat = load_checkpoint(yolo.trainer.wdir / "qat.pt")[0].state_dict()
    corrected = {k for k in seen["qc"] if k.endswith(("gamma", "beta"))}
    assert corrected and seen["qc"].keys() - corrected == qat.keys()
    moved = [k for k, v in qat.items() if not torch.equal(v, seen["qc"][k])]
    assert moved == [] and any((seen["qc"][k] != 1).any() for k in corrected if k.endswith("gamma"))


UNSUPPORTED = """
import json, sys
from ultralytics import YOLO
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host import compat
compat.supported_versions = lambda: ">=9.0,<10"
if sys.argv[3] == "fuse":
    from ultralytics.nn.tasks import BaseModel
    BaseModel.fuse = lambda self, other: self
yolo = YOLO(sys.argv[1])
yolo.predict(sys.argv[2], imgsz=64, verbose=False, device="cpu")
deployed = sum(type(m).__name__ == "DeployedConv2d" for m in yolo.predictor.model.backend.model.modules())
from yolo_qc_plugin import add_qc_callbacks
try:
    add_qc_callbacks(YOLO("yolov5n.yaml"))
    refused = ""
except QCError as error:
    refused = str(error)
print(json.dumps({"deployed": deployed, "refused": refused}))
"""


def test_a_checkpoint_opens_with_an_unsupported_ultralytics(train, digits, tmp_path):
    """Predicting works and a warning names the versions; training is refused; a model that cannot be fused is too."""
    best = train(QUICK).trainer.best
    image = next((digits.parent / "images" / "val").iterdir())

    def run(case):
        command = [sys.executable, "-c", UNSUPPORTED, str(best), str(image), case]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    done = run("version")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["deployed"] == 15
    assert "is not supported; yolo-qc-plugin supports ultralytics>=9.0,<10" in found["refused"]
    assert "supports ultralytics>=9.0,<10. The checkpoint opens" in done.stdout + done.stderr
    broken = run("fuse")
    assert broken.returncode != 0 and "BaseModel.fuse takes ['self', 'other']" in broken.stderr
