# yolo_qc_plugin, AGPL-3.0
"""Batch norm re-estimation: what is measured, what stays, and that the report says so."""

from __future__ import annotations

import json

import torch
from torch import nn
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin.qat.reestimation import reestimate
from yolo_qc_plugin.run import finish


def test_statistics_are_the_average_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3))
    model.add_module("kept", nn.BatchNorm2d(3))
    model.unused = nn.BatchNorm2d(3)
    model.unused.forward = None
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_()
            m.running_var.uniform_(1, 2)
    model.eval()
    model[0].train()
    batches = [torch.randn(n, 3, 4, 4) * 3 + 1 for n in (4, 2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate(model, batches, lambda x: model[3](model[2](model[1](model[0](x)))), spared=["kept"])
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert model[2].running_mean.abs().max() < 1e-5  # of what the first one normalized, nothing dropped
    torch.testing.assert_close(model[2].running_var, torch.ones(3), rtol=0.05, atol=0)
    for name in ("kept.running_mean", "kept.running_var", "unused.running_mean", "unused.running_var"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert [m.training for m in model] == [True, False, False, False, False]
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_run(train, tmp_path, monkeypatch):
    """Of a run with a frozen layer: all other statistics are new, nothing else is, and what is measured is written."""
    measured, validate = [], finish.validate

    def look(trainer, model, coco):
        measured.append({k: v.cpu().clone() for k, v in model.state_dict().items()})
        return validate(trainer, model, coco)

    monkeypatch.setattr(finish, "validate", look)
    train({"bits": 4, "bn_reestimate": True, "correction": "off", "output_bits": None}, freeze=1)
    weights = tmp_path / "run" / "weights"
    last, qat = (load_checkpoint(weights / f)[0].state_dict() for f in ("last.pt", "qat.pt"))
    different = {k for k, v in last.items() if not torch.equal(v, qat[k])}
    norms = {k for k in last if k.endswith(("running_mean", "running_var"))}
    assert {k for k in different if "num_batches" not in k} == {k for k in norms if not k.startswith("model.0.")}
    assert len(measured) == 1 and all(torch.equal(v, qat[k]) for k, v in measured[0].items())
    metrics = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())["metrics"]
    assert list(metrics) == ["float", "float_outputs", "bn_reestimated", "qat", "qc"]
    assert metrics["bn_reestimated"] == metrics["qat"]
