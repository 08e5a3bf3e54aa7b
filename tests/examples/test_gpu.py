# yolo_qc_plugin, AGPL-3.0
"""examples/benchmarks/gpu.py on a CPU: its checks find nothing, and each finds the fault that is planted for it."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import TINY_YAML
from ultralytics import YOLO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import exactness  # noqa: E402
import gpu  # noqa: E402
import gpu_runs  # noqa: E402
import operators  # noqa: E402
import step  # noqa: E402

from yolo_qc_plugin.deploy.fold import deployed_convs  # noqa: E402
from yolo_qc_plugin.quant import native  # noqa: E402
from yolo_qc_plugin.run import start  # noqa: E402
from yolo_qc_plugin.run.steps import Steps  # noqa: E402


@pytest.mark.parametrize("name,part", [("forward", "values"), ("backward", "gradients by x"), ("sums", "sums")])
def test_a_kernel_that_is_off_is_found(name, part, monkeypatch):
    assert exactness.kernel_faults("cpu", (torch.float32,)) == []
    true = {"sums": native.backward}.get(name) or getattr(native, name)

    def off(*args):
        found = true(*args)
        if name == "forward":
            found[(0,) * found.dim()] += args[1][0]  # one step
        elif name == "backward":
            found[0][(0,) * found[0].dim()] += 1
        else:
            found[1].add_(1.0)
        return found

    monkeypatch.setattr(native, "backward" if name == "sums" else name, off)
    faults = exactness.kernel_faults("cpu", (torch.float32,))
    assert len(faults) >= 3 and all(part in fault for fault in faults), faults


@pytest.mark.parametrize("odd,error,named,all_behind", [
    ("model.2.cv1.conv", 0.5, ["model.2.m.0.cv1.conv", "model.2.cv3.conv"], 10),
    ("model.24.cv2.0.2", 500, ["model.24.cv2.0.2"], 1),  # which gives what is found, and nothing reads it
])  # fmt: skip
def test_a_convolution_that_is_not_exact_is_found(monkeypatch, odd, error, named, all_behind):
    """As Winograd's is not: of all that follow, "layer by layer" names those that read what it gives."""
    model, images = exactness.deployed("yolov5n.yaml", 64), torch.rand(1, 3, 64, 64)
    assert exactness.code_faults(model, images, "cpu") == []

    def inexact(model):
        copy = deepcopy(model)
        layer = deployed_convs(copy)[odd]
        exact = layer.convolve
        layer.convolve = lambda x, weight: exact(x, weight) + error
        return copy

    monkeypatch.setattr(exactness, "deepcopy", inexact)
    faults = exactness.code_faults(model, images, "cpu")
    assert [f.partition(", layer by layer")[0] for f in faults if "layer by layer" in f] == named
    assert sum("end to end" in f for f in faults) >= all_behind


def test_a_run_that_was_killed_and_resumed_has_no_fault(digits, tmp_path, small_files):
    folder = tmp_path / "run"
    asked = dict(model=str(gpu.TRAINED), data=digits, imgsz=64, batch=8, device="cpu", workers=0, optimizer="MuSGD")
    assert gpu_runs.faults(folder, **asked) == []
    assert gpu_runs._changed(folder, {**asked, "data": str(digits)}) == []

    report = json.loads((folder / "qc" / "report.json").read_text())
    report["metrics"][report["kept"]]["fitness"] += 0.01
    (folder / "qc" / "report.json").write_text(json.dumps(report))
    assert "fitness: 0." in gpu_runs._changed(folder, {**asked, "data": str(digits)})[0]
    untrained = YOLO(TINY_YAML)
    untrained.save(folder / "weights" / "best.pt")
    assert gpu_runs._changed(folder, {**asked, "data": str(digits)}) == [
        "all figures are 0: there is nothing to compare"
    ]
    rows = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join(rows[:2]))
    assert gpu_runs._lost(folder) == ["results.csv has 1 rows in place of 2 epochs and what is kept"]


def test_a_run_that_ends_before_it_is_killed_is_a_fault(digits, tmp_path):
    found = gpu_runs.faults(tmp_path / "run", "missing.pt", digits, 64, 8, "cpu")
    assert len(found) == 1 and found[0].startswith("ended by itself (1):") and "missing.pt" in found[0]


