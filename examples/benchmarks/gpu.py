# yolo_qc_plugin, AGPL-3.0
"""Whether training works on this machine's GPU, and what it costs: minutes, from a checkout, without network.

    python examples/benchmarks/gpu.py [--quick]

Each part runs in a process of its own with a time limit, so that one that hangs leaves the others their time:

kernels     The quantizer's compiled passes give what separate operations give, there and on the CPU.
codes       A deployed model has the same codes on the GPU as on the CPU, layer by layer and end to end.
runs        Two epochs of the stock trainer from a small trained model with AMP in FP16 and in BF16, 8 workers and MuSGD
            (optimizer=auto takes it above 10,000 iterations); killed, resumed, corrected, measured again, exported.
operations  A step asks for few more operations than the stock one, and waits for the device no more often.
step        Time and memory of a step at 640 px, batch 64.
quantizer   Time of the quantizer beside that of the memory it reads and writes.

With a GPU it writes gpu.json and gpu.md after each part, in which the parts that were not asked for stay, and those of
other GPUs. Without one it runs what a CPU allows, on small sizes, says what was left out and writes nothing. It exits
with 1 where something was found; the logs that it names say more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import exactness
import gpu_runs
import operators
import quantizer
import step
import torch
from about import about, versions

from yolo_qc_plugin import compose
from yolo_qc_plugin.run import start

# part -> seconds that it may take: 8 minutes in all
LIMITS = {"kernels": 30, "codes": 25, "runs": 120, "operations": 60, "step": 220, "quantizer": 25}
WITHOUT_GPU = "kernels", "codes", "runs", "operations"  # timings of small sizes would say nothing
MOST_OPERATIONS, MOST_TIME, MOST_MEMORY, MOST_PASSES = 1.25, 1.10, 1.15, 1.3  # times stock's; times five passes
MODELS = "yolov5n.yaml", "yolo11n.yaml"
TRAINED = Path(__file__).parents[2] / "tests" / "checkpoints" / "float.pt"  # on digits of TRAINED_SIZE
TRAINED_SIZE = 64
OURS, TAUGHT = "LSQ+ EMA", "LSQ+ EMA, taught"


def kernels(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `kernels`."""
    dtypes = exactness.DTYPES if gpu else exactness.DTYPES[:1]
    return {"faults": exactness.kernel_faults("cuda" if gpu else "cpu", dtypes)}


