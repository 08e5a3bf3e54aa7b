# yolo_qc_plugin, AGPL-3.0
"""The table of all exports: what it measures, what it leaves out and why, what it refuses before any work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import FLOAT, TINY
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.deploy.litert.graph import LITERT_KINDS
from yolo_qc_plugin.tools import exports
from yolo_qc_plugin.tools.benchmark import benchmark, format_benchmark
from yolo_qc_plugin.tools.latency import SETTLE, TURN, measure

pytest.importorskip("onnxruntime", reason="needs the extra export")
pytestmark = pytest.mark.usefixtures("small_files")

FINDS = 0.05  # mAP50-95 of a model that finds digits
SAME = 0.01  # of mAP50-95 between a checkpoint and its files, on eight images


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run of one short epoch that finds digits, and the float model that it began with."""
    folder = tmp_path_factory.mktemp("benchmarked")
    start = folder / "start.pt"
    shutil.copy(FLOAT, start)
    model = YOLO(start)
    add_qc_callbacks(model, weight_bits=4, act_bits=8, budget=None)
    options = {**TINY, "nbs": 8, "optimizer": "Adam", "lr0": 1e-3, "mosaic": 0.0}
    model.train(data=str(digits), project=str(folder), name="run", **options)
    return folder / "run", start


# Ultralytics' own LiteRT and its INT8 for OpenVINO take a minute, and packages that a test environment need not have;
# files of less than 0.1 MB it takes for broken ones.
PROGRAM = """
import sys
from ultralytics.engine import exporter
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.tools import exports
find = exports.find_spec
exports.find_spec = lambda name: None if name in {"litert_torch", "nncf"} else find(name)
size = exporter.file_size
exporter.file_size = lambda path: max(0.2, size(path))
sys.exit(main(["benchmark", *sys.argv[1:]]))
"""


def program(*keys):
    """What the command prints; in a process of its own: runtimes leave threads, and later tests fork."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *keys], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kind_is_in_the_table(run, digits):
    folder, start = run
    given = [f"model={folder / 'weights' / 'best.pt'}", f"data={digits}", f"float={start}", "repeats=6", "threads=1"]
    told = program(*given)
    result = json.loads((folder / "qc" / "benchmark.json").read_text())
    page = (folder / "qc" / "benchmark.md").read_text()
    assert told.endswith(page + "\n")
    rows = {(row["runtime"], row["file"]): row for row in result["rows"]}
    assert result["figure"] == "mAP50-95"
    assert result["imgsz"] == [64, 64] and page.startswith("# tiny W4A8, 64 px, on digits.yaml\n")
    assert all(f"| {runtime}" in page for runtime, _ in rows)
    expected = rows["PyTorch", "checkpoint"]["figure"]
    assert expected > FINDS
    ours = {key: row for key, row in rows.items() if key[1].startswith("ours") and "skipped" not in row}
    here = {name for runtime, name in ours if runtime == "ONNX Runtime"}
    assert here == {"ours packed", "ours int8", "ours int4", "ours qonnx"}
    qonnx = ours.pop(("ONNX Runtime", "ours qonnx"))  # of which ONNX Runtime computes what it means
    assert abs(qonnx["figure"] - expected) < SAME and not {"median", "ratio", "integer"} & qonnx.keys()
    if ("OpenVINO", "ours qonnx") in rows:
        assert rows["OpenVINO", "ours qonnx"]["skipped"] == "not tried: made for FINN and hls4ml"
    assert rows["ONNX Runtime", "ours tensorrt"]["skipped"].startswith("QC: TensorRT takes INT8 codes")
    for (runtime, name), row in ours.items():
        same = SAME if runtime != "OpenVINO" else 3 * SAME  # which computes edges of 8 bits in BF16 where it can
        assert abs(row["figure"] - expected) < same and 0 < row["p10"] <= row["median"] <= row["p90"], (runtime, name)
        assert row["mb"] < rows["ONNX Runtime", "FP32"]["mb"]
    assert rows["ONNX Runtime", "FP32"]["ratio"] == 1 and rows["ONNX Runtime", "FP32"]["integer"][0] == 0
    for kind in ("ours packed", "ours int8"):
        integer, convolutions = rows["ONNX Runtime", kind]["integer"]
        assert convolutions / 2 < integer < convolutions
    assert rows["ONNX Runtime", "ours packed"]["mb"] < rows["ONNX Runtime", "ours int8"]["mb"]
    assert rows["ONNX Runtime", "FP32"]["figure"] != expected
    assert "figure" in rows["ONNX Runtime", "Ultralytics INT8"]
    if ("OpenVINO", "FP32") in rows:
        assert rows["OpenVINO, f32", "FP32"]["figure"] == pytest.approx(
            rows["ONNX Runtime", "FP32"]["figure"], abs=SAME
        )
        assert rows["OpenVINO, f32", "FP32"]["ratio"] == 1 and rows["OpenVINO", "FP32"]["mb"] > 0.1
        assert rows["OpenVINO", "Ultralytics INT8"]["skipped"] == "needs nncf"  # which Ultralytics quantizes by
    assert rows["ONNX Runtime", "ours openvino"]["skipped"].startswith("QC: onnx='openvino' is for a model whose SiLU")


def test_litert_files_are_in_the_table(run, digits, tmp_path):
    """Without Ultralytics' converter there is no FP32 to compare with, and the reason is told."""
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    given = [f"model={run[0] / 'weights' / 'best.pt'}", f"data={digits}", "repeats=6", f"out={tmp_path / 'new'}"]
    program(*given, "format=litert")
    result = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    rows = {row["file"]: row for row in result["rows"] if row["runtime"] == "LiteRT"}
    reason = rows["FP32"]["skipped"]
    assert reason == "needs litert_torch" and reason in (tmp_path / "new" / "benchmark.md").read_text()
    assert all(rows[f"ours {k}"]["figure"] > FINDS and rows[f"ours {k}"]["ratio"] is None for k in LITERT_KINDS)
    assert rows["ours int4"]["mb"] < rows["ours int8"]["mb"]
    assert {row["runtime"] for row in result["rows"]} == {"PyTorch", "LiteRT"}


