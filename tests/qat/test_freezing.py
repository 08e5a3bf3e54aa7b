# yolo_qc_plugin, AGPL-3.0
"""Iterative weight freezing: which weights, at which code, and that they keep it through all that follows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import TINY, steps_of
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.qat import freezing
from yolo_qc_plugin.qat.freezing import Freezing, freeze_threshold
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.quant.functional import gradients
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs


@pytest.fixture
def model():
    torch.manual_seed(0)
    shapes = [((3, 8, 3), 3, False), ((8, 8, 1), 4, True), ((8, 4, 1), 8, False)]
    convs = [QuantConv2d.from_float(nn.Conv2d(*c), bits, 4, per_channel, True) for c, bits, per_channel in shapes]
    for conv in convs:
        conv.weight_quant.calibrate(conv.weight, "mse")
    return nn.Sequential(*convs)


@torch.no_grad()
def walk(model, rand):
    """A step of a random walk of weights and scales."""
    for conv in model:
        noise = torch.randn(conv.weight.shape, generator=rand)
        conv.weight.add_(noise * conv.weight_quant.per_weight(noise), alpha=0.4)
        conv.weight_quant.scale.mul_(1 + 0.02 * torch.randn(conv.weight_quant.scale.shape, generator=rand))


def test_a_frozen_weight_keeps_the_mean_of_its_codes(model):
    """Weight by weight against a count by hand; those of 8 bits are not frozen."""
    found, rand = Freezing(TrainedWeights(model), bits=4), torch.Generator().manual_seed(0)
    codes = [found.codes.clone().numpy()]
    frozen_at, held = np.full(len(codes[0]), -1), np.zeros(len(codes[0]))
    last, frequency, mean = np.zeros(len(held)), np.zeros(len(held)), codes[0].astype(float)
    narrow = 3 * 8 * 9 + 64
    for step in range(40):
        walk(model, rand)
        found.threshold = None if step < 10 else 0.045
        found.weights.read()
        found.step()
        now = np.concatenate([c.weight_codes().flatten().numpy() for c in model])
        now = np.where(frozen_at >= 0, held, now)
        sign = np.sign(now - codes[-1])
        frequency = 0.99 * frequency + 0.01 * (sign * last == -1)
        last = np.where(sign == 0, last, sign)
        if step >= 10:
            new = (frequency > 0.045) & (frozen_at < 0) & (np.arange(len(held)) < narrow)
            held[new], frozen_at[new] = np.round(mean[new]), step
        mean = 0.99 * mean + 0.01 * now
        codes.append(now)
        np.testing.assert_array_equal(found.codes.numpy(), now)
        found.put_back(model)
        after = np.concatenate([c.weight_codes().flatten().numpy() for c in model])
        np.testing.assert_array_equal(after[frozen_at >= 0], held[frozen_at >= 0])
    np.testing.assert_array_equal(found.free.numpy() == 0, frozen_at >= 0)
    np.testing.assert_array_equal(found.held.numpy(), held)
    assert 20 < (frozen_at >= 0).sum() < narrow and len(set(frozen_at)) > 5 and (frequency[narrow:] > 0.045).any()
    assert (held[frozen_at >= 0] != np.array(codes)[frozen_at[frozen_at >= 0] + 1, frozen_at >= 0]).any()


def test_whatever_an_optimizer_does_the_weight_is_put_back_to_its_scale(model):
    found = Freezing(TrainedWeights(model), bits=4)
    found.frequency.fill_(1.0)
    found.threshold = 0.5
    found.step()
    codes = [c.weight_codes() for c in model]
    with torch.no_grad():
        for conv in model:
            conv.weight.add_(1e6)
            conv.weight_quant.scale.mul_(3.0)
    found.put_back(model)
    for conv, before in list(zip(model, codes))[:2]:
        assert conv.weight_codes().equal(before)
        assert torch.equal(conv.weight, before * conv.weight_quant.per_weight(before))
    assert (model[2].weight > 1e5).all()


def test_a_frozen_weight_has_no_gradient_and_its_scale_that_of_a_fixed_code():
    rand = torch.Generator().manual_seed(0)
    weight, upstream = (torch.randn(6, 4, 3, 3, generator=rand) for _ in range(2))
    scale = torch.full((6,), 0.3)
    free = (torch.rand(weight.shape, generator=rand) > 0.5).to(torch.int8)
    codes = (weight / 0.3).round().clamp(-8, 7)
    by_weight, by_scale, _ = gradients(upstream, weight, scale, None, -8, 7, 1.0, free)
    v = weight / 0.3
    inside = (v > -8) & (v < 7) & free.bool()
    assert torch.equal(by_weight, upstream * inside)
    torch.testing.assert_close(by_scale, (upstream * (codes - v * inside)).sum((1, 2, 3)))


def test_a_fixed_code_is_handed_out_whatever_the_weight_and_has_no_gradient(model):
    weights = TrainedWeights(model)
    found = Freezing(weights, bits=4)
    found.free[:10] = 0
    found.held[:10] = torch.arange(-4, 4).repeat(2)[:10]
    first, *_ = weights.hand_out()
    scale = model[0].weight_quant.scale
    assert torch.equal(first.flatten()[:10], found.held[:10] * scale)
    first.sum().backward()
    grad = model[0].weight.grad.flatten()
    assert not grad[:10].any() and grad[10:].mean() > 0.9


def test_the_threshold_falls_after_a_quarter_of_the_run():
    assert [freeze_threshold(0.01, p) for p in (0, 0.24)] == [None, None]
    assert [freeze_threshold(0.01, p) for p in (0.25, 0.625, 1)] == pytest.approx([0.1, 0.055, 0.01])
    assert freeze_threshold(0.3, 0.25) == freeze_threshold(0.3, 1) == 0.3


class Watch:
    """What was frozen after each step, at which codes; checks that it stays so in the model and its average."""

    def __init__(self):
        self.held, self.counts, self.best = {}, [], {}

    def on_train_batch_end(self, trainer) -> None:
        oscillation = steps_of(trainer).oscillation
        self.counts.append(int((oscillation.free == 0).sum()))
        for model in (trainer.model, trainer.ema.ema):
            self.check(model)
        for name, free, held in zip(
            oscillation.names, oscillation.by_layer(oscillation.free), oscillation.by_layer(oscillation.held)
        ):
            self.held[name] = (free == 0, held.clone())
        for model in (trainer.model, trainer.ema.ema):
            self.check(model)

    def check(self, model, held=None) -> None:
        convs = dict(quant_convs(model))
        for name, (frozen, codes) in (held or self.held).items():
            assert torch.equal(convs[name].weight_codes()[frozen], codes[frozen]), name

    def on_model_save(self, trainer) -> None:
        self.check(load_checkpoint(trainer.last)[0])
        if trainer.best_fitness == trainer.fitness:
            self.best = dict(self.held)

    def start(self, yolo) -> None:
        for event in ("on_train_batch_end", "on_model_save"):
            yolo.add_callback(event, getattr(self, event))


def test_frozen_weights_keep_their_codes_through_averaging_saving_resume_and_correction(digits, tmp_path, monkeypatch):
    """With dampening and momentum beside it; the run is killed and resumed when some weights are frozen."""

    def kill(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(freezing, "FIRST_THRESHOLD", 0.015)  # in so short a run nothing oscillates ten times
    watch, yolo = Watch(), YOLO("yolov5n.yaml")
    add_qc_callbacks(yolo, bits=3, rounding="nearest", dampening_weight=0.1, freeze_threshold=0.015, ema_decay=0.9)
    watch.start(yolo)
    yolo.add_callback("on_train_batch_start", kill)
    arguments = {**TINY, "epochs": 4, "nbs": 4, "batch": 4, "optimizer": "SGD", "lr0": 0.02, "close_mosaic": 0}
    with pytest.raises(KeyboardInterrupt):
        yolo.train(**arguments, data=str(digits), project=str(tmp_path), name="run")
    at_kill = sum(int(frozen.sum()) for frozen, _ in watch.held.values())
    assert at_kill > 50 and watch.counts[2] == 0 and len(watch.counts) == 12

    yolo = YOLO(tmp_path / "run" / "weights" / "last.pt")
    watch.start(yolo)
    yolo.train(resume=True)
    counts = watch.counts
    assert len(counts) == 24 and counts == sorted(counts) and counts[12] >= at_kill and counts[-1] > counts[12]
    assert len([n for n, (frozen, _) in watch.held.items() if frozen.any()]) > 20
    for file in ("qat.pt", "best.pt"):
        watch.check(load_checkpoint(tmp_path / "run" / "weights" / file)[0], watch.best)
    report = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())
    assert report["config"]["freeze_threshold"] == 0.015 and report["metrics"]["qc"]