def codes(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `codes`; of YOLOv5, as values of attention can lie anywhere."""
    size = 640 if gpu else 64
    images = torch.rand(2 if gpu else 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    faults = []
    for target in ("cpu", "openvino"):  # SiLU with a rounded sigmoid, and rounded as a whole
        model = exactness.deployed(MODELS[0], size, target)
        found = exactness.code_faults(model, images, "cuda" if gpu else "cpu")
        faults += [f"{target}: {fault}" for fault in found]
    return {"faults": faults}


def runs(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `runs`."""
    imgsz, batch = TRAINED_SIZE, 16 if gpu else 8
    data = compose(folder / "digits", train=(4 if gpu else 2) * batch, val=8, imgsz=imgsz, seed=0)
    arguments = dict(workers=8 if gpu else 0, optimizer="MuSGD", device="0" if gpu else "cpu")
    faults = []
    for amp in ([True] if quick else [True, "bf16"]) if gpu else [False]:
        run = folder / f"amp-{amp}"
        found = gpu_runs.faults(run, str(TRAINED), data, imgsz=imgsz, batch=batch, amp=amp, **arguments)
        faults += [f"amp={amp}: {fault}" for fault in found]
    return {"faults": faults}


def operations(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `operations`."""
    imgsz, batch = (640, 16) if gpu else (64, 4)
    data = compose(folder / "digits", train=3 * batch, val=4, imgsz=imgsz, seed=0)
    start.why_no_teacher = lambda *_: ""  # a start that has learned nothing teaches here
    variants = {"stock": None, **{name: step.OURS[name] for name in (OURS, TAUGHT)}}
    found = {}
    for name, options in variants.items():
        run = dict(device="0" if gpu else "cpu", project=str(folder), name=name, optimizer="SGD")
        found[name] = operators.one_step(MODELS[0], data, options, imgsz, batch, **run)
    rows = {
        n: {"operations": one.operations, "waits": sum(one.waits.values()), "busy": one.busy}
        for n, one in found.items()
    }
    print({name: dict(one.waits) for name, one in found.items()})  # for the log
    return {"faults": operation_faults(rows), "figures": rows}


def operation_faults(rows: dict[str, dict]) -> list[str]:
    """What a step asks for beyond the goals, in words."""
    stock, ours, taught = rows["stock"], rows[OURS], rows[TAUGHT]
    faults = []
    if ours["operations"] > MOST_OPERATIONS * stock["operations"]:
        faults.append(f"{ours['operations']} operations in a step, stock has {stock['operations']}")
    # one more loss, which Ultralytics' progress bar reads as it reads the others
    for name, row, more in ((OURS, ours, 0), ("taught", taught, 1)):
        if row["waits"] > stock["waits"] + more:
            faults.append(f"{name}: {row['waits']} reads in a step wait for the device, stock has {stock['waits']}")
    return faults


def time_of_step(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `step`."""
    models = MODELS[:1] if quick else MODELS
    asked = dict(imgsz=640, batch=64, threads=8, turn=12, turns=4, starts=1, device="0", clock="wall")
    variants = ["float", OURS, TAUGHT, *["LSQ+ EMA, no telemetry", "quantize=8"] * (not quick)]
    args = argparse.Namespace(models=models, variants=variants, **asked)
    data = compose(folder / "digits", train=2 * args.batch, val=8, imgsz=args.imgsz, seed=0)
    found = {model: step.measure(model, args, data, folder) for model in models}
    return {"faults": step_faults(found), "figures": {**asked, "results": found}}


def step_faults(found: dict[str, dict]) -> list[str]:
    """Which models' steps take more than the goals, in words."""
    faults = []
    for model, rows in found.items():
        if OURS not in rows or "float" not in rows:
            faults.append(f"{model}: a variant did not run")
            continue
        ratio, memory = rows[OURS]["ratio"], rows[OURS]["mb"] / rows["float"]["mb"]
        if ratio > MOST_TIME:
            faults.append(f"{model}: a step takes {ratio:.3f}x of float")
        if memory > MOST_MEMORY:
            faults.append(f"{model}: a step's memory is {memory:.2f}x of float")
    return faults


def time_of_quantizer(gpu: bool, quick: bool, folder: Path) -> dict:
    """Part `quantizer`."""
    sizes = [mb * 2**20 for mb in (1, 4, 16, 100, 400)]
    found = [{"mb": size / 1e6, "ms": quantizer.measure(size, "cuda", 10 if quick else 30)} for size in sizes]
    return {"faults": quantizer_faults(found), "figures": found}


def quantizer_faults(found: list[dict]) -> list[str]:
    """At which sizes the quantizer takes more than the goal, in words; below 16 MB launches are what is measured."""
    ratios = {one["mb"]: one["ms"]["compiled"] / one["ms"]["five passes"] for one in found if one["mb"] >= 16}
    return [f"{mb:.0f} MB: {ratio:.2f}x of five passes" for mb, ratio in ratios.items() if ratio > MOST_PASSES]


PARTS: dict[str, Callable[[bool, bool, Path], dict]] = {
    "kernels": kernels, "codes": codes, "runs": runs, "operations": operations, "step": time_of_step,
    "quantizer": time_of_quantizer,
}  # fmt: skip


def run_part(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """One part in a process of its own: its faults and figures, and the seconds it took."""
    log, answer, began = folder / f"{name}.log", folder / f"{name}.json", time.monotonic()
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder), *["--quick"] * args.quick]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        try:
            code = process.wait(args.limit or LIMITS[name])
            said = f"ended with {code}, see {log}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with the runs that it has started
            process.wait()
            said = f"took more than {args.limit or LIMITS[name]} s, see {log}"
    found = json.loads(answer.read_text()) if answer.exists() else {"faults": [said]}
    return {**found, "seconds": round(time.monotonic() - began), "quick": args.quick}


def write(file: Path, name: str, part: dict) -> None:
    """Put a part into the record, beside those of the same machine and versions and of other GPUs; make the page."""
    record = {**about(), "gpu": torch.cuda.get_device_name()}
    part = {**part, **{k: record.pop(k) for k in ("commit", "date")}}
    found = json.loads(file.read_text()) if file.exists() else {}
    before = found.get(record["gpu"], {})
    others = before.get("parts", {}) if record.items() <= before.items() else {}
    parts = {**others, name: part}
    record["parts"] = {k: parts[k] for k in LIMITS if k in parts}
    found[record["gpu"]] = record
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(found))


