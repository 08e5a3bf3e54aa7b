# yolo_qc_plugin, AGPL-3.0
"""The callbacks: inject on_pretrain_routine, average on_train_batch_end (steps.py), correct on_train_end."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import RANK

from ..config import QCConfig, QCError
from ..host import architecture, compat, log, patches
from ..host.distillation import check_teacher
from ..host.distributed import alone
from ..host.record import QuantRecord
from ..quant.inject import inject
from ..quant.share import share_quantizers
from ..quant.taps import tap_sums
from . import start
from .budget import with_plan
from .finish import finish, saying_what_is_safe
from .labels import label_for_run, refuse_without_labels
from .loggers import hand_over, take_back
from .qc import take_all_images
from .state import RunState
from .steps import Steps
from .validation import EpochValidation

BEFORE_LOGGERS = "on_fit_epoch_end", "on_train_end"


class QCCallbacks:
    """One run's callbacks.

    Args:
        config: The options of the run.
    """

    def __init__(self, config: QCConfig):
        self.state = RunState(config)
        self.validation = EpochValidation()
        self._registered_with: Any = None
        self._trainer: BaseTrainer | None = None  # of the run, once it has begun
        self._handed_on = False  # to the processes of a run on several devices

    def __getstate__(self) -> dict:
        """A process of a multi-GPU run gets the options."""
        return {"config": self.state.config}

    def __setstate__(self, state: dict) -> None:
        """Attach the plugin there."""
        type(self).__init__(self, **state)
        attach()

    def register(self, model) -> None:
        """Add the callbacks to a YOLO object or a trainer, in place of earlier ones of ours.

        Those that loggers are to see something of come first: loggers end their runs at on_train_end.
        """
        for event, callback in self.events().items():
            others = _others(model.callbacks[event])
            model.callbacks[event] = [callback, *others] if event in BEFORE_LOGGERS else [*others, callback]
        self._registered_with = model

    def events(self) -> dict:
        """Event name -> callback."""
        return {
            "on_pretrain_routine_start": self.on_pretrain_routine_start,
            patches.ON_DATASET: self.on_dataset,
            patches.ON_MODEL_SETUP: self.on_model_setup,
            "on_pretrain_routine_end": self.on_pretrain_routine_end,
            "on_train_epoch_start": self.on_train_epoch_start,
            "on_train_batch_start": self.on_train_batch_start,
            "on_train_batch_end": self.on_train_batch_end,
            "on_train_epoch_end": self.on_train_epoch_end,  # a timed stop skips the last batch's own callback
            "on_fit_epoch_end": self.on_fit_epoch_end,
            "on_val_start": self.on_val_start,
            "on_val_batch_end": self.on_val_batch_end,
            "on_train_end": self.on_train_end,
            "teardown": self.teardown,
        }

    def on_pretrain_routine_start(self, trainer: BaseTrainer) -> None:
        """Refuse what cannot work, before any training time is spent."""
        if self._trainer and getattr(self._registered_with, "trainer", None) is self._trainer:
            self._withdraw(trainer, self._registered_with)  # older versions tell no end of a run that failed
        else:
            start.check_arguments(trainer, self.state.config)

    def on_dataset(self, trainer: BaseTrainer) -> None:
        """Have photographs labelled, where that is asked for; of several processes, by the first alone."""
        if trainer.ddp and RANK == -1:  # it starts the processes of a run, and is told nothing of the run's end
            if self._handed_on:
                self._withdraw(trainer, self._registered_with)
                return
            self._handed_on = True
        if RANK in {-1, 0}:
            label_for_run(trainer, self.state.config)

    def on_model_setup(self, trainer: BaseTrainer, checkpoint: dict | None) -> dict | None:
        """Inject the quantizers; on resume, with the options and the state that the checkpoint holds.

        Returns:
            What Ultralytics is to resume from: the checkpoint, or None where `RunState` restores all of it.
        """
        self._trainer = trainer
        model = architecture.student(trainer.model)
        start.check_model(model)
        if trainer.resume:
            self.state.open(trainer, checkpoint or {})
        elif self.state.config.labels == "data":
            refuse_without_labels(trainer)
        if trainer.args.distill_model:
            check_teacher(trainer.args.distill_model, model, self.state.config.distill_outputs > 0)
        if not trainer.resume:  # a checkpoint has its plan
            self.state.config = with_plan(trainer, model, self.state.config)
        config = self.state.config
        start.warn_of_options(config)
        injection = inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
        image = architecture.blank_image(model)
        if config.runs_on.sums:
            sums = tap_sums(model, image, config, architecture.sums_of_branches(model))
            log.info(f"{sums} residual sums with quantized inputs")
        shared = share_quantizers(model, image, joined=config.runs_on.joined)
        model.qc = QuantRecord(config.to_dict(), start=str(trainer.args.model))
        if trainer.resume and checkpoint:
            earlier = self.state.take_average(checkpoint, model, trainer)
            model.qc.float_metrics, model.qc.run = earlier.float_metrics, earlier.run
            model.qc.start, model.qc.taught = earlier.start, earlier.taught
        start.write_atomically(trainer)
        log.info(f"{injection}; {shared} read an input that another one quantizes")
        return None if self.state.resumed else checkpoint

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Measure the float start and start the scales from data, or restore both; take over the EMA."""
        compat.check_trainer(trainer, compat.WHEN_READY)
        if trainer.resume:
            self.state.find_teacher(trainer)
        else:
            self.state.teacher = start.begin_from_float(trainer, self.state.config)
        self.state.steps = Steps(trainer, self.state.config, self.state.teacher)
        if trainer.resume:
            self.state.restore(trainer)

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        """Take over what Ultralytics replaced in recovering, and save the state that a resumed run starts from."""
        take_back(trainer)
        self.state.begin_epoch(trainer)

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        """Prepare the quantizers."""
        self.state.steps.begin_batch(trainer)

    def on_train_batch_end(self, trainer: BaseTrainer) -> None:
        """Average, if the micro-batch ended in an optimizer step."""
        self.state.steps.end_batch(trainer)

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """The same for the last batch of a timed stop, whose own event is skipped; validation follows."""
        self.state.steps.end_epoch(trainer)
        self.validation.expect(architecture.student(trainer.ema.ema))

    def on_fit_epoch_end(self, trainer: BaseTrainer) -> None:
        """Let loggers see what was noted of the epoch; of Ultralytics' final evaluation there is nothing."""
        self.validation.put_back()  # of several processes, one may have had no image to validate
        if scalars := self.state.steps.scalars:
            hand_over(trainer, scalars)
            self.state.steps.scalars = {}

    def on_val_start(self, validator: BaseValidator) -> None:
        """Have the deployed form validated."""
        self.validation.begin(validator)

    def on_val_batch_end(self, validator: BaseValidator) -> None:
        """Take it out again after the last batch."""
        self.validation.end_batch(validator, self.state.teacher is not None)

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """Correct, choose the better, report; of several processes, rank 0 alone is here."""
        if self.state.steps.telemetry:
            self.state.steps.telemetry.write()
        take_back(trainer)
        with alone(), saying_what_is_safe(trainer.wdir):
            take_all_images(trainer)
            finish(trainer, self.state.config, self.state.teacher)

    def teardown(self, trainer: BaseTrainer) -> None:
        """Leave nothing behind, however the run ended: the next `train` of the same object is a float one."""
        self.validation.put_back()
        model = self._registered_with
        # a YOLO object that trains on several data sets in turn holds no trainer but what runs one after the other
        if model is trainer or getattr(model, "trainer", None) is trainer:
            self._withdraw(model)

    def _withdraw(self, *models) -> None:
        """Take the callbacks out of YOLO objects and trainers."""
        for model in models:
            for event in self.events():
                model.callbacks[event] = _others(model.callbacks[event])


