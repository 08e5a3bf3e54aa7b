# yolo_qc_plugin, AGPL-3.0
"""What a run survives: causes each fault in a small real run, with callbacks=qc and without, and writes the page.

    python examples/experiments/reliability.py [--only NAME ...] [--out docs]

Each run is a process of its own on a data set of 24 images (`yolo-qc digits`), two epochs of YOLOv5n at 64 px. After
the fault, every checkpoint that was whole before is opened again; what cannot be opened is lost. The full disk is a
small tmpfs, which only root may mount; other users get a file size limit in its place. The exit status is 1 where the
plugin lost something that stock kept, ended in an error that stock did not end in and that is not to be, or went on
where a fault is to stop it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo_config_")  # leave the user's settings alone

import numpy as np
import torch
from PIL import Image
from record import made, versions
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import SETTINGS

from yolo_qc_plugin import add_qc_callbacks, compose

ARGUMENTS = {
    "imgsz": 64, "batch": 8, "epochs": 2, "device": "cpu", "plots": False, "workers": 0, "warmup_epochs": 0, "nbs": 8,
    "name": "run", "exist_ok": True,
}  # fmt: skip
TIMEOUT = 1800  # seconds for one run
ANSI = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")


@dataclass
class Fault:
    """One fault and how it is caused.

    Args:
        name: Of the fault; --only takes it.
        cause: In words, for the page.
        prepare: Called with the case before the run.
        events: Event -> callback that causes the fault within the run; called before the plugin's own.
        arguments: Of train().
        options: Of the plugin.
        keeps: Checkpoints that are whole before the fault, or that the run gives in spite of it.
        stops: The plugin is to stop where stock goes on: it refuses, or the fault hits a step of its own.
        stock: Whether stock Ultralytics has this fault too.
    """

    name: str
    cause: str
    prepare: Callable[[Case], None] = lambda case: None
    events: dict[str, Callable] = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    keeps: tuple[str, ...] = ("last.pt", "best.pt")
    stops: bool = False
    stock: bool = True


class Case:
    """One run of one fault: its folder, its data, its start model, and what came of it."""

    def __init__(self, fault: Fault, folder: Path, plugin: bool):
        self.fault, self.folder, self.plugin = fault, folder, plugin
        self.project, self.run = folder, folder / "run"
        self.model = "yolov5n.yaml"
        self.arguments = {**ARGUMENTS, **fault.arguments}
        folder.mkdir(parents=True)
        self.yaml = compose(folder / "data", train=24, val=8, imgsz=64, seed=0)

    def train(self) -> None:
        """The run itself, in this process."""
        yolo = YOLO(self.model)
        if self.plugin:
            add_qc_callbacks(yolo, **self.fault.options)
        for event, callback in self.fault.events.items():  # before the plugin's, which goes before those that are there
            yolo.callbacks[event].insert(0, lambda trainer, callback=callback: callback(trainer, self))
        yolo.train(data=str(self.yaml), project=str(self.project), **self.arguments)

    def outcome(self) -> dict:
        """Run, then look at what is left."""
        self.fault.prepare(self)
        ended, log = forked(self.train, self.folder / "log.txt")
        files = forked(self.state, self.folder / "state.txt")[0]
        keeps = [*self.fault.keeps, *["qat.pt"] * (self.plugin and ended == "completed")]
        said = [line for line in log if "QC" in line and "kept" in line]
        return {
            "ended": ended,
            "said": said[-1].partition("QC: ")[2] if said else "",
            "files": files,
            "lost": [name for name in keeps if files.get(name) not in {"float", "quantized"}],
        }

    def state(self) -> dict[str, str]:
        """What the weights folder holds: name -> float, quantized or unreadable."""
        found = {}
        for file in sorted((self.run / "weights").glob("*")) if (self.run / "weights").exists() else []:
            try:
                model, _ = load_checkpoint(file)
                found[file.name] = "quantized" if hasattr(model, "qc") else "float"
            except Exception as e:
                found[file.name] = f"unreadable ({type(e).__name__})"
        return found


def forked(function: Callable, log: Path) -> tuple[object, list[str]]:
    """Call in a forked process, with its output in a file: what it returned, or how it ended; the output's lines."""
    result = log.with_suffix(".json")
    child = os.fork()
    if not child:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        signal.alarm(TIMEOUT)
        handle = result.open("w")  # opened now: later the disk may be full, or the folder not ours
        try:
            value = function()
            value = "completed" if value is None else value
        except BaseException as e:
            traceback.print_exc()
            value = f"{type(e).__name__}: {ANSI.sub('', str(e))}".splitlines()[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        json.dump(value, handle)
        handle.close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    text = ANSI.sub("", log.read_text(errors="replace"))
    value = json.loads(result.read_text()) if result.stat().st_size else f"killed by signal {os.WTERMSIG(status)}"
    return value, text.splitlines()


# --- how faults are caused -------------------------------------------------------------------------------------------


def small_disk(case: Case) -> None:
    """Put the run's folder on a disk of its own."""
    case.project = case.folder / "disk"
    case.run = case.project / "run"
    case.project.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(case.project)], check=True)


