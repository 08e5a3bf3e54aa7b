# yolo_qc_plugin, AGPL-3.0
"""The training loader: calibration takes nothing from the first epoch, and it may have worker processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import FLOAT
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin.quant.layers import is_quantized


def test_each_epoch_sees_every_image_once(train, digits):
    """Calibration reads two of six batches before."""
    epochs = []

    def look(trainer):
        def preprocess(batch, original=trainer.preprocess_batch):
            epochs[-1].update(batch["im_file"])
            return original(batch)

        trainer.preprocess_batch = preprocess

    train(
        {"calibration_batches": 2, "correction": "off", "output_bits": None},
        {"on_train_start": look, "on_train_epoch_start": lambda _: epochs.append(Counter())},
        model=FLOAT,
        batch=4,
        epochs=2,
        close_mosaic=0,  # which resets the loader too
    )
    images = {str(image) for image in (digits.parent / "images" / "train").iterdir()}
    assert len(images) == 24 and epochs == [dict.fromkeys(images, 1)] * 2


def test_a_run_with_workers(train, tmp_path):
    """It calibrates, trains, stops in its second epoch, is resumed, and corrects."""
    workers = []

    def with_workers(trainer):
        trainer.args.workers = 2  # Ultralytics has set 0 on a CPU

    def count(trainer):
        workers.append((trainer.train_loader.num_workers, trainer.test_loader.num_workers))
        if trainer.epoch == 1 and len(workers) == 2:
            raise KeyboardInterrupt

    callbacks = {"on_pretrain_routine_start": with_workers, "on_train_batch_start": lambda _: None}
    arguments = {"model": FLOAT, "epochs": 2, "batch": 4, "optimizer": "Adam", "lr0": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        train({"correction_lr": 1e-3}, {**callbacks, "on_train_epoch_start": count}, **arguments)
    weights = tmp_path / "run" / "weights"
    assert (weights / "resume.pt").exists()

    resumed = YOLO(weights / "last.pt")
    for event, callback in {**callbacks, "on_train_epoch_start": count}.items():
        resumed.add_callback(event, callback)
    resumed.train(resume=True, save_dir=str(tmp_path / "run"))
    assert len(workers) == 3 and all(train == 2 for train, _ in workers)
    report = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())
    assert report["metrics"]["float"]["map50_95"] > 0.2 and report["metrics"]["qc"]["map50_95"] > 0.1
    assert is_quantized(load_checkpoint(Path(weights, "best.pt"))[0]) and not (weights / "resume.pt").exists()
