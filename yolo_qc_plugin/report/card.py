# yolo_qc_plugin, AGPL-3.0
"""qc/MODEL_CARD.md: what one pastes on a hub's page of a model, with the front matter that hubs read."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from ..files import replacing
from .console import STAGES, in_short, weights_by_widths, widths_of
from .record import FIGURES

CARD = "MODEL_CARD.md"  # in a run's qc/
PIPELINES = {  # task -> the hubs' name of it
    "detect": "object-detection",
    "segment": "image-segmentation",
    "pose": "keypoint-detection",
    "obb": "object-detection",
    "classify": "image-classification",
}
TAGS = "ultralytics", "yolo", "quantization", "quantization-aware-training", "yolo-qc-plugin"
METHOD = "https://arxiv.org/abs/2311.05109"


def write_card(report: dict[str, Any], weights: Path, folder: Path) -> Path:
    """Write the card of a run's best.pt into `folder`, atomically.

    Args:
        report: What qc/report.json holds.
        weights: The run's folder of checkpoints, for the sizes of its files.
        folder: Where to write, the run's qc/.
    """
    sizes = {file.name: file.stat().st_size for file in (weights / "best.pt", weights / "qat.pt") if file.is_file()}
    path = folder / CARD
    with replacing(path) as temporary:
        temporary.write_text(model_card(report, sizes), encoding="utf-8")
    return path


def model_card(report: dict[str, Any], sizes: dict[str, int]) -> str:
    """The card as text.

    Args:
        report: What qc/report.json holds.
        sizes: Checkpoint's name -> its bytes.
    """
    made, size, metrics = report["training"], report["size_mb"], report["metrics"]
    base = Path(made["start"]).stem or "model"  # checkpoints of earlier versions do not know it
    data = data_name(made.get("photographs") or made["data"])
    widths = Counter(map(widths_of, report["layers"])).most_common()
    short = in_short(weights_by_widths(report["layers"]))
    columns = [(name, title) for name, title in FIGURES.values() if name in metrics["qat"]]
    stages = [stage for stage in ("float", "qat", "qc") if metrics.get(stage)]
    rows = [
        f"| {STAGES[stage]}{' (`best.pt`)' if stage == report['kept'] else ''} | "
        + " | ".join(f"{100 * metrics[stage][name]:.2f}" for name, _ in columns)
        + f" | {size['float32' if stage == 'float' else 'quantized']:.2f} |"
        for stage in stages
    ]
    return "\n".join([
        *_front_matter(report, base, data, short.lower().replace(" ", "-"), columns),
        "",
        f"# {base}, {short}",
        "",
        f"{base} ({made['task']}) trained to integer weights and activations with yolo-qc-plugin "
        f"{report['versions']['yolo_qc_plugin']}: {_method(report)}.",
        "",
        f"- Base model: `{Path(made['start']).name}`",
        f"- Widths (W: bits of weights, A: of activations): {', '.join(f'{n} layers {w}' for w, n in widths)}",
        f"- Data: {data}, {len(made['names'])} classes, {made['epochs']} epochs at {made['imgsz']} px",
        "",
        "## Accuracy",
        "",
        f"On the validation set, in points, by Ultralytics' validator{_judged(report)}.",
        "",
        f"| | {' | '.join(title for _, title in columns)} | weights, MB |",
        f"|---{'|---:' * (len(columns) + 1)}|",
        *rows,
        "",
        "## Files",
        "",
        "| file | MB | what it is |",
        "|---|---:|---|",
        *(
            f"| `{name}` | {size / 1e6:.2f} | {WHAT[name]} |"
            for name, size in sizes.items()
            if name == "best.pt" or metrics.get("qc")
        ),
        f"| an exported file | about {size['quantized']:.2f} | by `yolo export model=best.pt format=onnx` |",
        "",
        "## How to load it",
        "",
        f"With ultralytics {report['versions']['ultralytics']} and yolo-qc-plugin installed:",
        "",
        "```python",
        "from ultralytics import YOLO",
        "",
        'model = YOLO("best.pt")',
        f'results = model.predict("image.jpg", imgsz={made["imgsz"]})',
        "```",
        "",
        "## Licence",
        "",
        "AGPL-3.0, as Ultralytics' models and yolo-qc-plugin are. Terms of the training data may add to it.",
        "",
    ])  # fmt: skip


def _method(report: dict[str, Any]) -> str:
    """How the model was trained, with the paper of what of it was on."""
    averaged = " with averaged weights and scales" if report["config"]["ema_decay"] else ""
    corrected = ", and a correction at its end" if report["metrics"].get("qc") else ""
    source = f" ([Gupta and Asthana, WACV 2024]({METHOD}))" if averaged or corrected else ""
    return f"quantization-aware training{averaged}{corrected}{source}"


def _judged(report: dict[str, Any]) -> str:
    """What a reader of the figures has to know."""
    by_model = report["training"].get("val_by_model")
    agreement = f" (a float model labelled {by_model} of its photographs: agreement with it, not accuracy)"
    kept = "; the better of QAT and QAT + QC there is kept"
    return agreement * bool(by_model) + kept * bool(report["metrics"].get("qc"))


def data_name(path: str) -> str:
    """What a data set is called: by its YAML, or by the folder of a data.yaml, whose name says nothing."""
    file = Path(path)
    return file.parent.name if file.stem == "data" and file.parent.name else file.stem


WHAT = {
    "best.pt": "checkpoint for Ultralytics, latent weights in FP32; trains no further",
    "qat.pt": "the same before the correction",
}


def _front_matter(
    report: dict[str, Any], base: str, data: str, widths: str, columns: list[tuple[str, str]]
) -> list[str]:
    """The lines between ---; quoted as JSON, which YAML reads."""
    made, kept = report["training"], report["metrics"][report["kept"]]
    quote = partial(json.dumps, ensure_ascii=False)
    return [
        "---",
        "license: agpl-3.0",
        "library_name: ultralytics",
        f"pipeline_tag: {PIPELINES[made['task']]}",
        "tags:",
        *(f"- {tag}" for tag in (*TAGS, widths)),
        f"base_model: {quote(base)}",
        "datasets:",
        f"- {quote(data)}",
        "metrics:",
        *(f"- {name}" for name, _ in columns),
        "model-index:",
        f"- name: {quote(f'{base}-{widths}')}",
        "  results:",
        "  - task:",
        f"      type: {PIPELINES[made['task']]}",
        "    dataset:",
        f"      name: {quote(data)}",
        f"      type: {quote(data)}",
        "      split: val",
        "    metrics:",
        *(line for name, title in columns for line in (
            f"    - type: {name}", f"      name: {quote(title)}", f"      value: {kept[name]:.4f}",
        )),
        "---",
    ]  # fmt: skip
