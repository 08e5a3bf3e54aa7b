# yolo_qc_plugin, AGPL-3.0
"""Metrics of a model by pycocotools, for any data set in YOLO layout: of boxes, masks and keypoints.

Ultralytics' own mAP interpolates the precision-recall curve a little differently from COCOeval. Here one validation by
Ultralytics feeds both, on the same images, labels and predictions, so that the two can be held side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any

from ultralytics import YOLO, __version__
from ultralytics.data.base import BaseDataset
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo import detect as of_boxes
from ultralytics.models.yolo import pose as of_keypoints
from ultralytics.models.yolo import segment as of_masks
from ultralytics.utils.checks import check_imgsz

from ..coco.records import COMPARED, Record, all_metrics, in_coco_form, recording
from ..config import QCError
from ..host.checkpoints import open_checkpoint
from ..host.photographs import is_plain_folder

VALIDATORS = of_boxes.DetectionValidator, of_masks.SegmentationValidator, of_keypoints.PoseValidator
NAMES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


def evaluate(
    model: str | Path | YOLO,
    data: str | Path,
    *,
    imgsz: int | Sequence[int] | None = None,
    batch: int = 16,
    device: str | None = None,
    split: str = "val",
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    clip: bool = True,
    rect: bool = True,
) -> dict[str, Any]:
    """Validate a model once with Ultralytics and score the very same predictions by COCOeval too.

    COCO's AP differs from Ultralytics' mAP50-95 by two rules. COCOeval counts at most 100 detections per image and
    class (its maxDets[-1]; 20 of keypoints), whatever `max_det` lets through. And the boxes that predict() returns, and
    that a COCO server is sent, are cut off at the image's border, while Ultralytics' own metric compares them uncut:
    where many objects touch the border, COCO's AP is higher for that (blood cells at 320 pixels: by 1.3 points). With
    `clip=False` COCOeval gets the uncut boxes too, and what is left is how the two interpolate, 0.1 to 0.3 points so
    far.

    The ground truth is that of COCO's own annotations file where the data set is COCO (with its crowds and areas), as
    Ultralytics finds it, else that of the labels.

    Nothing is written to the runs folder, and a YOLO object that is given keeps its callbacks.

    Args:
        model: Checkpoint, exported model or model YAML, of the task "detect", "segment" or "pose", or a YOLO object of
            one.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels, or height and width, to which all images are then padded; None takes the one the
            checkpoint was trained with.
        batch: Images a batch.
        device: "cpu", "0", ...; None lets Ultralytics choose.
        split: "train", "val" or "test".
        conf: Lowest confidence kept, 0..1.
        iou: Overlap from which non-maximum suppression drops the weaker box, 0..1.
        max_det: Detections kept per image.
        clip: Cut boxes and keypoints off at the image's border for COCOeval, detections and ground truth alike.
        rect: Pad batches of images of like shape as little as can be, as Ultralytics validates a checkpoint; False
            pads all to a square, as it does with exported models of fixed size.

    Returns:
        "model", "data", "imgsz", "split", "clip"; "ground_truth", the annotations file or "labels"; "coco", see
        `coco_metrics`, and "ultralytics" with map50_95 and map50, in 0..1, both by what is compared: "bbox" and, of the
        task, "segm" or "keypoints"; "images" and "instances", how many were evaluated.

    Raises:
        FileNotFoundError: The data set is missing.
        QCError: The model is missing or cannot be read, or an argument is not accepted.
        ValueError: The model's task has no such metrics.
    """
    settings = dict(batch=batch, device=device, split=split, conf=conf, iou=iou, max_det=max_det, rect=rect)
    truth, results, validator = detect(model, data, imgsz, clip, **settings)
    own = {kind: getattr(validator.metrics, name) for kind, name in COMPARED[validator.args.task].items()}
    return {
        "model": str(getattr(model, "ckpt_path", model)),
        "data": str(data),
        "imgsz": validator.args.imgsz,
        "split": split,
        "clip": clip,
        "ground_truth": truth["info"]["description"],
        "coco": all_metrics(validator, truth, results),
        "ultralytics": {k: {"map50_95": float(m.map), "map50": float(m.map50)} for k, m in own.items()},
        "images": len(truth["images"]),
        "instances": len(truth["annotations"]),
    }


def detect(
    model: str | Path | YOLO,
    data: str | Path,
    imgsz: int | Sequence[int] | None = None,
    clip: bool = True,
    **settings,
) -> tuple[dict[str, Any], list[dict[str, Any]], BaseValidator]:
    """Validate a model once with Ultralytics; see `evaluate` for the arguments.

    Returns:
        The ground truth in COCO form, with images of labels in the order of their files, COCO results, and the
        validator.
    """
    yolo = load_scored(model)
    records: list[list[Record]] = []
    with ExitStack() as recorded:

        def start(validator: BaseValidator) -> None:
            records.append(recorded.enter_context(recording(validator, whole_masks=True)))

        validator = validate(yolo, data, imgsz, start, **settings)
    truth, results = in_coco_form(validator, records[0], clip)
    return truth, results, validator


def takes_oblong() -> bool:
    """Whether data sets of the installed Ultralytics can be padded to a height and a width."""
    return "tuple" in str(signature(BaseDataset).parameters["imgsz"].annotation)


def check_data(task: str, data: str | Path) -> None:
    """Refuse a folder without the data YAML that Ultralytics wants; it takes one that has it.

    Raises:
        QCError: Naming it.
    """
    if task != "classify" and is_plain_folder(data):
        raise QCError(f"QC: data={data} is a folder; give a data YAML, as `yolo val` takes it.")


def validate(
    yolo: YOLO,
    data: str | Path,
    imgsz: int | Sequence[int] | None = None,
    prepare: Callable[[BaseValidator], Any] | None = None,
    **arguments,
) -> BaseValidator:
    """Run `yolo.val` without pictures, and without a folder that stays.

    Args:
        yolo: The model; its callbacks stay as they are.
        data: Data YAML, as Ultralytics accepts it.
        imgsz: Image side in pixels, or height and width; None takes the model's own.
        prepare: Called with the validator before its run.
        **arguments: Of `yolo val`.

    Returns:
        The validator, with the metrics and the data set of this run.

    Raises:
        QCError: On a folder in place of a data YAML, on an empty batch, or on a size that is not square, where this
            Ultralytics pads to squares alone.
    """
    check_data(yolo.task, data)
    if arguments.get("batch", 1) < 1:
        raise QCError(f"QC: batch={arguments['batch']} is not accepted; give a whole number of at least 1.")
    oblong = check_imgsz(list(imgsz), min_dim=2) if isinstance(imgsz, Sequence) else None  # as it rounds one side
    if oblong and not takes_oblong():
        raise QCError(f"QC: imgsz={oblong} is not square, which ultralytics {__version__} cannot validate; update it.")
    size = {} if imgsz is None else {"imgsz": max(oblong) if oblong else imgsz}
    made: list[BaseValidator] = []

    def make(args: dict[str, Any], _callbacks: dict) -> BaseValidator:
        made.append(yolo.task_map[yolo.task]["validator"](args=args, _callbacks=_callbacks))
        made[0].args.val = False  # else, of COCO, Ultralytics turns save_json on, which installs a package
        if prepare:
            prepare(made[0])
        if oblong:  # a validator takes one side alone, but pads to height and width for exported models, set as here
            made[0].args.imgsz, made[0].args.rect = oblong, False
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        yolo.val(validator=make, data=str(data), plots=False, verbose=False, project=folder, **size, **arguments)
    return made[0]


def format_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as plain text, metrics in points (0..100) and "-" where there is no ground truth."""
    points = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
    rows = []
    for kind, coco in result["coco"].items():
        own = {"AP": result["ultralytics"][kind]["map50_95"], "AP50": result["ultralytics"][kind]["map50"]}
        rows.append((NAMES[kind], "COCOeval", "Ultralytics"))
        plain = {name: value for name, value in coco.items() if name != "per_class"}
        rows += [(name, points(value), points(own[name]) if name in own else "") for name, value in plain.items()]
        rows += [(f"AP of {name}", points(value), "") for name, value in coco["per_class"].items()]
    width = max(len(row[0]) for row in rows)
    head = f"{result['model']} on {result['data']} ({result['split']}), imgsz {result['imgsz']}"
    counts = f"{result['images']} images, {result['instances']} instances, ground truth: {result['ground_truth']}"
    return "\n".join([head, counts, *(f"{a:<{width}}  {b:>8}  {c:>11}".rstrip() for a, b, c in rows)])


def load_scored(model: str | Path | YOLO) -> YOLO:
    """The model, if pycocotools has metrics of what it predicts."""
    yolo = model if isinstance(model, YOLO) else open_checkpoint("model", model)
    if yolo.task_map[yolo.task]["validator"] not in VALIDATORS:
        kind, tasks = f"{type(yolo).__name__} of task '{yolo.task}'", ", ".join(COMPARED)
        raise ValueError(f"model '{model}' is a {kind}; pycocotools has metrics for YOLO models of the tasks {tasks}")
    return yolo
