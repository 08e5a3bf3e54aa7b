# yolo_qc_plugin, AGPL-3.0
"""A run's budget: widths for each layer, found before the quantizers are put in, and what became of the promise.

qc/sensitivity.json has the costs that the plan was made from, and qc/plan.json the plan, which `layer_bits` takes. The
checkpoint holds the plan in its options' `layer_bits`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import Any

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import RANK

from ..config import QCConfig, QCError
from ..files import replacing
from ..host import architecture, log
from ..host.distributed import from_rank_0
from ..host.images import spread_out
from ..host.photographs import image_files
from ..options import AUTO, BUDGET_UNITS, split_budget
from ..report.costs import FILE
from ..report.record import FIGURES, model_size
from .allocation import BITS_OF_INPUTS, PERCENT_OF_USUAL, Layer, Plan, Problem
from .sensitivity import IMAGES, Probe, Wanted, completed, measure, prepare, size_for, to_measure
from .start import is_untrained

PLAN = "plan.json"  # in a run's qc/


def with_plan(trainer: BaseTrainer, model: BaseModel, config: QCConfig) -> QCConfig:
    """The options with a width for each layer, where they have a budget; rank 0 decides.

    `budget` is then no longer "auto", but what was meant by it.

    Args:
        trainer: Has read its data set; its model is made, but not yet injected.
        model: That float model.
        config: The options.

    Raises:
        QCError: If the budget is out of reach; the message names the range.
    """
    budget = config.chosen_budget
    if budget and config.budget == AUTO and is_untrained(trainer):
        log.info("all layers have the same widths: only of a trained model one can see where bits are needed")
        budget = None
    config = replace(config, budget=budget)
    if budget is None:
        return config
    plan = from_rank_0(_plan(trainer, model, config, budget) if RANK in {-1, 0} else None)
    return replace(config, layer_bits={**config.layer_bits, **plan})


def _plan(trainer: BaseTrainer, model: BaseModel, config: QCConfig, budget: str) -> dict[str, str]:
    """Measure, decide, write and say; returns name -> widths as `layer_bits` takes them."""
    unit = split_budget(budget)[1]
    folder = trainer.save_dir / "qc"
    files = spread_out(image_files(trainer.data["train"], str(trainer.args.data)), IMAGES)
    probe, about = prepare(model, config, files, size_for(trainer.args.imgsz), trainer.device)
    layers = layers_of(probe, config, unit)
    problem = Problem(layers, {}, bits_beside_weights(probe), usual_plan(probe))
    if unit != "%drop":  # before what takes minutes
        check_reach(problem, budget)
    folder.mkdir(parents=True, exist_ok=True)
    needed = wanted(layers)
    costs = measure(probe, to_measure(needed), about, folder / FILE)
    summary = solve(replace(problem, costs=completed(costs, needed)), budget)
    with replacing(folder / PLAN) as temporary:
        temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    for line in format_plan(summary):
        log.info(line)
    log.info(f"the plan is in {folder / PLAN}, which qc_layer_bits takes")
    return summary["layer_bits"]


def layers_of(probe: Probe, config: QCConfig, unit: str) -> dict[str, Layer]:
    """The layers with the widths that they may have.

    Edges have `edge_widths`, and what `layer_bits` names keeps its width. Inputs are free where the budget counts them.
    """
    edges = architecture.edge_convs(probe.model)
    free = config.runs_on.widths
    layers = {}
    for name, conv in probe.convs.items():
        w, a = config.named_bits(name)
        edge_w, edge_a = config.edge_widths if name in edges else (None, None)
        body = None if unit in BITS_OF_INPUTS else config.body_bits[1]
        fixed_w, fixed_a = w or edge_w, a or edge_a or body
        reads = next((t for t, readers in probe.readers.items() if name in readers), "")
        weight_bits, act_bits = (free if fixed is None else (fixed,) for fixed in (fixed_w, fixed_a))
        layers[name] = Layer(conv.weight.numel(), probe.macs[name], reads, weight_bits, act_bits)
    return layers


def wanted(layers: dict[str, Layer]) -> Wanted:
    """The widths at which costs are needed."""
    of_weights = {("weights", name): layer.weight_bits for name, layer in layers.items()}
    of_tensors = {("activations", layer.reads): layer.act_bits for layer in layers.values() if layer.reads}
    return {**of_weights, **of_tensors}


def bits_beside_weights(probe: Probe) -> float:
    """Of the file: biases, scales, and what is not quantized."""
    of_weights = sum(conv.weight.numel() * conv.weight_quant.bits for conv in probe.convs.values())
    return model_size(probe.model)["quantized"] * 8e6 - of_weights


def usual_plan(probe: Probe) -> Plan:
    """The widths that the options give; to be asked before the probe has measured."""
    return {name: (conv.weight_quant.bits, conv.act_quant.bits) for name, conv in probe.convs.items()}


def check_reach(problem: Problem, budget: str) -> None:
    """Refuse a budget that the least widths exceed, or that the largest do not use.

    One of PERCENT_OF_USUAL, which targets give by themselves, may be more than the largest widths use.

    Raises:
        QCError: Naming the range.
    """
    limit, unit = split_budget(budget)
    low, high = problem.reach(unit)
    if limit < low or (limit > high and unit not in PERCENT_OF_USUAL):
        digits = next((d for d in range(2, 9) if ceil(low * 10**d) < floor(high * 10**d)), 9)
        low, high = ceil(low * 10**digits) / 10**digits, floor(high * 10**digits) / 10**digits
        widths = sorted({w for layer in problem.layers.values() for w in layer.weight_bits})
        raise QCError(
            f"QC: budget={budget!r} is out of reach; give {low:.{digits}f} to {high:.{digits}f}{unit}, which this "
            f"model takes at {widths[0]} to {widths[-1]} bits with the widths that other options set."
        )


def solve(problem: Problem, budget: str) -> dict[str, Any]:
    """The plan as it is written to the file.

    Returns:
        "budget"; "layer_bits", name -> widths as the option of that name takes them; "takes", unit -> amount.

    Raises:
        QCError: If the budget is out of reach.
    """
    check_reach(problem, budget)
    limit, unit = split_budget(budget)
    plan = problem.solve(unit, limit)
    layer_bits = {name: f"W{w}A{a}" for name, (w, a) in plan.items()}
    return {"budget": budget, "layer_bits": layer_bits, "takes": {u: problem.amount(u, plan) for u in BUDGET_UNITS}}


def format_plan(summary: dict[str, Any]) -> list[str]:
    """A plan in two lines: what it takes, and how many layers have each width."""
    takes = ", ".join(f"{amount:.{2 if unit == 'MB' else 1}f}{unit}" for unit, amount in summary["takes"].items())
    widths = Counter(summary["layer_bits"].values())
    return [
        f"budget {summary['budget']}: takes {takes} (predicted)",
        f"layers: {', '.join(f'{count} at {name}' for name, count in sorted(widths.items()))}",
    ]


def planned_widths(folder: Path) -> dict[str, str]:
    """Layer -> widths that the plan in a run's qc/ gives it; empty where there is none."""
    file = folder / PLAN
    return json.loads(file.read_text(encoding="utf-8"))["layer_bits"] if file.exists() else {}


