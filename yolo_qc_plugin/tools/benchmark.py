# yolo_qc_plugin, AGPL-3.0
"""Size, accuracy and latency of all that can be exported of a checkpoint and run on this machine, in one table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import TQDM
from ultralytics.utils.checks import check_imgsz

from ..config import QCError
from ..deploy.exported import batched
from ..deploy.exported_qonnx import open_onnx
from ..deploy.litert.exported import litert_obstacle
from ..host import log
from ..host.checkpoints import load_checkpoint
from ..host.exporting import NEEDS
from ..host.record import own_record
from ..quant.inject import remove
from ..quant.layers import quant_convs
from ..report.console import in_short, weights_by_widths
from ..report.pictures import refuse_to_overwrite
from ..report.record import FIGURES, figures_of
from .accuracy import MAIN_FIGURES
from .evaluate import check_data, validate
from .exports import FP32, File, files_of
from .latency import RUNTIMES, TURN, Runtime, cpu_name, integer_convolutions, measure
from .running import computed_by, on_runtime

PACKAGES = ("yolo-qc-plugin", "ultralytics", "torch", "onnxruntime", "openvino", "nncf", "ai-edge-litert")
HEAD = ("runtime", "file", "MB", "figure", "ms", "ratio", "integer convolutions")
WRITTEN = "Written by `yolo-qc benchmark`"  # in each page


def benchmark(
    model: str,
    data: str,
    *,
    float: str | None = None,
    format: str | None = None,
    imgsz: int | Sequence[int] | None = None,
    split: str = "val",
    threads: int | None = None,
    repeats: int = 60,
    out: str | None = None,
) -> dict[str, Any]:
    """Export every kind of a checkpoint that can run here, measure all in each runtime, and write the table.

    Args:
        model: Checkpoint of a quantized model.
        data: Data YAML, as Ultralytics accepts it: for accuracy, and for Ultralytics to calibrate its INT8 on.
        float: Checkpoint that training began with, whose exports by Ultralytics are measured beside. Without it, ratios
            are to the model without its quantizers.
        format: "onnx", "openvino" or "litert": what runs files of this format alone; by default all that is here.
        imgsz: Image side in pixels, or height and width; by default that of training.
        split: "train", "val" or "test", of accuracy.
        threads: Of each runtime; by default as many as there are processors.
        repeats: Calls of each file, at least.
        out: Folder for benchmark.md and benchmark.json; by default qc/ of the run, or that of the checkpoint.

    Returns:
        "model" (in words), "checkpoint", "float", "data", "split", "imgsz" ([height, width]), "threads", "repeats",
        "cpu", "versions", "page" (the file), and "rows", one for each file in each runtime: "runtime", "file", "mb"
        (1e6 bytes), "figure" (mAP50-95, that of masks or keypoints, or top-1, in 0..1), "median", "p10", "p90" (ms of
        an image), "ratio" (to FP32 in the same turns), "integer" ([convolutions that ONNX Runtime computes in integers,
        all]), or "skipped", a reason. What was not measured is missing.

    Raises:
        QCError: If a checkpoint is missing or is not what it should be.
    """
    yolo = load_checkpoint("model", model, quantized=True)
    start = load_checkpoint("float", float, quantized=False) if float else None
    if start and (start.task, start.names) != (yolo.task, yolo.names):
        raise QCError(
            f"QC: float={float} is of another task or other classes than model={model}; give its float start."
        )
    if hasattr(yolo.model, "end2end"):
        yolo.model.end2end = False  # the head that exports have
    for name, count in {"repeats": repeats, "threads": 1 if threads is None else threads}.items():
        if count < 1:
            raise QCError(f"QC: {name}={count} is not accepted; give a whole number of at least 1.")
    runtimes = _runtimes(format)
    check_data(yolo.task, data)
    sides = check_imgsz(imgsz or yolo.overrides.get("imgsz", 640), stride=int(max(yolo.model.stride)), min_dim=2)
    folder = _folder(Path(model), out)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # before what takes minutes
        raise QCError(f"QC: out={folder} cannot be written to; give out= another folder.")
    page = folder / "benchmark.md"
    refuse_to_overwrite([page], WRITTEN, "yolo-qc benchmark")
    result: dict[str, Any] = {
        "model": _described(yolo),
        "checkpoint": model,
        "float": float,
        "data": data,
        "split": split,
        "imgsz": sides,
        "threads": threads or os.cpu_count() or 1,
        "repeats": repeats,
        "cpu": cpu_name(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "page": str(page),
    }
    with tempfile.TemporaryDirectory() as name:
        int8 = {"quantize": 8, "data": data} if float else None
        files = files_of(Path(model), Path(float or _without_quantizers(model, name)), int8)
        result["rows"] = _Rows(yolo, files, runtimes, Path(name), result).all()
    (folder / "benchmark.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    Path(result["page"]).write_text(format_benchmark(result), encoding="utf-8")
    return result


def _runtimes(format: str | None) -> dict[str, Runtime]:
    """Those to measure in, by name."""
    formats = {runtime.stock: runtime.package for runtime in RUNTIMES.values()}
    if format and format not in formats:
        raise QCError(f"QC: format={format} is not accepted; accepted: {', '.join(formats)}.")
    if format and not find_spec(formats[format]):
        raise QCError(f"QC: format={format} needs {formats[format]}; {NEEDS[format][1]}.")
    return {k: r for k, r in RUNTIMES.items() if format in {None, r.stock} and find_spec(r.package)}


def _folder(model: Path, out: str | None) -> Path:
    if out:
        return Path(out)
    return model.parent.parent / "qc" if model.parent.name == "weights" else model.parent


def _described(yolo: YOLO) -> str:
    """A model's architecture, widths and target."""
    layers = [
        {"weights": c.weight.numel(), "weight_bits": c.weight_quant.bits, "act_bits": c.act_quant.bits}
        for _, c in quant_convs(yolo.model)
    ]
    widths = in_short(weights_by_widths(layers))
    target = own_record(yolo.model).config.get("target")
    named = f", target={target}" if target else ""
    return f"{Path(yolo.model.yaml.get('yaml_file', yolo.task)).stem} {widths}{named}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _without_quantizers(model: str, folder: str) -> Path:
    """A float checkpoint of the same shape, for its time: what its weights find means nothing."""
    yolo, file = load_checkpoint("model", model, quantized=True), Path(folder, "float.pt")
    remove(yolo.model)
    yolo.save(file)
    return file


