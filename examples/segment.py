# yolo_qc_plugin, AGPL-3.0
"""Take a segmentation model to 4-bit weights: python examples/segment.py [WEIGHTS DATA EPOCHS IMGSZ].

Pose, oriented boxes and classification work in the same way.
"""

import sys

from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks


def main(weights: str = "yolo11n-seg.pt", data: str = "coco8-seg.yaml", epochs: int = 10, imgsz: int = 640) -> None:
    """Train for CPUs (weights of 4 bits, activations of 8) and print the accuracy of boxes and masks."""
    model = YOLO(weights)
    add_qc_callbacks(model, bits=4, target="cpu")
    model.train(data=data, epochs=int(epochs), imgsz=int(imgsz), optimizer="Adam", lr0=1e-3, warmup_bias_lr=0.0)
    found = YOLO(model.trainer.best).val(data=data, imgsz=int(imgsz))
    print(f"{model.trainer.best}: mAP50-95 of boxes {found.box.map:.3f}, of masks {found.seg.map:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
