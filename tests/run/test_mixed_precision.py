# yolo_qc_plugin, AGPL-3.0
"""Mixed precision through the host's loop. On a CPU the host switches it off; the tests switch it on again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import TINY, steps_of
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.qat.correction import train_correction
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.run import qc

# three batches of four images, a step each
ARGUMENTS = {**TINY, "batch": 4, "nbs": 4, "fraction": 0.5, "optimizer": "AdamW", "lr0": 1e-3}


class Run:
    """Callbacks that train in `dtype` (None: FP32) and keep what each step leaves.

    The gradient of step `overflow` becomes infinite. The scaler starts at 1024: from a random start, gradients times
    the usual 65536 are too large for FP16 by themselves.
    """

    def __init__(self, dtype: torch.dtype | None, overflow: int | None):
        self.dtype, self.overflow = dtype, overflow
        self.called, self.losses, self.kept, self.dtypes = 0, [], [], set()
        self.scales: tuple = ()  # of the scaler: at the end of training, and at the beginning of QC

    def on_pretrain_routine_end(self, trainer) -> None:
        trainer.amp = True if self.dtype == torch.bfloat16 else self.dtype or False  # True: BF16 on a CPU
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=self.dtype == torch.float16)
        trainer.optimizer.register_step_post_hook(lambda *_: setattr(self, "called", self.called + 1))
        conv = dict(quant_convs(trainer.model))["model.3.conv"]
        conv.register_forward_hook(lambda _, args, y: self.dtypes.add((args[0].dtype, y.dtype)))
        self.keep(trainer)

    def on_train_batch_start(self, trainer) -> None:
        if len(self.losses) == self.overflow:
            weight = trainer.model.model[0].conv.weight
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    def on_train_batch_end(self, trainer) -> None:
        self.losses.append(trainer.loss.item())
        self.keep(trainer)

    def keep(self, trainer) -> None:
        model = {k: v.detach().clone() for k, v in unwrap_model(trainer.model).named_parameters()}
        average = {k: v.clone() for k, v in trainer.ema.ema.state_dict().items()}
        oscillation = {k: v.clone() for k, v in steps_of(trainer).oscillation.state_dict().items()}
        self.kept.append((model, average, trainer.ema.updates, oscillation))


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """dtype -> Run, all from one start; the last step of FP16 overflows."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # as the host builds it on a GPU: fused, and so called by the scaler for the steps that overflow, too
        patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))
        for dtype in (None, torch.bfloat16, torch.float16):
            run = found[dtype] = Run(dtype, overflow=2 if dtype == torch.float16 else None)
            yolo = YOLO("yolov5n.yaml")
            correction = "channel" if dtype else "off"
            # per tensor: which side of a threshold a value falls on moves this start's first loss by up to 5% in FP32
            # too, and the bound below was found for these scales
            options = {"bits": 4, "per_channel": False, "rounding": "nearest", "freeze_threshold": 0.01}
            add_qc_callbacks(yolo, **options, correction=correction, output_bits=None)
            for event in (e for e in dir(run) if e.startswith("on_")):
                yolo.add_callback(event, getattr(run, event))

            def keep_scales(*given, run=run, yolo=yolo):
                scaler = next(g for g in given if isinstance(g, torch.amp.GradScaler))
                run.scales = yolo.trainer.scaler.get_scale(), scaler.get_scale()
                train_correction(*given)

            patch.setattr(qc, "train_correction", keep_scales)
            yolo.train(**ARGUMENTS, data=str(digits), project=str(tmp_path_factory.mktemp("run")))
    return found


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_step_that_overflows_changes_nothing(runs):
    run = runs[torch.float16]
    assert run.called == 3  # the fused optimizer and its hooks
    for step, updates in ((1, 1), (2, 2)):
        assert not same(run.kept[step][0], run.kept[step - 1][0]) and run.kept[step][2] == updates
        assert not same(run.kept[step][1], run.kept[step - 1][1])
        assert not same(run.kept[step][3], run.kept[step - 1][3])  # codes, their changes and frozen weights
    assert same(run.kept[3][3], run.kept[2][3])
    assert run.scales == (512, 512)  # QC goes on from what training has found, and loses no step to finding it
    assert same(run.kept[3][0], run.kept[2][0]) and same(run.kept[3][1], run.kept[2][1]) and run.kept[3][2] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trains_as_in_single_precision(runs, dtype):
    """The first loss is near, as weights and codes are the same. Later ones differ more: the gradients of a 4-bit
    network that starts at random change altogether with its input changed by a millionth."""
    run, single = runs[dtype], runs[None]
    assert run.dtypes == {(dtype, dtype)} and single.dtypes == {(torch.float32, torch.float32)}
    assert run.losses[0] == pytest.approx(single.losses[0], rel=0.03)
    assert run.losses == pytest.approx(single.losses, rel=0.5)
    for model, average, *_ in run.kept:
        assert {p.dtype for p in model.values()} == {torch.float32}
        assert all(v.isfinite().all() for v in (*model.values(), *average.values()))