class _Rows:
    """The rows of a table, being measured.

    Args:
        yolo: The quantized model, with whose validation all files are validated.
        files: To be written.
        runtimes: To measure in.
        folder: For the files.
        settings: The result so far.
    """

    def __init__(
        self,
        yolo: YOLO,
        files: Sequence[File],
        runtimes: Mapping[str, Runtime],
        folder: Path,
        settings: dict[str, Any],
    ):
        self.yolo, self.files, self.runtimes, self.folder, self.settings = yolo, files, runtimes, folder, settings

    def all(self) -> list[dict[str, Any]]:
        """The checkpoint's row, and those of each runtime."""
        sides, run = self.settings["imgsz"], [self._files_of(runtime) for runtime in self.runtimes.values()]
        self.files = [f for f in self.files if any(f in files for files in run)]
        total = 1 + len(self.files) + sum(1 + len(files) for files in run)
        with TQDM(total=total) as bar, log.quiet():  # which Ultralytics' own bars obey

            def step(what: str) -> None:
                bar.set_description(what)
                bar.update()

            step("checkpoint: accuracy")
            mb = Path(self.settings["checkpoint"]).stat().st_size / 1e6
            rows = [{"runtime": "PyTorch", "file": "checkpoint", "mb": mb, "figure": self._figure()}]
            for file in self.files:
                step(f"{file.name}, {file.format}: export")
                file.write(self.folder, sides[0] if sides[0] == sides[1] else sides)
            for name, runtime in self.runtimes.items():
                rows += self._of(name, runtime, step)
        return rows

    def _files_of(self, runtime: Runtime) -> list[File]:
        """What a runtime is to run."""
        return [f for f in self.files if f.format == (runtime.format if f.kind else runtime.stock)]

    def _of(self, name: str, runtime: Runtime, step) -> list[dict[str, Any]]:
        """The rows of a runtime."""
        rows, runs = [], {}
        for file in self._files_of(runtime):
            step(f"{file.name}, {name}: accuracy")
            row: dict[str, Any] = {"runtime": name, "file": file.name}
            rows.append(row)
            reason = file.obstacle if file.path is None else _obstacle(file, file.path, runtime.package)
            if file.path is None or reason:
                row["skipped"] = reason
                continue
            row["mb"] = file.mb
            if file.is_timed:
                run = runs[file.name] = runtime.open(file.path, self.settings["threads"])
            else:
                run = open_onnx(file.path).open(runtime.package)
            if self.settings["float"] or file.kind:
                with computed_by(self.yolo.model, on_runtime(batched(run, 1))):
                    row["figure"] = self._figure()
            if name == "ONNX Runtime" and file.is_timed:
                row["integer"] = integer_convolutions(file.path)
        step(f"{name}: time")
        channels = self.yolo.model.yaml.get("channels", 3)
        times = measure(runs, FP32, self.settings["imgsz"], self.settings["repeats"], channels)
        return [{**row, **times.get(row["file"], {})} for row in rows]

    def _figure(self) -> float:
        """The main figure of the task, 0..1, all images padded as for a file of fixed size; its name is noted."""
        given = {key: self.settings[key] for key in ("data", "split", "imgsz")}
        # in this process: converters leave threads, beside which none may fork
        validator = validate(self.yolo, **given, batch=16, device="cpu", rect=False, workers=0)
        found = figures_of(validator.metrics.results_dict)
        name = next(name for name in MAIN_FIGURES if name in found)
        self.settings["figure"] = dict(FIGURES.values())[name]
        return found[name]


