# yolo_qc_plugin, AGPL-3.0
"""How long exported files take on the CPU of this machine, in turns, and as shares of one of them.

All files of a runtime are run in one process, in turns of a few calls each, so that a slow moment of the machine hits
all alike; ratios are taken within a turn.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..deploy.exported import Run
from ..deploy.litert.exported import LITERT_RUNTIMES, in_pixels, litert_metadata, litert_session

TURN = 6  # calls of one file before the next one's turn
SETTLE = 4  # calls at the start of a turn that are not counted: the file before left its threads and caches


@dataclass(frozen=True)
class Runtime:
    """Something that runs files here.

    Attributes:
        stock: Format of `yolo export`, of those of Ultralytics' own files that it runs.
        format: That of ours.
        package: Without which it is not here.
        open: File and number of threads -> images to outputs.
    """

    stock: str
    format: str
    package: str
    open: Callable[[Path, int], Run]


def _onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def _openvino(file: Path, threads: int, precision: str = "") -> Run:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    file = next(file.glob("*.xml")) if file.is_dir() else file
    request = openvino.compile_model(str(file), "CPU", settings).create_infer_request()
    return lambda images: [np.array(v) for v in request.infer([images]).to_tuple()]


def _litert(file: Path, threads: int) -> Run:
    run, about = litert_session(file.read_bytes(), LITERT_RUNTIMES[0], threads), litert_metadata(file)
    # Ultralytics' own files of segmentation can have the prototypes, of four axes, before the boxes
    return lambda images: in_pixels(sorted(run(images), key=np.ndim), about, *images.shape[2:])


# OpenVINO computes float layers in BF16 where the processor can, unless told otherwise
RUNTIMES = {
    "ONNX Runtime": Runtime("onnx", "onnx", "onnxruntime", _onnxruntime),
    "OpenVINO": Runtime("openvino", "onnx", "openvino", _openvino),
    "OpenVINO, f32": Runtime("openvino", "onnx", "openvino", partial(_openvino, precision="f32")),
    "LiteRT": Runtime("litert", "litert", "ai_edge_litert", _litert),
}


def measure(
    runs: Mapping[str, Run],
    base: str,
    sides: Sequence[int],
    repeats: int,
    channels: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float | None]]:
    """Time files in turns.

    Args:
        runs: Of each file.
        base: The file by whose time the others' are divided, if it is among them.
        sides: Height and width in pixels.
        repeats: Calls of each file, at least.
        channels: Of an image.
        clock: Seconds; `time.process_time` counts the processor's time alone.

    Returns:
        File -> "median", "p10" and "p90" of one call in ms, and "ratio", the median over all turns of the ratio within
        a turn, which a machine's slow minutes do not move, or None.
    """
    image = np.random.default_rng(0).random((1, channels, *sides), dtype=np.float32)
    turns: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(-(-repeats // TURN)):
        for name, run in runs.items():
            for _ in range(SETTLE):
                run(image)
            turns[name].append([])
            for _ in range(TURN):
                start = clock()
                run(image)
                turns[name][-1].append(1e3 * (clock() - start))
    of_base = [statistics.median(turn) for turn in turns.get(base, [])]
    found: dict[str, dict[str, float | None]] = {}
    for name, own in turns.items():
        times = [t for turn in own for t in turn]
        tenths = statistics.quantiles(times, n=10)
        ratios = [statistics.median(turn) / b for turn, b in zip(own, of_base)]
        ratio = statistics.median(ratios) if ratios else None
        found[name] = {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "ratio": ratio}
    return found


def integer_convolutions(file: Path) -> tuple[int, int]:
    """How many of an ONNX file's convolutions ONNX Runtime's optimiser made integer ones, and of how many."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        ops = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    integer = ops.count("QLinearConv")
    return integer, integer + ops.count("Conv") + ops.count("FusedConv")


def cpu_name() -> str:
    """The processor's name as the system tells it, and whether it has 8-bit dot products."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
        return name + (" (VNNI)" if "vnni" in info else " (no VNNI)")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
