# yolo_qc_plugin, AGPL-3.0
"""The experiments under examples/: cells that resume, what is refused, the records and their pages."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import cells  # noqa: E402
import paper  # noqa: E402
import record  # noqa: E402
from conftest import TINY  # noqa: E402


def request_of(digits, tmp_path, cell: cells.Cell | None = None, **options) -> dict:
    given = {k: v for k, v in TINY.items() if k not in {"imgsz", "epochs", "device"}} | {"epochs": 2}
    args = Namespace(data=str(digits), weights="yolov5n.yaml", device="cpu", epochs=2, imgsz=64, qc=[], runs=tmp_path)
    args.coco = False
    args.train = [f"{k}={v}" for k, v in given.items()]
    cell = cell or cells.Cell("EMA-4bit", {"bits": 4, "ema_decay": 0.99, **options})
    return cells.request(cell, 0, args)


def test_a_killed_cell_goes_on_and_fills_its_row(train, digits, tmp_path):
    request = request_of(digits, tmp_path)

    def kill(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(request["options"], {"on_train_batch_start": kill}, name="EMA-4bit-seed0", **request["recipe"])
    assert not cells.is_done(request, {})
    cells.work(request)
    found = json.loads(Path(request["target"]).read_text())
    assert found["resumed"] and found["steps"] == 3 and found["model"] == "yolov5n"
    assert found["images"] == {"train": 24, "val": 8} and str(tmp_path) not in json.dumps(found)
    assert set(found) >= {"versions", "commit", "date", "machine"}
    assert cells.is_done(request, {})
    with pytest.raises(SystemExit, match="was made with other epochs; give another --name"):
        cells.is_done({**request, "recipe": {**request["recipe"], "epochs": 3, "device": "0"}}, {})
    with pytest.raises(SystemExit, match="was made with other options"):
        cells.is_done({**request, "options": {"bits": 3}}, {})

    joined = record.join(tmp_path / "paper.json", "digits-yolov5n", tmp_path)
    Path(request["target"]).unlink()
    assert record.read(tmp_path / "paper.json") == joined and joined["digits-yolov5n"]["cells"] == {
        "EMA-4bit-seed0": found
    }
    assert cells.is_done(request, joined["digits-yolov5n"]["cells"])


def test_a_cell_that_fails_says_why(digits, tmp_path, capsys):
    assert not cells.start(request_of(digits, tmp_path, bitz=4), threads=1)
    said = capsys.readouterr().out
    assert "EMA-4bit-seed0: FAILED" in said and "unknown option 'bitz'" in said and said.count("\n") == 1


def test_a_cell_is_taught_by_the_float_cell_of_its_seed(digits, tmp_path, capsys):
    """Once that has run; no path of the teacher is part of what the cell is."""
    cell = cells.Cell("taught-4bit", {"bits": 4}, teacher="float", recipe={"dis": 0})
    request = request_of(digits, tmp_path, cell)
    teacher = tmp_path / "float-seed0" / "weights" / "best.pt"
    assert request["recipe"]["distill_model"] == str(teacher) and request["recipe"]["dis"] == 0
    assert cells.identity(request)["recipe"]["distill_model"] == "best.pt"
    assert not cells.start(request, threads=1)
    assert f"taught-4bit-seed0: FAILED: {teacher} is missing" in capsys.readouterr().out


def test_pages_from_files(tmp_path):
    """Two seeds of three rows: means, deviations, the share of float, and an ordering that holds."""
    one = {"recipe": {"epochs": 2}, "data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}}
    one |= {"images": {"train": 24, "val": 8}}
    figures = {
        "float": [(0.50,), (0.60,)],
        "LSQ-4bit": [(0.30, 0.40), (0.40, 0.48)],
        "EMA-4bit": [(0.44, 0.4), (0.5, 0.6)],
    }
    recorded = {}
    for name, seeds in figures.items():
        for seed, values in enumerate(seeds):
            rows = ["trained"] if name == "float" else ["qat", "qc"]
            metrics = {row: {"map50_95": v, "map50": v} for row, v in zip(rows, values)}
            recorded[f"{name}-seed{seed}"] = {**one, "recipe": {**one["recipe"], "seed": seed}, "metrics": metrics}
    content = {"cells": recorded, "notes": ["Two seeds."]}
    page = record.page(["# Page"], {"d-yolov5n": content}, *paper.TABLES.values(), paper.drawn).splitlines()
    assert page[-1] == "Two seeds." and not [line for line in page if "Table 2" in line or "Table 3" in line]
    assert "| float trained on | - | 32 | 2 | 55.0 ± 7.1 | 100.0% | 55.0 ± 7.1 | 28.0 |" in page
    assert "| LSQ | ✗ | 4 | 2 | 35.0 ± 7.1 | 63.6% | 35.0 ± 7.1 | 20.6 |" in page
    assert "| EMA-4bit | LSQ-4bit | +14.0, +10.0 | +12.00 | 2.00 | holds |" in page
    assert "| EMA-4bit + QC | EMA-4bit | -4.0, +10.0 | +3.00 | 7.00 | noise |" in page
    recorded["EMA-4bit-decay0.9-seed0"] = recorded["EMA-4bit-seed0"]
    page = paper.table3("d-yolov5n", content)
    assert any("decays above that are the same here" in line and "0.4375" in line for line in page)


SCRIPTS = {
    "benchmarks": ("step", "quantizer", "correction", "deploy"),
    "experiments": (
        "paper table1", "paper cost", "presets", "defaults", "sensitivity", "families", "parity", "kill_and_resume",
        "reliability", "equalization",
    ),
}  # fmt: skip


@pytest.mark.parametrize("folder,script", [(folder, s) for folder, names in SCRIPTS.items() for s in names])
def test_a_page_follows_from_its_json_file_alone(folder, script, tmp_path, monkeypatch):
    """Whoever changes the one or the other has to change both."""
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    name, *kind = script.split()
    began = time.time_ns()
    monkeypatch.setenv("YOLO_CONFIG_DIR", os.environ["YOLO_CONFIG_DIR"])  # a script changes it
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / folder)
    monkeypatch.setattr(sys, "argv", [name, *kind, "--assemble"])
    try:
        runpy.run_path(str(ROOT / "examples" / folder / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    pages = {f.relative_to(docs): f.read_bytes() for f in docs.rglob("*") if f.is_file()}
    assert pages == {f.relative_to(ROOT / "docs"): f.read_bytes() for f in (ROOT / "docs").rglob("*") if f.is_file()}
    assert any(f.suffix == ".md" and f.stat().st_mtime_ns > began for f in docs.rglob("*"))  # it wrote one


def test_the_folders_name_their_scripts():
    """README.md of each folder of examples/ has a line for every script, and docs/ stays small."""
    for folder in SCRIPTS:
        scripts = {f.name for f in (ROOT / "examples" / folder).glob("*.py")}
        named = re.findall(r"^- `(\w+\.py)`", (ROOT / "examples" / folder / "README.md").read_text(), re.M)
        assert sorted(named) == sorted(scripts)
    assert len([f for f in (ROOT / "docs").rglob("*") if f.is_file()]) < 40
