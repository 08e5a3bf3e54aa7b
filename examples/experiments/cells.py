# yolo_qc_plugin, AGPL-3.0
"""Cells of a table, for the scripts beside this file: each is one stock training run.

A cell writes one JSON file beside its run; when all have ended, they are joined in the table's record (record.py). A
cell that has its file or is in the record is done. One that was killed goes on from its last.pt through the plugin's
resume, where the run left a resume.pt, else it starts again. `run` keeps several processes busy with
`python cells.py REQUEST.json`, a cell each; on a GPU they share it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import measured
from record import join, made, read, versions
from trials import add_trial

# of every run unless `--train` says otherwise; the float row too
RECIPE = {
    "optimizer": "Adam",
    "lr0": 1e-3,
    "lrf": 0.01,
    "nbs": 16,
    "batch": 16,
    "warmup_epochs": 1,
    "warmup_bias_lr": 0.0,  # the 0.1 of Ultralytics is meant for SGD from scratch
    "val": False,  # the last epoch alone: no epoch is chosen by the validation set
    "plots": False,
}
MACHINE = {"device", "workers", "cache"}  # cells of one page may differ in these


@dataclass(frozen=True)
class Cell:
    """One run, whatever its seed.

    Args:
        name: Of its files.
        options: Of the plugin, whose widths are uniform unless a budget is among them; None is float.
        work: "train"; "correct" corrects the source's run with these options, with teacher="off" by labels alone;
            "start" trains nothing and measures what training begins from, float or calibrated; "round" measures the
            source's model with softer rounding.
        source: Name of the cell whose run this one begins from.
        recipe: Further arguments of `model.train()`; "trial" is a name of trials.py.
    """

    name: str
    options: dict | None
    work: str = "train"
    source: str | None = None
    recipe: dict = field(default_factory=dict)


def parser(description: str, kinds: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The command line that the scripts share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if kinds:
        p.add_argument("kind", choices=kinds)
    p.add_argument("--name", help="of the set in the record; by default DATA-MODEL")
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--weights", help="float checkpoint")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--device", default="cpu", help="as `yolo` takes it; one GPU is shared by all jobs")
    p.add_argument("--jobs", type=int, default=1, help="cells side by side")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of each cell")
    p.add_argument("--train", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of train() for every cell")
    p.add_argument("--qc", nargs="+", default=[], metavar="KEY=VALUE", help="options of every quantized cell")
    p.add_argument("--only", nargs="+", metavar="CELL", help="names of the cells to run")
    p.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the page and its record")
    p.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="the runs and a JSON file of each")
    p.add_argument("--assemble", action="store_true", help="join what there is and make the page, without training")
    p.set_defaults(coco=False)  # whether cells measure COCO's AP too
    return p


def model_of(weights: str) -> str:
    """Name of the architecture in a checkpoint, as yolov5n."""
    from ultralytics import YOLO

    return Path(YOLO(weights).model.yaml["yaml_file"]).stem


def measure(cells: list[Cell], file: Path, args: argparse.Namespace) -> tuple[dict, bool]:
    """Run the missing cells of a set and join them in a record.

    Args:
        cells: In the order to run them.
        file: Of the record.
        args: From `parser`; its `runs` becomes the folder of this set, and its `name` the set's.

    Returns:
        The record, and whether all cells are done.
    """
    if args.assemble and not args.name:
        return read(file), True
    if not (args.name or (args.data and args.weights)):
        raise SystemExit("give --name, or --data and --weights, after which the set is named")
    args.name = args.name or f"{Path(args.data).stem}-{model_of(args.weights)}"
    args.runs /= args.name
    recorded = read(file).get(args.name, {}).get("cells", {})
    done = args.assemble or run(cells, recorded, args)
    return join(file, args.name, args.runs), done


def pairs(texts: list[str]) -> dict:
    """KEY=VALUE texts as a dict, with values as Python writes them, else as text."""
    result = {}
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep:
            raise SystemExit(f"{text!r} is not accepted; give KEY=VALUE")
        try:
            result[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def run(cells: list[Cell], recorded: dict[str, dict], args: argparse.Namespace) -> bool:
    """Run every cell that is missing, `--jobs` at a time, seeds outermost so that a part is a whole table.

    Args:
        cells: In the order to run them.
        recorded: Those that the record has.
        args: From `parser`.

    Returns:
        Whether all of them are done.
    """
    if not (args.data and args.weights):
        raise SystemExit("--data and --weights are needed to train")
    if unknown := set(args.only or ()) - {c.name for c in cells}:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: the cells are {' '.join(c.name for c in cells)}")
    args.runs.mkdir(parents=True, exist_ok=True)
    wanted = [(c, seed) for seed in args.seeds for c in cells if not args.only or c.name in args.only]
    requests = [request(c, seed, args) for c, seed in wanted]
    missing = [r for r in requests if not is_done(r, recorded)]
    done = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for waits in False, True:  # some need what the run of another cell has left
            done += pool.map(lambda r: start(r, args.threads), [r for r in missing if bool(r["source"]) is waits])
    return all(done)


def request(cell: Cell, seed: int, args: argparse.Namespace) -> dict:
    """All that a process needs to know of a cell: plain values."""
    name = f"{cell.name}-seed{seed}"
    source = cell.source and str((args.runs / f"{cell.source}-seed{seed}" / "weights" / "qat.pt").resolve())
    size = {"device": args.device, "epochs": args.epochs, "imgsz": args.imgsz}
    recipe = {**RECIPE, **size, **pairs(args.train), **cell.recipe, "seed": seed}
    if cell.work == "start" and cell.options is None:  # the same whatever is trained beside it
        recipe = {k: v for k, v in recipe.items() if k in {"imgsz", "seed", *MACHINE}}
    return {
        "work": cell.work,
        "coco": args.coco,
        "options": cell.options and {**cell.options, **({} if cell.source else pairs(args.qc))},
        "recipe": recipe,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
        "weights": str(Path(args.weights).resolve()) if Path(args.weights).exists() else args.weights,
        "run": str((args.runs / name).resolve()),
        "source": source,
        "target": str((args.runs / f"{name}.json").resolve()),
    }


def is_done(request: dict, recorded: dict[str, dict]) -> bool:
    """Whether a cell has its JSON file or is in the record.

    Raises:
        SystemExit: If that cell is of another experiment: rows of a table are to differ in nothing but the method.
    """
    target = Path(request["target"])
    found = json.loads(target.read_text()) if target.exists() else recorded.get(target.stem)
    if found is None:
        return False
    asked = identity(request)
    differ = [k for k in asked if found.get(k) != asked[k] and k != "recipe"]
    recipe = {k: v for k, v in found["recipe"].items() if k not in MACHINE}
    differ += sorted(k for k in recipe.keys() | asked["recipe"] if recipe.get(k) != asked["recipe"].get(k))
    if differ:
        what = ", ".join(differ)
        raise SystemExit(f"{target.stem} of {target.parent.name} was made with other {what}; give another --name")
    return True


def identity(request: dict) -> dict:
    """What makes a cell the one it is, as its JSON file has it: no path of a machine, no device."""
    return {
        "options": request["options"],
        "recipe": {k: v for k, v in named(request["recipe"]).items() if k not in MACHINE},
        "data": Path(request["data"]).name,
        "weights": Path(request["weights"]).name,
    }


def named(recipe: dict) -> dict:
    """The recipe with the names of files, such as a teacher's, in place of their paths."""
    return {k: Path(v).name if isinstance(v, str) and os.sep in v else v for k, v in recipe.items()}


