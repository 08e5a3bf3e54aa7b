# yolo_qc_plugin, AGPL-3.0
"""A budget: the integer program, and a run whose layers have the widths that it decides."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from math import exp
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT, TINY, TINY_YAML
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.options import BUDGET_UNITS, split_budget
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.report.record import model_size
from yolo_qc_plugin.run import budget
from yolo_qc_plugin.run.allocation import BITS_OF_INPUTS, DROP, PERCENT_OF_USUAL, Layer, Problem
from yolo_qc_plugin.run.sensitivity import Probe
from yolo_qc_plugin.run.start import is_untrained

WIDTHS = (2, 4, 8)


def small_problem(seed: int) -> Problem:
    """Four layers: the first reads the image, two read one tensor, the last has fixed weights."""
    draw = random.Random(seed)
    reads = {"a": "", "b": "t", "c": "t", "d": "u"}
    layers = {
        name: Layer(
            draw.randint(10, 500),
            draw.randint(100, 9000),
            tensor,
            (8,) if name == "d" else WIDTHS,
            (8,) if name == "a" else WIDTHS,
        )
        for name, tensor in reads.items()
    }
    costs = {
        kind: {name: {str(w): draw.random() * 3.0**-w for w in WIDTHS} for name in names}
        for kind, names in (("weights", "abcd"), ("activations", "tu"))
    }
    return Problem(layers, costs, other_bits=5000, usual={"a": (4, 8), "b": (4, 4), "c": (2, 4), "d": (8, 4)})


def all_plans(problem: Problem):
    """Every choice of widths that gives the readers of one tensor one width."""
    pairs = [[*product(layer.weight_bits, layer.act_bits)] for layer in problem.layers.values()]
    for choice in product(*pairs):
        plan = dict(zip(problem.layers, choice))
        if plan["b"][1] == plan["c"][1]:
            yield plan


@pytest.mark.parametrize("unit", BUDGET_UNITS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_the_plan_is_the_best_of_all_within_the_budget(unit, seed, share):
    problem = small_problem(seed)
    low, high = problem.reach(unit)
    limit = low + share * (high - low) + 1e-9
    plan = problem.solve(unit, limit)
    goal = "MB" if unit == "%drop" else "%drop"
    within = [other for other in all_plans(problem) if problem.amount(unit, other) <= limit + 1e-6]
    assert plan in all_plans(problem) and problem.amount(unit, plan) <= limit + 1e-6
    assert problem.amount(goal, plan) == pytest.approx(min(problem.amount(goal, o) for o in within), rel=1e-3)
    amounts = [problem.amount(unit, other) for other in all_plans(problem)]
    assert (low, high) == pytest.approx((min(amounts), max(amounts)))


def test_costs_that_are_all_0_leave_the_budget():
    """As of an untrained classifier, whose outputs do not depend on its layers."""
    problem = small_problem(0)
    nothing = {kind: {n: dict.fromkeys(of, 0.0) for n, of in found.items()} for kind, found in problem.costs.items()}
    plan = replace(problem, costs=nothing).solve("bits", 4.0)
    assert problem.amount("bits", plan) <= 4.0


def test_a_tensor_counts_once():
    problem = small_problem(0)
    plan = {"a": (8, 8), "b": (8, 2), "c": (8, 2), "d": (8, 8)}
    total = DROP["weights"] * sum(problem.costs["weights"][n]["8"] for n in "abcd")
    of_tensors = problem.costs["activations"]
    total += DROP["activations"] * (of_tensors["t"]["2"] + of_tensors["u"]["8"])
    assert problem._shares("%drop")("b", 8, 2) > problem._shares("%drop")("c", 8, 2)
    assert sum(problem._shares("%drop")(n, *w) for n, w in plan.items()) == pytest.approx(total)
    assert problem.amount("%drop", plan) == pytest.approx(100 * (1 - exp(-total)))


@pytest.mark.parametrize("unit", BUDGET_UNITS)
def test_a_budget_out_of_reach_names_the_range_which_is_within_reach(unit):
    problem = replace(small_problem(1), other_bits=1e7)
    for amount in (1e-4,) if unit in PERCENT_OF_USUAL else (1e-4, 1e6):
        with pytest.raises(QCError, match=r"budget='.*' is out of reach; give [0-9.]+ to [0-9.]+") as e:
            budget.solve(problem, f"{amount:f}{unit}")
        told = str(e.value).partition("give ")[2].split()
        assert told[2].rstrip(",").endswith(unit)
        for end in told[0] + unit, told[2].rstrip(","):
            budget.check_reach(problem, end)
            assert split_budget(end)[1] == unit


@pytest.mark.parametrize("unit", PERCENT_OF_USUAL)
def test_more_than_the_largest_widths_use_is_no_fault_in_percent_of_the_usual(unit):
    """A target's own budget is never in the way, whatever the model."""
    problem = small_problem(1)
    plan = budget.solve(problem, f"1000{unit}")["layer_bits"]
    assert plan == {name: f"W{max(of.weight_bits)}A{max(of.act_bits)}" for name, of in problem.layers.items()}


