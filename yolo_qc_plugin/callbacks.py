# yolo_qc_plugin, AGPL-3.0
"""The callbacks: inject on_pretrain_routine, average on_train_batch_end, correct on_train_end."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from itertools import islice

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from . import compat, host
from .checkpoint import AtomicPath, QuantRecord, record_of
from .config import QCConfig, QCError
from .dampening import Dampening
from .deploy import deployed_convs
from .distributed import alone, broadcast_quantizers
from .ema import ConstantEMA
from .finish import finish, saying_what_is_kept, take_all_images, validate
from .freezing import Freezing, freeze_threshold
from .inject import calibrate, inject, remove, share_quantizers
from .layers import is_quantized
from .offsets import OffsetsTogether
from .optimizer import ScaleSteps
from .oscillation import Oscillation, annealed
from .qdq import ONNX_KINDS, check_kind
from .quantizer import Quantizer
from .resume import Accumulation, fits, read_state, restore, rewind, write_state
from .telemetry import EVERY, FILE, Telemetry
from .weights import WeightsTogether


class QCCallbacks:
    """One run's callbacks and the little state they share.

    Args:
        config: The options of the run.
    """

    def __init__(self, config: QCConfig):
        self.config = config
        self.steps = None  # ScaleSteps of the optimizer, which counts its real steps
        self.averaged = 0  # steps that the EMA has seen
        self.weights = self.offsets = None  # WeightsTogether and OffsetsTogether of the model
        self.accumulation = None  # which micro-batches wait for a step
        self.oscillation: Oscillation | None = None
        self.freezing: Freezing | None = None  # is then `oscillation`, too
        self.dampening: Dampening | None = None
        self.telemetry: Telemetry | None = None  # of rank 0
        self.batches = 0  # begun in this epoch
        self.progress = 0.0  # share of the run that was done when the present step's first micro-batch began

    def __getstate__(self) -> dict:
        """A process of a multi-GPU run gets the options."""
        return {"config": self.config}

    def __setstate__(self, state: dict) -> None:
        """Attach the plugin there."""
        self.__init__(**state)
        attach()

    def register(self, model) -> None:
        """Add the callbacks to a YOLO object or a trainer, in place of earlier ones of ours."""
        for event, callback in self.events().items():
            others = [c for c in model.callbacks[event] if not isinstance(getattr(c, "__self__", None), QCCallbacks)]
            model.callbacks[event] = [*others, callback]

    def events(self) -> dict:
        """Event name -> callback."""
        return {
            "on_pretrain_routine_start": self.on_pretrain_routine_start,
            host.ON_MODEL_SETUP: self.on_model_setup,
            "on_pretrain_routine_end": self.on_pretrain_routine_end,
            "on_train_epoch_start": self.on_train_epoch_start,
            "on_train_batch_start": self.on_train_batch_start,
            "on_train_batch_end": self.on_train_batch_end,
            "on_train_epoch_end": self.on_train_epoch_end,  # a timed stop skips the last batch's own callback
            "on_train_end": self.on_train_end,
        }

    def on_pretrain_routine_start(self, trainer: BaseTrainer) -> None:
        """Refuse what cannot work, before any training time is spent."""
        compat.check_trainer(trainer, compat.AT_START)
        args = trainer.args
        host.check_task(args.task)
        if args.quantize is not None:
            raise QCError(
                f"QC: quantize={args.quantize!r} is Ultralytics' own quantization and cannot be combined with "
                "callbacks=qc; leave it out (widths are qc_bits, qc_weight_bits and qc_act_bits)."
            )
        if str(args.distill_model).endswith(".pt") and is_quantized(load_checkpoint(args.distill_model)[0]):
            raise QCError(f"QC: distill_model={args.distill_model} is quantized; give a float checkpoint.")
        if args.compile:
            raise QCError(f"QC: compile={args.compile!r} does not work with quantizers yet; accepted: compile=False.")
        if not args.resume and str(args.model).endswith(".pt") and is_quantized(load_checkpoint(args.model)[0]):
            raise QCError(
                f"QC: model={args.model} is already quantized. Start callbacks=qc from a float checkpoint, or train "
                "it without callbacks=qc."
            )

    def on_model_setup(self, trainer: BaseTrainer) -> None:
        """Inject the quantizers; on resume, with the options and the state that the checkpoint holds."""
        model = host.student(trainer.model)
        host.check_model(model)
        host.check_weights(model)
        resumed = trainer.qc_checkpoint
        if resumed:
            self._take_options(record_of(resumed["ema"]).options)
        elif trainer.resume:
            raise QCError(
                f"QC: {trainer.args.model} is no unfinished run of callbacks=qc and cannot be resumed as one; start "
                "from a float checkpoint without resume."
            )
        injection = inject(model, self.config, host.edge_convs(model), host.fixed_convs(model))
        shared = share_quantizers(model, host.blank_image(model))
        model.qc = QuantRecord(self.config.to_dict())
        trainer.wdir = AtomicPath(trainer.wdir)
        trainer.last, trainer.best = trainer.wdir / trainer.last.name, trainer.wdir / trainer.best.name
        if resumed:
            trainer.qc_state = read_state(trainer, resumed)
            averaged = host.student(resumed["ema"])
            model.qc.float_metrics, model.qc.run = averaged.qc.float_metrics, averaged.qc.run
            model.load_state_dict(averaged.float().state_dict())
            if not trainer.qc_state and not fits(resumed, model):
                raise QCError(
                    f"QC: {trainer.args.model} was begun with another version of yolo-qc-plugin, whose scales are not "
                    "those of this one, and cannot be resumed; start from the float checkpoint."
                )
        LOGGER.info(f"{host.PREFIX}{injection}; {shared} read an input that another one quantizes")

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Measure the float start, start the scales from data, and take over the EMA."""
        compat.check_trainer(trainer, compat.WHEN_READY)
        model = unwrap_model(trainer.model)
        if not trainer.qc_checkpoint:
            LOGGER.info(f"{host.PREFIX}measuring the float model that training starts from")
            float_model = host.student(deepcopy(model))
            remove(float_model)
            record = record_of(model)
            record.float_metrics = validate(trainer, float_model)
            if RANK in {-1, 0}:
                self._calibrate(trainer, model)
            broadcast_quantizers(model)
            folder = trainer.save_dir / "qc"
            for stale in (trainer.wdir / "qat.pt", folder / "report.json", folder / FILE):  # of an earlier run here
                stale.unlink(missing_ok=True)
            averaged = host.student(trainer.ema.ema)
            averaged.load_state_dict(host.student(model).state_dict())
            averaged.qc = record
        self._take_over_ema(trainer)
        self.steps, self.averaged = ScaleSteps(trainer.optimizer, model), 0
        if self.config.freeze_threshold:
            self.oscillation = self.freezing = Freezing(model, self.config.body_bits[0])
        free = self.freezing and self.freezing.by_layer(self.freezing.free)
        self.weights, self.offsets = WeightsTogether(model, free), OffsetsTogether(model)
        if self.config.dampening_weight:
            self.dampening = Dampening(model, self.weights, host.loss_is_summed(trainer.args.task))
        self.accumulation = Accumulation()
        if self.config.telemetry and RANK in {-1, 0}:
            self.oscillation = self.freezing or Oscillation(model)
            self.telemetry = Telemetry(model, self.oscillation, trainer.save_dir / "qc")
        if trainer.qc_state:
            restore(trainer, trainer.qc_state)
            self.load_state_dict(trainer.qc_state["named"])
        elif trainer.qc_checkpoint and self.telemetry:
            self.telemetry.reread(trainer.ema.updates)

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        """Take over what the host replaced in recovering (from a NaN loss the EMA, from lack of memory the optimizer),
        and write resume.pt."""
        self._take_over_ema(trainer)
        model = unwrap_model(trainer.model)
        if self.steps.optimizer is not trainer.optimizer:  # by older versions of the host
            self.steps, self.averaged = ScaleSteps(trainer.optimizer, model), 0
        for quantizer in (m for m in model.modules() if isinstance(m, Quantizer)):
            quantizer.forget()  # what a forward pass that ended in an error has left
        if self.telemetry:
            self.telemetry.follow(model, trainer.ema.ema)
        resumed, trainer.qc_state = trainer.qc_state, None
        if resumed:
            rewind(trainer, resumed, self.accumulation)
        self.accumulation.settle(trainer)
        self.batches = 0
        self._put_back_frozen(trainer)  # the host may have gone back to older weights
        if not resumed and RANK in {-1, 0}:
            write_state(trainer, record_of(model).run, self.state_dict())

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        """Quantize all weights at once, bring all offsets to their grids, and have oscillation dampened."""
        if not self.accumulation.pending:
            self.progress = (trainer.epoch + self.batches / len(trainer.train_loader)) / trainer.epochs
        self.batches += 1
        self.weights.prepare()
        self.offsets.prepare()
        if self.dampening:
            self.dampening.prepare(annealed(0.0, self.config.dampening_weight, self.progress))

    def on_train_batch_end(self, trainer: BaseTrainer) -> None:
        """Count the micro-batch, and freeze and average if it ended in an optimizer step."""
        self.accumulation.count(trainer)
        self._average(trainer)

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """Average where the last batch's callback was skipped, and pass on what was recorded."""
        self._average(trainer)
        if self.telemetry:
            self.telemetry.to_tensorboard(trainer.epoch + 1)
            self.telemetry.write(EVERY)

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """Correct, keep the better, report; of several processes, rank 0 alone is here."""
        if self.telemetry:
            self.telemetry.write()
        with alone(), saying_what_is_kept(trainer.wdir):
            take_all_images(trainer)
            finish(trainer, self.config)

    def state_dict(self) -> dict:
        """What resume.pt keeps of the callbacks, by name: tensors and plain values. Later parts add theirs here."""
        state = {"steps": self.steps.taken, "pending": self.accumulation.pending, "progress": self.progress}
        parts = {"oscillation": self.oscillation, "telemetry": self.telemetry}
        return state | {name: part.state_dict() for name, part in parts.items() if part}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self.steps.taken = self.averaged = state["steps"]
        self.accumulation.pending = state["pending"]
        self.progress = state["progress"]
        for name, part in {"oscillation": self.oscillation, "telemetry": self.telemetry}.items():
            if part and name in state:
                part.load_state_dict(state[name])

    def _take_options(self, saved: QCConfig) -> None:
        """Continue with the checkpoint's options; say so where others were given."""
        defaults = QCConfig()
        names = [f.name for f in fields(QCConfig) if getattr(self.config, f.name) != getattr(saved, f.name)]
        if ignored := [n for n in names if getattr(self.config, n) != getattr(defaults, n)]:
            LOGGER.warning(f"{host.PREFIX}resume ignores {', '.join(ignored)} and uses the checkpoint's options.")
        self.config = saved

    def _calibrate(self, trainer: BaseTrainer, model) -> None:
        trainer._model_train()  # batch norms of frozen layers keep their statistics, as they will in training
        calibrate(
            model,
            islice(trainer.train_loader, self.config.calibration_batches * max(trainer.world_size, 1)),
            lambda batch: model(trainer.preprocess_batch(batch)["img"]),
            self.config.scale_init,
        )
        trainer.train_loader.reset()  # the first epoch sees every image once, calibration or not

    def _average(self, trainer: BaseTrainer) -> None:
        """Once per real optimizer step: micro-batches that only accumulate gradients take none."""
        if self.steps.taken > self.averaged:
            if self.freezing:
                self.freezing.threshold = freeze_threshold(self.config.freeze_threshold, self.progress)
            if self.oscillation:
                self.oscillation.step()
            trainer.ema.step(unwrap_model(trainer.model))
            self._put_back_frozen(trainer)
            self.averaged = self.steps.taken
            if self.telemetry:
                self.telemetry.record(trainer.ema.updates)

    def _put_back_frozen(self, trainer: BaseTrainer) -> None:
        if self.freezing:
            for model in (unwrap_model(trainer.model), trainer.ema.ema):
                self.freezing.put_back(model)

    def _take_over_ema(self, trainer: BaseTrainer) -> None:
        if not isinstance(trainer.ema, ConstantEMA):
            trainer.ema = ConstantEMA(trainer.ema.ema, self.config.ema_decay, trainer.ema.updates)


