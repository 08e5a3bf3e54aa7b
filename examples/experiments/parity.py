# yolo_qc_plugin, AGPL-3.0
"""One model, one number: mAP of checkpoints, of their deployed form, and of their exported files in each runtime.

    python examples/experiments/parity.py --checkpoints run/weights/best.pt ... --data bccd.yaml --imgsz 320

Exports every checkpoint by the stock `export`, runs `yolo-qc check` on the file, and writes a page from the JSON that
gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from record import made, table_head, versions
from ultralytics import YOLO

from yolo_qc_plugin.tools.accuracy import is_chance
from yolo_qc_plugin.tools.check import check, format_check


def measure(checkpoint: Path, name: str, args: argparse.Namespace) -> dict:
    """The result of the check, with the name and the file's size in MB."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "best.pt"
        shutil.copy(checkpoint, copy)
        yolo = YOLO(copy)
        file = Path(yolo.export(format="onnx", imgsz=args.imgsz, device="cpu"))
        found = check(copy, file, args.data, images=args.images)
        print(format_check(found), flush=True)
        kept = {k: v for k, v in found.items() if k not in {"model", "file", "data"}}
        return {"name": name, "mb": file.stat().st_size / 1e6, **kept}


def page(record: dict) -> str:
    """The record as Markdown."""
    results = record["results"]
    runtimes = [row["name"] for row in results[0]["runtimes"] if "AP" in row]
    columns = "model", "MB", "as trained", "deployed, PyTorch", *runtimes, "largest difference"
    lines = [
        "# One model, one number",
        "",
        f"Written by `examples/experiments/parity.py` on {record['data']} at {record['imgsz']} px. AP (mAP50-95 by "
        "pycocotools, square images) in points: of the checkpoint as it was trained, fake-quantized; of its deployed "
        "form, which `yolo val` runs; of the ONNX file of its target, packed where none is named. In brackets the "
        f"share of codes that differ layer by layer, over {record['images']} images. A difference above 0.1 points is "
        "chance where 0 lies within the middle 95% of 1,000 resamples of the images, or, where codes have flipped, at "
        "its end.",
        "",
        *table_head([*columns]),
    ]
    for result in results:
        figures = [result["checkpoint"]["AP"], result["pytorch"]["AP"]]
        cells = [result["name"], f"{result['mb']:.2f}", *(f"{100 * v:.2f}" for v in figures)]
        for runtime in runtimes:
            row = next(r for r in result["runtimes"] if r["name"] == runtime)
            if "skipped" in row:
                cells.append(row["skipped"])
                continue
            figures.append(row["AP"])
            cells.append(f"{100 * row['AP']:.2f} [{row['changed']:.0e}]")
        above = [entry for entry in (result["checkpoint"], *result["runtimes"]) if "intervals" in entry]
        reading = f" ({'chance' if all(map(is_chance, above)) else 'more than chance'})" if above else ""
        lines.append(f"| {' | '.join([*cells, f'{100 * (max(figures) - min(figures)):.2f}{reading}'])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoints", type=Path, nargs="+", help="the runs' best.pt")
    p.add_argument("--names", nargs="+", help="names in the table (the runs' folders)")
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--images", type=int, default=8)
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "parity.json"
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    if not (args.checkpoints and args.data):
        p.error("--checkpoints and --data are needed to measure")
    names = args.names or [c.resolve().parent.parent.name for c in args.checkpoints]
    results = [measure(c, n, args) for c, n in zip(args.checkpoints, names, strict=True)]
    record = {
        "data": Path(args.data).name,
        "imgsz": args.imgsz,
        "images": args.images,
        "versions": versions(),
        **made(),
    }
    record["results"] = results
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