def page(found: dict[str, dict]) -> str:
    """The records of all GPUs as Markdown."""
    lines = ["# On a GPU", "", "Written by `examples/benchmarks/gpu.py` from `gpu.json`. Busy is how long a step's"]
    lines.append("kernels take together: a step takes longer where they wait for Python to launch them.")
    return "\n".join([*lines, *(line for record in found.values() for line in section(record)), ""])


def section(record: dict) -> list[str]:
    """What was found on a GPU."""
    lines = ["", f"## {record['gpu']}", "", f"{record['cpu']}. {versions(record)}.", ""]
    lines += ["| part | at commit | | s | found |", "|---|---|---|---|---|"]
    for name, part in record["parts"].items():
        shown = [name, part["commit"], "quick" if part["quick"] else "", str(part["seconds"])]
        lines.append(f"| {' | '.join(shown)} | {'; '.join(part['faults']) or 'nothing'} |")
    parts = {name: part["figures"] for name, part in record["parts"].items() if "figures" in part}
    if rows := parts.get("operations"):
        lines += ["", "| step | operations | waits for the device | busy, ms |", "|---|---|---|---|"]
        for name, row in rows.items():
            busy = f"{row['busy']:.1f}" if row.get("busy") else ""
            lines.append(f"| {name} | {row['operations']} | {row['waits']} | {busy} |")
    for model, rows in parts.get("step", {}).get("results", {}).items():
        lines += ["", f"A step of {Path(model).stem}, 640 px, batch 64:", "", *step.table(rows)]
    if rows := parts.get("quantizer"):
        lines += ["", "| MB | five passes, ms | quantizer, ms | |", "|---|---|---|---|"]
        for one in rows:
            bound, ours = one["ms"]["five passes"], one["ms"]["compiled"]
            lines.append(f"| {one['mb']:.0f} | {bound:.3f} | {ours:.3f} | {ours / bound:.2f}x |")
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one precision of AMP, one model's step, fewer repeats")
    p.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="the file keeps the others")
    p.add_argument("--limit", type=float, help="seconds of each part, in place of its own")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    p.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    file, gpu = args.out / "gpu.json", torch.cuda.is_available()
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    if args.part:
        (args.folder / args.part).mkdir(parents=True, exist_ok=True)
        found = PARTS[args.part](gpu, args.quick, args.folder / args.part)
        (args.folder / f"{args.part}.json").write_text(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp(prefix="yolo-qc-gpu-"))
    parts = {}
    for name in args.parts:
        if not gpu and name not in WITHOUT_GPU:
            print(f"{name}: left out, there is no GPU", flush=True)
            continue
        parts[name] = run_part(name, args, folder)
        print(f"{name}, {parts[name]['seconds']} s: {'; '.join(parts[name]['faults']) or 'nothing found'}", flush=True)
        if gpu:
            write(file, name, parts[name])
    if not gpu:
        print("Not measured on a GPU: with small sizes on a CPU; nothing was written.")
    sys.exit(any(part["faults"] for part in parts.values()))


if __name__ == "__main__":
    main()