def _others(callbacks: list) -> list:
    """Those that are not of this plugin."""
    return [c for c in callbacks if not isinstance(getattr(c, "__self__", None), QCCallbacks)]


def _resume(trainer: BaseTrainer, record: QuantRecord) -> None:
    """Have a run that is resumed without a word of ours go on as it began."""
    attach()
    QCCallbacks(record.options).register(trainer)


def attach() -> None:
    """Attach the plugin to Ultralytics in this process, for training.

    Raises:
        QCError: If the installed Ultralytics is not supported.
    """
    patches.attach_for_training(_resume)


def attach_for_opening() -> None:
    """Attach what it takes to open a finished checkpoint, or to resume an unfinished one."""
    patches.attach_for_opening(_resume)


def add_qc_callbacks(model, config: QCConfig | None = None, **options) -> QCConfig:
    """Make the next `model.train(...)` a quantization-aware one, corrected at its end.

    The callbacks go when that run has ended, however it ended; of several data sets in one call they stay for all.

    Args:
        model: An `ultralytics.YOLO` object with a float model (of a task in `architecture.MODELS`), or a trainer that
            has not started.
        config: The options; or give them by name:
        **options: Fields of `QCConfig`, e.g. bits=4; target= and preset="paper" give values to those not given.

    Returns:
        The config in force.

    Raises:
        QCError: On an option, a model or an Ultralytics version that is not accepted.

    Examples:
        >>> from yolo_qc_plugin import add_qc_callbacks
        >>> add_qc_callbacks(model, bits=4)
    """
    if config is not None and options:
        raise QCError(f"QC: give config or options, not both (got config and {', '.join(options)}).")
    if config is not None and not isinstance(config, QCConfig):
        raise QCError(f"QC: config={config!r} is not accepted; give a QCConfig, or options by name, as bits=4.")
    if not hasattr(model, "callbacks"):
        raise QCError(f"QC: model={model!r} is not accepted; give an ultralytics.YOLO object, as YOLO('yolo11n.pt').")
    config = config or QCConfig.from_options(options)
    attach()
    if isinstance(model, BaseTrainer):  # its data set is read, and its on_pretrain_routine_start is over
        if config.labels == "teacher" and not model.resume:
            raise QCError(
                "QC: labels='teacher' is too late for a trainer, which has read its data set; add the callbacks to the "
                "YOLO object, or train on what `yolo-qc label` wrote."
            )
        start.check_arguments(model, config)
    module = getattr(model, "model", None)
    unfinished = (getattr(model, "ckpt", None) or {}).get("optimizer")  # to be resumed, with the options in it
    if isinstance(module, nn.Module) and not unfinished:  # a trainer may have the name of a file there
        start.check_model(module)
    QCCallbacks(config).register(model)
    return config