def attach() -> None:
    """Attach the plugin to the host in this process; costs nothing where it is not asked for."""
    host.attach(on_resume=lambda trainer, record: QCCallbacks(record.options).register(trainer))


def export_events(onnx: str = ONNX_KINDS[0]) -> dict:
    """Event name -> callback for an export.

    Args:
        onnx: Kind of ONNX graph, "int8" or "int4".

    Raises:
        QCError: On another kind.
    """
    check_kind(onnx)

    def on_export_start(exporter) -> None:
        if not deployed_convs(exporter.model):
            raise QCError(f"QC: {exporter.file} is not quantized; callbacks=qc exports checkpoints trained with it.")
        exporter.model.qc_onnx = onnx

    return {"on_export_start": on_export_start}


def add_qc_callbacks(model, config: QCConfig | None = None, **options) -> QCConfig | None:
    """Make the next `model.train(...)` a quantization-aware one, corrected at its end.

    With `onnx=` alone, and a quantized model: choose the kind of graph that `model.export(format="onnx")` writes.

    Args:
        model: An `ultralytics.YOLO` object with a float model (of a task in `host.MODELS`), or a trainer that has not
            started.
        config: The options; or give them by name:
        **options: Fields of `QCConfig`, e.g. bits=4, with preset="paper" or "best" for those not given; or onnx="int8"
            or "int4".

    Returns:
        The config in force; None for an export.

    Raises:
        QCError: On an option, a model or an Ultralytics version that is not accepted.

    Examples:
        >>> from yolo_qc_plugin import add_qc_callbacks
        >>> add_qc_callbacks(model, bits=4)
    """
    if options.keys() == {"onnx"} and config is None:
        attach()
        for event, callback in export_events(**options).items():
            model.add_callback(event, callback)
        return None
    if config is not None and options:
        raise QCError(f"QC: give config or options, not both (got config and {', '.join(options)}).")
    config = config or QCConfig.from_options(options)
    attach()
    module = getattr(model, "model", None)
    if hasattr(module, "modules"):
        host.check_model(module)
        host.check_weights(module)
        if is_quantized(module):
            raise QCError("QC: the model is already quantized; start from a float checkpoint.")
    QCCallbacks(config).register(model)
    return config