def fill_disk(trainer, case: Case) -> None:
    """Leave no room on that disk; where there is none, limit the size of files."""
    if not os.path.ismount(case.project):
        return limit_files(trainer, case)
    with (case.project / "filler").open("wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(1 << 20))
        except OSError:
            pass


def limit_files(trainer, case: Case) -> None:
    """Let no file grow past 100 kB, one that is being replaced included: what a full disk would leave room for."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def in_epoch(number: int, action: Callable) -> Callable:
    """The action, in one epoch only (1 is the first)."""
    return lambda trainer, case: action(trainer, case) if trainer.epoch + 1 == number else None


def lock(folder: Path) -> None:
    """Take the permission to write away; root writes in spite of it, but not to a read-only mount."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)


def release(folder: Path) -> None:
    """Unmount what was mounted within a folder, and allow writing."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines() if os.path.exists("/proc/mounts") else []):
        if Path(line.split()[1]).is_relative_to(folder):
            subprocess.run(["umount", line.split()[1]], check=True)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            inner.chmod(0o755)


def lock_run(trainer, case: Case) -> None:
    """A run folder that nothing can be written to any more."""
    lock(case.run)


def lock_project(case: Case) -> None:
    """A project folder in which no run folder can be made."""
    case.project = case.folder / "project"
    case.run = case.project / "run"
    case.project.mkdir()
    lock(case.project)


def interrupt(trainer, case: Case) -> None:
    """What Ctrl-C does, in a job in the background too, where a shell turns the signal off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def interrupt_correction(trainer, case: Case) -> None:
    """Ctrl-C at the correction's second batch, which is the first pass over the loader once qat.pt is there."""

    class Interrupted(type(trainer.train_loader)):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 1 and (case.run / "weights" / "qat.pt").exists():
                    interrupt(trainer, case)
                yield batch

    trainer.train_loader.__class__ = Interrupted


def labels(case: Case, split: str = "train") -> list[Path]:
    """Label files of a split."""
    return sorted((case.folder / "data" / "labels" / split).glob("*.txt"))


def no_labels(case: Case) -> None:
    """Delete every label of the training set."""
    shutil.rmtree(case.folder / "data" / "labels" / "train")


def corrupt_labels(case: Case) -> None:
    """Write into every second label file what is no label, and cut an image."""
    for file in labels(case)[::2]:
        file.write_text("3 0.5 nan 2.0\nnot a label\n")
    image = next((case.folder / "data" / "images" / "train").iterdir())
    image.write_bytes(image.read_bytes()[:100])


def no_images(case: Case) -> None:
    """Delete every image of the training set."""
    for file in (case.folder / "data" / "images" / "train").iterdir():
        file.unlink()


def eleventh_class(case: Case) -> None:
    """Name a class that no box has."""
    case.yaml.write_text(f"{case.yaml.read_text()}  10: nothing\n")


def constant_images(case: Case, value: int = 0) -> None:
    """Paint every image in one colour."""
    for file in (case.folder / "data" / "images").rglob("*.*"):
        if file.suffix in {".png", ".jpg"}:
            Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(file)


def start_model(change: Callable) -> Callable:
    """Start from a checkpoint whose state was changed."""

    def prepare(case: Case) -> None:
        def write() -> None:
            yolo = YOLO("yolov5n.yaml")
            with torch.no_grad():
                change(yolo.model.state_dict())
            yolo.save(case.folder / "start.pt")

        forked(write, case.folder / "start.txt")
        case.model = str(case.folder / "start.pt")

    return prepare


def zero_weights(state: dict) -> None:
    """Some channels of a layer, a whole layer, and a batch norm that passes nothing on."""
    state["model.1.conv.weight"][:4] = 0
    state["model.3.conv.weight"].zero_()
    state["model.5.bn.weight"].zero_()


def spoil(value: float) -> Callable:
    """One weight that is no number."""
    return lambda state: state["model.3.conv.weight"].view(-1)[7:8].fill_(value)


def cut_start(case: Case) -> None:
    """Start from the first half of a checkpoint."""
    start_model(lambda state: None)(case)
    file = Path(case.model)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_best(trainer, case: Case) -> None:
    """Cut best.pt after Ultralytics' final evaluation."""
    trainer.best.write_bytes(trainer.best.read_bytes()[:1000])


def tensorboard_on(case: Case) -> None:
    """Log to TensorBoard, by Ultralytics' own setting."""
    train = case.train

    def run() -> None:
        SETTINGS.update({"tensorboard": True})
        train()

    case.train = run


def refuse_writer(trainer, case: Case) -> None:
    """Let the writer fail as in a folder that it cannot write to."""
    from ultralytics.utils.callbacks import tensorboard as host

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    host.SummaryWriter = refuse


def earlier_run(case: Case) -> None:
    """A complete run in the folder already."""
    forked(case.train, case.folder / "earlier.txt")


def same_time(case: Case) -> None:
    """A second run in the same folder, started with this one."""
    train = case.train

    def both() -> None:
        child = os.fork()
        if not child:
            try:
                train()
            finally:
                os._exit(0)
        try:
            train()
        finally:
            os.waitpid(child, 0)

    case.train = both


FAULTS = [
    Fault("none", "nothing: for comparison"),
    Fault(
        "disk full in training", "when last.pt of epoch 2 is written, no file can grow past 100 kB",
        events={"on_train_epoch_end": in_epoch(2, limit_files)},
    ),
    Fault(
        "disk full in QC", "a tmpfs is filled at on_train_end, before the plugin writes", small_disk,
        {"on_train_end": fill_disk}, stops=True,
    ),
    Fault("read-only project", "the project's folder forbids writing, from the start", lock_project, keeps=()),
    Fault("read-only run in QC", "the run's folders forbid writing at on_train_end", events={"on_train_end": lock_run},
          stops=True),
    Fault("missing labels", "labels/train deleted", no_labels, keeps=()),
    Fault("corrupt labels", "text and NaN in every second label file, one image cut", corrupt_labels),
    Fault("empty training set", "images/train emptied", no_images, keeps=()),
    Fault("batch of one", "batch=1", arguments={"batch": 1, "nbs": 1, "fraction": 0.25, "epochs": 1}),
    Fault("last batch of one", "9 images, batch=8", arguments={"fraction": 0.375}),
    Fault("class without boxes", "an eleventh class in the data YAML", eleventh_class),
    Fault("constant images", "all images black", constant_images),
    Fault("zero weights", "channels, a layer and a batch norm of zeros", start_model(zero_weights)),
    Fault(
        "zero weights, per channel", "the same with qc_per_channel and qc_act_offset=False", start_model(zero_weights),
        options={"per_channel": True, "act_offset": False}, stock=False,
    ),
    Fault("infinite weight", "inf in one weight of the start checkpoint", start_model(spoil(float("inf"))), keeps=(),
          stops=True),
    Fault("NaN weight", "NaN in one weight of the start checkpoint", start_model(spoil(float("nan"))), keeps=(),
          stops=True),
    Fault("truncated start", "half of a checkpoint as model=", cut_start, keeps=()),
    Fault(
        "truncated best.pt", "best.pt cut to 1000 bytes at on_train_end", events={"on_train_end": cut_best},
        keeps=("last.pt",),
    ),
    Fault("TensorBoard", "none: it logs scalars and the graph", tensorboard_on),
    Fault(
        "unwritable TensorBoard", "its writer raises PermissionError", tensorboard_on,
        {"on_pretrain_routine_start": refuse_writer},
    ),
    Fault("second run", "a second run in the folder of a complete one, exist_ok=True", earlier_run),
    Fault("two runs at once", "two runs in one folder at the same time, exist_ok=True", same_time),
    Fault("SIGINT in training", "in epoch 2", events={"on_train_batch_start": in_epoch(2, interrupt)}),
    Fault(
        "SIGINT in QC", "at QC's second batch", events={"on_train_end": interrupt_correction}, stock=False,
        keeps=("last.pt", "best.pt", "qat.pt"), stops=True,
    ),
    Fault(
        "QC diverges", "qc_correction_lr=1e37: the loss is not finite", options={
            "correction_lr": 1e37, "correction_epochs": 2, "output_bits": None,
        }, stock=False,
    ),
]  # fmt: skip


def page(record: dict) -> str:
    """The record as Markdown."""
    results, of = record["faults"], record["versions"]
    lines = [
        "# What a run survives",
        "",
        f"Written by `examples/experiments/reliability.py`: {', '.join(f'{k} {v}' for k, v in of.items())}.",
        "Each fault is caused in a small real run (24 images, two epochs, CPU), by stock Ultralytics and with",
        "`callbacks=qc`. Lost is what was whole before the fault, or what a completed run gives, and cannot be opened",
        "after it.",
        "",
        "| fault | how it was caused | stock | with the plugin | kept, as the plugin says | lost |",
        "|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        if fault.name not in results:
            continue
        stock, ours = (results[fault.name].get(k) for k in ("stock", "plugin"))
        lost = ", ".join(ours["lost"]) or "nothing"
        if stock and stock["lost"]:
            lost += f" (stock: {', '.join(stock['lost'])})"
        ended = stock["ended"] if stock else "has no such step"
        cells = [fault.name, fault.cause, ended, ours["ended"], ours["said"].partition(" are kept in ")[2]]
        lines.append("| " + " | ".join(shorten(c.replace("|", "\\|"), 220) for c in [*cells, lost]) + " |")
    return "\n".join([*lines, ""])


def worse(fault: Fault, result: dict) -> bool:
    """Whether the plugin did worse than stock, or the fault that is to stop it did not."""
    ours, stock = result["plugin"], result.get("stock") or {"lost": [], "ended": ""}
    failed = stock["ended"] == "completed" and ours["ended"] != "completed"
    missed = fault.stops and ours["ended"] == "completed"
    return bool(set(ours["lost"]) - set(stock["lost"])) or (failed and not fault.stops) or missed


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=[f.name for f in FAULTS], help="these alone; the others stay")
    p.add_argument("--out", type=Path, default=Path("docs"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "results" / "reliability.json"
    if args.assemble:
        (args.out / "reliability.md").write_text(page(json.loads(file.read_text())))
        return
    results = json.loads(file.read_text())["faults"] if args.only and file.exists() else {}
    for fault in FAULTS:
        if args.only and fault.name not in args.only:
            continue
        results[fault.name] = {}
        for kind in ("stock", "plugin")[not fault.stock :]:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(fault, Path(folder).resolve() / "case", kind == "plugin")
                try:
                    found = case.outcome()
                finally:
                    release(case.folder)
                text = json.dumps(found).replace(str(case.folder), "")  # no path of this machine in the record
                results[fault.name][kind] = json.loads(text)
            print(f"{fault.name}, {kind}: {text}", flush=True)
        record = {"versions": versions(), **made(), "faults": results}
        file.write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "reliability.md").write_text(page(record))
    sys.exit(any(worse(f, results[f.name]) for f in FAULTS if f.name in results))


if __name__ == "__main__":
    main()
