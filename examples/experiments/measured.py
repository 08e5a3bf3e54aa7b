# yolo_qc_plugin, AGPL-3.0
"""What cells measure beside their runs: COCO's AP, starts without training, soft rounding; and how cells differ.

Where a script asks for COCO's AP, a cell measures each state of its model by pycocotools on the validation set. Beside
its run it leaves coco/STATE/detections.json and annotations.json, which `yolo-qc compare` takes, and resampled.npy: AP
of all images, then of each resample of them (tools/intervals.py). These are the same for all cells on the same images,
so that the difference of two cells has an interval without measuring anything again. An archive beside the record keeps
them when the runs are gone, so that further seeds can be added on another machine.

States: "trained" is a float model; "qat" a quantized one without QC, "qc" the same with QC; "hard" and "soft" are a
quantized one by the way that it rounds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import numpy as np

FILES = {"trained": "best.pt", "qat": "qat.pt", "qc": "qc.pt"}  # of a run's weights
State = tuple[str, str]  # name of a cell, state of its model


@contextmanager
def keeping_corrected() -> Iterator[None]:
    """Have the corrected model written to qc.pt; best.pt holds it only where it is the better one."""
    from yolo_qc_plugin.run import finish

    train_qc = finish.train_qc

    def train_and_write(trainer, config, source, *more):
        model = train_qc(trainer, config, source, *more)
        finish.write_like(source, deepcopy(model), {}, Path(source).with_name(FILES["qc"]))
        return model

    finish.train_qc = train_and_write
    try:
        yield
    finally:
        finish.train_qc = train_qc


def models(request: dict, found: dict) -> dict:
    """State -> what is measured of a cell: the checkpoint, or a YOLO object that rounds in another way."""
    if request["work"] == "round":
        from yolo_qc_plugin.quant.soft_rounding import HARD, SOFT

        return {"hard": rounding(request["source"], HARD), "soft": rounding(request["source"], SOFT)}
    states = ["qc"] if request["work"] == "correct" else found["metrics"]
    weights = Path(request["run"]) / "weights"
    return {state: weights / FILES[state] for state in states if state in FILES and found["metrics"][state] is not None}


def coco(model, request: dict, folder: Path) -> dict[str, float]:
    """Measure a model on the validation set and leave its files in a folder.

    Returns:
        "ap" by pycocotools, of boxes, or of the masks or keypoints of such a task, and "box_ap" then of its boxes;
        "map50_95" and "map50" by Ultralytics, of the same boxes; all in 0..1. Of a file also "agreement", the loss of
        its outputs against those of the float checkpoint that training starts from.
    """
    from yolo_qc_plugin.coco.metrics import coco_metrics
    from yolo_qc_plugin.coco.records import COMPARED
    from yolo_qc_plugin.tools.evaluate import detect
    from yolo_qc_plugin.tools.intervals import resampled_ap

    size, device = (request["recipe"][key] for key in ("imgsz", "device"))
    truth, detections, validator = detect(model, request["data"], size, device=device)
    *_, kind = COMPARED[validator.args.task]
    resampled = resampled_ap(truth, detections, iou_type=kind, sigmas=getattr(validator, "sigma", None))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_text(json.dumps(detections))
    np.save(folder / "resampled.npy", resampled)
    box = validator.metrics.box
    found = {"ap": float(resampled[0]), "map50_95": float(box.map), "map50": float(box.map50)}
    if kind != "bbox":
        found["box_ap"] = coco_metrics(truth, detections)["AP"]
    if isinstance(model, Path):
        losses = agreement(model, request["weights"], validator)
        np.save(folder / "agreement.npy", losses)
        found["agreement"] = float(losses.mean())
    return found


def agreement(file: Path, start: str, validator) -> np.ndarray:
    """How far a model's outputs are from those of its float start, image by image of a validator's data set.

    AP of a few hundred images tells apart what differs by two points. This loss, which training lowers (of outputs, in
    host/distillation.py), is a mean over all places of all images, and tells apart much less. Scores below where the
    grid of a finished model's begins are cut in both: no detection counts there, and places are many.
    """
    import torch
    from ultralytics.nn.tasks import load_checkpoint

    from yolo_qc_plugin.host.architecture import LOWEST_SCORE
    from yolo_qc_plugin.host.distillation import branches, head_loss
    from yolo_qc_plugin.run.sensitivity import GAINS

    def cut(output):
        if isinstance(output, tuple) and isinstance(output[1], dict):  # not of a classifier
            for raw in branches(output).values():
                raw["scores"] = raw["scores"].clamp_min(LOWEST_SCORE)
        return output

    model, teacher = (load_checkpoint(f, device=validator.device)[0].float().eval() for f in (file, start))
    losses = {}
    with torch.no_grad():
        for batch in validator.dataloader:
            batch = validator.preprocess(batch)
            for name, image in zip(batch["im_file"], batch["img"].float().split(1)):
                losses[name] = head_loss(model.model[-1], cut(model(image)), cut(teacher(image)), GAINS).item()
    return np.array([losses[name] for name in sorted(losses)])


def add_callbacks(yolo, options: dict):
    """Have a run quantized with the same widths in all layers, unless a budget is among the options; returns them."""
    from yolo_qc_plugin import add_qc_callbacks

    return add_qc_callbacks(yolo, **{"budget": None, **options})


def begin(request: dict) -> dict:
    """Write what training begins from: the float checkpoint, or the model as the plugin has calibrated it."""
    from ultralytics import YOLO

    weights = Path(request["run"]) / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    yolo = YOLO(request["weights"])
    state = "trained" if request["options"] is None else "qat"
    found = {"model": Path(yolo.model.yaml["yaml_file"]).stem, "steps": 0, "metrics": {state: {}}}
    if state == "qat":
        found |= calibrate(yolo, request, weights / FILES[state])
    else:
        shutil.copyfile(request["weights"], weights / FILES[state])
    return found


def calibrate(yolo, request: dict, file: Path) -> dict:
    """Start a run as any other, write its model once it is calibrated, with its outputs quantized, and end it.

    Returns:
        What the report of a whole run has as "size_mb" and "operations".
    """
    from ultralytics.nn.tasks import load_checkpoint

    from yolo_qc_plugin.host.architecture import blank_image, student
    from yolo_qc_plugin.report.record import described, model_size, operations
    from yolo_qc_plugin.run.finish import set_outputs

    config = add_callbacks(yolo, request["options"])

    class Calibrated(Exception):
        """Ends the run."""

    def write(model) -> None:
        yolo.model = model.cpu()
        yolo.save(file)

    def on_train_start(trainer) -> None:
        write(deepcopy(student(trainer.ema.ema)))
        if config.output_bits is not None:  # of the checkpoint, as after training
            model, _ = load_checkpoint(file, device=trainer.device)
            set_outputs(trainer, model, config)
            write(model)
        raise Calibrated

    yolo.add_callback("on_train_start", on_train_start)
    folder = Path(request["run"])
    place = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    with suppress(Calibrated):
        yolo.train(data=request["data"], **place, **request["recipe"])
    model = load_checkpoint(file)[0].float()
    layers = described(model, blank_image(model, yolo.trainer.args.imgsz))
    return {"size_mb": model_size(model), "operations": operations(layers)}


def rounding(file: str | Path, within: float):
    """A finished model that rounds only what lies within so many steps of a grid point, and is not deployed."""
    from ultralytics import YOLO

    from yolo_qc_plugin.quant.soft_rounding import round_within

    yolo = YOLO(file)
    yolo.model.fuse = lambda *args, **kwargs: yolo.model  # fusing would compute integers
    round_within(yolo.model, within)
    return yolo


def rounded(request: dict) -> dict:
    """Nothing but the measuring is to be done of a cell that rounds."""
    return {"metrics": {}}


KINDS = {"start": begin, "round": rounded}


def label(first: State, second: State) -> str:
    """The key of a difference in a record."""
    return " - ".join("/".join(state) for state in (first, second))


def keep_resampled(archive: Path, name: str, runs: Path) -> dict[str, np.ndarray]:
    """Add what the runs of a set left of resampled AP to the archive of a record.

    Args:
        archive: An .npz file, made where it is missing.
        name: Of the set.
        runs: Folder of the set's runs.

    Returns:
        "SET/CELL-seedSEED/STATE" -> AP of all images, then of each resample, (1 + resamples,), in 0..1, to 1/65535.
    """
    kept = dict(np.load(archive)) if archive.exists() else {}
    files = sorted(runs.glob("*-seed*/coco/*/resampled.npy"))
    for file in files:
        kept[f"{name}/{file.parents[2].name}/{file.parent.name}"] = np.rint(np.load(file) * 65535).astype(np.uint16)
    if files:
        np.savez_compressed(archive, **dict(sorted(kept.items())))
    return {key: values / 65535 for key, values in kept.items()}


def differences(
    content: dict, name: str, kept: dict[str, np.ndarray], runs: Path, pairs: list[tuple[State, State]]
) -> dict[str, dict]:
    """Paired differences of AP with their intervals, of all pairs of which resamples are known.

    In each resample of the images the difference is averaged over the seeds that both cells have.

    Args:
        content: A set of the record; a difference that it has stays where resamples of no more seeds are known.
        name: Of the set.
        kept: From `keep_resampled`.
        runs: Folder of the set's runs.
        pairs: First and second state.

    Returns:
        Label -> "seeds"; "difference", their mean in points; its "interval".
    """
    from yolo_qc_plugin.tools.intervals import interval

    found = dict(content.get("differences", {}))
    for pair in pairs:
        of = [measured_seeds(content["cells"], state) for state in pair]
        keys = {s: [f"{name}/{cell}-seed{s}/{state}" for cell, state in pair] for s in sorted(of[0] & of[1])}
        seeds = [seed for seed, both in keys.items() if all(key in kept for key in both)]
        if len(seeds) > len(found.get(label(*pair), {"seeds": []})["seeds"]):
            apart = 100 * np.mean([kept[keys[s][0]] - kept[keys[s][1]] for s in seeds], axis=0)  # (1 + resamples,)
            files = [
                [runs / f"{cell}-seed{s}" / "coco" / state / "agreement.npy" for s in seeds] for cell, state in pair
            ]
            found[label(*pair)] = {
                **nearer(files), "seeds": seeds, "difference": float(apart[0]), "interval": interval(apart[1:]),
            }  # fmt: skip
    return found


def nearer(files: list[list[Path]]) -> dict:
    """The difference of two states' agreement, averaged over seeds, with its interval over resampled images.

    Args:
        files: Of the first and of the second state, one for each seed.

    Returns:
        "agreement" and "agreement_interval"; empty where a file is missing.
    """
    if not all(file.exists() for one in files for file in one):
        return {}
    a, b = (np.stack([np.load(file) for file in one]).mean(axis=0) for one in files)
    draw = np.random.default_rng(0)
    means = [(a - b)[draw.integers(len(a), size=len(a))].mean() for _ in range(1000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"agreement": float((a - b).mean()), "agreement_interval": [float(low), float(high)]}


def measured_seeds(cells: dict[str, dict], state: State) -> set[int]:
    """Seeds of which a record has the AP of a state."""
    found = ((key.rpartition("-seed"), cell["metrics"].get(state[1]) or {}) for key, cell in cells.items())
    return {int(seed) for (name, _, seed), metrics in found if name == state[0] and "ap" in metrics}
