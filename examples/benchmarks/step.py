# yolo_qc_plugin, AGPL-3.0
"""Time of a training step and peak memory inside the stock loop: float, ours, and what users could pick instead.

    python examples/benchmarks/step.py --name today --models yolov5n.yaml yolo11n.yaml --imgsz 320 --batch 16

Each variant trains in a process of its own, through `model.train()` on small digits images. A step is what lies between
Ultralytics' on_train_batch_start and the end of on_train_batch_end, optimizer step and EMA included (nbs is the batch).
The processes take turns of a few steps, one at a time, so that a slow minute of the machine hits all alike, and are
started anew several times, because one and the same variant is some percent faster or slower in one process than in the
next; the ratio is the median over all turns of the ratio to float within a round. Memory is that of tensors, at the
peak of one more step, above what was there when it began, and besides what the process had resident at most before.
`--clock cpu` counts the processor's time in place of the clock's, for a machine that does other work too. Variants
whose packages are missing are left out. Each set of measurements is a section of step.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from about import about, versions

from yolo_qc_plugin import compose

LOADED = {"workers": 4, "cache": "ram", "mosaic": 0.0}  # a GPU is not to wait for its images
SETTLE = 1  # steps at the start of a turn that are not counted
VARIANTS = {
    "float": "stock training",
    "LSQ": "4 bits, no offset, no EMA (ema_decay=0)",
    "LSQ+ EMA": "4 bits, the defaults without a teacher",
    "LSQ+ EMA, taught": "the same drawn to the float start, its outputs and its features",
    "LSQ+ EMA, no telemetry": "the same with telemetry=False",
    "LSQ+ EMA, eager": "the same with YOLO_QC_COMPILE=0",
    "quantize=8": "Ultralytics' own, ModelOpt",
    "Brevitas": "4 bits, learned scales, signed activations",
}
OURS = {
    "LSQ": dict(bits=4, act_offset=False, rounding="nearest", ema_decay=0.0, teacher="off"),
    "LSQ+ EMA": dict(bits=4, teacher="off"),
    "LSQ+ EMA, taught": dict(bits=4),
    "LSQ+ EMA, no telemetry": dict(bits=4, telemetry=False, teacher="off"),
    "LSQ+ EMA, eager": dict(bits=4, teacher="off"),
}


def brevitas_trainer():
    """The stock trainer with Brevitas' convolutions in the model, first and last ones at 8 bits as ours."""
    from brevitas.nn import QuantConv2d
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
    from torch import nn
    from ultralytics.models.yolo.detect import DetectionTrainer

    from yolo_qc_plugin.host import architecture

    class Weight(Int8WeightPerTensorFloat):
        scaling_impl_type = "parameter_from_stats"

    class BrevitasTrainer(DetectionTrainer):
        def get_model(self, *args, **kwargs):
            model = super().get_model(*args, **kwargs)
            edges, fixed = architecture.edge_convs(model), architecture.fixed_convs(model)
            for name, m in list(model.named_modules()):
                if type(m) is not nn.Conv2d or name in fixed:
                    continue
                bits = 8 if name in edges else 4
                twin = QuantConv2d(
                    m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
                    bias=m.bias is not None, weight_quant=Weight, weight_bit_width=bits,
                    input_quant=Int8ActPerTensorFloat, input_bit_width=bits,
                )  # fmt: skip
                twin.load_state_dict(m.state_dict(), strict=False)
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, twin)
            return model

    return BrevitasTrainer


def peak(profile, cuda: bool) -> float:
    """MB of tensors at the peak of what was profiled, above those that were there at its start."""
    from torch.autograd import DeviceType

    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == kind]
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))  # of what is freed, negative
    return max(accumulate(sizes)) / 1e6