def test_a_step_that_waits_for_the_device_is_found(digits, tmp_path, monkeypatch):
    """Operations and reads of a step are within the goals; a value that is read in it shows."""
    monkeypatch.setattr(start, "why_no_teacher", lambda *_: "")
    found = gpu.operations(False, True, tmp_path)
    rows = found["figures"]
    assert found["faults"] == [] and rows["stock"]["operations"] > 500 and rows["stock"]["waits"] > 0
    end = Steps.end_batch

    def waits(self, trainer):
        end(self, trainer)
        self._weights.convs[0].weight.sum().item()

    monkeypatch.setattr(Steps, "end_batch", waits)
    one = operators.one_step("yolov5n.yaml", digits, step.OURS[gpu.OURS], 64, 4, project=str(tmp_path), optimizer="SGD")
    rows[gpu.OURS] = {"operations": 2 * rows["stock"]["operations"], "waits": sum(one.waits.values())}
    faults = gpu.operation_faults(rows)
    assert len(faults) == 2 and "operations in a step" in faults[0] and "wait for the device" in faults[1]


def test_times_beyond_the_goals_are_found():
    float_, ours = {"ratio": 1.0, "mb": 100.0}, {"ratio": 1.05, "mb": 110.0}
    assert gpu.step_faults({"m": {"float": float_, gpu.OURS: ours}}) == []
    slow = {"m": {"float": float_, gpu.OURS: {"ratio": 1.2, "mb": 120.0}}, "n": {"float": float_}}
    assert [f.partition(": ")[2] for f in gpu.step_faults(slow)] == [
        "a step takes 1.200x of float", "a step's memory is 1.20x of float", "a variant did not run",
    ]  # fmt: skip
    sizes = [{"mb": mb, "ms": {"five passes": 1.0, "compiled": ms}} for mb, ms in ((1, 9.0), (16, 1.2), (400, 1.4))]
    assert gpu.quantizer_faults(sizes) == ["400 MB: 1.40x of five passes"]


def test_without_a_gpu_it_says_so_and_a_part_that_hangs_is_ended(tmp_path):
    command = [sys.executable, str(ROOT / "examples/benchmarks/gpu.py"), "--out", str(tmp_path), "--limit", "0.1"]
    done = subprocess.run([*command, "--parts", "kernels", "step"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "kernels, 0 s: took more than 0.1 s" in done.stdout, done.stdout + done.stderr
    assert "step: left out, there is no GPU" in done.stdout and "Not measured on a GPU" in done.stdout
    assert not any(tmp_path.iterdir())


def test_a_part_is_written_beside_the_others_of_the_same_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    file, part = tmp_path / "gpu.json", {"faults": [], "seconds": 1, "quick": False}
    gpu.write(file, "codes", part)
    gpu.write(file, "kernels", part)
    found = json.loads(file.read_text())
    record = found["some GPU"]
    assert list(record["parts"]) == ["kernels", "codes"] and record["parts"]["codes"]["commit"]
    assert file.with_suffix(".md").read_text() == gpu.page(found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    gpu.write(file, "runs", part)
    both = json.loads(file.read_text())
    assert both["some GPU"] == record and list(both["another GPU"]["parts"]) == ["runs"]
    assert gpu.page(both).count("| runs |") == 1 and gpu.page(both).count("## ") == 2
    both["another GPU"]["versions"] = {"torch": "1"}
    file.write_text(json.dumps(both))
    gpu.write(file, "codes", part)
    assert list(json.loads(file.read_text())["another GPU"]["parts"]) == ["codes"]  # of other versions nothing stays


def test_the_page_shows_every_part():
    row = {"median": 9.0, "p10": 8.0, "p90": 10.0, "ratio": 1.05, "ratios": [1.05], "mb": 100.0}
    parts = {
        "kernels": {"seconds": 3, "faults": ["activation: 7 of 9 values differ"]},
        "operations": {"seconds": 4, "faults": [], "figures": {"stock": {"operations": 900, "waits": 9, "busy": 41.0}}},
        "step": {"seconds": 5, "faults": [], "figures": {"results": {"yolov5n.yaml": {"float": row, gpu.OURS: row}}}},
        "quantizer": {"seconds": 6, "faults": [], "figures": [{"mb": 16.0, "ms": {"five passes": 2, "compiled": 3}}]},
    }
    for part in parts.values():
        part.update(commit="abc", quick=True)
    text = gpu.page({"g": {"gpu": "some GPU", "cpu": "some CPU", "versions": {"torch": "2"}, "parts": parts}})
    for shown in (
        "| kernels | abc | quick | 3 | activation: 7 of 9 values differ |",
        "| stock | 900 | 9 | 41.0 |",
        "1.050x",
        "| 1.50x |",
    ):
        assert shown in text
