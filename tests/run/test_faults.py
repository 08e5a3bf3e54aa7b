# yolo_qc_plugin, AGPL-3.0
"""The likeliest faults in real small runs: what is whole stays whole, and one message says what happened."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import cv2
import pytest
import torch
from conftest import TINY_YAML
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.files import replacing
from yolo_qc_plugin.quant.layers import is_quantized, scale_parameters
from yolo_qc_plugin.run.finish import saying_what_is_safe


def kept(weights: Path) -> set[str]:
    """Names of all files in a weights folder, each of which must open; resume.pt is there, for the run is not over."""
    names = {file.name for file in weights.iterdir()} - {"resume.pt"}
    assert all(is_quantized(load_checkpoint(weights / name)[0]) for name in names)
    assert torch.load(weights / "resume.pt", weights_only=True)["epoch"] == 0
    return names


def test_disk_that_fills_up_after_training(train, tmp_path, caplog):
    """Nothing that was whole is lost, no part of a file stays, and the error names the file."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer):  # a file cannot grow past 100 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))

    try:
        with pytest.raises(OSError, match=r"File too large.*weights/qat\.pt"):
            train({"correction": "off"}, {"on_fit_epoch_end": lambda t: fill(t) if t.epoch == t.epochs else None})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert kept(tmp_path / "run" / "weights") == {"best.pt", "last.pt"}
    assert "OSError after training had ended" in caplog.text and "best.pt, last.pt." in caplog.text


def test_interrupt_in_the_correction(train, tmp_path, caplog):
    """Ctrl-C at QC's second batch: all of training is there, the model before the correction too."""
    seen = []

    def count(trainer):  # training has ended: one more batch sets the grids of outputs, the others are the correction's
        def preprocess(batch, original=trainer.preprocess_batch):
            seen.append(batch)
            if len(seen) == 3:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # off in a job in the background
                os.kill(os.getpid(), signal.SIGINT)
            return original(batch)

        trainer.preprocess_batch = preprocess

    with pytest.raises(KeyboardInterrupt):
        train({"calibration_batches": 1}, {"on_model_save": count})
    assert kept(tmp_path / "run" / "weights") == {"best.pt", "last.pt", "qat.pt"}
    assert "KeyboardInterrupt after training had ended" in caplog.text and "best.pt, qat.pt, last.pt." in caplog.text
    assert "last.pt does again what failed" in caplog.text


def test_only_whole_files_are_said_to_be_kept(tmp_path, caplog):
    torch.save({}, tmp_path / "last.pt")
    (tmp_path / "best.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    with pytest.raises(RuntimeError), saying_what_is_safe(tmp_path):
        raise RuntimeError("reason")
    assert f"reason. Its checkpoints are kept in {tmp_path}: last.pt." in caplog.text


def test_a_folder_that_forbids_writing_is_named(tmp_path):
    path = tmp_path / "missing" / "report.json"  # root may write to any folder that is there
    with pytest.raises(FileNotFoundError) as e, replacing(path) as temporary:
        temporary.write_text("{}")
    assert e.value.filename == str(path)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_start_that_is_not_finite(train, tmp_path, value):
    """Refused at once where the model is at hand, and before training where the host loads it."""
    yolo = YOLO(TINY_YAML)
    yolo.model.state_dict()["model.3.conv.weight"].view(-1)[7] = value
    with pytest.raises(QCError, match=r"inf or NaN in 1 tensors \(model.3.conv.weight\)"):
        add_qc_callbacks(yolo)
    yolo.save(tmp_path / "start.pt")
    with pytest.raises(QCError, match=r"model\.3\.conv\.weight"):
        train({}, pretrained=str(tmp_path / "start.pt"))
    assert not list((tmp_path / "run" / "weights").iterdir())


def test_degenerate_data_and_weights(train, digits, tmp_path):
    """Black images one at a time, a class without boxes, channels and a layer of zeros: finite to the end."""
    shutil.copytree(digits.parent, tmp_path / "data")
    for file in (tmp_path / "data" / "images").rglob("*.*"):
        cv2.imwrite(str(file), 0 * cv2.imread(str(file)))
    text = digits.read_text().replace(str(digits.parent), str(tmp_path / "data"))
    (tmp_path / "data" / "digits.yaml").write_text(f"{text}  10: nothing\n")
    yolo = YOLO(TINY_YAML)
    state = yolo.model.state_dict()
    state["model.1.conv.weight"][:4] = 0
    state["model.3.conv.weight"].zero_()
    yolo.save(tmp_path / "start.pt")
    arguments = {"data": str(tmp_path / "data" / "digits.yaml"), "batch": 1, "nbs": 1, "fraction": 0.2}
    trained = train({"per_channel": True}, pretrained=str(tmp_path / "start.pt"), **arguments)
    model = trained.model
    assert all(v.isfinite().all() for v in model.state_dict().values() if v.is_floating_point())
    assert all((s > 0).all() for q in [m for m in model.modules() if hasattr(m, "quant_range")] for s in [q.scale])
    assert len(scale_parameters(model)) > 20
