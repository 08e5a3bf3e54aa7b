# yolo_qc_plugin, AGPL-3.0
"""The scales' parameter group in optimizers that the real host builds, and steps in proportion to the scale."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.optim import MuSGD

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.host.record import QuantRecord
from yolo_qc_plugin.qat.scale_steps import MAX_STEP, ScaleSteps, separate_scales
from yolo_qc_plugin.quant.inject import inject, remove
from yolo_qc_plugin.quant.layers import scale_parameters
from yolo_qc_plugin.quant.quantizer import ActQuantizer, WeightQuantizer
from yolo_qc_plugin.run.callbacks import attach

attach()


@pytest.fixture(scope="module", params=["yolov5n.yaml", "yolo26n.yaml"])
def float_model(request):
    torch.manual_seed(0)
    return DetectionModel(request.param, nc=3, verbose=False)


PLAIN_LSQ = dict(per_channel=True, act_offset=False, scale_lr=0.1)


@pytest.fixture(scope="module", params=[{}, PLAIN_LSQ], ids=["lsq+", "lsq"])
def case(request, float_model):
    """(float model, quantized model, options)"""
    return float_model, quantized(float_model, **request.param), request.param


def quantized(float_model, **options):
    """The model as a run has it when the host builds its optimizer."""
    model, config = copy.deepcopy(float_model), QCConfig(**options)
    inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
    model.qc = QuantRecord(config.to_dict())
    return model


def build(model, name, iterations=1000.0):
    """The host's own build_optimizer, on a stand-in for the trainer that has what it reads."""
    args = SimpleNamespace(lr0=0.01, momentum=0.9, optimizer=name, warmup_bias_lr=0.1)
    trainer = SimpleNamespace(args=args, data={"nc": 3})
    return BaseTrainer.build_optimizer(
        trainer, model=model, name=name, lr=0.01, momentum=0.9, decay=5e-4, iterations=iterations
    )


def sorted_into(optimizer, model):
    """Parameter name -> index and settings of every group that holds it."""
    groups = {name: [] for name, _ in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            groups[names[id(p)]].append((i, {k: v for k, v in group.items() if k != "params"}))
    return groups


@pytest.mark.parametrize("name,iterations,kind", [
    ("SGD", 1000, "SGD"), ("Adam", 1000, "Adam"), ("AdamW", 1000, "AdamW"), ("MuSGD", 1000, "MuSGD"),
    ("RMSprop", 1000, "RMSprop"), ("auto", 1000, "AdamW"), ("auto", 20_000, "MuSGD"),
])  # fmt: skip
def test_scales_get_a_group_of_their_own_and_the_rest_stays(case, name, iterations, kind):
    float_model, model, options = case
    optimizer, plain = build(model, name, iterations), build(float_model, name, iterations)
    assert type(optimizer) is type(plain) and type(optimizer).__name__ == kind
    groups, expected = sorted_into(optimizer, model), sorted_into(plain, float_model)
    assert all(len(found) == 1 for found in groups.values())

    scales = {n for n in groups if n.endswith(("weight_quant.scale", "act_quant.scale", "act_quant.offset"))}
    assert len(scales) == len(scale_parameters(model)) > 100
    last = len(plain.param_groups)
    smallest = min(g["lr"] for g in plain.param_groups)
    for n in scales:
        index, settings = groups.pop(n)[0]
        assert index == last and settings["weight_decay"] == 0 and not settings.get("use_muon")
        assert settings["lr"] == pytest.approx(smallest * options.get("scale_lr", QCConfig().scale_lr), rel=1e-12)
        assert settings["param_group"] == "scale"
    assert groups == expected  # everything else: same group, same settings
    assert optimizer.param_groups[last].keys() == plain.param_groups[0].keys()  # complete, and nothing foreign


def test_the_float_model_is_sorted_as_without_the_plugin(float_model):
    patched, original = (
        build(float_model, "MuSGD"),
        BaseTrainer.build_optimizer.__wrapped__(
            SimpleNamespace(args=SimpleNamespace()), float_model, "MuSGD", 0.01, 0.9, 5e-4, 1000.0
        ),
    )
    assert sorted_into(patched, float_model) == sorted_into(original, float_model)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "MuSGD", "RMSprop"])
def test_the_optimizer_steps_every_scale(float_model, name):
    model = quantized(float_model)
    optimizer = build(model, name)
    steps = ScaleSteps(optimizer, model)
    before = [p.detach().clone() for p in scale_parameters(model)]
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    assert all((p < b).all() for p, b in zip(scale_parameters(model), before)) and steps.taken == 1


def test_a_model_whose_quantizers_were_removed_trains_as_a_float_one(float_model):
    model = quantized(float_model)
    remove(model)
    assert sorted_into(build(model, "SGD"), model) == sorted_into(build(float_model, "SGD"), float_model)


def test_nothing_to_separate():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "param_group": "bn"}], lr=0.1)
    assert separate_scales(optimizer, [], 1.0) is None and len(optimizer.param_groups) == 1