def test_a_file_that_cannot_be_written_is_a_row(run, digits, tmp_path, monkeypatch):
    """Its reason is one line, and the others are measured."""

    def refuse(self, **arguments):
        if arguments["format"] == "onnx" and arguments.get("quantize") is None and "ours" in str(self.ckpt_path):
            raise RuntimeError("no\nmore than this")
        return export(self, **arguments)

    export, level = YOLO.export, LOGGER.level
    monkeypatch.setattr(YOLO, "export", refuse)
    result = benchmark(str(run[0] / "weights" / "best.pt"), str(digits), format="onnx", repeats=6, out=str(tmp_path))
    rows = {row["file"]: row for row in result["rows"]}
    assert rows["ours int8"] == {"runtime": "ONNX Runtime", "file": "ours int8", "skipped": "no"}
    assert rows["FP32"]["median"] > 0 and "figure" not in rows["FP32"]  # a float start was not given
    assert rows["FP32"]["ratio"] == 1 and "Ultralytics INT8" not in rows and LOGGER.level == level


@pytest.mark.parametrize("change,message", [
    (dict(model="none.pt"), "model=none.pt does not exist"),
    (dict(model="start"), "is not quantized; accepted: checkpoints trained with callbacks=qc"),
    (dict(model="fused.pt"), "fused.pt was fused when it was saved; accepted: a run's best.pt, last.pt or qat.pt"),
    (dict(float="fused.pt"), "fused.pt is quantized; accepted: float checkpoints"),
    (dict(model="torn.pt"), "torn.pt cannot be read as a checkpoint"),
    (dict(float="best"), "is quantized; accepted: float checkpoints"),
    (dict(float="yolov5n.yaml"), "float=yolov5n.yaml is of another task or other classes than model="),
    (dict(data="none.yaml"), "none.yaml"),
    (dict(out="closed"), "out=closed cannot be written to"),
    (dict(out="mine"), "benchmark.md was not made by yolo-qc benchmark"),
    (dict(repeats=0), "repeats=0 is not accepted"),
    (dict(format="engine"), "format=engine is not accepted; accepted: onnx, openvino, litert."),
    (dict(threads=0), "threads=0 is not accepted"),
    (dict(data="."), "data=. is a folder; give a data YAML"),
], ids=str)  # fmt: skip
def test_refusals_take_one_line_and_no_export(run, digits, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exports.File, "write", lambda *_: pytest.fail("something was exported"))
    (tmp_path / "torn.pt").write_bytes(run[1].read_bytes()[:1000])
    YOLO(run[0] / "weights" / "best.pt").fuse().save("fused.pt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "benchmark.md").write_text("my notes")
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "closed")  # the superuser may write everywhere
    named = {"best": run[0] / "weights" / "best.pt", "start": run[1]}
    given = {"model": "best", "data": digits, "float": "start", "out": tmp_path / "out", **change}
    assert main(["benchmark", *(f"{key}={named.get(value, value)}" for key, value in given.items())]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo-qc benchmark: ")]
    assert len(error) == 1 and message in error[0]


def test_the_figure_is_named_by_the_task():
    row = {"runtime": "PyTorch", "file": "checkpoint", "mb": 1.0, "figure": 0.5}
    about = {"model": "m", "data": "d.yaml", "imgsz": [64, 64], "threads": 1, "repeats": 6, "cpu": "c", "versions": {}}
    assert "| mAP50-95 |" in format_benchmark({**about, "rows": [row]})  # of a record of before it was named
    assert "| top1  |" in format_benchmark({**about, "rows": [row], "figure": "top1"})


def test_times_are_of_the_calls_and_ratios_of_the_turn():
    """A machine that gets slower, and is slow for a while, leaves ratios as they are."""
    calls = 0
    now = 0.0

    def of(seconds):
        def run(images):
            nonlocal calls, now
            assert images.shape == (1, 3, 4, 8) and images.dtype == np.float32
            calls += 1
            now += seconds * 1.001**calls * (20 if seconds == 1 and 30 < calls <= 40 else 1)

        return run

    runs = {"FP32": of(2.0), "half": of(1.0)}
    found = measure(runs, "FP32", [4, 8], 4 * TURN, clock=lambda: now)
    assert calls == 2 * 4 * (TURN + SETTLE)
    assert found["FP32"]["ratio"] == 1 and found["half"]["ratio"] == pytest.approx(0.5, rel=0.02)
    assert found["half"]["p10"] < found["half"]["median"] < found["half"]["p90"]
    assert found["half"]["median"] == pytest.approx(1000, rel=0.1) and found["half"]["p90"] > 10000
    assert measure({"half": of(1.0)}, "FP32", [4, 8], 1)["half"]["ratio"] is None
