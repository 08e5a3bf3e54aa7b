# yolo_qc_plugin, AGPL-3.0
"""QC: what it trains, what it freezes, that it lowers the detector's loss, and that it stops at a bad one."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.qat.correction import (
    corrected_in_norms,
    freeze_statistics,
    insert_correction,
    train_correction,
)
from yolo_qc_plugin.quant.calibrate import calibrate
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs


@pytest.fixture(scope="module")
def quantized():
    """Trained for some seconds first: an untrained detector assigns its boxes to targets at random."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    model.args = get_cfg()  # the criterion reads its gains there
    optimizer, data = torch.optim.Adam(model.parameters(), lr=2e-3), batch()
    for _ in range(25):
        optimizer.zero_grad()
        model(data)[0].sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    model(data["img"])
    model.criterion = None
    inject(model, QCConfig(bits=4), architecture.edge_convs(model), architecture.fixed_convs(model))
    model.model[3].register_module("drop", nn.Dropout(0.5))  # to see that freezing reaches it
    calibrate(model, [data["img"]], model, "mse")
    return model


@pytest.fixture
def model(quantized):
    return copy.deepcopy(quantized)


def batch():
    """Two images with three objects, as the host's loader gives them."""
    rand = torch.Generator().manual_seed(0)
    return {
        "img": torch.rand(2, 3, 64, 64, generator=rand),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([[0.0], [2.0], [1.0]]),
        "bboxes": torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.6, 0.3, 0.5], [0.5, 0.5, 0.6, 0.6]]),
    }


def loss_of(model):
    freeze_statistics(model)
    model.criterion = model.init_criterion()
    return lambda data: model(data)[0].sum()


def test_insert_correction_starts_as_the_identity(model):
    model.eval()
    x = batch()["img"]
    before = model(x)[0]
    insert_correction(model, per_channel=True)
    assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("scale,shift", [(True, True), (True, False), (False, True)])
def test_what_is_trained_and_how_long_it_is(model, per_channel, scale, shift):
    convs = [m for _, m in quant_convs(model)]
    trained = insert_correction(model, per_channel, scale, shift)
    expected = []
    for m in convs:
        length = m.out_channels if per_channel else 1
        assert m.correction.gamma.shape == m.correction.beta.shape == (length,)
        assert m.correction.gamma.dtype == torch.float32
        assert (m.correction.gamma == 1).all() and (m.correction.beta == 0).all()
        expected += [m.correction.gamma] * scale + [m.correction.beta] * shift
    assert list(map(id, trained)) == list(map(id, expected)) and len(trained) == len(convs) * (scale + shift)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, trained))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("scale,shift", [(True, True), (True, False), (False, True)])
def test_training_moves_the_factors_only(model, per_channel, scale, shift):
    trained = insert_correction(model, per_channel, scale, shift)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    codes = [m.weight_codes() for _, m in quant_convs(model)]
    assert train_correction(trained, [[batch()] * 2], loss_of(model), lr=1e-2, steps=2) == 2
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    kinds = [name for name, on in (("gamma", scale), ("beta", shift)) if on]
    expected = {f"{n}.correction.{k}" for n, _ in quant_convs(model) for k in kinds}
    # all of them, but for box branches of a level that no object was assigned to
    assert changed <= expected and all(n.startswith("model.24.cv2.") for n in expected - changed)
    assert len(expected - changed) <= 2 * 3 * len(kinds)
    assert all(torch.equal(m.weight_codes(), c) for (_, m), c in zip(quant_convs(model), codes))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_without_freezing_statistics_would_move(model):
    """Negative control of the test above: the loss needs training mode, which moves batch norm."""
    insert_correction(model, True)
    loss = loss_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    loss(batch())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    model.train()
    loss(batch())
    assert not any(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "running_mean" in k)


def test_freeze_statistics_sets_the_modes(model):
    model.eval()
    freeze_statistics(model)
    for m in model.modules():
        assert m.training == (not isinstance(m, (nn.BatchNorm2d, nn.Dropout))), m


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_loss_falls_on_a_fixed_batch(model, per_channel):
    trained = insert_correction(model, per_channel)
    loss, data = loss_of(model), batch()
    first = loss(data).item()
    assert train_correction(trained, [[data] * 6, [data] * 6], loss, lr=1e-2, steps=12) == 12
    assert loss(data).item() < 0.7 * first


