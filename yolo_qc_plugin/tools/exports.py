# yolo_qc_plugin, AGPL-3.0
"""The files that a benchmark compares: every kind of a quantized model, and Ultralytics' own of a float one."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultralytics import YOLO

from ..deploy.kinds import ONNX_KINDS
from ..deploy.litert.graph import LITERT_KINDS
from ..run.export import choose_kinds

FP32 = "FP32"
# measured for size and accuracy alone: ONNX Runtime runs each Quant node as a dozen of its own, whose time says nothing
UNTIMED = "onnx", "qonnx"
# format -> packages that Ultralytics' exporter needs, and further ones for its INT8; and those that ours needs
STOCK = {
    "onnx": (("onnx", "onnxruntime"), ()),
    "openvino": (("openvino",), ("nncf",)),
    "litert": (("litert_torch", "ai_edge_litert"), ("ai_edge_quantizer",)),
}
OURS = {"onnx": (ONNX_KINDS, ("onnx", "onnxruntime")), "litert": (LITERT_KINDS, ("onnx", "ai_edge_litert"))}


@dataclass
class File:
    """An export for one image at a time.

    Attributes:
        name: "FP32", "Ultralytics INT8", or "ours" and the kind.
        format: Of `yolo export`.
        checkpoint: What is exported.
        needs: Packages without which it is not.
        kind: Arguments of `choose_kinds`; empty for a float model.
        arguments: Of `yolo export`.
        path: Once it is written: a file, or OpenVINO's folder.
        obstacle: Why it was not, in one line.
    """

    name: str
    format: str
    checkpoint: Path
    needs: Sequence[str]
    kind: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    obstacle: str = ""

    @property
    def mb(self) -> float:
        """Its size in 1e6 bytes, once it is written."""
        parts = [self.path, *self.path.rglob("*")] if self.path else []
        return sum(part.stat().st_size for part in parts if part.is_file()) / 1e6

    @property
    def is_timed(self) -> bool:
        """Whether its time is that of what it was written for."""
        return UNTIMED not in self.kind.items()

    def write(self, folder: Path, imgsz: int | list[int]) -> None:
        """Export it into a folder of its own, or find out why not.

        Args:
            folder: For the folder.
            imgsz: Side in pixels, or [height, width].
        """
        if missing := [name for name in self.needs if not find_spec(name)]:
            self.obstacle = f"needs {', '.join(missing)}"
            return
        own = folder / f"{self.name}-{self.format}".replace(" ", "-")
        own.mkdir()
        yolo, said = YOLO(shutil.copy(self.checkpoint, own / "model.pt")), io.StringIO()
        if self.kind:
            choose_kinds(yolo, **self.kind)
        try:
            with redirect_stdout(said), redirect_stderr(said):  # converters print what they do, past all logs
                self.path = Path(yolo.export(format=self.format, imgsz=imgsz, device="cpu", **self.arguments))
        except Exception as e:  # a file less: the errors of exporters and their converters have no type in common
            self.obstacle = next(iter(str(e).strip().splitlines()), type(e).__name__)


def files_of(model: Path, start: Path, int8: Mapping[str, Any] | None) -> list[File]:
    """All files, none written yet.

    Args:
        model: Checkpoint of a quantized model.
        start: Checkpoint of a float one.
        int8: Arguments by which Ultralytics exports that one in INT8 too, if it is to be.
    """
    files = []
    for format, (needs, further) in STOCK.items():
        files.append(File(FP32, format, start, needs))
        if int8:
            files.append(File("Ultralytics INT8", format, start, (*needs, *further), arguments=int8))
    for format, (kinds, needs) in OURS.items():
        files += [File(f"ours {kind}", format, model, needs, {format: kind}) for kind in kinds]
    return files
