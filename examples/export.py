# yolo_qc_plugin, AGPL-3.0
"""Write a 4-bit checkpoint as ONNX and measure both: python examples/export.py best.pt [DATA KIND IMGSZ].

KIND is packed (small and fast), int8 (for older runtimes) or int4 (for converters).
"""

import sys
from pathlib import Path

from ultralytics import YOLO

from yolo_qc_plugin import choose_onnx_kind


def main(checkpoint: str, data: str = "coco8.yaml", kind: str = "packed", imgsz: int = 640) -> None:
    """Export, then validate the checkpoint and the file on square images."""
    model = YOLO(checkpoint)
    choose_onnx_kind(model, kind)
    file = model.export(format="onnx", imgsz=int(imgsz))
    for path in (checkpoint, file):
        found = YOLO(path, task="detect").val(data=data, imgsz=int(imgsz), rect=False, batch=1)
        print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB, mAP50-95 {found.box.map:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
