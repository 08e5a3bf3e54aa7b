# yolo_qc_plugin, AGPL-3.0
"""Measure methods and defaults: every cell is one stock training run, written to one JSON file.

    python examples/experiments.py table    --data bccd.yaml --weights float.pt --seeds 0 1 2 --epochs 8
    python examples/experiments.py defaults --data bccd.yaml --weights float.pt --seeds 0 --epochs 8

`table` trains the float checkpoint on (the float row), plain LSQ (ema_decay=0) and LSQ with EMA, at 4 and 3 bits; each
quantized run gives two rows, before and after QC. `defaults` changes one default at a time. Cells that have a JSON file
are not run again. `--jobs` runs cells side by side, sharing the cores. The Markdown page is made from the JSON files
alone, by `--assemble` without training.

Only the last epoch is validated (val=False), so no epoch is chosen by the validation set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPE = {
    "optimizer": "Adam",
    "lr0": 1e-3,
    "lrf": 0.01,
    "nbs": 16,
    "batch": 16,
    "warmup_epochs": 1,
    "warmup_bias_lr": 0.0,  # the host's 0.1 is meant for SGD from scratch
    "val": False,
    "plots": False,
    "device": "cpu",
}

TABLE = {"float": None} | {
    f"{method}-{bits}bit": {"bits": bits, "ema_decay": decay}
    for bits in (4, 3)
    for method, decay in (("LSQ", 0.0), ("EMA", None))  # None: the default decay
}

# one default changed at a time, at 3 bits, where choices matter more than noise; the base is what the defaults were
# before the page was made, and outputs stay float, so that the page shows training alone
BASE = {"bits": 3, "scale_init": "mse", "output_bits": None}
DEFAULTS = {
    "base": {},
    "act_offset=False": {"act_offset": False},
    "per_channel=True": {"per_channel": True},
    "scale_init=lsq": {"scale_init": "lsq"},
    "scale_lr=0.1": {"scale_lr": 0.1},
    "scale_lr=10": {"scale_lr": 10.0},
    "ema_decay=0": {"ema_decay": 0.0},
    "ema_decay=0.9": {"ema_decay": 0.9},
    "correction_lr=0.003": {"correction_lr": 0.003},
    "correction_lr=0.01": {"correction_lr": 0.01},
    "4bit scale_init=lsq": {"bits": 4, "scale_init": "lsq", "output_bits": 8},  # beside EMA-4bit of the other table
}


def cells(kind: str) -> dict[str, dict | None]:
    """Name -> plugin options of each cell, None for float training."""
    if kind == "table":
        return {k: v and {n: x for n, x in v.items() if x is not None} for k, v in TABLE.items()}
    return {k: {**BASE, **v} for k, v in DEFAULTS.items()}


def run_cell(options: dict | None, seed: int, args: argparse.Namespace, target: Path) -> None:
    """Train one cell in this process and write its JSON."""
    import torch
    import ultralytics
    from ultralytics import YOLO

    from yolo_qc_plugin import __version__, add_qc_callbacks

    torch.set_num_threads(args.threads)
    began = time.time()
    model = YOLO(args.weights)
    if options is not None:
        add_qc_callbacks(model, **options)
    recipe = {**RECIPE, "epochs": args.epochs, "imgsz": args.imgsz, "seed": seed}
    metrics = model.train(data=args.data, project=str(args.runs), name=target.stem, exist_ok=True, **recipe)
    result = {
        "options": options,
        "seed": seed,
        "recipe": recipe,
        "weights": Path(args.weights).name,
        "data": Path(args.data).name,
        "seconds": round(time.time() - began, 1),
        "versions": {"yolo_qc_plugin": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__},
    }
    if options is None:
        result["metrics"] = {"trained": {"map50_95": float(metrics.box.map), "map50": float(metrics.box.map50)}}
    else:
        report = json.loads((Path(model.trainer.save_dir) / "qc" / "report.json").read_text())
        result |= {"config": report["config"], "metrics": report["metrics"], "kept": report["kept"]}
    target.write_text(json.dumps(result, indent=1))


def run_all(kind: str, args: argparse.Namespace) -> None:
    """Run every cell without a JSON file, `--jobs` at a time, seeds outermost so that a part is a whole table."""
    folder = args.out / kind
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in args.seeds for name in cells(kind) if not args.only or name in args.only]
    missing = [(n, s) for n, s in wanted if not (folder / f"{n}-seed{s}.json").exists()]

    def spawn(cell: tuple[str, int]) -> None:
        name, seed = cell
        target = folder / f"{name}-seed{seed}.json"
        command = [sys.executable, __file__, kind, "--cell", name, "--target", str(target), "--seeds", str(seed)]
        for key in ("data", "weights", "epochs", "imgsz", "threads", "runs"):
            command += [f"--{key}", str(getattr(args, key))]
        log = args.runs / f"{kind}-{name}-seed{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        with log.open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
        print(f"{name} seed {seed}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(spawn, missing))


def rows(kind: str, folder: Path) -> dict[str, list[dict]]:
    """Row label -> metrics of each seed, from the JSON files, in the order of the cells."""
    table: dict[str, list[dict]] = {}
    for name in cells(kind):
        for path in sorted(folder.glob(f"{name}-seed*.json")):
            metrics = json.loads(path.read_text())["metrics"]
            if "trained" in metrics:
                table.setdefault("float trained on", []).append(metrics["trained"])
                continue
            table.setdefault(name, []).append(metrics["qat"])
            if metrics["qc"]:
                table.setdefault(f"{name} + QC", []).append(metrics["qc"])
    return table


def assemble(kind: str, folder: Path) -> str:
    """The Markdown table: mean and spread (smallest to largest) over seeds, in points."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return ""
    one = json.loads(files[0].read_text())
    recipe = ", ".join(f"{k}={v}" for k, v in one["recipe"].items() if k != "seed")
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
    lines = [
        f"# {kind.capitalize()}: {one['weights']} on {one['data']}",
        "",
        f"Written by `examples/experiments.py {kind}` from the JSON files in `{folder.name}/`. {versions}.",
        f"Recipe of every row: {recipe}. mAP in points on the validation set, mean [smallest, largest] over seeds.",
        "",
        "| row | seeds | mAP50-95 | mAP50 |",
        "|---|---|---|---|",
    ]
    for label, values in rows(kind, folder).items():
        cols = []
        for key in ("map50_95", "map50"):
            v = [100 * m[key] for m in values]
            cols.append(f"{statistics.mean(v):.1f} [{min(v):.1f}, {max(v):.1f}]")
        lines.append(f"| {label} | {len(values)} | {' | '.join(cols)} |")
    if kind == "table":
        lines += ["", *orderings(folder), "", *output_cost(folder), "", *sharing_cost(folder)]
    return "\n".join(lines) + "\n"


