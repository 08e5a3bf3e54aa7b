# yolo_qc_plugin, AGPL-3.0
"""Whether `yolo-qc sensitivity` ranks layers as real drops of mAP do: each alone at few bits, without training.

    python examples/experiments/sensitivity.py --weights float.pt --data coco.yaml --imgsz 320

Every second layer's weights and every fourth tensor are quantized alone, everything else is in float. Beside the
cost that the plugin measures, the loss of the outputs, there is a second-order estimate of it: with the gradient g of
outputs that are weighted by a random v, E[v v^T] being the loss's second derivative by the outputs, and the error e of
the values,

    loss = E[(g . e)^2] / 2 = E[sum (g e)^2] / 2    where errors of different values are independent

It takes a backward pass for a few images in place of a forward pass for each layer and width.

    python examples/experiments/sensitivity.py --plans --weights float.pt --data coco.yaml --imgsz 640

measures what plans of widths lose by costs on fewer images, pixels and widths (plans.py). OUT/sensitivity.json
keeps every figure as soon as it is measured; OUT/sensitivity.md is made from it alone, by --assemble. Each model is a
section.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plans import measure_costs, plans
from record import made, page, read, table_head, versions, write

HEAD = ["# Sensitivity", "", "Written by `examples/experiments/sensitivity.py` from `sensitivity.json`."]
EVERY = {"weights": 2, "activations": 4}  # one of so many is measured
MEASURES = {"direct": "loss of the outputs", "second": "second order", "diagonal": "second order, diagonal"}
SAMPLES = 4  # images a backward pass


def measure(file: Path, args: argparse.Namespace) -> None:
    """Measure what the record lacks."""
    from ultralytics import YOLO

    from yolo_qc_plugin.config import QCConfig
    from yolo_qc_plugin.host.images import spread_out
    from yolo_qc_plugin.host.photographs import read_photographs
    from yolo_qc_plugin.run.callbacks import attach
    from yolo_qc_plugin.run.sensitivity import IMAGES, prepare

    attach()
    yolo = YOLO(args.weights)
    files = spread_out(list(read_photographs(args.data, args.out).splits["train"]), IMAGES)
    probe, _ = prepare(yolo.model, QCConfig(), files, args.imgsz, "cpu")
    yolo.model = probe.model
    yolo.model.fuse = lambda *args, **kwargs: yolo.model  # fusing would compute integers
    record = read(file)
    content = record.setdefault(args.name, {"notes": []})
    content |= {key: content.get(key, {}) for key in ("drops", "costs")}
    content["about"] = {
        "weights": Path(args.weights).name, "data": Path(args.data).name, "imgsz": args.imgsz, "bits": args.bits,
        "images": len(files), "versions": versions(), **made(),
    }  # fmt: skip

    def figure() -> float:
        settings = {"imgsz": args.imgsz, "batch": 16, "workers": 0, "plots": False, "verbose": False}
        return 100 * yolo.val(data=args.data, device="cpu", rect=True, **settings).box.map

    if "float" not in content["drops"]:
        content["drops"]["float"] = figure()
    for kind, names in (("weights", list(probe.convs)), ("activations", list(probe.inputs))):
        for layer in names[:: EVERY[kind]]:
            key = f"{kind}/{layer}"
            if key not in content["drops"]:
                quant = probe.set_bits(kind, layer, args.bits)
                quant.enabled = True
                content["drops"][key] = figure()
                quant.enabled = False
                write(file, record)
            if "direct" not in content["costs"].get(key, {}):
                content["costs"][key] = {"direct": probe.cost(kind, layer, args.bits)}
                write(file, record)
    for key, found in second_order(probe, args.bits).items():
        if key in content["costs"]:
            content["costs"][key] |= found
    write(file, record)


def second_order(probe, bits: int) -> dict[str, dict[str, float]]:
    """Kind and name -> both estimates at a width, of a detector that gives distributions of box sides."""
    import torch

    from yolo_qc_plugin.quant.modules import hooked

    torch.manual_seed(0)
    inputs = dict.fromkeys(probe.inputs)
    found: dict[str, dict[str, list[float]]] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        inputs[name] = x
        x.retain_grad()

    def add(key: str, gradient: torch.Tensor, error: torch.Tensor) -> None:
        product = gradient * error
        parts = found.setdefault(key, {"second": [], "diagonal": []})
        parts["second"].append(product.sum().square().item() / 2)
        parts["diagonal"].append(product.square().sum().item() / 2)

    @torch.no_grad()
    def error(quant, x: torch.Tensor) -> torch.Tensor:
        quant.enabled = True
        y = quant(x)
        quant.enabled = False
        return y - x

    for kind, names in (("weights", probe.convs), ("activations", probe.inputs)):
        for name in names:
            probe.set_bits(kind, name, bits)
    of_weights = {name: error(conv.weight_quant, conv.weight) for name, conv in probe.convs.items()}
    for conv in probe.convs.values():
        conv.weight.requires_grad_(True)
    hooks = [q.register_forward_pre_hook(lambda m, args, n=n: keep(n, args[0])) for n, q in probe.inputs.items()]
    with hooked(hooks):
        for images in (part for batch in probe.images for part in batch.split(SAMPLES)):
            weighted_outputs(probe.model(images)[1], probe.model.model[-1].reg_max).backward()
            for name, conv in probe.convs.items():
                add(f"weights/{name}", conv.weight.grad, of_weights[name])
                conv.weight.grad = None
            for name, x in inputs.items():
                add(f"activations/{name}", x.grad, error(probe.inputs[name], x))
    for conv in probe.convs.values():
        conv.weight.requires_grad_(False)
    return {key: {name: sum(v) / len(v) for name, v in parts.items()} for key, parts in found.items()}


def weighted_outputs(raw: dict, bins: int):
    """Sum of v * outputs, where v is drawn so that E[v v^T] is the second derivative of the loss of outputs.

    Of binary cross-entropy that is p (1 - p); of a divergence of distributions diag(p) - p p^T, as one-hot samples
    less p have it.
    """
    import torch

    from yolo_qc_plugin.run.sensitivity import GAINS

    scores, sides = (
        raw["scores"],
        raw["boxes"].unflatten(1, (4, bins)),
    )  # (batch, classes, places), (batch, 4, bins, places)
    with torch.no_grad():
        p, q = scores.sigmoid(), sides.softmax(2)
        confidence = p.amax(1)
        share = confidence / confidence.sum().clamp_min(1)
        signs = torch.randint(0, 2, scores.shape) * 2 - 1
        v = (GAINS.cls * p * (1 - p) / confidence.sum().clamp_min(1)).sqrt() * signs
        drawn = torch.distributions.Categorical(q.transpose(2, 3)).sample()
        one_hot = torch.nn.functional.one_hot(drawn, bins).transpose(2, 3)
        signs = torch.randint(0, 2, drawn.shape) * 2 - 1
        u = (one_hot - q) * ((GAINS.dfl * share[:, None] / 4).sqrt() * signs)[:, :, None]
    return (scores * v).sum() + (sides * u).sum()


def ranks(name: str, content: dict) -> list[str]:
    """A model: how well each measure ranks, and every layer's figures."""
    from scipy.stats import spearmanr

    if "drops" not in content:
        return []
    about, drops, costs = content["about"], content["drops"], content["costs"]
    whole = drops["float"]
    lost = {key: whole - ap for key, ap in drops.items() if key in costs}
    lines = [
        f"## {name}",
        "",
        f"{about['weights']} on {about['data']} at {about['imgsz']} px, mAP50-95 in points: float {whole:.1f}. Each "
        f"alone at {about['bits']} bits, weights per output channel, everything else in float, no training. Costs are "
        f"of {about['images']} training images without labels. "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}.",
        "",
        "Rank correlation (Spearman) of the cost with the loss of mAP:",
        "",
        *table_head(
            ["", *(f"{kind} ({sum(k.startswith(kind) for k in lost)})" for kind in EVERY), f"both ({len(lost)})"]
        ),
    ]
    for key, title in MEASURES.items():
        shown = []
        for kind in (*EVERY, ""):
            chosen = [k for k in lost if k.startswith(kind) and key in costs[k]]
            rank = spearmanr([lost[k] for k in chosen], [costs[k][key] for k in chosen]).statistic if chosen else 0
            shown.append(f"{rank:.2f}")
        lines.append(f"| {title} | {' | '.join(shown)} |")
    lines += ["", *table_head(["alone", "loss of mAP", *MEASURES.values()])]
    for key, loss in sorted(lost.items(), key=lambda item: -item[1]):
        lines.append(f"| {key} | {loss:.1f} | {' | '.join(f'{costs[key].get(m, 0):.3g}' for m in MEASURES)} |")
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", help="float checkpoint")
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--name", help="of the section; by default that of the checkpoint")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--plans", action="store_true", help="measure what plans lose by fewer costs")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "sensitivity.json"
    if not args.assemble:
        if not (args.weights and args.data):
            p.error("--weights and --data are needed to measure")
        args.name = args.name or Path(args.weights).stem
        (measure_costs if args.plans else measure)(file, args)
    file.with_suffix(".md").write_text(page(HEAD, read(file), ranks, plans), encoding="utf-8")


if __name__ == "__main__":
    main()