@pytest.fixture(scope="module")
def planned(digits, tmp_path_factory):
    """(run that was planned to 3 bits a weight, its folder, the arguments of train())."""
    folder = tmp_path_factory.mktemp("budget")
    arguments = {**TINY, "data": str(digits), "project": str(folder), "name": "run", "epochs": 2}
    yolo = YOLO(FLOAT)
    options = {"budget": "3.5bits", "layer_bits": "model.3.conv:W5", "act_bits": 8, "telemetry": False}
    add_qc_callbacks(yolo, **options)
    seen = {}
    yolo.add_callback("on_train_epoch_start", lambda trainer: seen.update({trainer.epoch: trainer.wdir}))
    yolo.train(**arguments)
    return yolo, folder / "run", {**arguments, "name": "again"}


def test_a_plan_measures_some_widths_alone(planned):
    """Of half the size of training; the others follow from them."""
    found = json.loads((planned[1] / "qc" / "sensitivity.json").read_text())
    measured = {tuple(costs) for costs in found["costs"]["weights"].values()}
    assert measured == {("8",), ("5",), ("2", "3", "4", "6")}  # edges, what `layer_bits` names, the rest
    assert found["about"]["imgsz"] == 64  # the least of TINY


def widths_of(model) -> dict[str, str]:
    """Name -> widths as `layer_bits` takes them."""
    return {name: f"W{conv.weight_quant.bits}A{conv.act_quant.bits}" for name, conv in quant_convs(model)}


def test_a_run_has_the_widths_of_its_plan(planned):
    _, run, _ = planned
    plan = json.loads((run / "qc" / "plan.json").read_text())
    model, _ = load_checkpoint(run / "weights" / "best.pt")
    report = json.loads((run / "qc" / "report.json").read_text())
    widths = widths_of(model)
    assert widths == plan["layer_bits"] == {x["name"]: f"W{x['weight_bits']}A{x['act_bits']}" for x in report["layers"]}
    assert len(Counter(widths.values())) > 2  # it has chosen
    assert widths["model.0.conv"] == widths["model.7.cv2.0.2"] == "W8A8"  # edges
    assert widths["model.3.conv"] == "W5A8"  # the user's
    bits = [(conv.weight.numel(), conv.weight_quant.bits) for _, conv in quant_convs(model)]
    mean = sum(n * b for n, b in bits) / sum(n for n, _ in bits)
    assert 3.3 < mean <= 3.5 and plan["takes"]["bits"] == pytest.approx(mean)
    assert plan["takes"]["MB"] == pytest.approx(model_size(model)["quantized"])
    assert model.qc.options.budget == "3.5bits"


def test_the_report_has_the_promise_and_what_became_of_it(planned):
    yolo, run, _ = planned
    report = json.loads((run / "qc" / "report.json").read_text())
    found, metrics = report["budget"], report["metrics"]
    expected = 100 * (1 - metrics[report["kept"]]["map50_95"] / metrics["float"]["map50_95"])
    assert found["measured_drop"] == pytest.approx(expected) and found["kept"] is None
    told = f"{found['takes']['%drop']:.1f}%, measured after {yolo.trainer.ema.updates} {expected:.1f}%"
    assert told in budget.format_outcome(found)


