# yolo_qc_plugin, AGPL-3.0
"""Runs in two stages, for cells: what joins in, or rests, from a part of the epochs on."""

from __future__ import annotations

from collections.abc import Callable


def activations_last(trainer) -> None:
    """Activations are rounded in the second half of the epochs alone."""
    from ultralytics.utils.torch_utils import unwrap_model

    from yolo_qc_plugin.quant.calibrate import act_quantizers

    for model in (unwrap_model(trainer.model), trainer.ema.ema):
        for quantizer in act_quantizers(model).values():
            quantizer.enabled = trainer.epoch >= trainer.epochs / 2


def weights_rest(trainer) -> None:
    """In the last fifth of the epochs, or the last one, scales, batch norm and biases train alone."""
    from ultralytics.utils.torch_utils import unwrap_model

    from yolo_qc_plugin.quant.layers import quant_convs

    if trainer.epochs - trainer.epoch <= max(trainer.epochs // 5, 1):
        for _, conv in quant_convs(unwrap_model(trainer.model)):
            conv.weight.requires_grad_(False)


STAGES: dict[str, Callable] = {"activations last": activations_last, "weights rest": weights_rest}


def add_stages(yolo, name: str | None) -> None:
    """Have a run in the stages of a name, one of STAGES; None is a run of one stage."""
    if name:
        yolo.add_callback("on_train_epoch_start", STAGES[name])
