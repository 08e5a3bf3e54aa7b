# yolo_qc_plugin, AGPL-3.0
"""A host that looks different is refused before training, by the name of what differs: one test for each kind."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.callbacks.base import default_callbacks

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host import compat
from yolo_qc_plugin.qat.scale_steps import separate_scales


def refused(message: str) -> None:
    with pytest.raises(QCError, match=f"ultralytics {compat.ULTRALYTICS_VERSION} .*{message}.*supports ultralytics"):
        compat.refuse(compat.differences())


def test_this_host_is_accepted():
    assert compat.differences() == []
    compat.check_version()


def test_every_function_is_looked_at(monkeypatch):
    for owner, name in compat.CALLED:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, None)
            refused(f"{name} is missing")


@pytest.mark.parametrize("owner, name, lacking", [
    (BaseTrainer, "preprocess_batch", "batch"), (tasks, "load_checkpoint", "weight, device"),
])  # fmt: skip
def test_renamed_parameters(monkeypatch, owner, name, lacking):
    monkeypatch.setattr(owner, name, lambda something: None)
    refused(f"{name} takes no {lacking}")


def test_missing_argument_and_event(monkeypatch):
    monkeypatch.delitem(DEFAULT_CFG_DICT, "quantize")
    monkeypatch.delitem(default_callbacks, "on_train_batch_end")
    refused("there is no argument quantize; there is no event on_train_batch_end")


@pytest.mark.parametrize("event, name", [("on_pretrain_routine_start", "wdir"), ("on_pretrain_routine_end", "ema.ema")])
def test_missing_attribute_of_the_trainer(digits, tmp_path, event, name):
    """A real trainer that has lost one when our callbacks look."""
    yolo = YOLO("yolov5n.yaml")
    yolo.add_callback(event, lambda trainer: delattr(trainer, name.partition(".")[0]))
    add_qc_callbacks(yolo)
    with pytest.raises(QCError, match=f"trainer.{name} is missing in DetectionTrainer"):
        yolo.train(**TINY, data=str(digits), project=str(tmp_path))


def test_missing_parameter_group():
    scale = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [scale], "param_group": "norm"}], lr=0.1)
    with pytest.raises(QCError, match=r"groups \['norm'\]; one called 'bn' is expected"):
        separate_scales(optimizer, [scale], 1.0)