class Quantizers(nn.Module):
    """Weight and activation quantizers whose scales lie far apart, with gradients set by hand."""

    def __init__(self):
        super().__init__()
        self.weight, self.act, self.plain = WeightQuantizer(8, 3), ActQuantizer(4, True), ActQuantizer(4, False)
        self.weight.scale.data = torch.tensor([1e-4, 2e-3, 0.5])
        self.act.scale.data.fill_(0.05)
        self.act.offset.data.fill_(-0.25)
        self.plain.scale.data.fill_(30.0)
        self.other = nn.Parameter(torch.tensor([1e-3, 5.0]))

    def gradient(self, value):
        for p in self.parameters():
            p.grad = torch.full_like(p, value)

    def values(self):
        return {n: p.detach().clone() for n, p in self.named_parameters()}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("sign", [1, -1])
def test_adam_moves_scales_by_lr_of_themselves(kind, sign):
    model = Quantizers()
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.0)
    ScaleSteps(optimizer, model)
    before = model.values()
    model.gradient(sign * 123.0)
    optimizer.step()
    for name, value in model.values().items():
        unit = {"act.offset": before["act.scale"], "other": torch.ones(2)}.get(name, before[name])
        torch.testing.assert_close(value, before[name] - sign * 1e-2 * unit, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [getattr(torch.optim, n) for n in ScaleSteps.ADAPTIVE])
def test_adaptive_steps_are_in_units_of_the_scale(kind):
    """Over a few steps: each step of the same optimizer without ScaleSteps, times the scale before it."""
    model = Quantizers()
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.0)
    ScaleSteps(optimizer, model)
    free = {n: torch.zeros_like(p, requires_grad=True) for n, p in model.named_parameters()}
    reference = kind(free.values(), lr=1e-3, weight_decay=0.0)
    for gradient in (0.3, -2.0, 0.5):
        before, free_before = model.values(), {n: p.detach().clone() for n, p in free.items()}
        model.gradient(gradient)
        for p in free.values():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        reference.step()
        for name, value in model.values().items():
            unit = {"act.offset": before["act.scale"], "other": 1.0}.get(name, before[name])
            step = free[name].detach() - free_before[name]
            assert (step != 0).all()
            # float32 values of size 30 resolve 2e-6 of steps of 1e-3 or somewhat less
            torch.testing.assert_close(value - before[name], step * unit, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", [
    lambda p: torch.optim.SGD(p, lr=0.01),
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    lambda p: MuSGD([{"params": p, "use_muon": False}], lr=0.01, momentum=0.9, nesterov=True),
], ids=["SGD", "Nesterov", "MuSGD"])  # fmt: skip
def test_sgd_follows_the_published_gradient(kind):
    model, twin = Quantizers(), Quantizers()
    optimizer, reference = kind([*model.parameters()]), kind([*twin.parameters()])
    ScaleSteps(optimizer, model)
    for gradient in (1e-4, -2e-4, 5e-5):
        model.gradient(gradient)
        twin.gradient(gradient)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert (model.act.scale != 0.05).all()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1.0, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("direction", ["down", "up", "either"])
def test_scales_stay_positive_and_near_what_they_were(kind, direction):
    model = Quantizers()
    optimizer = kind(model.parameters())
    steps = ScaleSteps(optimizer, model)
    random = torch.Generator().manual_seed(0)
    scales = [model.weight.scale, model.act.scale, model.plain.scale]
    for i in range(200):
        before = [s.detach().clone() for s in scales]
        for p in model.parameters():
            sign = torch.randn(p.shape, generator=random).sign() if direction == "either" else torch.ones(p.shape)
            p.grad = sign * (1e6 if direction != "up" else -1e6)
        optimizer.step()
        for s, b in zip(scales, before):
            assert (s > 0).all() and s.isfinite().all(), f"step {i}"
            assert ((1 - MAX_STEP) * b <= s).all() and (s <= (1 + MAX_STEP) * b).all(), f"step {i}"
    assert steps.taken == 200


def test_one_huge_step_changes_scales_by_a_tenth():
    for gradient, factor in ((1e6, 0.9), (-1e6, 1.1)):
        model = Quantizers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ScaleSteps(optimizer, model)
        before = model.values()
        model.gradient(gradient)
        optimizer.step()
        assert all(torch.equal(v, factor * before[n]) for n, v in model.values().items() if n.endswith("scale"))
        assert torch.equal(model.other, before["other"] - 0.1 * gradient)  # nothing else is held back


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_only_real_steps_are_counted(kind, fused):
    """GradScaler does not call an optimizer for a step that overflowed; a fused one it does, and its hooks run."""
    model = Quantizers()
    optimizer = kind(model.parameters(), lr=0.01, fused=fused)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    steps, scaler = ScaleSteps(optimizer, model), torch.amp.GradScaler("cpu", init_scale=1.0)
    for gradient, taken in ((1e-3, 1), (float("inf"), 1), (1e-3, 2), (float("nan"), 2)):
        before = model.values()
        loss = sum(p.sum() for p in model.parameters()) * 0
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        model.gradient(gradient)
        scaler.step(optimizer)
        scaler.update()
        assert steps.taken == taken
        for name, value in model.values().items():
            assert torch.equal(value, before[name]) == (gradient != 1e-3)
    assert len(called) == (4 if fused else 2)


def test_frozen_scales_stay():
    model = Quantizers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ScaleSteps(optimizer, model)
    before = model.values()
    model.gradient(1.0)
    model.weight.scale.grad = None
    optimizer.step()
    assert torch.equal(model.weight.scale, before["weight.scale"]) and not torch.equal(model.other, before["other"])
