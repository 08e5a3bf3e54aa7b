# yolo_qc_plugin, AGPL-3.0
"""Kill runs at random moments (SIGKILL), resume them, and compare what they end with with a run that nobody killed.

    python examples/experiments/kill_and_resume.py --kills 10 --out docs/results
    python examples/experiments/kill_and_resume.py --kills 10 --model float.pt --data data.yaml --imgsz 160

Each kill is at a random event (a call or a return of a function) within a phase of the run; the phases are taken
in turn, so that short ones (the writing of a checkpoint) are hit as well. Every other run is killed once more when it
was resumed. Ultralytics resumes as for any run, and nothing names the plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from record import made, versions
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks, compose
from yolo_qc_plugin.files import AtomicPath
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.run import finish, qc, resume
from yolo_qc_plugin.run.state import RunState

# a phase -> the function in whose course the run is killed
PHASES = {
    "optimizer step": (BaseTrainer, "optimizer_step"),
    "last.pt and best.pt": (AtomicPath, "write_bytes"),
    "training of QC": (qc, "train_correction"),
    "resume.pt": (RunState, "_save"),
    "validation": (BaseTrainer, "validate"),
    "stripping": (resume, "strip"),
    "report": (finish, "build_report"),
    "qat.pt": (finish, "write_like"),
    "last writes": (finish, "conclude"),
    "start of an epoch": (BaseTrainer, "_model_train"),
}
NOT_AGAIN = {"resume.pt"}  # what a run that is resumed at its last epoch does not come by

# everything that has a state: a warm-up, gradients that wait across epochs, no mosaics in the last epoch
TRAINING = {
    "batch": 8, "nbs": 16, "warmup_epochs": 1, "close_mosaic": 1, "multi_scale": 0.5, "optimizer": "AdamW",
    "device": "cpu", "workers": 0, "plots": False, "verbose": False, "seed": 0,
}  # fmt: skip


class Watch:
    """Counts the events of the phases, and kills this process at a given one.

    Args:
        phases: Those to count.
        moment: (phase, number of its entry, event within the entry), or None to count alone.
    """

    def __init__(self, phases: list[str], moment: tuple[str, int, int] | None = None):
        self.moment = moment
        self.counts: dict[str, list[int]] = {phase: [] for phase in phases}
        self.current = None  # phase that is under way; phases within it are part of it

    def install(self) -> None:
        """Wrap the functions of the phases."""
        for phase, (owner, name) in ((phase, PHASES[phase]) for phase in self.counts):
            setattr(owner, name, self._watched(phase, getattr(owner, name)))
        Path.write_bytes = write_in_parts

    def _watched(self, phase: str, function: Callable) -> Callable:
        @wraps(function)
        def watched(*args, **kwargs):
            if self.current:
                return function(*args, **kwargs)
            self.current = phase
            self.counts[phase].append(0)
            sys.setprofile(self._event)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)
                self.current = None

        return watched

    def _event(self, frame, event, argument) -> None:
        counts = self.counts[self.current]
        counts[-1] += 1
        if self.moment and (self.current, len(counts) - 1, counts[-1]) == self.moment:
            place = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            print(f"\nkilled in {self.current}: {place}, line {frame.f_lineno}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def write_in_parts(path: Path, data: bytes) -> int:
    """Path.write_bytes by 64 kB, each with an event, so that a kill can leave a part."""
    with open(path, "wb") as f:
        for i in range(0, len(data), 1 << 16):
            f.write(data[i : i + (1 << 16)])
            f.flush()
    return len(data)


def in_child(function: Callable, log: Path) -> int:
    """Run a function in a fork of this process, its output in `log`; returns its wait status."""
    pid = os.fork()
    if not pid:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def train(name: str, args: argparse.Namespace, watch: Watch) -> None:
    """A new run; the events counted go to a file."""
    watch.install()
    model = YOLO(args.model)
    add_qc_callbacks(model, bits=4, budget=None)
    arguments = {**TRAINING, "data": str(args.data), "epochs": args.epochs, "imgsz": args.imgsz}
    model.train(**arguments, project=str(args.folder), name=name, exist_ok=True)
    (args.folder / f"{name}.json").write_text(json.dumps(watch.counts))


def go_on(last: Path, watch: Watch) -> None:
    """Resume as a user does; a run that was killed in its last acts has nothing to resume, as Ultralytics says."""
    watch.install()
    try:
        YOLO(last).train(resume=True)
    except AssertionError as error:
        if "nothing to resume" not in str(error):
            raise


def compare(run: Path, reference: Path) -> list[str]:
    """What differs between two runs that have ended."""
    different = []
    for name in ("last.pt", "qat.pt", "best.pt"):
        a, b = (load_checkpoint(folder / "weights" / name)[0] for folder in (run, reference))
        first, second = a.state_dict(), b.state_dict()
        if first.keys() != second.keys():
            different.append(f"{name}: names")
        different += [f"{name}: {k}" for k in first if k in second and not torch.equal(first[k], second[k])]
        codes = {n: conv.weight_codes() for n, conv in quant_convs(b)}
        different += [f"{name}: {n} codes" for n, c in quant_convs(a) if not torch.equal(c.weight_codes(), codes[n])]
    a, b = (json.loads((folder / "qc" / "report.json").read_text()) for folder in (run, reference))
    different += [f"report.json: {k}" for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
    a, b = (rows(folder / "results.csv") for folder in (run, reference))
    different += ["results.csv"] if a != b else []
    files = [{str(f.relative_to(folder)) for f in folder.rglob("*")} for folder in (run, reference)]
    return different + [f"file {name}" for name in files[0] ^ files[1]]


def rows(csv: Path) -> list[list[str]]:
    """results.csv without its column of times."""
    return [[v for i, v in enumerate(line.split(",")) if i != 1] for line in csv.read_text().splitlines()]


def choose(random_: random.Random, phase: str, counts: dict[str, list[int]], resumed: bool) -> tuple[str, int, int]:
    """A random moment of a phase: in any of its entries, or in its first after a resume."""
    entry = 0 if resumed else random_.randrange(len(counts[phase]))
    return phase, entry, random_.randint(1, counts[phase][entry])


def try_run(name: str, phases: list[str], counts: dict, random_: random.Random, args: argparse.Namespace) -> dict:
    """Kill a run once in each of `phases`, resume it after each, and compare it in the end."""
    run, log = args.folder / name, args.folder / f"{name}.txt"
    last = run / "weights" / "last.pt"
    kills = []
    for i, phase in enumerate([*phases, None]):
        moment = choose(random_, phase, counts, bool(i)) if phase else None
        watch = Watch([phase] if phase else [], moment)
        if not last.exists():
            status = in_child(lambda watch=watch: train(name, args, watch), log)
        elif load_checkpoint(last)[1]["optimizer"]:
            status = in_child(lambda watch=watch: go_on(last, watch), log)
        else:  # it has ended, to the very last act
            status = 0
        if phase is None:
            break
        if status != signal.SIGKILL:
            raise SystemExit(f"{name} was not killed in {moment} (status {status}), see {log}")
        killed = log.read_text(errors="replace").rpartition("\nkilled in ")[2].splitlines()[0]
        temporary = [f.name for f in run.rglob(".*.tmp")]
        kills.append({"phase": phase, "at": killed.partition(": ")[2], "half written": len(temporary)})
        kills[-1]["went on from"] = "last.pt" if last.exists() else "the beginning"
    different = compare(run, args.folder / "reference") if status == 0 else [f"ended with status {status}, see {log}"]
    return {"run": name, "kills": kills, "different": different}


def page(result: dict) -> str:
    """The result as Markdown."""
    about = result["about"]
    lines = [
        "# Killed and resumed",
        "",
        f"Written by `examples/experiments/kill_and_resume.py`: {about['model']} on {about['data']} "
        f"({about['images']['train']} training and {about['images']['val']} validation images) "
        f"at {about['imgsz']} px, seed {about['seed']}, "
        f"{', '.join(f'{k}={v}' for k, v in about['training'].items())}; ultralytics {about['ultralytics']}, torch "
        f"{about['torch']}. Each run was killed by SIGKILL at a random event within a "
        "phase and resumed by `YOLO(last.pt).train(resume=True)`; without a last.pt it was started again. Compared are "
        "all tensors and codes of last.pt, qat.pt and best.pt, report.json, results.csv without its times, and the "
        "names of all files.",
        "",
        "| run | killed in | at | half-written files | then went on from | differs from the uninterrupted run |",
        "|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        for i, kill in enumerate(run["kills"]):
            different = run["different"]
            final = "nothing" if not different else f"{len(different)}: {', '.join(different[:3])}"
            final = final if i == len(run["kills"]) - 1 else "(killed again)"
            cells = run["run"], kill["phase"], f"`{kill['at']}`", kill["half written"], kill["went on from"], final
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model", default="yolov5n.yaml")
    p.add_argument("--data", type=Path, help="made of digits if left out")
    p.add_argument("--imgsz", type=int, default=64)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "resume.json"
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    torch.set_num_threads(1)  # forks share no thread pool
    random_ = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.data = args.data or compose(args.folder / "digits", train=24, val=8, imgsz=args.imgsz, seed=0)
        if in_child(lambda: train("reference", args, Watch(args.phases)), args.folder / "reference.txt"):
            raise SystemExit((args.folder / "reference.txt").read_text(errors="replace"))
        data = check_det_dataset(args.data)
        images = {split: len(list(Path(data[split]).iterdir())) for split in ("train", "val")}
        counts = json.loads((args.folder / "reference.json").read_text())
        todo = [args.phases[i % len(args.phases)] for i in range(args.kills)]
        runs = []
        while todo:
            phases = [todo.pop(0)]
            if len(runs) % 2 and (again := next((phase for phase in todo if phase not in NOT_AGAIN), None)):
                todo.remove(again)
                phases.append(again)
            runs.append(try_run(f"run{len(runs) + 1}", phases, counts, random_, args))
            print(json.dumps(runs[-1]), flush=True)
            if runs[-1]["different"]:
                print((args.folder / f"{runs[-1]['run']}.txt").read_text(errors="replace")[-3000:], file=sys.stderr)
            shutil.rmtree(args.folder / runs[-1]["run"])
    about = {
        "model": Path(args.model).name,
        "data": args.data.name,
        "images": images,
        "imgsz": args.imgsz,
        "seed": args.seed,
        "training": {"epochs": args.epochs, **TRAINING},
        **versions(),
        **made(),
    }
    result = {"about": about, "runs": runs}
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(result))
    sys.exit(any(run["different"] for run in runs))


if __name__ == "__main__":
    main()