def orderings(folder: Path) -> list[str]:
    """The paper's orderings, seed by seed: differences of mAP50-95 in points, and how many seeds agree.

    A difference is called noise where its seeds disagree in sign or its mean is under half a point, which is what 72
    validation images leave uncertain.
    """
    table = rows("table", folder)
    pairs = []
    for bits in (4, 3):
        lsq, ema = f"LSQ-{bits}bit", f"EMA-{bits}bit"
        pairs += [(ema, lsq), (f"{lsq} + QC", lsq), (f"{ema} + QC", ema), (f"{ema} + QC", f"{lsq} + QC")]
    lines = ["The paper's orderings (first above second), differences of mAP50-95 in points:", ""]
    lines += ["| first | second | by seed | mean | reading |", "|---|---|---|---|---|"]
    for first, second in pairs:
        if not (table.get(first) and table.get(second)):
            continue
        d = [100 * (a["map50_95"] - b["map50_95"]) for a, b in zip(table[first], table[second])]
        mean = statistics.mean(d)
        same_sign = all(x > 0 for x in d) or all(x < 0 for x in d)
        reading = "noise" if not same_sign or abs(mean) < 0.5 else ("holds" if mean > 0 else "reversed")
        lines.append(f"| {first} | {second} | {', '.join(f'{x:+.1f}' for x in d)} | {mean:+.1f} | {reading} |")
    return lines


def output_cost(folder: Path) -> list[str]:
    """What 8-bit outputs of the convolutions, which integer kernels need, cost before the correction."""
    runs = [json.loads(path.read_text())["metrics"] for path in sorted(folder.glob("*.json"))]
    costs = [100 * (m["qat"]["map50_95"] - m["float_outputs"]["map50_95"]) for m in runs if "float_outputs" in m]
    return mean_line("8-bit outputs against float outputs after QAT", costs)


def sharing_cost(folder: Path) -> list[str]:
    """What one quantizer for all convolutions that read a tensor costs in QAT, against runs with one for each."""
    costs = []
    for path in sorted(folder.with_name("table-unshared").glob("*.json")):
        if (folder / path.name).exists():
            now, before = (json.loads(p.read_text())["metrics"]["float_outputs"] for p in (folder / path.name, path))
            costs.append(100 * (now["map50_95"] - before["map50_95"]))
    return mean_line("Shared quantizers against one for each convolution (`table-unshared/`), float outputs", costs)


def mean_line(what: str, points: list[float]) -> list[str]:
    """A line on the mean of differences in points, or none where there are too few."""
    if len(points) < 2:
        return []
    spread = statistics.stdev(points)
    return [
        f"{what}, over {len(points)} runs: mean {statistics.mean(points):+.2f} points, deviation {spread:.2f}, "
        f"standard error of the mean {spread / len(points) ** 0.5:.2f}."
    ]


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=("table", "defaults"))
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--weights", help="float checkpoint")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--jobs", type=int, default=1, help="cells side by side")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each cell")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    p.add_argument("--only", nargs="+", help="names of the cells to run")
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON files, without training")
    p.add_argument("--cell", help=argparse.SUPPRESS)
    p.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.runs = args.runs.resolve()
    if args.cell:
        return run_cell(cells(args.kind)[args.cell], args.seeds[0], args, args.target)
    if not args.assemble:
        if not (args.data and args.weights):
            p.error("--data and --weights are needed to train")
        run_all(args.kind, args)
    page = assemble(args.kind, args.out / args.kind)
    (args.out / f"{args.kind}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
