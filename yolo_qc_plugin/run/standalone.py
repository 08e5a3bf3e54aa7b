# yolo_qc_plugin, AGPL-3.0
"""QC alone: correct the checkpoint of a finished run again, with other options, without training it again."""

from __future__ import annotations

import shlex
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.torch_utils import unset_deterministic

from ..config import QCConfig, QCError
from ..deploy.snap import snap
from ..host import architecture, compat, log
from ..host.checkpoints import open_checkpoint
from ..host.labelling import TASKS
from ..host.photographs import has_no_yaml
from ..host.record import own_record, record_of
from ..host.teacher import FILE as TEACHER
from ..host.teacher import teacher_of
from ..quant.layers import quant_convs
from .drawing import draw_run
from .finish import correct_and_choose, write_like
from .labels import refuse_without_labels
from .start import check_device
from .validation import validate

OF_THE_RUN = "leave data= out, for the data of the run, or give the YAML that `yolo-qc label` writes"
OPTIONS = tuple(f.name for f in fields(QCConfig) if f.name.startswith("correction"))
# of the run that the checkpoint is from: what is not to be taken over
OTHERS = "model", "pretrained", "resume", "project", "name", "exist_ok", "save_dir", "distill_model"


def correct(model: str | Path, data: str | Path | None = None, **arguments) -> dict:
    """Train QC on the checkpoint of a finished run and write qat.pt, best.pt and qc/report.json to a folder of its own.

    Images, loss, precision and validation are the stock trainer's, set up as for the run that the checkpoint is from.
    That run's teacher.pt, where it lies beside the checkpoint, teaches again.

    Args:
        model: RUN/weights/qat.pt, or best.pt, whose correction is undone first.
        data: Data set YAML; by default the run's.
        **arguments: Options of QC (`correction`, `correction_scale`, `correction_shift`, `correction_epochs`,
            `correction_lr`), and arguments of `yolo train`, such as device, batch, seed and name; by default the run's.

    Returns:
        The report, with figures "qat" and "qc".

    Raises:
        QCError: If the checkpoint is not one of ours, an option is not accepted, or the data have no labels.

    Examples:
        >>> from yolo_qc_plugin import correct
        >>> correct("runs/detect/train/weights/qat.pt", correction="tensor", correction_shift=False)
    """
    yolo = open_checkpoint("model", model)
    record = record_of(yolo.model)
    if record is None:
        raise QCError(f"QC: model={model} is not quantized; give qat.pt or best.pt of a run of callbacks=qc.")
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    config = QCConfig.from_options({**record.config, **options})
    if config.correction == "off":
        raise QCError("QC: correction='off' leaves nothing to do; give 'channel' or 'tensor'.")
    of_run = {k: v for k, v in yolo.ckpt["train_args"].items() if k not in OTHERS}
    overrides = {**of_run, "name": "correct", **arguments, "model": str(model), "mode": "train"}
    if data is not None:
        overrides["data"] = str(data)
        if yolo.task in TASKS and has_no_yaml(data):
            raise QCError(f"QC: data={data} is a folder without a data YAML; {OF_THE_RUN}.")
    trainer = yolo.task_map[yolo.task]["trainer"](overrides=overrides)
    if trainer.ddp:
        raise QCError(f"QC: device={trainer.args.device!r} is more than one; QC alone runs on one device.")
    refuse_without_labels(trainer, OF_THE_RUN)
    compat.check_trainer(trainer, compat.AT_START)
    check_device(trainer)
    try:
        return _correct(trainer, config, Path(model), {**arguments, **options})
    finally:  # what Ultralytics does when a training ends
        for loader in (getattr(trainer, name, None) for name in ("train_loader", "test_loader")):
            if loader is not None:
                loader.close()
        unset_deterministic()


def _correct(trainer: BaseTrainer, config: QCConfig, source: Path, arguments: dict) -> dict:
    """Set a trainer up and do what follows its last epoch; `arguments` are what the user gave beside model and data."""
    trainer._setup_train()
    trainer.epoch = trainer.epochs - 1  # the loss and the images are those of the last epoch
    if trainer.args.close_mosaic:
        trainer._close_dataloader_mosaic()
        trainer.train_loader.reset()
    model, _ = load_checkpoint(source, device=trainer.device)
    model.qc.config = config.to_dict()
    for _, conv in quant_convs(model):  # of an earlier correction
        conv.correction = None
    snap(model, architecture.blank_image(model))
    log.info(f"measuring {source}")
    metrics = {"qat": validate(trainer, deepcopy(model), config.coco_eval)}
    qat = trainer.wdir / "qat.pt"
    write_like(source, model, trainer.validator.metrics.results_dict, qat)
    teacher = teacher_of(source.parent, config, trainer.device)
    given = {"model": source, "data": trainer.args.data, **arguments}
    command = shlex.join(["yolo-qc", "correct", *(f"{name}={value}" for name, value in given.items())])
    report = correct_and_choose(trainer, config, metrics, qat, trainer.best, command, teacher)
    if trainer.args.plots:
        first = source.with_name(TEACHER)
        draw_run(trainer, trainer.best, str(first) if first.exists() else own_record(model).start)
    return report
