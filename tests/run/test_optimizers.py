# yolo_qc_plugin, AGPL-3.0
"""Real steps of the SGD family, which follows LSQ's gradient: scales move, and none of them jumps."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FLOAT

from yolo_qc_plugin.quant.layers import quant_convs


@pytest.mark.parametrize("optimizer,lr0", [("SGD", 0.03), ("MuSGD", 0.01)])
def test_scales_move_without_jumps(train, optimizer, lr0):
    """Not held back, a scale changes by an eighth (SGD) to a half (MuSGD) in one of these nine steps."""
    largest = []

    def follow(trainer):
        convs = [conv for _, conv in quant_convs(trainer.model)]
        scales = [q.scale.detach() for conv in convs for q in (conv.weight_quant, conv.act_quant)]
        before = []
        trainer.optimizer.register_step_pre_hook(lambda *_: before.append(torch.cat([s.clone() for s in scales])))
        trainer.optimizer.register_step_post_hook(
            lambda *_: largest.append((torch.cat(scales) / before.pop() - 1).abs().max().item())
        )

    options = {"bits": 4, "budget": None, "correction": "off", "telemetry": False}
    yolo = train(options, {"on_train_start": follow}, model=FLOAT, optimizer=optimizer, lr0=lr0, nbs=8, epochs=3)
    assert type(yolo.trainer.optimizer).__name__ == optimizer and len(largest) == 9
    assert 0.01 < max(largest) < 0.1 + 1e-6
    report = json.loads((yolo.trainer.save_dir / "qc" / "report.json").read_text())
    assert report["metrics"]["qat"]["map50_95"] > 0.01  # a ruined model finds nothing
