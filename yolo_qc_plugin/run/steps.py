# yolo_qc_plugin, AGPL-3.0
"""What the plugin does around each optimizer step of the stock loop, and the state that goes from step to step."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..config import QCConfig
from ..host import architecture
from ..host.distillation import Distillation, Gains
from ..host.teacher import Teacher
from ..qat.annealed_rounding import AnnealedRounding, temperature
from ..qat.correction import freeze_norms
from ..qat.dampening import Dampening
from ..qat.ema import ConstantEMA
from ..qat.freezing import Freezing, freeze_threshold
from ..qat.oscillation import Oscillation, annealed
from ..qat.prepare import TrainedWeights
from ..qat.scale_steps import ScaleSteps
from ..qat.weight_steps import WeightSteps
from ..quant.calibrate import act_quantizers
from .accumulation import Accumulation
from .telemetry import EVERY, Telemetry


class Steps:
    """Quantizes the weights for each micro-batch; after a real step freezes, averages and records.

    Args:
        trainer: Set up, its scales calibrated; its EMA is taken over.
        config: The options of the run.
        teacher: The float model that the run starts from, where it teaches.

    Attributes:
        accumulation: Which micro-batches wait for a step.
        distillation: Draws the model to a teacher, where there is one.
        oscillation: Counts changes of the weights' codes, where something needs it.
        telemetry: Of rank 0, where it is on.
        scalars: What loggers are to get of the epoch that has ended.
    """

    def __init__(self, trainer: BaseTrainer, config: QCConfig, teacher: Teacher | None = None):
        self.config = config
        self.accumulation = Accumulation()
        self._averaged = 0  # steps that the average has seen
        self._batches = 0  # begun in this epoch
        self._progress = 0.0  # share of the run that was done when the present step's first micro-batch began
        model = architecture.student(trainer.model)
        self._steps = ScaleSteps(trainer.optimizer, model)  # counts the optimizer's real steps
        recorded = config.telemetry and RANK in {-1, 0}
        self._weights = TrainedWeights(model)
        trained = bool(self._weights.convs)  # false where all that is quantized is frozen
        self._shared = [quant for quant in act_quantizers(model).values() if quant.readers > 1]
        self._weight_steps = (
            WeightSteps(trainer.optimizer, self._weights) if config.relative_steps and trained else None
        )
        self._annealed = AnnealedRounding(self._weights) if config.rounding == "annealed" and trained else None
        self._freezing = Freezing(self._weights, config.body_bits[0]) if config.freeze_threshold and trained else None
        self.oscillation = self._freezing or (Oscillation(self._weights) if recorded and trained else None)
        self._dampening = None
        if config.dampening_weight and trained:
            summed = architecture.loss_is_summed(trainer.args.task)
            self._dampening = Dampening(unwrap_model(trainer.model), self._weights, summed)
        self.distillation = distillation(trainer, config, unwrap_model(trainer.model), teacher)
        if teacher:
            architecture.take_memory_format(teacher.model, model)
        self._freezes_norms = config.bn_freeze and teacher is not None
        self.telemetry = None
        self.scalars: dict[str, float] = {}
        if self.oscillation and recorded:
            self.telemetry = Telemetry(model, self.oscillation, Path(trainer.save_dir) / "qc")
        self._take_over(trainer)

    def _take_over(self, trainer: BaseTrainer) -> None:
        """Take over what Ultralytics replaced in recovering: the EMA (NaN loss), the optimizer (lack of memory)."""
        if not isinstance(trainer.ema, ConstantEMA):
            trainer.ema = ConstantEMA(trainer.ema.ema, self.config.ema_decay, trainer.ema.updates)
        if self._steps.optimizer is not trainer.optimizer:
            self._steps, self._averaged = ScaleSteps(trainer.optimizer, architecture.student(trainer.model)), 0
            if self._weight_steps:
                self._weight_steps.attach(trainer.optimizer)

    def begin_epoch(self, trainer: BaseTrainer) -> None:
        """Start from what Ultralytics has now, which may be older weights."""
        self._take_over(trainer)
        self._batches = 0
        self._weights.take_back()  # after an error in an epoch that is begun again
        for quant in self._shared:
            quant.let_go()
        self.accumulation.settle(trainer)
        self._put_back_frozen(trainer)
        self._weights.read()
        if self.telemetry:
            self.telemetry.watch(*_models(trainer))

    def _share_done(self, trainer: BaseTrainer) -> float:
        """How much of the run is over, in [0, 1]: of its epochs or, where it is given hours, of these."""
        done = (trainer.epoch + self._batches / len(trainer.train_loader)) / trainer.epochs
        if trainer.args.time:  # epochs follow from it after the first one only
            done = max(done, (time.time() - trainer.train_time_start) / (3600 * trainer.args.time))
        return min(done, 1.0)

    def begin_batch(self, trainer: BaseTrainer) -> None:
        """Hand out the quantized weights, and add what is to join the loss."""
        if not self.accumulation.pending:
            self._progress = self._share_done(trainer)
        if self._freezes_norms and not self._batches:  # Ultralytics has just set the mode of every layer
            freeze_norms(architecture.student(trainer.model))
        self._batches += 1
        softness = temperature(self._progress) if self._annealed else None
        dtype = None if self._dampening else architecture.amp_dtype(trainer)  # its loss needs all digits
        if self._annealed and softness:
            quantized = self._annealed.hand_out(softness, dtype)
        else:
            quantized = self._weights.hand_out(dtype)
        if self.distillation:  # first: it weighs what the model returns, which is the labels' loss alone then
            self.distillation.prepare()
        if self._dampening:
            self._dampening.prepare(annealed(0.0, self.config.dampening_weight, self._progress), quantized)

    def end_batch(self, trainer: BaseTrainer) -> None:
        """Count the micro-batch, and do what is due after the step that it may have ended in."""
        self._weights.take_back()
        self.accumulation.count(trainer)
        self._after_step(trainer)

    def end_epoch(self, trainer: BaseTrainer) -> None:
        """Do what is due after a last batch whose end Ultralytics did not tell; pass on what was recorded."""
        self._weights.take_back()
        self._after_step(trainer)
        if self._annealed and temperature(self._progress):
            trainer.stopper.best_epoch = trainer.epoch + 1  # patience begins when weights are rounded as in validation
        if self.telemetry:
            self.scalars = self.telemetry.scalars()
            self.telemetry.write(EVERY)

    def _after_step(self, trainer: BaseTrainer) -> None:
        """Once per real step: micro-batches that only accumulate gradients, and steps that overflowed, take none."""
        if self._steps.taken > self._averaged:
            self._weights.read()
            if self._freezing and self.config.freeze_threshold:
                self._freezing.threshold = freeze_threshold(self.config.freeze_threshold, self._progress)
            if self.oscillation:
                self.oscillation.step()
            trainer.ema.step(unwrap_model(trainer.model))
            self._put_back_frozen(trainer)
            self._averaged = self._steps.taken
            if self.telemetry:
                self.telemetry.record(trainer.ema.updates)

    def _put_back_frozen(self, trainer: BaseTrainer) -> None:
        if self._freezing:
            for model in _models(trainer):
                self._freezing.put_back(model)

    def state_dict(self) -> dict:
        """What resume.pt keeps: tensors and plain values, by name."""
        state = {"steps": self._steps.taken, "pending": self.accumulation.pending, "progress": self._progress}
        return state | {name: part.state_dict() for name, part in self._parts()}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self._steps.taken = self._averaged = state["steps"]
        self.accumulation.pending = state["pending"]
        self._progress = state["progress"]
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def _parts(self) -> list[tuple[str, Oscillation | Telemetry | WeightSteps]]:
        parts = {"oscillation": self.oscillation, "telemetry": self.telemetry, "weight_steps": self._weight_steps}
        return [(name, part) for name, part in parts.items() if part]


def distillation(
    trainer: BaseTrainer, config: QCConfig, model: nn.Module, teacher: Teacher | None
) -> Distillation | None:
    """What draws `model` to a teacher in this run; None where there is none, or nothing of it is to count.

    Args:
        trainer: Its arguments name the gains of the losses, and maybe a teacher of Ultralytics'.
        config: The options of the run.
        model: What is called with a batch.
        teacher: The float model that the run starts from, where it teaches.
    """
    args = trainer.args
    if not (teacher or args.distill_model) or not (config.distill_outputs or (teacher and config.distill_features)):
        return None
    gains = Gains(config.distill_outputs, config.distill_features, config.label_weight, args.cls, args.dfl)
    return Distillation(model, gains, teacher, architecture.loss_is_summed(args.task))


def _models(trainer: BaseTrainer) -> tuple[nn.Module, nn.Module]:
    """The model in training and its average."""
    return architecture.student(trainer.model), architecture.student(trainer.ema.ema)