def toy():
    """One factor pair whose loss is (gamma - 3)^2, so that steps can be followed by hand."""
    conv = QuantConv2d.from_float(nn.Conv2d(1, 1, 1), 4, 4, False, True)
    trained = insert_correction(nn.Sequential(conv), True)
    return trained, conv.correction


def test_learning_rate_follows_a_cosine_to_zero():
    """Under a constant gradient each Adam step is the learning rate itself (up to Adam's eps of 1e-8)."""
    trained, affine = toy()
    seen = []

    def loss(_):
        seen.append(affine.gamma.item())
        return affine.gamma.sum() * 2.0

    done = train_correction(trained, iter([[0] * 4, [0] * 4]), loss, lr=0.1, steps=8)
    seen.append(affine.gamma.item())
    steps = [a - b for a, b in pairwise(seen)]
    assert done == 8
    assert steps == pytest.approx([0.1 * (0.5 + 0.5 * math.cos(math.pi * n / 8)) for n in range(8)], abs=1e-6)


def test_gradients_are_bounded_as_by_the_host():
    """After a gradient of norm 1e6 (cut to 10), one of 10 counts as much; uncut it would count as nothing."""
    trained, affine = toy()
    sizes = iter([1e6, -10.0])
    train_correction(trained, [[0] * 2], lambda _: affine.gamma.sum() * next(sizes), lr=0.1, steps=10**6)
    # Adam: -0.1, then m = (0.9 * 10 - 10) * 0.1 / (1 - 0.81) and v = 100, so +0.1 * 1 / 19
    assert affine.gamma.item() == pytest.approx(1 - 0.1 + 0.1 / 19, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(value):
    trained, affine = toy()
    losses = iter([1.0, 1.0, value])
    with pytest.raises(FloatingPointError, match=r"loss became -?(nan|inf) at step 2"):
        train_correction(trained, [[0] * 2, [0] * 2], lambda _: affine.gamma.sum() * next(losses), lr=0.1, steps=4)
    assert affine.gamma.isfinite().all()


def test_scaler_leaves_the_steps_as_they_are():
    """A gradient scaler multiplies the loss and divides the gradient; powers of two are exact."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trained, affine = toy()
        train_correction(trained, [[0] * 5], lambda _, affine=affine: (affine.gamma - 3).square().sum(), 0.1, 5, scaler)
        results.append(affine.gamma.item())
    assert results[0] == results[1] > 1


@pytest.mark.parametrize("epoch", [[1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 3.0]], ids=["even", "rest"])
def test_accumulated_batches_make_one_step(epoch):
    """Steps on sums of two batches' gradients are steps on batches of twice the size; what is left over counts, too."""
    results = []
    for batches, accumulate in ((epoch, 2), ([sum(epoch[:2]), sum(epoch[2:])], 1)):
        trained, affine = toy()
        done = train_correction(
            trained,
            [batches] * 2,
            lambda size, affine=affine: size * affine.gamma.square().sum() / 4,
            0.1,
            4,
            accumulate=accumulate,
        )
        results.append((done, affine.gamma.item()))
    assert results[0] == results[1] and results[0][0] == 4


@pytest.mark.parametrize("per_channel", [True, False])
def test_correction_within_batch_norm(model, per_channel):
    """The same outputs and gradients in FP64, and everything in its place afterwards, an error or not."""
    trained = insert_correction(model, per_channel)
    freeze_statistics(model.double())
    for i, p in enumerate(trained):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    image = batch()["img"].double()
    blocks = architecture.normed_blocks(model)
    places = {n: (m.conv.correction, m.bn) for n, m in model.named_modules() if m in blocks}
    assert len(places) > 50

    def gradients():
        loss = sum(y.square().mean() for y in model(image).values() if isinstance(y, torch.Tensor))
        return loss.detach(), torch.autograd.grad(loss, trained)

    plain = gradients()
    with pytest.raises(ZeroDivisionError), corrected_in_norms(blocks):
        assert all(model.get_submodule(n).conv.correction is None for n in places)
        joined = gradients()
        raise ZeroDivisionError
    assert torch.allclose(joined[0], plain[0], rtol=1e-9)
    for a, b in zip(joined[1], plain[1]):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9 * b.abs().max())
    assert all((model.get_submodule(n).conv.correction, model.get_submodule(n).bn) == p for n, p in places.items())