def _obstacle(file: File, path: Path, package: str) -> str | None:
    """Why a runtime is not given a file, or None."""
    if not file.kind:
        return None
    return open_onnx(path).obstacle(package) if file.format == "onnx" else litert_obstacle()


def format_benchmark(result: dict[str, Any]) -> str:
    """The result of `benchmark` as a page of Markdown: a table, aligned, and what is not in it and why."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = [result.get("figure", "mAP50-95") if name == "figure" else name for name in HEAD]
    table = [head, *(_cells(row) for row in result["rows"] if "skipped" not in row)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in table]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    size = "x".join(map(str, dict.fromkeys(result["imgsz"])))
    about = (
        f"{WRITTEN}. {result['cpu']}, threads={result['threads']}, one image at a time, at least "
        f"{result['repeats']} calls of each file in turns of {TURN}; median ms [10%, 90%] and the median ratio to FP32 "
        f"in the same turn. {versions}. OpenVINO without f32 computes float layers in BF16 where the processor has it."
    )
    title = f"# {result['model']}, {size} px, on {Path(result['data']).name}"
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "skipped" in row:
            left_out.setdefault((row["file"], row["skipped"]), []).append(row["runtime"])
    if left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {file} ({', '.join(runtimes)}): {reason}" for (file, reason), runtimes in left_out.items()]
    return "\n".join([title, "", about, "", *lines, ""])


def _cells(row: dict[str, Any]) -> list[str]:
    """A row in words."""
    words = {
        "mb": lambda mb: f"{mb:.2f}",
        "figure": lambda figure: f"{100 * figure:.2f}",
        "median": lambda ms: f"{ms:.1f} [{row['p10']:.1f}, {row['p90']:.1f}]",
        "ratio": lambda ratio: f"{ratio:.2f}x",
        "integer": lambda counts: f"{counts[0]} of {counts[1]}",
    }
    cells = ["-" if row.get(key) is None else word(row[key]) for key, word in words.items()]
    return [row["runtime"], row["file"], *cells]
