# yolo_qc_plugin, AGPL-3.0
"""What a benchmark records beside its figures: the machine, the versions, the commit and the time."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
import ultralytics

from yolo_qc_plugin import __version__
from yolo_qc_plugin.tools.latency import cpu_name


def about() -> dict:
    """Plain values: "cpu", "machine" (its operating system), "versions", "commit", "date"."""
    shown = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "cpu": cpu_name(),
        "machine": platform.platform(),
        "versions": {"yolo_qc_plugin": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__},
        "commit": shown.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions(about: dict) -> str:
    """The versions in words."""
    return ", ".join(f"{k} {v}" for k, v in about["versions"].items())
