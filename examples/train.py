# yolo_qc_plugin, AGPL-3.0
"""Take a float detector to 4 bits: python examples/train.py [WEIGHTS DATA EPOCHS IMGSZ].

Start from a checkpoint that was trained on your data. The learning rate is one for fine-tuning.
"""

import sys

from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks


def main(weights: str = "yolo11n.pt", data: str = "coco8.yaml", epochs: int = 10, imgsz: int = 640) -> None:
    """Train, then measure what is in best.pt, as a fresh program would."""
    model = YOLO(weights)
    add_qc_callbacks(model, bits=4)
    model.train(data=data, epochs=int(epochs), imgsz=int(imgsz), optimizer="Adam", lr0=1e-3, warmup_bias_lr=0.0)
    best = YOLO(model.trainer.best)
    print(f"{model.trainer.best}: mAP50-95 {best.val(data=data, imgsz=int(imgsz)).box.map:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