def start(request: dict, threads: int) -> bool:
    """Run a cell in a process of its own; says how it went and returns whether it is done."""
    if request["source"] and not Path(request["source"]).exists():
        print(f"{Path(request['run']).name}: FAILED: {request['source']} is missing: repeat the cell that made it")
        return False
    folder = Path(request["run"])
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "request.json", folder.with_name(f"{folder.name}.log")
    begun = file.exists() and identity(json.loads(file.read_text())) == identity(request)
    if not begun:
        (folder / "weights" / "resume.pt").unlink(missing_ok=True)  # of another experiment
    file.write_text(json.dumps(request))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a" if begun else "w") as out:
        command = [sys.executable, __file__, file]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    print(f"{folder.name}: {'done' if code == 0 else f'FAILED: {last} (see {log})'}", flush=True)
    return code == 0


def work(request: dict) -> None:
    """Run a cell in this process and write its JSON file."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    began = time.time()
    folder, kinds = Path(request["run"]), {"train": train, "correct": correct, **measured.KINDS}
    with measured.keeping_corrected() if request["coco"] else nullcontext():
        found = kinds[request["work"]](request)
    seconds = round(time.time() - began, 1)
    if request["coco"]:
        for state, model in measured.models(request, found).items():
            of_run = found["metrics"].get(state, {})
            found["metrics"][state] = {**measured.coco(model, request, folder / "coco" / state), **of_run}
    result = {
        **identity(request),
        "recipe": named(request["recipe"]),
        **found,
        "seconds": seconds,
        "versions": versions(),
        **made(request["recipe"]["device"]),
    }
    temporary = Path(request["target"]).with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(request["target"])


def train(request: dict) -> dict:
    """Train a cell, or go on training it; returns what its JSON file is to hold of the run."""
    from ultralytics import YOLO

    folder = Path(request["run"])
    last = folder / "weights" / "last.pt"
    resume = last.exists() and last.with_name("resume.pt").exists()
    recipe = dict(request["recipe"])
    model = YOLO(last if resume else request["weights"])
    add_trial(model, recipe.pop("trial", None))
    if resume:
        metrics = model.train(resume=True, device=recipe["device"])
    else:
        if request["options"] is not None:
            measured.add_callbacks(model, request["options"])
        place = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
        metrics = model.train(data=request["data"], **place, **recipe)
    trainer = model.trainer
    found = {
        "model": Path(model.model.yaml["yaml_file"]).stem,
        "images": {"train": len(trainer.train_loader.dataset), "val": len(trainer.test_loader.dataset)},
        "steps": trainer.ema.updates,
        "resumed": resume,
    }
    if request["options"] is None:
        trained = {"map50_95": float(metrics.box.map), "map50": float(metrics.box.map50)}
        return {**found, "metrics": {"trained": trained}}
    report = json.loads((folder / "qc" / "report.json").read_text())
    of_report = "config", "metrics", "kept", "size_mb", "operations", "budget"
    return {**found, **{key: report[key] for key in of_report if key in report}}


def correct(request: dict) -> dict:
    """Correct the finished run of another cell; returns what the JSON file is to hold of it."""
    from yolo_qc_plugin import correct

    source, folder, options = Path(request["source"]), Path(request["run"]), dict(request["options"])
    if options.pop("teacher", None) == "off":  # QC is taught by the teacher.pt beside what it corrects
        apart = folder / "apart"
        apart.mkdir(parents=True, exist_ok=True)
        source = Path(shutil.copy(source, apart))
    place = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    machine = {k: v for k, v in request["recipe"].items() if k in MACHINE}
    report = correct(source, request["data"], **options, **place, **machine)
    return {key: report[key] for key in ("config", "metrics", "kept")}


def mean_and_spread(values: Collection[float]) -> str:
    """Mean and standard deviation, to a tenth."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def conditions(files: list[dict]) -> list[str]:
    """In words: what the runs of a page were made with and under."""

    def of(values) -> str:
        return " or ".join(dict.fromkeys(str(v) for v in values))

    recipe = {k: of(f["recipe"].get(k) for f in files) for f in files for k in f["recipe"] if k != "seed"}
    versions = {k: of(f["versions"][k] for f in files) for k in files[0]["versions"]}
    return [
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}. Recipe of every row: "
        f"{', '.join(f'{k}={v}' for k, v in recipe.items())}."
    ]


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
