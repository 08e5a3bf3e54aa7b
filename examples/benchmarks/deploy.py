# yolo_qc_plugin, AGPL-3.0
"""Size and CPU latency of exported models: FP32, Ultralytics' own INT8, and ours in both containers.

    python examples/benchmarks/deploy.py --models yolov5n.yaml yolo11n.yaml --imgsz 320 640

Each model is trained for one epoch on small digits images, in float and with the plugin: latency depends on a model's
shape, not on its weights. Every file is then run in ONNX Runtime and OpenVINO (batch 1, CPU), all in one process, in
turns of a few calls each, so that a slow moment of the machine hits all alike. Writes a JSON file and a Markdown page.

The graph that ONNX Runtime makes of each file is counted too: how many convolutions became integer ones (QLinearConv),
and what the others lack.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
from about import about, versions
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks, choose_onnx_kind, compose
from yolo_qc_plugin.deploy.nodes import links

TURN = 6  # calls of one file before the next one's turn
SETTLE = 4  # calls at the start of a turn that are not counted: the file before left its threads and caches
FILES = ("FP32", "Ultralytics INT8", "ours int8", "ours int4")
# (runtime, precision of the float part); OpenVINO computes float layers in BF16 where the CPU can, unless told
RUNTIMES = {"ONNX Runtime": None, "OpenVINO": None, "OpenVINO, f32": "f32"}


def make_files(model: str, imgsz: int, data: Path, folder: Path) -> dict[str, Path]:
    """The four files of a model at one size."""
    stem = f"{Path(model).stem}-{imgsz}"
    settings = dict(data=str(data), imgsz=64, epochs=1, batch=8, device="cpu", plots=False, verbose=False, workers=0)
    made = {}
    for quantized in (False, True):
        run = folder / f"{Path(model).stem}-{'quantized' if quantized else 'float'}"
        checkpoint = run / "weights" / "best.pt"
        if not checkpoint.exists():
            yolo = YOLO(model)
            if quantized:
                add_qc_callbacks(yolo, bits=4)
            yolo.train(**settings, project=str(folder), name=run.name, exist_ok=True)
        kinds = {"ours int8": "int8", "ours int4": "int4"}
        stock = {"FP32": {}, "Ultralytics INT8": dict(quantize=8, data=str(data))}
        for name, options in (kinds if quantized else stock).items():
            yolo = YOLO(checkpoint)
            if quantized:
                choose_onnx_kind(yolo, options)
            file = yolo.export(format="onnx", imgsz=imgsz, device="cpu", **({} if quantized else options))
            made[name] = folder / f"{stem}-{name.replace(' ', '-')}.onnx"
            Path(file).replace(made[name])
    return {name: made[name] for name in FILES}


def runner(file: Path, runtime: str, image: np.ndarray, threads: int):
    """A function that runs the file once, or None where the runtime cannot."""
    if runtime == "ONNX Runtime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"images": image})
    if "int4" in file.name:
        return None  # OpenVINO 2026.4 crashes on 4-bit activations
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if RUNTIMES[runtime]:
        settings["INFERENCE_PRECISION_HINT"] = RUNTIMES[runtime]
    request = openvino.compile_model(str(file), "CPU", settings).create_infer_request()
    return lambda: request.infer([image])


def measure(files: dict[str, Path], imgsz: int, threads: int, repeats: int) -> dict[str, dict[str, dict]]:
    """Runtime -> file -> median, 10th and 90th percentile of one call in ms, and the ratio to FP32.

    The ratio is the median over all rounds of the ratio within a round, which a machine's slow minutes do not move.
    """
    image = np.random.default_rng(0).random((1, 3, imgsz, imgsz), dtype=np.float32)
    result: dict[str, dict[str, dict]] = {}
    for runtime in RUNTIMES:
        calls = {n: call for n, f in files.items() if (call := runner(f, runtime, image, threads))}
        turns: dict[str, list[list[float]]] = {n: [] for n in calls}
        for _ in range(-(-repeats // TURN)):
            for n, call in calls.items():
                for _ in range(SETTLE):
                    call()
                turns[n].append([])
                for _ in range(TURN):
                    start = time.perf_counter()
                    call()
                    turns[n][-1].append(1e3 * (time.perf_counter() - start))
        base = [statistics.median(turn) for turn in turns["FP32"]]
        result[runtime] = {}
        for n, own in turns.items():
            times = [t for turn in own for t in turn]
            tenths = statistics.quantiles(times, n=10)
            ratio = statistics.median(statistics.median(turn) / b for turn, b in zip(own, base))
            result[runtime][n] = {
                "median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "ratio": ratio
            }  # fmt: skip
    return result


def optimised_convolutions(file: Path, folder: Path) -> dict[str, int]:
    """What ONNX Runtime's optimiser made of the file's convolutions: kind -> count."""
    options, target = onnxruntime.SessionOptions(), folder / "optimised.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(target), 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(target).graph
    sources, _ = links(graph)
    count: Counter = Counter()
    for n in graph.node:
        if n.op_type == "QLinearConv":
            count["integer"] += 1
        elif n.op_type in {"Conv", "FusedConv"}:
            weight = sources.get(n.input[1])
            reason = "output not quantized" if weight is not None else "float weight"
            count[f"float: {reason}"] += 1
    return dict(count)


def page(record: dict) -> str:
    """The record as Markdown."""
    lines = [
        "# Size and latency of exported models",
        "",
        f"Written by `examples/benchmarks/deploy.py`. {record['cpu']}, {record['threads']} threads, batch 1, "
        f"{record['repeats']} calls of each file in turns of {TURN}; median ms [10%, 90%] and median ratio to FP32 in "
        f"the same round. {versions(record)}.",
        "",
        "OpenVINO without f32 computes float layers in BF16 where the CPU has it. Version 2026.4 crashes on 4-bit",
        "activations, so the int4 file is not run there.",
        "",
    ]
    for r in record["results"]:
        lines += [f"## {Path(r['model']).stem}, {r['imgsz']} px", ""]
        lines += ["| file | MB | " + " | ".join(RUNTIMES) + " | convolutions in ONNX Runtime |"]
        lines += ["|" + "---|" * (3 + len(RUNTIMES))]
        for name in FILES:
            cells = []
            for runtime in RUNTIMES:
                t = r["ms"][runtime].get(name)
                cells.append(f"{t['median']:.1f} [{t['p10']:.1f}, {t['p90']:.1f}] {t['ratio']:.2f}x" if t else "-")
            kinds = ", ".join(f"{v} {k}" for k, v in sorted(r["convolutions"][name].items(), reverse=True))
            lines.append(f"| {name} | {r['mb'][name]:.2f} | {' | '.join(cells)} | {kinds} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["yolov5n.yaml", "yolo11n.yaml"])
    p.add_argument("--imgsz", type=int, nargs="+", default=[320, 640])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--repeats", type=int, default=240)
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--work", type=Path, help="folder for the files made (a temporary one)")
    p.add_argument("--prepare", action="store_true", help="make the files in --work and stop")
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "deploy.json"
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        data = compose(work / "digits", train=16, val=8, imgsz=64, seed=0)
        cases = []
        for model in args.models:
            for imgsz in args.imgsz:
                made = {n: work / f"{Path(model).stem}-{imgsz}-{n.replace(' ', '-')}.onnx" for n in FILES}
                ready = all(f.exists() for f in made.values())
                cases.append((model, imgsz, made if ready else make_files(model, imgsz, data, work)))
        if args.prepare:
            return
        results = []
        for model, imgsz, files in cases:
            case = {"model": model, "imgsz": imgsz, "mb": {n: f.stat().st_size / 1e6 for n, f in files.items()}}
            case["convolutions"] = {n: optimised_convolutions(f, work) for n, f in files.items()}
            case["ms"] = measure(files, imgsz, args.threads, args.repeats)
            results.append(case)
    record = {**about(), "threads": args.threads, "repeats": args.repeats, "results": results}
    record["versions"] |= {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
    file.write_text(json.dumps(record, indent=1))
    file.with_suffix(".md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
