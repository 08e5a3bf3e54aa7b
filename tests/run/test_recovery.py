# yolo_qc_plugin, AGPL-3.0
"""What the host recovers from, with quantizers in place: a loss that is not a number, and lack of memory."""

from __future__ import annotations

import torch

from yolo_qc_plugin.qat.ema import ConstantEMA
from yolo_qc_plugin.quant.layers import quant_convs, scale_parameters

OPTIONS = {"bits": 4, "correction": "off", "output_bits": None}


class Poison:
    """A forward hook that makes one loss NaN; of a class, because the host pickles the model."""

    armed = False

    def __call__(self, model, args, output):
        if model.training and self.armed:
            Poison.armed = False
            return output[0] * float("nan"), output[1]


def test_nan_loss(train):
    """The last loss of the second epoch is NaN, and with it all weights and scales; the host repeats the epoch."""
    epochs, batches, finite, steps, end = [], [], [], [], {}

    def on_pretrain_routine_end(trainer):
        trainer.model.register_forward_hook(Poison())
        trainer.optimizer.register_step_post_hook(lambda *_: steps.append(len(epochs)))

    def on_train_epoch_start(trainer):
        equal = all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in trainer.ema.ema.state_dict().items())
        epochs.append((trainer.epoch, trainer.ema.updates, type(trainer.ema), equal))

    def on_train_batch_start(trainer):
        batches.append(trainer.epoch)
        Poison.armed = len(batches) == 6

    def on_train_epoch_end(trainer):
        both = [*scale_parameters(trainer.model), *scale_parameters(trainer.ema.ema)]
        finite.append(all(bool(p.isfinite().all()) for p in both))

    train(
        OPTIONS,
        {
            "on_pretrain_routine_end": on_pretrain_routine_end,
            "on_train_epoch_start": on_train_epoch_start,
            "on_train_batch_start": on_train_batch_start,
            "on_train_epoch_end": on_train_epoch_end,
            "on_train_end": lambda trainer: end.update(updates=trainer.ema.updates),
        },
        epochs=3,
        nbs=8,
    )
    repeated = steps.count(3)  # 3; none in older versions of the host
    assert epochs == [
        (0, 0, ConstantEMA, True),
        (1, 3, ConstantEMA, False),
        (1, 3, ConstantEMA, True),  # again, from last.pt
        (2, 3 + repeated, ConstantEMA, False),
    ]
    assert finite == [True, False, True, True] and end["updates"] == 3 + repeated + 3


def test_out_of_memory(train):
    """Twice in the first epoch; the host halves the batch and begins the epoch again, older versions of it with a new
    optimizer, as here the second time."""
    seen = {"batches": 0, "held": []}

    def held(trainer):
        return sum(conv.given_weight is not None for _, conv in quant_convs(trainer.model))

    def on_pretrain_routine_end(trainer):
        def fail(module, args):
            seen["batches"] += 1
            if seen["batches"] in {2, 4}:
                seen["scales"] = [p.detach().clone() for p in scale_parameters(trainer.model)]
                seen["held"].append(held(trainer) > 0)
                if seen["batches"] == 4:
                    trainer.optimizer = None
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        trainer.model.model[-1].cv2[0][1].conv.register_forward_pre_hook(fail)

    def on_train_epoch_start(trainer):
        if seen["batches"]:
            seen["held"].append(held(trainer) > 0)
            scales = scale_parameters(trainer.model)
            assert all(torch.equal(p, before) for p, before in zip(scales, seen["scales"]))
            assert {id(p) for p in trainer.optimizer.param_groups[-1]["params"]} == {id(p) for p in scales}

    def on_train_end(trainer):
        seen["end"] = trainer.batch_size, trainer.ema.updates, type(trainer.ema)
        seen["moved"] = [not torch.equal(p, v) for p, v in zip(scale_parameters(trainer.model), seen["scales"])]

    events = (on_pretrain_routine_end, on_train_epoch_start, on_train_end)
    train(OPTIONS, {event.__name__: event for event in events}, nbs=8)
    assert seen["held"] == [True, False] * 2  # a pass that failed leaves no tensors behind
    # a step on a batch of 8; none on one of 4, of two that make a step; three on four batches of 2 each
    assert seen["end"] == (2, 1 + 0 + 3, ConstantEMA) and seen["batches"] == 2 + 2 + 12
    assert sum(seen["moved"]) > 0.8 * len(seen["moved"])
