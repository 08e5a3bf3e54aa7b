# yolo_qc_plugin, AGPL-3.0
"""The experiments under examples/: cells that resume, what is refused, the records and their pages."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import cells  # noqa: E402
import coco  # noqa: E402
import measured  # noqa: E402
import paper  # noqa: E402
import record  # noqa: E402
import trials  # noqa: E402
from conftest import CHECKPOINTS, TINY, TINY_YAML  # noqa: E402

from yolo_qc_plugin import add_qc_callbacks  # noqa: E402
from yolo_qc_plugin.config import QCConfig  # noqa: E402
from yolo_qc_plugin.data.digits import compose  # noqa: E402
from yolo_qc_plugin.host import distillation  # noqa: E402
from yolo_qc_plugin.quant import quantizer  # noqa: E402
from yolo_qc_plugin.quant.layers import QuantConv2d, quant_convs  # noqa: E402
from yolo_qc_plugin.quant.observers import mse_scale, mse_scale_offset  # noqa: E402
from yolo_qc_plugin.tools.evaluate import detect, evaluate  # noqa: E402


def request_of(digits, tmp_path, cell: cells.Cell | None = None, **options) -> dict:
    given = {k: v for k, v in TINY.items() if k not in {"imgsz", "epochs", "device"}} | {"epochs": 2}
    args = Namespace(data=str(digits), weights=str(TINY_YAML), device="cpu", epochs=2, imgsz=64, qc=[], runs=tmp_path)
    args.coco = False
    args.train = [f"{k}={v}" for k, v in given.items()]
    cell = cell or cells.Cell("EMA-4bit", {"bits": 4, "ema_decay": 0.99, **options})
    return cells.request(cell, 0, args)


def test_a_killed_cell_goes_on_and_fills_its_row(train, digits, tmp_path):
    request = request_of(digits, tmp_path)

    def kill(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(request["options"], {"on_train_batch_start": kill}, name="EMA-4bit-seed0", **request["recipe"])
    assert not cells.is_done(request, {})
    cells.work(request)
    found = json.loads(Path(request["target"]).read_text())
    assert found["resumed"] and found["steps"] == 3 and found["model"] == "tiny"
    assert found["images"] == {"train": 24, "val": 8} and str(tmp_path) not in json.dumps(found)
    assert set(found) >= {"versions", "commit", "date", "machine"}
    assert cells.is_done(request, {})
    with pytest.raises(SystemExit, match="was made with other epochs; give another --name"):
        cells.is_done({**request, "recipe": {**request["recipe"], "epochs": 3, "device": "0"}}, {})
    with pytest.raises(SystemExit, match="was made with other options"):
        cells.is_done({**request, "options": {"bits": 3}}, {})

    joined = record.join(tmp_path / "paper.json", "digits-yolov5n", tmp_path)
    Path(request["target"]).unlink()
    assert record.read(tmp_path / "paper.json") == joined and joined["digits-yolov5n"]["cells"] == {
        "EMA-4bit-seed0": found
    }
    assert cells.is_done(request, joined["digits-yolov5n"]["cells"])


def test_a_run_is_corrected_by_its_teacher_or_by_labels_alone(digits, tmp_path):
    """The same way twice is the same; without the teacher it is another."""
    source = cells.Cell("source", {"bits": 4, "correction": "off"})
    ways = {"a": {}, "b": {}, "c": {"teacher": "off"}}
    again = [cells.Cell(name, {"correction": "channel", **of}, "correct", source="source") for name, of in ways.items()]
    shifts = []
    for cell in source, *again:
        request = {**request_of(digits, tmp_path, cell), "weights": str(CHECKPOINTS / "float.pt")}
        with measured.keeping_corrected():
            cells.work(request)
        assert json.loads(Path(request["target"]).read_text())["options"] == cell.options
        if cell.source:
            model, _ = load_checkpoint(Path(request["run"]) / "weights" / "qc.pt")
            shifts.append([conv.correction.beta.flatten().tolist() for _, conv in quant_convs(model)])
    assert shifts[0] == shifts[1] != shifts[2]


def test_a_cell_that_fails_says_why(digits, tmp_path, capsys):
    assert not cells.start(request_of(digits, tmp_path, bitz=4), threads=1)
    said = capsys.readouterr().out
    assert "EMA-4bit-seed0: FAILED" in said and "unknown option 'bitz'" in said and said.count("\n") == 1


def test_a_cell_waits_for_the_one_that_it_begins_from(digits, tmp_path, capsys):
    """And no path is part of what a cell is."""
    cell = cells.Cell(
        "later", {"correction": "tensor"}, "correct", source="EMA-4bit", recipe={"distill_model": "a/b.pt"}
    )
    request = request_of(digits, tmp_path, cell)
    assert cells.identity(request)["recipe"]["distill_model"] == "b.pt"
    assert not cells.start(request, threads=1)
    source = tmp_path / "EMA-4bit-seed0" / "weights" / "qat.pt"
    assert f"later-seed0: FAILED: {source} is missing" in capsys.readouterr().out


def test_pages_from_files(tmp_path):
    """Two seeds of three rows: means, deviations, the share of float, and an ordering that holds."""
    one = {"recipe": {"epochs": 2}, "data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}}
    one |= {"images": {"train": 24, "val": 8}}
    figures = {
        "float": [(0.50,), (0.60,)],
        "LSQ-4bit": [(0.30, 0.40), (0.40, 0.48)],
        "EMA-4bit": [(0.44, 0.4), (0.5, 0.6)],
    }
    recorded = {}
    for name, seeds in figures.items():
        for seed, values in enumerate(seeds):
            rows = ["trained"] if name == "float" else ["qat", "qc"]
            metrics = {row: {"map50_95": v, "map50": v} for row, v in zip(rows, values)}
            recorded[f"{name}-seed{seed}"] = {**one, "recipe": {**one["recipe"], "seed": seed}, "metrics": metrics}
    content = {"cells": recorded, "notes": ["Two seeds."]}
    page = record.page(["# Page"], {"d-yolov5n": content}, *paper.TABLES.values(), paper.drawn).splitlines()
    assert page[-1] == "Two seeds." and not [line for line in page if "Table 2" in line or "Table 3" in line]
    assert "| float trained on | - | 32 | 2 | 55.0 ± 7.1 | 100.0% | 55.0 ± 7.1 | 28.0 |" in page
    assert "| LSQ | ✗ | 4 | 2 | 35.0 ± 7.1 | 63.6% | 35.0 ± 7.1 | 20.6 |" in page
    assert "| EMA-4bit | LSQ-4bit | +14.0, +10.0 | +12.00 | 2.00 | holds |" in page
    assert "| EMA-4bit + QC | EMA-4bit | -4.0, +10.0 | +3.00 | 7.00 | noise |" in page
    recorded["EMA-4bit-decay0.9-seed0"] = recorded["EMA-4bit-seed0"]
    page = paper.table3("d-yolov5n", content)
    assert any("decays above that are the same here" in line and "0.4375" in line for line in page)


def cell_of(seed: int, **states: float) -> dict:
    """What a cell records, with AP by state."""
    return {"recipe": {"seed": seed}, "metrics": {state: {"ap": ap} for state, ap in states.items()}}


def test_differences_are_paired_over_images_and_averaged_over_seeds(tmp_path):
    """Of what two cells share; in each resample the mean over seeds, so that opposite errors of seeds cancel."""
    rng = np.random.default_rng(0)
    base, noise = rng.normal(0.3, 0.05, 1001), rng.normal(0, 0.01, 1001)  # AP of all images, then of resamples
    resampled = {
        ("a", 0): base + 0.02 + noise,
        ("a", 1): base + 0.04 - noise,
        ("a", 2): base,  # b has no such seed
        ("b", 0): base,
        ("b", 1): base,
    }
    content = {"cells": {}, "notes": []}
    for (name, seed), values in resampled.items():
        file = tmp_path / "runs" / f"{name}-seed{seed}" / "coco" / "qat" / "resampled.npy"
        file.parent.mkdir(parents=True)
        np.save(file, values)
        content["cells"][f"{name}-seed{seed}"] = cell_of(seed, qat=values[0])
    pair, absent = (("a", "qat"), ("b", "qat")), (("a", "qc"), ("b", "qat"))
    archive, runs, gone = tmp_path / "coco.npz", tmp_path / "runs", tmp_path / "elsewhere"
    kept = measured.keep_resampled(archive, "set", runs)
    found = measured.differences(content, "set", kept, runs, [pair, absent])
    (one,) = found.values()
    assert one["seeds"] == [0, 1] and one["difference"] == pytest.approx(3, abs=2e-3)
    assert one["interval"] == pytest.approx([3, 3], abs=4e-3)

    archived = measured.keep_resampled(archive, "set", gone)  # on another machine
    assert archived.keys() == kept.keys() == {f"set/{name}-seed{seed}/qat" for name, seed in resampled}
    assert measured.differences(content, "set", archived, gone, [pair]) == found
    np.save(runs / "a-seed2" / "coco" / "qat" / "resampled.npy", base + 0.06)
    content["cells"]["b-seed2"] = cell_of(2, qat=base[0])
    later = measured.keep_resampled(archive, "set", runs)
    assert measured.differences({**content, "differences": found}, "set", later, runs, [pair]) == found  # b has no file
    partly = {**content, "differences": found}
    content["cells"]["a-seed2"] = cell_of(2, qat=base[0] + 0.06)
    assert paper.difference(partly, *pair, "ap")[-2:] == ["+3.00 to +3.00 (0, 1)", "holds"]
    later["set/b-seed2/qat"] = archived["set/b-seed0/qat"]
    (more,) = measured.differences(partly, "set", later, runs, [pair]).values()
    assert more["seeds"] == [0, 1, 2] and more["difference"] == pytest.approx(4, abs=2e-3)
    del content["cells"]["b-seed2"]

    content["differences"] = found
    columns = paper.difference(content, *pair, "ap")
    assert columns[-2:] == ["+3.00 to +3.00", "holds"] and paper.difference(content, *absent, "ap") == []
    one["interval"] = [-0.5, 6.5]
    assert paper.difference(content, *pair, "ap")[-2:] == ["-0.50 to +6.50", "noise"]


def test_a_cell_has_cocos_ap_of_each_state(digits, tmp_path):
    """Of one that is calibrated alone, and of a trained one before and after QC, whichever of them best.pt holds."""
    found = {}
    for cell in cells.Cell("start", {"bits": 4}, "start"), cells.Cell("trained", {"bits": 4}):
        request = {**request_of(digits, tmp_path, cell), "coco": True, "weights": str(CHECKPOINTS / "float.pt")}
        cells.work(request)
        found[cell.name] = json.loads(Path(request["target"]).read_text())
    assert found["start"]["steps"] == 0 and found["start"]["metrics"].keys() == {"qat"}
    for name, state in ("start", "qat"), ("trained", "qat"), ("trained", "qc"):
        run = tmp_path / f"{name}-seed0"
        measured_again = evaluate(run / "weights" / f"{state}.pt", digits, imgsz=64)
        figures = found[name]["metrics"][state]
        assert figures["ap"] == pytest.approx(measured_again["coco"]["bbox"]["AP"], abs=1e-12) and figures["ap"] > 0.01
        assert figures["map50_95"] == pytest.approx(measured_again["ultralytics"]["bbox"]["map50_95"], abs=1e-12)
        assert np.load(run / "coco" / state / "resampled.npy").shape == (1001,)
    assert found["trained"]["config"]["budget"] is None  # the start is trained: else its widths would be planned
    assert all(found["start"][key] == found["trained"][key] for key in ("size_mb", "operations"))
    states = {file: load_checkpoint(run / "weights" / f"{file}.pt")[0].state_dict() for file in ("best", "qat", "qc")}
    kept = states[found["trained"]["kept"]]
    assert kept.keys() == states["best"].keys() and all(torch.equal(v, kept[k]) for k, v in states["best"].items())
    assert any(not torch.equal(v, states["qat"][k]) for k, v in states["qc"].items())


STAGES = [name for name, of in trials.CALLBACKS.items() if "on_train_epoch_start" in of]


@pytest.mark.parametrize("name", STAGES)
def test_trials_of_stages(digits, tmp_path, name):
    """Of what is rounded, to how many bits, and of what is trained: by epoch, in four of them."""
    model, seen = YOLO(CHECKPOINTS / "float.pt"), []
    cells.add_trial(model, name)
    add_qc_callbacks(model, bits=4, budget=None, correction="off", rounding="nearest")

    def look(trainer):
        _, conv = list(quant_convs(trainer.model))[1]
        _, averaged = list(quant_convs(trainer.ema.ema))[1]
        rounds = {(c.act_quant.bits if c.act_quant.enabled else None) for c in (conv, averaged)}
        seen.append((trainer.epoch, rounds, conv.weight.detach().clone(), conv.weight_quant.scale.detach().clone()))

    model.add_callback("on_train_batch_start", look)
    arguments = {**TINY, "epochs": 4, "nbs": 8, "optimizer": "Adam", "fraction": 0.5}
    model.train(data=str(digits), project=str(tmp_path), name="run", **arguments)
    bits = {"activations last": (None, None, 4, 4), "activations in stages": (6, 5, 4, 4)}.get(name, (4,) * 4)
    for (epoch, rounds, *before), (_, _, *after) in pairwise(seen):
        assert rounds == {bits[epoch]}
        weight, scale = (not torch.equal(*pair) for pair in zip(before, after))
        assert scale and weight == (name != "weights rest" or epoch < 3)
    assert len(seen) == 8


def test_gradients_of_branches_count_alike():
    """Outputs stay, and so do gradients behind the last branch; further back they change."""
    x = torch.zeros(2, requires_grad=True)
    first, second = trials.Fork.apply(x, 2)
    (first * torch.tensor([3.0, 0.0]) + second * torch.tensor([0.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [3.5, 3.5]  # each of the norm that they have in the mean
    x.grad = None
    (trials.Fork.apply(x, 2)[0] * 100).sum().backward()  # the other branch gives back nothing
    assert x.grad.tolist() == [50.0, 50.0]

    model = load_checkpoint(CHECKPOINTS / "float.pt")[0].float().train()

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        output = model(torch.rand(2, 3, 64, 64))
        sum(x.square().mean() for x in (output["boxes"], output["scores"])).backward()
        return output["scores"].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.requires_grad_(True)
    plain, before = step()
    trials.gradients_balanced(SimpleNamespace(model=model))
    balanced, after = step()
    last = f"model.{len(model.model) - 1}."
    changed = {n for n in before if not torch.allclose(before[n], after[n], rtol=1e-3, atol=1e-9)}
    assert torch.equal(plain, balanced) and changed and not any(n.startswith(last) for n in changed)
    assert any(n.startswith("model.0.") for n in changed)


def test_scores_by_overlap():
    """Equal outputs lose nothing; a box that is off has its score drawn down, whatever its class."""
    torch.manual_seed(0)
    teacher = {"scores": torch.randn(1, 3, 5), "boxes": torch.rand(1, 4, 5) * 4 + 1}
    teacher["feats"] = [torch.zeros(1, 1, 1, 5)]
    same = {**teacher, "scores": teacher["scores"].clone().requires_grad_()}
    off = {**same, "boxes": teacher["boxes"] * torch.tensor([1, 1, 1, 1, 3.0])}  # nine times the area, the last place
    losses = [trials.aligned_loss(trials.OUTPUTS_LOSS, student, teacher, 1, 1.0, 0.0) for student in (same, off)]
    assert losses[0].item() == pytest.approx(0, abs=1e-5) and losses[1] > 0.1
    losses[1].backward()
    assert (same["scores"].grad[..., -1] > 1e-3).all() and same["scores"].grad[..., :-1].abs().max() < 1e-5
    bins = torch.full((1, 4 * 8, 2), -50.0)
    bins[:, 3::8] = 50  # all of a distribution in its fourth bin
    assert trials.distances(bins, 8).flatten().tolist() == pytest.approx([3.0] * 8)
    boxes = torch.tensor([[[1.0], [1.0], [1.0], [1.0]], [[1.0], [1.0], [3.0], [1.0]]])
    assert trials.overlap(boxes[:1], boxes[1:]).item() == pytest.approx(0.5)


def test_trials_of_starts():
    """Each is near the start of least squares where nothing lies far out, and cuts off an outlier less or more."""
    torch.manual_seed(0)
    x = torch.cat([torch.rand(20000) * 2 - 0.5, torch.tensor([8.0])])
    least = mse_scale_offset(x, 15)
    power, percentile = (with_offset(x, 15) for _, with_offset in trials.STARTS.values())
    assert percentile[0] < power[0] and percentile[0] == pytest.approx(2 / 15, rel=0.02)
    assert power[0] == pytest.approx(least[0].item(), rel=0.15) and power[0] >= least[0]
    for scale, offset in (power, percentile):
        assert (offset / scale).round() == pytest.approx(
            (offset / scale).item(), abs=1e-4
        ) and -15 <= offset / scale < 0
    short = torch.rand(4, 16) - 0.5  # of a 1x1 convolution: percentiles of few values are near the largest
    second, largest = short.abs().sort(1).values[:, -2:].T
    by_rows = trials.by_percentile(short, -8, 7) * 7
    assert ((by_rows > (largest + second) / 2) & (by_rows < largest)).all()
    rows = x[:20000].view(4, -1)
    for by_row, _ in trials.STARTS.values():
        assert by_row(rows, -8, 7).tolist() == pytest.approx(mse_scale(rows, -8, 7).tolist(), rel=0.15)


def test_a_cell_runs_its_trial(digits, tmp_path, monkeypatch):
    """Runs of one seed are the same but for it, which changes the scales that they end in."""

    def scales(cell, trial):
        cell = cells.Cell(cell, {"bits": 4, "correction": "off"}, recipe={"trial": trial} if trial else {})
        request = {**request_of(digits, tmp_path, cell), "weights": str(CHECKPOINTS / "float.pt")}
        with monkeypatch.context() as patch:
            for replaced in ("mse_scale", "mse_scale_offset"):
                patch.setattr(quantizer, replaced, getattr(quantizer, replaced))  # so that it comes back
            cells.work(request)
        assert json.loads(Path(request["target"]).read_text())["recipe"].get("trial") == trial
        model, _ = load_checkpoint(Path(request["run"]) / "weights" / "qat.pt")
        return [(conv.act_quant.scale.item(), conv.weight_quant.scale.mean().item()) for _, conv in quant_convs(model)]

    tried = [*trials.STARTS, *(name for name in trials.CALLBACKS if name not in STAGES)]
    first, *others, last = (scales(f"cell{i}", name) for i, name in enumerate((None, *tried, None)))
    assert first == last and first not in others and len({tuple(found) for found in others}) == len(tried)
    assert distillation.outputs_loss is trials.OUTPUTS_LOSS


def test_a_soft_model_is_not_deployed(digits):
    """Else it would compute integers; its weights are those that it was given."""
    file = CHECKPOINTS / "quantized.pt"
    by = {within: detect(measured.rounding(file, within), digits, 64)[1] for within in (0.5, 0.45)}
    latent = measured.rounding(file, 0.0)
    assert all(isinstance(c, QuantConv2d) for _, c in quant_convs(latent.model)) and len(by[0.5]) > 10
    assert by[0.5] != by[0.45]
    _, conv = next(quant_convs(latent.model))
    quant = conv.weight_quant
    low, high = (quant.per_weight(conv.weight) * end for end in (quant.quant_min, quant.quant_max))
    assert torch.allclose(quant(conv.weight), conv.weight.clamp(low, high))


def test_masks_are_what_a_segmentation_model_is_compared_by(tmp_path):
    """And boxes stand beside them, in its cells and in Table 1."""
    masks = compose(tmp_path / "masks", 1, 8, 64, task="segment")
    recipe = {"imgsz": 64, "device": "cpu"}
    request = {"recipe": recipe, "data": str(masks), "weights": str(CHECKPOINTS / "segment.pt")}
    found = measured.coco(CHECKPOINTS / "segment.pt", request, tmp_path / "coco")
    wanted = {kind: of["AP"] for kind, of in evaluate(CHECKPOINTS / "segment.pt", masks, **recipe)["coco"].items()}
    assert found["ap"] == pytest.approx(wanted["segm"]) and found["box_ap"] == wanted["bbox"] and found["ap"] > 0.01
    assert found["ap"] != pytest.approx(found["box_ap"], abs=1e-3) and found["agreement"] == pytest.approx(0, abs=1e-6)
    assert np.load(tmp_path / "coco" / "resampled.npy")[0] == found["ap"]

    one = {"data": "d.yaml", "weights": "w.pt", "model": "yolov8n-seg", "steps": 6, "versions": {}}
    one |= {"images": {"train": 24, "val": 8}}
    states = {"float": {"trained": 0.4}, "EMA-4bit": {"qat": 0.3, "qc": 0.35}}
    recorded = {}
    for name, of in states.items():
        metrics = {state: {"ap": ap, "box_ap": ap + 0.1} for state, ap in of.items()}
        recorded[f"{name}-seed0"] = {**one, "recipe": {"seed": 0}, "metrics": metrics}
    lines = paper.table1("d-yolov8n-seg", {"cells": recorded})
    assert "| method | QC | bits | seeds | AP of masks | of float | AP of boxes | paper, yolov5n-seg |" in lines
    assert "| EMA | ✓ | 4 | 1 | 35.0 | 87.5% | 45.0 | 19.5 |" in lines and "AP is that of masks." in lines[2]


def test_the_tables_on_coco(tmp_path):
    """A row of the recipe, an ordering of Table 1 with its interval, soft rounding; none without cells."""
    one = {"data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}, "seconds": 120}
    one |= {"images": {"train": 24, "val": 8}, "kept": "qc"}
    one |= {"options": {"weight_bits": 4, "act_bits": 8, "label_weight": 0.0}}
    states = {
        "pretrained": {"trained": 0.4},
        "calibrated-W4A8": {"qat": 0.1},
        "W4A8": {"qat": 0.36, "qc": 0.38},
        "float": {"trained": 0.39},
        "LSQ-4bit": {"qat": 0.2, "qc": 0.22},
        "EMA-4bit": {"qat": 0.25, "qc": 0.26},
        "EMA-4bit-channel": {"qat": 0.24, "qc": 0.26},
        "rounded-LSQ-4bit": {"hard": 0.2, "soft": 0.206},
    }
    recorded = {f"{name}-seed0": {**one, **cell_of(0, **of)} for name, of in states.items()}
    for cell in recorded.values():
        for state in cell["metrics"].values():
            state["map50"] = 0.5
    content = {"cells": recorded, "notes": [], "differences": {}}
    pair = ("EMA-4bit", "qat"), ("LSQ-4bit", "qat")
    assert pair in coco.compared()
    content["differences"][measured.label(*pair)] = {"seeds": [0], "interval": [4.0, 6.0]}
    page = record.page(coco.HEAD, {"d-yolov5n": content}, *coco.TABLES).splitlines()
    assert "Not by default: budget=none, label_weight=0.0." in page
    assert "| float trained on | 1 | | | | 39.0 | 97.5% | 100.0% | | | | | | |" in page
    assert "| W4A8 | 1 | 10.0 | 36.0 | 38.0 | 38.0 | 95.0% | 97.4% | +2.0 | +2.00 | - | - | one seed | 2 |" in page
    assert "| float | - | 32 | 1 | 40.0 | 100.0% | 50.0 | 28.0 |" in page
    assert "| LSQ | ✗ | 4 | 1 | 20.0 | 50.0% | 50.0 | 20.6 |" in page
    assert "| EMA-4bit | LSQ-4bit | +5.0 | +5.00 | - | +4.00 to +6.00 | holds |" in page
    assert "| 4 | per channel | ✗ | 1 | 24.0 | 22.1 |" in page
    assert "| 4 | 1 | 20.0 | 20.6 | 20.6 | 21.2 | +0.6 | +0.60 | - | - | one seed |" in page
    for table in page_tables(page):
        assert len({row.count("|") for row in table}) == 1, table[0]
    assert record.page(["# Page"], {"d": {"cells": {}, "notes": []}}, *coco.TABLES) == "# Page\n"


def test_the_table_of_budgets():
    """A plan against the uniform width of its size; at 0.9 of the size of W4A4 too."""
    one = {"data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}, "kept": "qc"}
    one |= {"images": {"train": 24, "val": 8}, "options": {}, "size_mb": {"quantized": 1.387}}
    states = {
        "pretrained": {"trained": 0.4},
        "W4A8": {"qat": 0.36, "qc": 0.37},
        "budget-W4A8": {"qat": 0.39, "qc": 0.385},
        "W4A4": {"qat": 0.3, "qc": 0.31},
        "budget-W4A4-90%": {"qat": 0.31, "qc": 0.3},
    }
    recorded = {f"{name}-seed0": {**one, **cell_of(0, **of)} for name, of in states.items()}
    recorded["budget-W4A8-seed0"]["budget"] = {"takes": {"%drop": 1.25, "%bops": 51.23}}
    recorded["W4A8-seed0"]["operations"] = {"percent_of_8_bits": 53.46}
    page = coco.budgets("d-yolov5n", {"cells": recorded, "notes": [], "differences": {}})
    row = "| budget-W4A8 | ✗ | 1 | 1.39 | 51.2 | 39.0 | 97.5% | 75% | 98.8% | +3.0 | +3.00 | - | - | one seed |"
    assert row in page
    assert "| budget-W4A4-90% | ✓ | 1 | 1.39 |  | 30.0 | 75.0% | -11% |  | -1.0 | -1.00 | - | - | one seed |" in page
    assert any(row.startswith("| W4A8 | ✗ | 1 | 1.39 | 53.5 | 36.0 |") for row in page)
    (rows,) = page_tables(page)
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + 8
    assert (("budget-W4A4-90%", "qat"), ("W4A4", "qat")) in coco.compared()


def test_cells_against_the_first():
    """What the float model's labels are worth: the first row has none."""
    one = {"data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}}
    one |= {"images": {"train": 24, "val": 8}}
    states = {"labels-none": {"qat": 0.5, "qc": 0.51}, "labels-0.25": {"qat": 0.52, "qc": 0.5}}
    recorded = {f"{name}-seed0": {**one, **cell_of(0, **of)} for name, of in states.items()}
    for cell, agreement in zip(recorded.values(), (0.3, 0.2)):
        cell["metrics"]["qat"]["agreement"] = agreement
    pair = ("labels-0.25", "qat"), ("labels-none", "qat")
    assert pair in coco.compared()
    apart = {"seeds": [0], "interval": [1.0, 3.0], "agreement": -0.1, "agreement_interval": [-0.2, -0.05]}
    page = coco.labels("d", {"cells": recorded, "notes": [], "differences": {measured.label(*pair): apart}})
    nearer = "0.200 | -0.100 | -0.200 to -0.050"
    assert f"| 0.25 | 1 | 52.0 | 50.0 | {nearer} | +2.0 | +2.00 | - | +1.00 to +3.00 | holds |" in page
    assert "| none | 1 | 50.0 | 51.0 | 0.300 |  |  | +0.0 | +0.00 | - | - | one seed |" in page
    assert coco.ablation("d", {"cells": recorded}) == []
    for made in coco.ablated(), coco.labelled():
        assert len({cell.name for cell in made}) == len(made) > 4
        assert all(QCConfig.from_options(cell.options) for cell in made)


def test_any_finished_run_is_corrected_in_other_ways():
    """After what the run had itself, of which a run without QC has nothing."""
    one = {"data": "d.yaml", "weights": "w.pt", "model": "yolov5n", "steps": 6, "versions": {}, "options": {}}
    one |= {"images": {"train": 24, "val": 8}, "config": {"correction_lr": 1e-3}}
    states = {
        "W4A4": {"qat": 0.3, "qc": 0.31},
        "W4A4-QC-lr0.01": {"qc": 0.32},
        "W4A4-QC-labels": {"qc": 0.29},
        "budget-W4A4": {"qat": 0.5},
        "budget-W4A4-QC-lr0.003": {"qc": 0.49},
    }
    recorded = {f"{name}-seed0": {**one, **cell_of(0, **of)} for name, of in states.items()}
    page = coco.corrections("d", {"cells": recorded, "notes": [], "differences": {}})
    (rows,) = page_tables(page)
    assert [row.rsplit(" | ", 4)[0] for row in rows[2:]] == [
        "| W4A4 | correction_lr=0.001 | 1 | 31.0 | +1.0",
        "| W4A4 | correction_lr=0.01 | 1 | 32.0 | +2.0",
        "| W4A4 | teacher=off | 1 | 29.0 | -1.0",
        "| budget-W4A4 | correction_lr=0.003 | 1 | 49.0 | -1.0",
    ]
    assert (("W4A4-QC-lr0.01", "qc"), ("W4A4", "qat")) in coco.compared()
    made = {cell.name: cell for cell in coco.cells("corrections", "budget-W4A4-ops")}
    assert made["budget-W4A4-ops-QC-lr0.01"].source == "budget-W4A4-ops" and made["budget-W4A4-ops"].work == "train"
    for source in coco.CORRECTED:
        assert coco.cells("corrections", source)[1].name == source
    assert coco.corrections("d", {"cells": {}}) == []


def test_a_budget_is_what_its_name_says():
    options = {cell.name: cell.options for cell in coco.budgeted()}
    for name, (width, more) in coco.PLANS.items():
        assert options[name] == {**options[width], **more} and name.startswith(f"budget-{width}")
        config = QCConfig.from_options(options[name])
        share = name.rpartition("-")[2] if name.endswith("%") else "100%"
        if name.endswith(f"-{config.target}"):
            assert config.chosen_budget == more.get("budget")
        else:
            assert config.budget == share + ("ops" if name.endswith("-ops") else "size")


def test_a_caption_is_of_the_file_where_it_was_measured():
    caption = runpy.run_path(str(ROOT / "examples" / "predictions.py"))["caption"]
    layers = [{"weight_bits": w, "act_bits": 8} for w in (8, 4, 7, 4, 4)]
    report = {"kept": "qc", "layers": layers, "size_mb": {"float32": 10.6, "quantized": 1.4}}
    report["metrics"] = {"float": {"map50_95": 0.3}, "qat": {"map50_95": 0.1}, "qc": {"map50_95": 0.2}}
    assert caption(report, "float", None) == "FP32: 10.6 MB of weights, mAP50-95 0.300"
    assert caption(report, "quantized", None) == "W4A8: 1.4 MB of weights, mAP50-95 0.200"
    measured_files = ("OpenVINO", "ours packed", 1.8, 5), ("ONNX Runtime", "FP32", 10.7, 9)
    measured_files += (("ONNX Runtime", "ours packed", 1.7, 6),)
    names = "runtime", "file", "mb", "median"
    rows = [{**dict(zip(names, row)), "figure": 0.25} for row in measured_files]
    assert caption(report, "float", {"rows": rows}) == "FP32: 10.7 MB, mAP50-95 0.250, 9.0 ms"
    assert caption(report, "quantized", {"rows": rows}) == "W4A8: 1.7 MB, mAP50-95 0.250, 6.0 ms"


def page_tables(lines: list[str]) -> list[list[str]]:
    """The tables of a page, each the lines of one."""
    tables: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


SCRIPTS = {
    "benchmarks": ("step", "quantizer", "gpu"),
    "experiments": (
        "paper table1", "summary", "sensitivity", "families", "parity", "targets",
        "kill_and_resume", "reliability",
        *["coco recipe"] * (ROOT / "docs" / "results" / "coco.json").exists(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("folder,script", [(folder, s) for folder, names in SCRIPTS.items() for s in names])
def test_a_page_follows_from_its_json_file_alone(folder, script, tmp_path, monkeypatch):
    """Whoever changes the one or the other has to change both."""
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    name, *kind = script.split()
    began = time.time_ns()
    monkeypatch.setenv("YOLO_CONFIG_DIR", os.environ["YOLO_CONFIG_DIR"])  # a script changes it
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / folder)
    monkeypatch.setattr(sys, "argv", [name, *kind, *["--assemble"] * (name != "summary")])
    try:
        runpy.run_path(str(ROOT / "examples" / folder / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    pages = {f.relative_to(docs): f.read_bytes() for f in docs.rglob("*") if f.is_file()}
    assert pages == {f.relative_to(ROOT / "docs"): f.read_bytes() for f in (ROOT / "docs").rglob("*") if f.is_file()}
    assert any(f.suffix == ".md" and f.stat().st_mtime_ns > began for f in docs.rglob("*"))  # it wrote one


def test_the_folders_name_their_scripts():
    """README.md of each folder of examples/ has a line for every script, and docs/ stays small."""
    for folder in SCRIPTS:
        scripts = {f.name for f in (ROOT / "examples" / folder).glob("*.py")}
        named = re.findall(r"^- `(\w+\.py)`", (ROOT / "examples" / folder / "README.md").read_text(), re.M)
        assert sorted(named) == sorted(scripts)
    assert len([f for f in (ROOT / "docs").rglob("*") if f.is_file()]) <= 42