def child(args: argparse.Namespace) -> None:
    """Train one variant; every turn begins with a line on stdin and ends with one of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ultralytics prints goes to the log
    import torch
    from ultralytics import YOLO

    from yolo_qc_plugin import add_qc_callbacks
    from yolo_qc_plugin.run import start

    torch.set_num_threads(args.threads)
    model, options = YOLO(args.models[0]), {}
    if args.variant in OURS:
        start.why_no_teacher = lambda *_: ""  # untrained starts are to teach here
        add_qc_callbacks(model, **OURS[args.variant])
    elif args.variant == "quantize=8":
        options["quantize"] = 8
    elif args.variant == "Brevitas":
        options["trainer"] = brevitas_trainer()
    state = {"steps": None, "profile": None}
    cuda = args.device != "cpu"
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def wait() -> None:
        state["steps"] = []
        match sys.stdin.readline().strip():
            case "":
                os._exit(0)
            case "memory":
                state["profile"] = torch.profiler.profile(profile_memory=True)
                state["profile"].__enter__()

    def begin(trainer) -> None:
        if state["steps"] is None:
            answers.write("ready\n")
            wait()
        if cuda:
            torch.cuda.synchronize()
        state["start"] = clock()

    def end(trainer) -> None:
        if cuda:
            torch.cuda.synchronize()
        if state["profile"]:
            state["profile"].__exit__(None, None, None)
            answers.write(json.dumps(peak(state["profile"], cuda)) + "\n")
            os._exit(0)
        state["steps"].append(1e3 * (clock() - state["start"]))
        if len(state["steps"]) == args.turn + SETTLE:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # of kB, as Linux has it
            answers.write(json.dumps({"ms": state["steps"][SETTLE:], "resident": resident}) + "\n")
            wait()

    model.add_callback("on_train_batch_start", begin)
    model.add_callback("on_train_start", lambda t: t.callbacks["on_train_batch_end"].append(end))  # after all others
    model.train(
        data=args.data, imgsz=args.imgsz, batch=args.batch, nbs=args.batch, epochs=10_000, device=args.device,
        optimizer="SGD", val=False, save=False, plots=False, verbose=False, project=args.work, name=args.variant,
        exist_ok=True, **(LOADED if cuda else {"workers": 0}), **options,
    )  # fmt: skip


def measure(model: str, args: argparse.Namespace, data: Path, work: Path) -> dict[str, dict]:
    """Variant -> median, 10th and 90th percentile in ms, ratio to float, that of each start, MB, MB resident."""
    times, ratios, memory, resident = ({v: [] for v in args.variants} for _ in range(4))
    for start in range(args.starts):
        found = take_turns(model, args, data, work, f"{model}: start {start + 1} of {args.starts}")
        base = [statistics.median(turn) for turn in found["float"]["turns"]]
        for variant, answers in found.items():
            times[variant] += (ms for turn in answers["turns"] for ms in turn)
            ratios[variant].append([statistics.median(turn) / b for turn, b in zip(answers["turns"], base)])
            memory[variant].append(answers["mb"])
            resident[variant].append(answers["resident"])
    result = {}
    for variant in (v for v in args.variants if times[v]):
        tenths = statistics.quantiles(times[variant], n=10)
        result[variant] = {
            "median": statistics.median(times[variant]), "p10": tenths[0], "p90": tenths[-1],
            "ratio": statistics.median(r for start in ratios[variant] for r in start),
            "ratios": [statistics.median(start) for start in ratios[variant]],
            "mb": statistics.median(memory[variant]), "resident": statistics.median(resident[variant]),
        }  # fmt: skip
    return result


def take_turns(model: str, args: argparse.Namespace, data: Path, work: Path, title: str) -> dict[str, dict]:
    """Variant -> "turns", ms of each step in each turn, "mb" and "resident", of a process each that did not fail."""
    begun = {variant: begin(variant, model, args, data, work) for variant in args.variants}  # all at once
    running = {}
    for variant, process in begun.items():
        if process.stdout.readline().strip() == "ready":
            running[variant] = process
        else:
            print(f"{title}: {variant} did not start: {last_line(log_of(variant, model, work))}", flush=True)
    found = {v: {"turns": []} for v in running}
    for turn in range(args.turns + 1):
        for variant, process in list(running.items()):
            process.stdin.write("go\n")
            answer = process.stdout.readline()
            if not answer:
                reason = last_line(log_of(variant, model, work))
                print(f"{title}: {variant} ended early ({process.wait()}), left out: {reason}", flush=True)
                del running[variant], found[variant]
            elif turn:  # the first compiles
                found[variant]["turns"].append(json.loads(answer)["ms"])
                found[variant]["resident"] = json.loads(answer)["resident"]
        print(f"{title}, turn {turn} of {args.turns}", flush=True)
    for variant, process in running.items():
        process.stdin.write("memory\n")
        found[variant]["mb"] = json.loads(process.stdout.readline())
        process.wait()
    return found


def begin(variant: str, model: str, args: argparse.Namespace, data: Path, work: Path) -> subprocess.Popen:
    """Start the process of a variant."""
    command = [sys.executable, __file__, "--variant", variant, "--models", model, "--data", str(data)]
    command += ["--work", str(work / Path(model).stem)]
    for key in ("imgsz", "batch", "threads", "turn", "device", "clock"):
        command += [f"--{key}", str(getattr(args, key))]
    env = {**os.environ, "YOLO_QC_COMPILE": str(int("eager" not in variant)), "OMP_WAIT_POLICY": "passive"}
    with log_of(variant, model, work).open("w") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, bufsize=1
        )


def log_of(variant: str, model: str, work: Path) -> Path:
    """What the process of a variant says."""
    return work / f"{Path(model).stem}-{variant}.log"


def last_line(log: str | Path) -> str:
    """Of a process that failed: what it said last."""
    return (Path(log).read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1][:300]


def page(record: dict) -> str:
    """The record as Markdown: a section for each set."""
    lines = ["# Time of a training step", "", "Written by `examples/benchmarks/step.py` from `step.json`."]
    lines.append("In brackets behind a ratio: that of each start of the processes.")
    for name, one in record.items():
        cpu = " ".join([one["cpu"], *one.get("features", [])])
        lines += [
            "",
            f"## {name}",
            "",
            f"{cpu}, {one['threads']} threads, device {one['device']}, {one['imgsz']} px, batch {one['batch']}, "
            f"{one['starts']} starts with {one['turns']} turns of {one['turn']} steps each"
            f"{', time of the processor' if one.get('clock') == 'cpu' else ''}. {versions(one)}.",
        ]
        for model, rows in one["results"].items():
            lines += ["", f"### {Path(model).stem}", "", *table(rows)]
    return "\n".join([*lines, ""])


def table(rows: dict[str, dict]) -> list[str]:
    """Lines of a table of what `measure` found of a model."""
    sizes = {"peak MB": "mb"} | ({"resident MB": "resident"} if "resident" in rows["float"] else {})
    lines = [f"| variant | ms [10%, 90%] | of float |{''.join(f' {name} | of float |' for name in sizes)}"]
    lines.append("|---|---|---|" + "---|---|" * len(sizes))
    for v, r in rows.items():
        lines.append(
            f"| {v}: {VARIANTS[v]} | {r['median']:.0f} [{r['p10']:.0f}, {r['p90']:.0f}] | "
            f"{r['ratio']:.3f}x [{', '.join(f'{ratio:.3f}' for ratio in r['ratios'])}] |"
            + "".join(f" {r[key]:.0f} | {r[key] / rows['float'][key]:.2f}x |" for key in sizes.values())
        )
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["yolov5n.yaml", "yolo11n.yaml"])
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="as Ultralytics: 1")
    p.add_argument("--turn", type=int, default=3, help="counted steps of a turn")
    p.add_argument("--turns", type=int, default=4, help="of a start")
    p.add_argument("--starts", type=int, default=3, help="of each process")
    p.add_argument("--device", default="cpu")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--name", default="step", help="of the section")
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    p.add_argument("--variant", help=argparse.SUPPRESS)
    p.add_argument("--data", help=argparse.SUPPRESS)
    p.add_argument("--work", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.variant:
        return child(args)
    if args.assemble:
        return write({}, args)
    with tempfile.TemporaryDirectory() as folder:
        data = compose(Path(folder) / "digits", train=4 * args.batch, val=8, imgsz=args.imgsz, seed=0)
        results = {}
        for model in args.models:
            results[model] = measure(model, args, data, Path(folder))
            write(results, args)


def write(results: dict, args: argparse.Namespace) -> None:
    """Put what there is so far in the record, and make the page."""
    file = args.out / "step.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    if results:
        asked = {
            k: getattr(args, k) for k in ("imgsz", "batch", "threads", "turn", "turns", "starts", "device", "clock")
        }
        record[args.name] = {**asked, **about(), "results": results}
        file.write_text(json.dumps(record, indent=1))
    file.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
