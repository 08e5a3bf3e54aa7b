# yolo_qc_plugin, AGPL-3.0
"""The start of a run: what is refused before any training time is spent, and how scales begin."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import BaseModel, load_checkpoint
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..coco.records import COMPARED
from ..config import MAX_BITS, QCConfig, QCError
from ..files import AtomicPath
from ..host import architecture, compat, log
from ..host.checkpoints import open_checkpoint
from ..host.distributed import broadcast_model, from_rank_0
from ..host.record import own_record
from ..host.teacher import FILE as TEACHER
from ..host.teacher import Teacher
from ..qat.correction import freeze_norms
from ..quant.calibrate import calibrate
from ..quant.inject import remove
from ..quant.layers import is_quantized
from ..report.card import CARD
from ..report.console import TABLE
from ..report.page import PAGE
from ..report.predictions import FILE as PREDICTIONS
from ..report.runs import RECORD
from ..report.traces import FILE as TELEMETRY
from .allocation import BITS_OF_INPUTS
from .validation import training_images, validate

DEVICES = "cpu", "cuda"  # torch.segment_reduce and FP64 are missing elsewhere
MIN_FITNESS = 0.05  # of a float start that can teach


def check_arguments(trainer: BaseTrainer, config: QCConfig) -> None:
    """Refuse a trainer whose arguments cannot work with quantizers, or with an option of ours.

    Raises:
        QCError: Naming the argument and what is accepted.
    """
    compat.check_trainer(trainer, compat.AT_START)
    args = trainer.args
    architecture.check_task(args.task)
    if config.coco_eval and args.task not in COMPARED:
        raise QCError(
            f"QC: coco_eval=True does not work with task={args.task!r}, of which pycocotools has no metrics; "
            f"accepted: {', '.join(COMPARED)}."
        )
    check_device(trainer)
    if args.quantize is not None:
        raise QCError(
            f"QC: quantize={args.quantize!r} is Ultralytics' own quantization and cannot be combined with "
            "callbacks=qc; leave it out (widths are qc_bits, qc_weight_bits and qc_act_bits)."
        )
    if args.compile:
        raise QCError(
            f"QC: compile={args.compile!r} does not work with quantizers: torch.compile cannot trace what layers "
            "do for backward. Quantizers are compiled by themselves; accepted: compile=False."
        )
    taught = config.teacher == "start" or args.distill_model
    drawn = config.distill_outputs or (config.distill_features and not args.distill_model)
    if not config.label_weight and not (taught and drawn):
        raise QCError(
            "QC: label_weight=0.0 leaves nothing to learn from with teacher='off', or with distill_outputs=0 and "
            "distill_features=0; give a label_weight above 0, or a teacher."
        )
    if config.label_weight != 1 and not (taught and drawn):
        raise QCError(
            f"QC: label_weight={config.label_weight} weighs labels against a teacher, and with teacher='off', or with "
            "distill_outputs=0 and distill_features=0, nothing of one counts; accepted: label_weight=1, or a teacher."
        )
    for name in ("model", "pretrained") if not args.resume else ():
        file = str(getattr(args, name))
        if file.endswith(".pt") and is_quantized(load_checkpoint(file)[0]):
            raise QCError(
                f"QC: {name}={file} is already quantized. Start callbacks=qc from a float checkpoint, or train "
                "it without callbacks=qc."
            )


def warn_of_options(config: QCConfig) -> None:
    """Say which options cost accuracy and bring nothing on the target that is named."""
    if config.runs_on.fills.get("act_bits") != MAX_BITS:
        return
    if config.body_bits[1] < MAX_BITS or (config.budget and config.budget.endswith(BITS_OF_INPUTS)):
        log.warning(
            f"activations of fewer than {MAX_BITS} bits lose accuracy, and nothing computes them faster with "
            f"target={config.target!r}: leave act_bits out, and give a budget of the file, as 110%size"
        )
    if config.output_bits is None and "output_bits" not in config.runs_on.bears:
        log.warning(f"output_bits=None: with target={config.target!r} convolutions are then computed in float, slowly")


def check_device(trainer: BaseTrainer) -> None:
    """Refuse a device that cannot train quantizers.

    Raises:
        QCError: Naming it and what is accepted.
    """
    if trainer.device.type not in DEVICES:
        raise QCError(
            f"QC: device={trainer.args.device!r} is not accepted: it lacks operations that quantizers take; give 'cpu' "
            "or the number of a CUDA device."
        )


def check_file(model: str) -> None:
    """Refuse a checkpoint that cannot be read, where opening it would end in a traceback.

    Args:
        model: As given to a command; what is not a checkpoint that is here passes.

    Raises:
        QCError: Naming it.
    """
    if model.endswith(".pt") and Path(model).is_file():
        open_checkpoint("model", model)


def check_model(model: nn.Module) -> None:
    """Refuse a model that the plugin cannot quantize, or whose weights no training can mend.

    Raises:
        QCError: Naming what is wrong and what is accepted.
    """
    architecture.check_model(model)
    architecture.check_weights(model)
    if is_quantized(model):
        raise QCError("QC: the model is already quantized; start from a float checkpoint.")


def write_atomically(trainer: BaseTrainer) -> None:
    """Have the trainer write each of its checkpoints as a whole."""
    trainer.wdir = AtomicPath(trainer.wdir)
    trainer.last, trainer.best = trainer.wdir / trainer.last.name, trainer.wdir / trainer.best.name


def why_no_teacher(trainer: BaseTrainer, model: BaseModel, fitness: float) -> str:
    """Why the float model that a run starts from cannot teach, after "it"; empty where it can.

    Args:
        trainer: Of the run.
        model: The float model, with a head for the data's classes.
        fitness: What it has on the validation set.
    """
    if fitness < MIN_FITNESS:
        return f"has a fitness of {fitness:.3f} on data={trainer.args.data}, under {MIN_FITNESS}"
    if is_untrained(trainer):
        return "is untrained"
    args = trainer.args
    file = Path(args.pretrained if isinstance(args.pretrained, (str, Path)) else args.model)
    if file.is_file() and not architecture.scores_as(model, load_checkpoint(file)[0]):
        return f"does not know all classes of data={args.data}"
    return ""


def is_untrained(trainer: BaseTrainer) -> bool:
    """Whether the run starts from no weights: of a YAML or with pretrained=False, and of no other file."""
    args = trainer.args
    from_scratch = str(args.model).endswith((".yaml", ".yml")) or args.pretrained is False
    return from_scratch and not isinstance(args.pretrained, (str, Path))


def begin_from_float(trainer: BaseTrainer, config: QCConfig) -> Teacher | None:
    """Measure the float model that training starts from, start all scales from data, and clear what a run left here.

    Returns:
        That float model as the teacher, which is in the run's folder too, or None where it is not to teach.
    """
    model = unwrap_model(trainer.model)
    log.info("measuring the float model that training starts from")
    float_model = architecture.student(deepcopy(model))
    remove(float_model)
    asked = config.teacher == "start" and bool(config.distill_outputs or config.distill_features)
    teacher = Teacher(float_model) if asked and not trainer.args.distill_model else None
    record = own_record(model)
    record.float_metrics = validate(trainer, float_model, config.coco_eval)
    fitness = from_rank_0(record.float_metrics["fitness"])  # the other ranks measure nothing
    if teacher and (obstacle := why_no_teacher(trainer, float_model, fitness)):
        if not config.label_weight:
            raise QCError(
                f"QC: label_weight=0.0 needs a teacher, and model={trainer.args.model} {obstacle}; give a label_weight "
                "above 0, or a start that knows the classes."
            )
        log.info(f"the start is no teacher: it {obstacle}")
        teacher = None
    record.taught = teacher is not None
    if RANK in {-1, 0}:
        folder = trainer.save_dir / "qc"
        written = RECORD, TELEMETRY, TABLE, CARD, PAGE, f"plots/{PREDICTIONS}"
        for stale in (trainer.wdir / "qat.pt", trainer.wdir / TEACHER, *(folder / name for name in written)):
            stale.unlink(missing_ok=True)  # of an earlier run here
        trainer._model_train()  # batch norms of frozen layers keep their statistics, as they will in training
        if teacher and config.bn_freeze:
            freeze_norms(model)
        calibrate(model, training_images(trainer, config.calibration_batches), model, config.scale_init)
        if teacher:
            trainer.train_loader.reset()
            teacher.measure(training_images(trainer, config.calibration_batches))
            teacher.write(trainer.wdir)
        trainer.train_loader.reset()  # the first epoch sees every image once, calibration or not
    broadcast_model(model)
    if teacher:
        teacher.broadcast()
    averaged = architecture.student(trainer.ema.ema)
    averaged.load_state_dict(architecture.student(model).state_dict())
    averaged.qc = record
    return teacher
