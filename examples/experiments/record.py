# yolo_qc_plugin, AGPL-3.0
"""The record of a published table: one JSON file beside its page, from which alone the page is made.

    {SET: {"cells": {"EMA-4bit-seed0": {...}, ...}, "notes": ["...", ...]}, ...}

A set is one data set with one model. Scripts add cells; notes are Markdown paragraphs written by hand, which the page
shows below the set's tables: the command that made it, and what the figures say.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read(file: Path) -> dict:
    """The record in a file; empty where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, record: dict) -> None:
    """Write a record with a line for each cell and each note, so that a difference shows which ones changed."""

    def text(value) -> str:
        return json.dumps(value, ensure_ascii=False)

    sets = []
    for name, content in record.items():
        parts = []
        for key, items in content.items():
            if isinstance(items, dict):
                lines = ",\n".join(f"   {text(k)}: {text(v)}" for k, v in items.items())
                parts.append(f"  {text(key)}: {{\n{lines}\n  }}")
            else:
                lines = ",\n".join(f"   {text(v)}" for v in items)
                parts.append(f"  {text(key)}: [\n{lines}\n  ]")
        sets.append(f" {text(name)}: {{\n" + ",\n".join(parts) + "\n }")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(sets) + "\n}\n", encoding="utf-8")


def join(file: Path, name: str, folder: Path) -> dict:
    """Add the cells of a run folder, one JSON file each, to a set of the record; returns the whole record."""
    record = read(file)
    content = record.setdefault(name, {"cells": {}, "notes": []})
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*-seed*.json")}
    content["cells"] = dict(sorted({**content["cells"], **found}.items()))
    if content["cells"]:
        write(file, record)
    return record


def results(cells: dict[str, dict], name: str) -> dict[int, dict]:
    """Seed -> what is recorded of a cell, for every seed there is."""
    return dict(sorted((r["recipe"]["seed"], r) for key, r in cells.items() if key.rpartition("-seed")[0] == name))


def page(head: list[str], record: dict, *tables: Callable[[str, dict], list[str]]) -> str:
    """The Markdown page of a record: its head, then of each set its tables and its notes.

    Args:
        head: Lines.
        record: As `read` gives it.
        tables: Each makes the lines of a table from a set's name and content; none where it lacks the cells.
    """
    lines = head
    for name, content in record.items():
        parts = [*(table(name, content) for table in tables), *([note] for note in content["notes"])]
        for part in filter(None, parts):
            lines = [*lines, "", *part]
    return "\n".join(lines) + "\n"


def table_head(titles: list[str]) -> list[str]:
    """The two lines with which a Markdown table begins."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    import torch
    import ultralytics

    from yolo_qc_plugin import __version__

    return {"yolo_qc_plugin": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__}


def made(device: str = "cpu") -> dict[str, str]:
    """Where and when a figure is made: the checkout's commit, the time, the processor or GPU."""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": shown.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": processor() if device == "cpu" else graphics(),
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def graphics() -> str:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name()
