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

# what makes a convolution fast, as /proc/cpuinfo names it
FEATURES = "avx2", "avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_tile"


def features() -> list[str]:
    """Which of FEATURES the processor has; none where the system does not tell."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [name for name in FEATURES if name in flags]


def about() -> dict:
    """Plain values: "cpu", its "features", "machine" (its operating system), "versions", "commit", "date"."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    shown = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "cpu": cpu_name(),
        "features": features(),
        "machine": platform.platform(),
        "versions": {"yolo_qc_plugin": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__},
        "commit": shown.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions(about: dict) -> str:
    """The versions in words."""
    return ", ".join(f"{k} {v}" for k, v in about["versions"].items())