def outcome(folder: Path, metrics: dict[str, Any], kept: str, steps: int) -> dict[str, Any] | None:
    """What became of the plan of a run, for the report; None where the folder has none.

    Args:
        folder: The run's qc/.
        metrics: "float" and what was kept -> figures of `report.record.figures_of`.
        kept: "qat" or "qc".
        steps: Of the optimizer; the prediction is for hundreds.

    Returns:
        The plan without its widths, which the report has layer by layer; "figure"; "measured_drop", in percent of the
        float model's figure; "steps"; and "kept", whether a budget of a drop is, None for other budgets.
    """
    file = folder / PLAN
    if not file.exists() or not metrics["float"]:
        return None
    summary = json.loads(file.read_text(encoding="utf-8"))
    figure = next(name for name, _ in FIGURES.values() if name in metrics["float"])
    drop = 100 * (1 - metrics[kept][figure] / max(metrics["float"][figure], 1e-9))
    limit, unit = split_budget(summary["budget"])
    kept_promise = drop <= limit if unit == "%drop" else None
    return {
        "budget": summary["budget"], "takes": summary["takes"],
        "figure": figure, "measured_drop": drop, "steps": steps, "kept": kept_promise,
    }  # fmt: skip


def format_outcome(found: dict[str, Any]) -> str:
    """The outcome in a line."""
    verdict = {True: ": kept", False: ": NOT kept", None: ""}[found["kept"]]
    return (
        f"budget {found['budget']}: drop of {found['figure']} predicted for hundreds of steps "
        f"{found['takes']['%drop']:.1f}%, measured after {found['steps']} {found['measured_drop']:.1f}%{verdict}"
    )
