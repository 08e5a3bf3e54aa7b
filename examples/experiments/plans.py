# yolo_qc_plugin, AGPL-3.0
"""What plans lose when the costs that they are made from are measured on less: fewer images, pixels and widths.

A part of sensitivity.py. The yardstick is what a plan costs by measurements at all widths on images of the size that is
trained at; plans are made from costs on other images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from record import made, read, table_head, versions, write

from yolo_qc_plugin.run.allocation import Layer, Problem
from yolo_qc_plugin.run.sensitivity import KINDS, MEASURED, completed

IMAGES = 32  # half of them for the yardstick
SMALL = 320  # px
ALL = tuple(range(2, 9))
# name -> unit, limit, widths of weights and of inputs to choose from, the usual ones
BUDGETS = {
    "100%ops of W4A4": ("%ops", 100, ALL, ALL, (4, 4)),
    "100%ops of W3A3": ("%ops", 100, ALL, ALL, (3, 3)),
    "102%size of W4A8": ("%size", 102, (4, 7), (8,), (4, 8)),
}
WIDTHS = ALL, MEASURED, (2, 4)  # that are measured; the others follow


def measure_costs(file: Path, args: argparse.Namespace) -> None:
    """Measure the costs on two halves of the images and in two sizes, as far as the record lacks them."""
    from ultralytics import YOLO

    from yolo_qc_plugin.config import QCConfig
    from yolo_qc_plugin.host.images import spread_out
    from yolo_qc_plugin.host.photographs import read_photographs
    from yolo_qc_plugin.run import budget, sensitivity

    record = read(file)
    content = record.setdefault(args.name, {"notes": []}).setdefault("plans", {"about": {}, "layers": {}, "costs": {}})
    files, config = spread_out(list(read_photographs(args.data, args.out).splits["train"]), IMAGES), QCConfig()
    for half, size in ("b", args.imgsz), ("a", SMALL), ("b", SMALL):
        if (key := f"{half}, {size} px") in content["costs"]:
            continue
        probe, about = sensitivity.prepare(YOLO(args.weights).model, config, files["ab".index(half) :: 2], size, "cpu")
        layers, begun = budget.layers_of(probe, config, "%ops"), time.process_time()
        begun_with = args.out / f"{args.name}, {key}.begun.json"  # so that a measurement that was cut off goes on
        costs = sensitivity.measure(probe, budget.wanted(layers), about, begun_with)
        content["costs"][key] = {**costs, "seconds": time.process_time() - begun}
        content["layers"] = {title: {**vars(layer)} for title, layer in layers.items()}
        content["about"] = {
            "weights": Path(args.weights).name, "data": Path(args.data).name, "imgsz": args.imgsz, "images": len(files),
            "other_bits": budget.bits_beside_weights(probe), "versions": versions(), **made(),
        }  # fmt: skip
        write(file, record)
        begun_with.unlink()


def problem(content: dict, costs: dict, weight_bits, act_bits, usual) -> Problem:
    """What a budget asks, with some costs."""
    layers, widths = {}, {}
    for name, layer in content["layers"].items():
        free = len(layer["weight_bits"]) > 1, len(layer["act_bits"]) > 1  # edges are not
        chosen = (weight_bits if free[0] else (8,)), (act_bits if free[1] else (8,))
        layers[name] = Layer(layer["weights"], layer["macs"], layer["reads"], *chosen)
        widths[name] = tuple(bits if is_free else 8 for bits, is_free in zip(usual, free))
    return Problem(layers, costs, content["about"]["other_bits"], widths)


def plans(name: str, content: dict) -> list[str]:
    """The predicted drop of each budget's plan, by what its costs were measured on."""
    if "plans" not in content:
        return []
    content = content["plans"]
    about, measured = content["about"], content["costs"]
    yardstick = f"b, {about['imgsz']} px"
    sources = {  # of the plan -> halves of the images
        "yardstick": [yardstick],
        f"these and 16 other images, {SMALL} px": [f"a, {SMALL} px", f"b, {SMALL} px"],
        f"16 other images, {SMALL} px": [f"a, {SMALL} px"],
    }
    lines = [
        f"## Plans from fewer costs: {name}",
        "",
        f"{about['weights']} on {about['data']}, without training. The predicted drop of mAP in percent, by costs on "
        f"{about['images'] // 2} images of {about['imgsz']} px at all widths, of plans whose costs come from what the "
        "row says; widths that were not measured follow from those that were. Seconds are of one thread beside other "
        f"work, all widths of {about['images'] // 2} images in proportion. "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}.",
        "",
        *table_head(["costs from", "widths", "seconds", *BUDGETS]),
    ]
    whole = {kind: measured[yardstick][kind] for kind in KINDS}
    asked = {key: problem(content, whole, *budget[2:]) for key, budget in BUDGETS.items()}
    usual = [f"{asked[key].amount('%drop', asked[key].usual):.2f}" for key in BUDGETS]
    lines.append(f"| the same width in all layers |  |  | {' | '.join(usual)} |")
    for title, halves in sources.items():
        if not all(half in measured for half in halves):
            continue
        for widths in WIDTHS[: 1 if title == "yardstick" else None]:
            costs = averaged([measured[half] for half in halves], widths)
            share = len(widths) / len(ALL)
            drops = []
            for key, (unit, limit, *rest) in BUDGETS.items():
                plan = problem(content, costs, *rest).solve(unit, limit)
                drops.append(f"{asked[key].amount('%drop', plan):.2f}")
            seconds = share * sum(measured[half]["seconds"] for half in halves)
            lines.append(f"| {title} | {', '.join(map(str, widths))} | {seconds:.0f} | {' | '.join(drops)} |")
    return lines


def averaged(halves: list[dict], widths: tuple[int, ...]) -> dict:
    """Costs at all widths, as if those of some had been measured, mean over halves of the images."""
    found: dict = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name, of in halves[0][kind].items():
            kept = [bits for bits in of if int(bits) in widths or len(of) == 1]
            found[kind][name] = {b: sum(half[kind][name][b] for half in halves) / len(halves) for b in kept}
    return completed(found, {(kind, n): [*map(int, of)] for kind in KINDS for n, of in halves[0][kind].items()})
