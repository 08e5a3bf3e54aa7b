# yolo_qc_plugin, AGPL-3.0
"""Labels by the model that a run starts from, for photographs without labels: in a run, and as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.engine.trainer import BaseTrainer

from ..config import QCConfig, QCError
from ..files import json_object
from ..host import log
from ..host.labelling import TASKS, Labeller
from ..host.photographs import any_labels, has_no_yaml, read_photographs
from .labelled import RECORD, YAML_FILE, write_labelled

SHOWN = 8  # classes in the text
ASK = "callbacks=qc qc_labels=teacher has the start model label the photographs"


def label(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    confidence: float = 0.25,
    imgsz: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Label photographs by a trained model, and write a data set to train on.

    Label files that the data set has are kept, and so are those in `out` that were changed or added by hand. Labelling
    that was interrupted goes on in the same folder.

    Args:
        model: A trained float checkpoint.
        data: A folder of photographs, or a data YAML; names, val and labels may be missing.
        out: Folder to write; by default the name of `data` with -labelled.
        confidence: Least confidence of a prediction that becomes a label, above 0 and below 1.
        imgsz: Size at which to predict, in pixels; by default that of the model's training.
        device: Where to compute: cpu, 0, ...

    Returns:
        What `write_labelled` returns.

    Raises:
        QCError: If the model, the data set or the confidence is not accepted, or if the model finds nothing.
    """
    QCConfig.kinds()["label_confidence"].check("confidence", confidence)
    folder = Path(out or f"{Path(data).resolve().stem}-labelled")
    if folder.resolve() == Path(data).resolve():
        raise QCError(f"QC: out={out} is data=; give another folder, to be written to.")
    photographs = read_photographs(data, folder)
    return write_labelled(photographs, Labeller(model, confidence, imgsz, device), folder)


def format_labels(summary: dict[str, Any]) -> str:
    """The result of `label` as three lines."""
    settings, boxes = summary["settings"], list(summary["boxes"].items())
    how = f"confidence at least {settings['confidence']}, {settings['imgsz']} px"
    unreadable = f", {summary['unreadable']} left out that cannot be read" if summary["unreadable"] else ""
    by_hand = f", {summary['by_hand']} changed by hand and kept" if summary["by_hand"] else ""
    more = f", and {len(boxes) - SHOWN} classes more" if len(boxes) > SHOWN else ""
    return "\n".join(
        [
            f"{summary['data']}: {summary['train']} photographs to train, {summary['val']} to validate{unreadable}",
            f"{summary['by_data']} labelled by the data set, {summary['by_model']} by {settings['model']} ({how}), "
            f"{summary['without_find']} of these without a find{by_hand}",
            f"found: {', '.join(f'{name} {number}' for name, number in boxes[:SHOWN]) or 'nothing'}{more}",
        ]
    )


def label_for_run(trainer: BaseTrainer, config: QCConfig) -> None:
    """Have a run train on photographs that its start model labels, where it is asked to; before its data are read.

    A data set that has all labels stays as it is. A resumed run goes on with the data set that it began with.

    Raises:
        QCError: If the photographs cannot be labelled; or on a folder of photographs that are not to be labelled.
    """
    _label_for_run(trainer, config)
    summary = labels_of_run(trainer)
    if summary.get("val_by_model"):
        log.warning(
            f"{summary['val_by_model']} of {summary['val']} photographs to validate are labelled by "
            f"{summary['settings']['model']}: figures tell the agreement with it, not accuracy"
        )


def _label_for_run(trainer: BaseTrainer, config: QCConfig) -> None:
    args = trainer.args
    if config.labels == "data":
        if args.task in TASKS and has_no_yaml(args.data):
            raise QCError(f"QC: data={args.data} is a folder without a data YAML; {ASK}.")
        return
    folder = (trainer.save_dir / "qc" / "data").resolve()
    if trainer.resume and (folder / YAML_FILE).exists():
        args.data = str(folder / YAML_FILE)
    if trainer.resume or args.data == str(folder / YAML_FILE):
        return
    photographs: Any = read_photographs(args.data, trainer.save_dir) if args.task in TASKS else None
    if photographs and photographs.complete:
        log.info(f"all photographs of data={args.data} have label files; labels='teacher' has nothing to do")
        return
    labeller = _start_model(trainer, config)  # refuses other tasks
    summary = write_labelled(photographs, labeller, folder)
    args.data = summary["data"]
    for line in format_labels(summary).splitlines():
        log.info(line)


def labels_of_run(trainer: BaseTrainer) -> dict[str, Any]:
    """What `write_labelled` returned of the data set that a run trains on, where a model labelled it; else empty."""
    file = Path(trainer.args.data).parent / RECORD
    found = json_object(file) if Path(trainer.args.data).name == YAML_FILE else {}
    return found if "by_model" in found else {}  # labelling was interrupted, or another file has that name


def refuse_without_labels(trainer: BaseTrainer, otherwise: str = ASK) -> None:
    """Refuse to train on background alone, before Ultralytics reads all images; a trainer's own data set may differ.

    Args:
        trainer: Before it has read its images.
        otherwise: What else there is to do.

    Raises:
        QCError: If no training image has a label.
    """
    data = str(trainer.args.data)
    stock = type(trainer).build_dataset.__module__.startswith("ultralytics.")
    if stock and trainer.args.task in TASKS and not any_labels(trainer.data["train"], data):
        raise QCError(f"QC: data={data} has no label for any training image; give label files, or {otherwise}.")


def _start_model(trainer: BaseTrainer, config: QCConfig) -> Labeller:
    """The model that the run starts from."""
    args = trainer.args
    if trainer.ddp:  # Ultralytics deletes the run's folder before it starts their processes
        raise QCError(
            f"QC: device={args.device} is not accepted with labels='teacher'; give one device, or label first by "
            f"`yolo-qc label model={args.model} data={args.data}` and train on the YAML that it writes."
        )
    if args.pretrained is not True:
        raise QCError(
            f"QC: pretrained={args.pretrained} is not accepted with labels='teacher'; give model=FILE.pt alone."
        )
    labeller = Labeller(args.model, config.label_confidence, device=trainer.device, otherwise=args.imgsz)
    if labeller.task != args.task:
        raise QCError(
            f"QC: model={args.model} is for {labeller.task} and cannot label for {args.task}; give a start model of "
            "the run's task."
        )
    return labeller
