# yolo_qc_plugin, AGPL-3.0
"""Exported files whose runtime shows what goes in and what comes out alone: OpenVINO's folders and TorchScript."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import YAML

from ..config import QCError
from ..deploy.exported import Exported, Run
from ..deploy.kinds import OPENVINO, missing, too_old
from ..deploy.nodes import unpack4

MARK = ".weight_codes"  # in the name of what holds a layer's integer weights


class ExportedWhole(Exported):
    """A file of which weights and outputs are compared, and no codes between.

    Args:
        path: Of the file or folder.

    Raises:
        QCError: If it cannot be read, or was not exported from a quantized checkpoint.
    """

    kind = ""  # in words

    def __init__(self, path: Path):
        self.path, self.codes, self.outputs, self.weights, self.values = path, {}, {}, {}, {}
        if not path.exists():
            raise QCError(f"QC: file={path} does not exist.")
        if reason := self.obstacle(self.runtimes[0]):
            raise QCError(f"QC: file={path} cannot be run: {reason}.")
        try:
            about = self._load()
            height, width = about["imgsz"]
            dynamic = about["args"]["dynamic"]
            self.fixed_batch = 0 if dynamic else int(about["batch"])
        except Exception as e:  # each reader has errors of its own, and metadata can lack any key
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise QCError(f"QC: file={path} is no {self.kind} of Ultralytics: {reason}") from None
        self.metadata = {key: str(value) for key, value in about.items()}
        self.imgsz = height if height == width else [height, width]
        self.batch = self.fixed_batch or 16
        if not self.weights:
            raise QCError(f"QC: file={path} has no quantized convolution; accepted: exports of a quantized checkpoint.")

    def _load(self) -> dict[str, Any]:
        """Read the model and its weights, and return Ultralytics' metadata."""
        raise NotImplementedError

    def _keep(self, name: str, codes: np.ndarray) -> None:
        """Note a layer's weights; a grouped convolution's may have an axis of groups."""
        self.weights[name.partition(MARK)[0]] = name
        self.values[name] = codes.reshape(-1, *codes.shape[-3:])


class ExportedOpenVINO(ExportedWhole):
    """The folder that `yolo export format=openvino` writes."""

    runtimes = ("openvino",)
    kind = "OpenVINO model"

    def _load(self) -> dict[str, Any]:
        import openvino

        self.model = openvino.Core().read_model(next(self.path.glob("*.xml"), self.path / "model.xml"))
        for node in self.model.get_ops():
            name = node.get_friendly_name()
            if node.get_type_name() != "Constant" or MARK not in name:
                continue
            if node.get_element_type() == openvino.Type.i4:
                self._keep(name, unpack4(node.data.view(np.uint8), list(node.shape)))
            elif node.get_element_type() in {openvino.Type.i8, openvino.Type.u8}:
                self._keep(name, node.data)
        return YAML.load(self.path / "metadata.yaml")

    def obstacle(self, name: str) -> str | None:
        """Why the runtime is not tried, or None."""
        return missing("openvino") or too_old("openvino", OPENVINO, "this model")

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The model in OpenVINO, its float layers in FP32 as for ONNX files."""
        import openvino

        compiled = openvino.compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: [np.array(v) for v in compiled([images]).to_tuple()]


class ExportedTorchScript(ExportedWhole):
    """What `yolo export format=torchscript` writes."""

    runtimes = ("torchscript",)
    kind = "TorchScript model"

    def _load(self) -> dict[str, Any]:
        about = {"config.txt": ""}
        with warnings.catch_warnings():  # torch deprecates the format that the user chose
            warnings.simplefilter("ignore", FutureWarning)
            self.model = torch.jit.load(self.path, map_location="cpu", _extra_files=about).eval()
        for name, parameter in self.model.named_parameters():
            if name.endswith(MARK):
                self._keep(name, parameter.numpy())
        return json.loads(about["config.txt"])

    @torch.no_grad()
    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        values = self.model(torch.from_numpy(images))
        values = values if isinstance(values, (tuple, list)) else (values,)
        return [v.numpy() for v in values if isinstance(v, torch.Tensor)]

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The model in PyTorch's interpreter."""
        return self._run
