# yolo_qc_plugin, AGPL-3.0
"""The callbacks: inject on_pretrain_routine, average on_train_batch_end (steps.py), correct on_train_end."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..config import QCConfig, QCError
from ..deploy.fold import deployed_convs
from ..deploy.qdq import ONNX_KINDS, check_kind
from ..files import AtomicPath
from ..host import architecture, compat, log, patches
from ..host.distillation import check_teacher
from ..host.distributed import alone, broadcast_quantizers
from ..host.record import QuantRecord, record_of
from ..quant.calibrate import calibrate
from ..quant.equalization import equalize
from ..quant.inject import inject, remove, share_quantizers
from ..quant.layers import is_quantized
from .finish import finish, saying_what_is_kept, take_all_images, training_images
from .resume import fits, read_state, restore, rewind, watch_mosaic, write_state
from .steps import Steps
from .telemetry import FILE
from .validation import EpochValidation, validate


class QCCallbacks:
    """One run's callbacks.

    Args:
        config: The options of the run.
    """

    def __init__(self, config: QCConfig):
        self.config = config
        self.steps: Steps | None = None  # once the trainer is set up
        self.validation = EpochValidation()

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
            patches.ON_MODEL_SETUP: self.on_model_setup,
            "on_pretrain_routine_end": self.on_pretrain_routine_end,
            "on_train_epoch_start": self.on_train_epoch_start,
            "on_train_batch_start": self.on_train_batch_start,
            "on_train_batch_end": self.on_train_batch_end,
            "on_train_epoch_end": self.on_train_epoch_end,  # a timed stop skips the last batch's own callback
            "on_val_start": self.on_val_start,
            "on_val_batch_end": self.on_val_batch_end,
            "on_train_end": self.on_train_end,
        }

    def on_pretrain_routine_start(self, trainer: BaseTrainer) -> None:
        """Refuse what cannot work, before any training time is spent."""
        compat.check_trainer(trainer, compat.AT_START)
        args = trainer.args
        architecture.check_task(args.task)
        if args.quantize is not None:
            raise QCError(
                f"QC: quantize={args.quantize!r} is Ultralytics' own quantization and cannot be combined with "
                "callbacks=qc; leave it out (widths are qc_bits, qc_weight_bits and qc_act_bits)."
            )
        if args.compile:
            raise QCError(
                f"QC: compile={args.compile!r} does not work with quantizers: torch.compile cannot trace what layers "
                "keep for backward and for others that read their input. Quantizers are compiled by themselves; "
                "accepted: compile=False."
            )
        if not args.resume and str(args.model).endswith(".pt") and is_quantized(load_checkpoint(args.model)[0]):
            raise QCError(
                f"QC: model={args.model} is already quantized. Start callbacks=qc from a float checkpoint, or train "
                "it without callbacks=qc."
            )

    def on_model_setup(self, trainer: BaseTrainer) -> None:
        """Inject the quantizers; on resume, with the options and the state that the checkpoint holds."""
        model = architecture.student(trainer.model)
        architecture.check_model(model)
        architecture.check_weights(model)
        resumed = trainer.qc_checkpoint
        if resumed:
            self._take_options(record_of(resumed["ema"]).options)
        elif trainer.resume:
            raise QCError(
                f"QC: {trainer.args.model} is no unfinished run of callbacks=qc and cannot be resumed as one; start "
                "from a float checkpoint without resume."
            )
        if trainer.args.distill_model:
            check_teacher(trainer.args.distill_model, model, self.config.distill_outputs > 0)
        injection = inject(model, self.config, architecture.edge_convs(model), architecture.fixed_convs(model))
        shared = share_quantizers(model, architecture.blank_image(model))
        model.qc = QuantRecord(self.config.to_dict())
        trainer.wdir = AtomicPath(trainer.wdir)
        trainer.last, trainer.best = trainer.wdir / trainer.last.name, trainer.wdir / trainer.best.name
        if resumed:
            trainer.qc_state = read_state(trainer, resumed)
            averaged = architecture.student(resumed["ema"])
            model.qc.float_metrics, model.qc.run = averaged.qc.float_metrics, averaged.qc.run
            model.load_state_dict(averaged.float().state_dict())
            if not trainer.qc_state and not fits(resumed, model):
                raise QCError(
                    f"QC: {trainer.args.model} was begun with another version of yolo-qc-plugin, whose scales are not "
                    "those of this one, and cannot be resumed; start from the float checkpoint."
                )
        log.info(f"{injection}; {shared} read an input that another one quantizes")

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Measure the float start, start the scales from data, and take over the EMA."""
        compat.check_trainer(trainer, compat.WHEN_READY)
        model = unwrap_model(trainer.model)
        if not trainer.qc_checkpoint:
            log.info("measuring the float model that training starts from")
            float_model = architecture.student(deepcopy(model))
            remove(float_model)
            record = record_of(model)
            record.float_metrics = validate(trainer, float_model)
            if RANK in {-1, 0}:
                self._calibrate(trainer, model)
            broadcast_quantizers(model)
            folder = trainer.save_dir / "qc"
            for stale in (trainer.wdir / "qat.pt", folder / "report.json", folder / FILE):  # of an earlier run here
                stale.unlink(missing_ok=True)
            averaged = architecture.student(trainer.ema.ema)
            averaged.load_state_dict(architecture.student(model).state_dict())
            averaged.qc = record
        self.steps = Steps(trainer, self.config)
        watch_mosaic(trainer)
        if trainer.qc_state:
            restore(trainer, trainer.qc_state)
            self.steps.load_state_dict(trainer.qc_state["named"])
        elif trainer.qc_checkpoint and self.steps.telemetry:
            self.steps.telemetry.reread(trainer.ema.updates)

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        """Take over what the host replaced in recovering, go on where a resumed run was, and write resume.pt."""
        resumed, trainer.qc_state = trainer.qc_state, None
        if resumed:
            rewind(trainer, resumed, self.steps.accumulation)
        self.steps.begin_epoch(trainer)
        if not resumed and RANK in {-1, 0}:
            write_state(trainer, record_of(unwrap_model(trainer.model)).run, self.steps.state_dict())

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        """Prepare the quantizers."""
        self.steps.begin_batch(trainer)

    def on_train_batch_end(self, trainer: BaseTrainer) -> None:
        """Average, if the micro-batch ended in an optimizer step."""
        self.steps.end_batch(trainer)

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """The same for the last batch of a timed stop, whose own event is skipped; validation follows."""
        self.steps.end_epoch(trainer)
        self.validation.follow(trainer)

    def on_val_start(self, validator: BaseValidator) -> None:
        """Have the deployed form validated."""
        self.validation.begin(validator)

    def on_val_batch_end(self, validator: BaseValidator) -> None:
        """Take it out again after the last batch."""
        self.validation.end_batch(validator)

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """Correct, keep the better, report; of several processes, rank 0 alone is here."""
        if self.steps.telemetry:
            self.steps.telemetry.write()
        with alone(), saying_what_is_kept(trainer.wdir):
            take_all_images(trainer)
            finish(trainer, self.config)

    def _take_options(self, saved: QCConfig) -> None:
        """Continue with the checkpoint's options; say so where others were given."""
        defaults = QCConfig()
        names = [f.name for f in fields(QCConfig) if getattr(self.config, f.name) != getattr(saved, f.name)]
        if ignored := [n for n in names if getattr(self.config, n) != getattr(defaults, n)]:
            log.warning(f"resume ignores {', '.join(ignored)} and uses the checkpoint's options.")
        self.config = saved

    def _calibrate(self, trainer: BaseTrainer, model) -> None:
        trainer._model_train()  # batch norms of frozen layers keep their statistics, as they will in training
        batches = self.config.calibration_batches
        equalize(model, training_images(trainer, batches), model)
        calibrate(model, training_images(trainer, batches), model, self.config.scale_init)
        trainer.train_loader.reset()  # the first epoch sees every image once, calibration or not


def attach() -> None:
    """Attach the plugin to the host in this process; costs nothing where it is not asked for."""
    patches.attach(on_resume=lambda trainer, record: QCCallbacks(record.options).register(trainer))


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
        model: An `ultralytics.YOLO` object with a float model (of a task in `architecture.MODELS`), or a trainer that
            has not started.
        config: The options; or give them by name:
        **options: Fields of `QCConfig`, e.g. bits=4, with preset="paper", "best" or "narrow" for those not given; or
            onnx="int8" or "int4".

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
        architecture.check_model(module)
        architecture.check_weights(module)
        if is_quantized(module):
            raise QCError("QC: the model is already quantized; start from a float checkpoint.")
    QCCallbacks(config).register(model)
    return config
