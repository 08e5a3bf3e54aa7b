# yolo_qc_plugin, AGPL-3.0
"""Oscillation dampening: its gradient, how it joins the host's loss, what it does to a run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import FLOAT
from torch import nn

from yolo_qc_plugin.qat.dampening import Dampening, dampening_loss
from yolo_qc_plugin.qat.oscillation import annealed
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.quant.functional import fake_quantize
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs


def test_loss_and_gradient_are_those_of_autograd():
    """Of the formula written plainly, per tensor and per channel, with clipped weights; scales learn nothing."""
    rand = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rand) for s in [(8, 3, 3, 3), (6, 4, 1, 1), (4, 2, 3, 3)]]
    scales = [torch.tensor([0.1]), 0.05 + torch.rand(6, generator=rand), 0.2 + torch.rand(4, generator=rand)]
    ranges = [(-8, 7), (-2, 1), (-128, 127)]
    found = []
    for plain in (False, True):
        ws, ss = ([t.clone().requires_grad_() for t in ts] for ts in (weights, scales))
        along = [s.view(-1, 1, 1, 1) for s in ss]
        quantized = [fake_quantize(w, s, None, *r).detach() for w, s, r in zip(ws, ss, ranges)]
        if plain:
            parts = zip(ws, quantized, along, ranges)
            loss = sum((q - w.clamp(s.detach() * a, s.detach() * b)).square().sum() for w, q, s, (a, b) in parts)
        else:
            loss = dampening_loss(ws, quantized, along, ranges)
        (3 * loss).backward()
        assert all(s.grad is None for s in ss)
        found.append([loss.detach(), *(w.grad for w in ws)])
    torch.testing.assert_close(*found)
    clipped = weights[0].abs() > 0.8
    assert clipped.any() and (found[0][1][clipped & (weights[0] > 0)] == 0).all() and found[0][1].count_nonzero() > 50


def test_the_weight_follows_the_authors_schedule():
    assert [annealed(0.0, 2.0, p) for p in (0, 0.1, 0.25, 0.625, 1, 1.5)] == pytest.approx([0, 0, 0, 1, 2, 2])
    assert [annealed(0.1, 0.01, p) for p in (0.25, 0.625, 1)] == pytest.approx([0.1, 0.055, 0.01])


class Host(nn.Sequential):
    """A convolution that returns what the host's models do in training: a loss in parts, and what is shown of it."""

    def forward(self, x):
        if not isinstance(x, dict):
            return super().forward(x)
        loss = super().forward(x["img"]).square().mean((2, 3)).sum(0)
        return loss, {"loss": loss.detach()}


@pytest.fixture
def parts():
    """(model, its TrainedWeights, a maker of batches)."""
    torch.manual_seed(0)
    model = Host(QuantConv2d.from_float(nn.Conv2d(3, 8, 3), 4, 4, True, True))
    model[0].weight_quant.calibrate(model[0].weight, "mse")
    model[0].act_quant.scale.data.fill_(0.1)
    images = torch.rand(16, 3, 8, 8)
    return model, TrainedWeights(model), lambda a, b: {"img": images[a:b]}


def test_micro_batches_add_up_to_the_batch_and_the_scaler_scales(parts):
    model, weights, batch = parts
    added = Dampening(model, weights)

    def gradient(*batches, weight=0.5, scaler=None):
        model.zero_grad()
        for one in batches:
            added.prepare(weight, weights.hand_out())
            loss, shown = model(one)
            assert shown.keys() == {"loss"} and shown["loss"].shape == (8,)
            (scaler.scale(loss) if scaler else loss).sum().backward()
        return model[0].weight.grad.clone()

    whole, alone = gradient(batch(0, 16)), gradient(batch(0, 16), weight=0.0)
    torch.testing.assert_close(gradient(batch(0, 8), batch(8, 16)), whole)
    weight, scale = model[0].weight.detach(), model[0].weight_quant.scale.detach().view(-1, 1, 1, 1)
    away = weight.clamp(-8 * scale, 7 * scale) - scale * model[0].weight_codes()
    torch.testing.assert_close(whole - alone, 16 * 0.5 * 2 * away, rtol=1e-4, atol=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.testing.assert_close(gradient(batch(0, 16), scaler=scaler), 8 * whole)
    added.summed = False
    torch.testing.assert_close(gradient(batch(0, 16)) - alone, (whole - alone) / 16, rtol=1e-3, atol=1e-6)


def test_one_training_pass_is_changed_and_no_copy(parts):
    model, weights, batch = parts
    added, plain = Dampening(model, weights), model(batch(0, 4))[0].sum()
    added.prepare(1.0, weights.hand_out())
    with pytest.raises(AttributeError):
        model({"img": None})  # a pass that fails
    added.prepare(1.0, weights.hand_out())
    expected = plain + 4 * added.loss()
    assert torch.allclose(model(batch(0, 4))[0], expected) and expected > plain
    assert torch.equal(model(batch(0, 4))[0].sum(), plain)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert not copied._forward_hooks and not model._forward_hooks


def away_from_grid(model) -> float:
    """Root mean square distance of latent weights to their grid points, in steps."""
    steps = [((c.weight / c.weight_quant.per_weight(c.weight)), c.weight_codes()) for _, c in quant_convs(model)]
    return torch.cat([(v.clamp(-8, 7) - q)[v.abs() < 7].flatten() for v, q in steps]).square().mean().sqrt().item()


def test_weights_come_nearer_to_their_grid_points_in_a_run(train):
    """From the second quarter of the run on, and as a loss that the host's clipping sees but its display does not."""
    seen = []

    def look(trainer):
        shown = 8 * sum(trainer.loss_items.values()).item()
        seen.append((away_from_grid(trainer.model), trainer.loss.item() - shown))

    options = {"bits": 4, "rounding": "nearest", "dampening_weight": 10.0, "correction": "off", "output_bits": None}
    train(options, {"on_train_batch_end": look}, "yolov5n.yaml", epochs=2, nbs=8, optimizer="SGD", lr0=0.02, val=False)
    away, added = zip(*seen)
    assert away[:2] == pytest.approx([12**-0.5] * 2, rel=0.01) and away[-1] < 0.9 * away[1]  # at random, then not
    assert max(map(abs, added[:2])) < 1e-2 and min(added[2:]) > 10


def test_it_counts_beside_a_teacher_whatever_labels_weigh(train):
    seen = []

    def look(trainer):
        seen.append(trainer.loss.item() - 8 * trainer.loss_items["teacher_loss"].item())

    options = {"bits": 4, "rounding": "nearest", "dampening_weight": 10.0, "label_weight": 0.0}
    options |= {"correction": "off", "output_bits": None}
    train(options, {"on_train_batch_end": look}, model=FLOAT, epochs=2, nbs=8, optimizer="SGD", lr0=0.02, val=False)
    assert max(map(abs, seen[:2])) < 1e-3 and min(seen[2:]) > 0.1