@pytest.mark.parametrize("after,kept,word", [(0.40, True, ": kept"), (0.38, False, "NOT kept")])
def test_a_drop_that_was_promised_is_kept_or_said_not_to_be(after, kept, word, tmp_path):
    summary = {"budget": "1.0%drop", "takes": {"%drop": 0.9}}
    (tmp_path / budget.PLAN).write_text(json.dumps(summary))
    figures = {"float": {"map50_95": 0.401}, "qat": {"map50_95": 0.1}, "qc": {"map50_95": after}}
    found = budget.outcome(tmp_path, figures, "qc", steps=9)
    assert found["kept"] is kept and word in budget.format_outcome(found)


def test_a_plan_given_back_makes_the_same_run(planned):
    _, run, arguments = planned
    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, layer_bits=str(run / "qc" / "plan.json"), act_bits=8, telemetry=False)
    yolo.train(**arguments)
    folders = run, yolo.trainer.save_dir
    first, second = (load_checkpoint(folder / "weights" / "best.pt")[0].state_dict() for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (yolo.trainer.save_dir / "qc" / "plan.json").exists()


def test_a_resumed_run_takes_the_plan_from_its_checkpoint(digits, tmp_path, monkeypatch):
    def stop(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, budget="3.0bits", telemetry=False)
    yolo.add_callback("on_train_batch_start", stop)
    with pytest.raises(KeyboardInterrupt):
        yolo.train(**{**TINY, "data": str(digits), "project": str(tmp_path), "name": "run", "epochs": 2})
    plan = json.loads((tmp_path / "run" / "qc" / "plan.json").read_text())["layer_bits"]
    monkeypatch.setattr(budget, "_plan", None)  # what would search again
    resumed = YOLO(tmp_path / "run" / "weights" / "last.pt")
    resumed.train(resume=True)
    assert widths_of(load_checkpoint(tmp_path / "run" / "weights" / "best.pt")[0]) == plan


def test_another_process_takes_the_plan_of_rank_0(monkeypatch):
    monkeypatch.setattr(budget, "RANK", 1)
    monkeypatch.setattr(budget, "from_rank_0", lambda value: {"a": "W2A8"} if value is None else value)
    monkeypatch.setattr(budget, "_plan", None)  # it does not search itself
    config = budget.with_plan(None, None, QCConfig(budget="3bits", layer_bits={"b": 4}))
    assert config.layer_bits == {"b": 4, "a": "W2A8"} and config.budget == "3bits"


def test_a_bad_budget_ends_before_training(train, monkeypatch):
    monkeypatch.setattr(budget, "measure", None)  # not even costs are measured
    for amount in "0.001MB", "9MB", "1.9bits", "8.5bits":
        with pytest.raises(QCError, match=r"out of reach; give .* at 2 to 8 bits"):
            train({"budget": amount}, model=FLOAT)


def test_a_plan_of_another_model_is_refused(planned, train):
    _, run, _ = planned
    with pytest.raises(QCError, match=r"layer_bits='model.*' matches no convolution"):
        train({"layer_bits": str(run / "qc" / "plan.json")}, model="yolov5n.yaml")


def test_a_trained_start_is_planned_of_itself(train):
    """With no more operations on bits than the same width for all takes; of sizes as training takes them."""
    yolo = train({"telemetry": False}, model=FLOAT, imgsz=[32, 64])
    report = json.loads((yolo.trainer.save_dir / "qc" / "report.json").read_text())
    assert report["config"]["budget"] == "100%ops" and report["budget"]["takes"]["%ops"] <= 100
    assert len(set(widths_of(load_checkpoint(yolo.trainer.best)[0]).values())) > 2


@pytest.mark.parametrize("model,pretrained,untrained", [
    ("a.yaml", True, True), ("a.yml", False, True), ("a.yaml", "b.pt", False), ("a.pt", True, False),
    ("a.pt", False, True), ("a.pt", "b.pt", False),
])  # fmt: skip
def test_what_counts_as_untrained(model, pretrained, untrained):
    """What starts from no weights, as Ultralytics reads these arguments."""
    assert is_untrained(SimpleNamespace(args=SimpleNamespace(model=model, pretrained=pretrained))) is untrained


def test_a_start_that_is_not_trained_has_the_same_width_everywhere(train, monkeypatch):
    monkeypatch.setattr(budget, "_plan", None)  # what would search
    yolo = train({"target": "cpu", "telemetry": False})
    model, _ = load_checkpoint(yolo.trainer.best)
    assert set(widths_of(model).values()) == {"W7A8", "W4A8"}
    assert model.qc.options.budget is None


@pytest.mark.parametrize("load", [lambda yolo: yolo.load(FLOAT), lambda yolo: yolo])
def test_a_yaml_with_weights_beside_it_is_trained(load, digits, tmp_path, monkeypatch):
    """As `load` and `pretrained=` give them."""
    monkeypatch.setattr(budget, "_plan", lambda *_: {"model.1.conv": "W6A6"})
    yolo = load(YOLO(TINY_YAML))
    given = {} if yolo.overrides.get("pretrained") else {"pretrained": str(FLOAT)}
    add_qc_callbacks(yolo, telemetry=False, correction="off")
    yolo.train(**{**TINY, "data": str(digits), "project": str(tmp_path), "name": "run", **given})
    assert "W6A6" in widths_of(load_checkpoint(yolo.trainer.best)[0]).values()


@pytest.mark.parametrize(
    "target,widths",
    [(None, range(2, 9)), ("cpu", (4, 7)), ("openvino", (4, 7)), ("litert", (4, 8)), ("fpga", range(2, 9))],
)
def test_a_target_has_the_widths_that_make_its_file_smaller(target, widths):
    assert QCConfig.from_options({"budget": "1MB", "target": target}).runs_on.widths == tuple(widths)


@pytest.mark.parametrize("target,edge", [("cpu", 7), ("openvino", 7), ("litert", 8), ("tensorrt", 8)])
def test_edges_have_no_wider_weights_than_the_target_computes(target, edge):
    config = QCConfig.from_options({"target": target})
    probe = Probe(YOLO(FLOAT).model, config, [torch.rand(1, 3, 64, 64)])
    layers = budget.layers_of(probe, config, "%size")
    assert (layers["model.0.conv"].weight_bits, layers["model.0.conv"].act_bits) == ((edge,), (8,))
    assert layers["model.1.conv"].weight_bits == config.runs_on.widths


def test_percents_of_the_usual_are_of_the_widths_that_other_options_give():
    config = QCConfig(bits=4, layer_bits={"model.3.conv": "W6"})
    probe = Probe(YOLO(FLOAT).model, config, [torch.rand(1, 3, 64, 64)])
    layers, usual = budget.layers_of(probe, config, "%ops"), budget.usual_plan(probe)
    problem = Problem(layers, {}, budget.bits_beside_weights(probe), usual)
    assert usual == {name: (conv.weight_quant.bits, conv.act_quant.bits) for name, conv in probe.convs.items()}
    size = model_size(probe.model)["quantized"]
    assert problem.amount("MB", usual) == pytest.approx(size)
    assert problem.amount("%size", usual) == pytest.approx(100) == problem.amount("%ops", usual)
    wider = {**usual, "model.1.conv": (8, 4)}
    more = probe.convs["model.1.conv"].weight.numel() * 4 / 8e6
    assert problem.amount("%size", wider) == pytest.approx(100 * (1 + more / size))
    ops = sum(layer.macs * w * a for layer, (w, a) in zip(layers.values(), usual.values()))
    assert problem.amount("%ops", wider) == pytest.approx(100 * (1 + 16 * layers["model.1.conv"].macs / ops))


def test_inputs_are_free_where_the_budget_counts_them():
    config = QCConfig(act_bits=6, edge_bits=7, layer_bits={"model.1.conv": "A5"})
    probe = Probe(YOLO(FLOAT).model, config, [torch.rand(1, 3, 64, 64)])
    for unit in BUDGET_UNITS:
        inner = tuple(range(2, 9)) if unit in BITS_OF_INPUTS else (6,)
        layers = budget.layers_of(probe, config, unit)
        assert layers["model.3.conv"].act_bits == inner and layers["model.3.conv"].weight_bits == tuple(range(2, 9))
        assert layers["model.1.conv"].act_bits == (5,) and layers["model.1.conv"].weight_bits == tuple(range(2, 9))
        assert layers["model.0.conv"].weight_bits == layers["model.0.conv"].act_bits == (7,)
        assert layers["model.0.conv"].reads == ""
        assert layers["model.2.cv1.conv"].reads == layers["model.2.cv2.conv"].reads  # they read one tensor
