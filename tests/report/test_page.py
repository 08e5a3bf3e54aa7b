# yolo_qc_plugin, AGPL-3.0
"""What a run leaves to be looked at: its page, its pictures, its card, the console's summary."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import FLOAT, TINY
from ultralytics import YOLO

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.host import log
from yolo_qc_plugin.report import console, page, plots, sections
from yolo_qc_plugin.report.card import METHOD, model_card
from yolo_qc_plugin.report.command import train_command
from yolo_qc_plugin.report.runs import Run
from yolo_qc_plugin.run import drawing
from yolo_qc_plugin.startup.command import split_arguments
from yolo_qc_plugin.tools import plot

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page consists of, and whether its elements are closed in their order."""

    def __init__(self, file: Path):
        super().__init__()
        self.text, self.links, self.tags, self.headings, self.ids = file.read_text("utf-8"), [], [], [], []
        self._open: list[str] = []
        self.feed(self.text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        """Take note of an element and of what it refers to."""
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name.rpartition(":")[2] in {"src", "href", "srcset", "data"}]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """One that closes itself, as those of SVG do."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        """Close the innermost element."""
        assert self._open.pop() == tag

    def handle_data(self, data):
        """Take note of headings."""
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A run that had something to find and to plan, with plots: its YOLO object."""
    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, budget="3.5bits", act_bits=8)
    arguments = {**TINY, "plots": True, "epochs": 2, "optimizer": "Adam", "lr0": 1e-3, "nbs": 8}
    yolo.returned = yolo.train(data=str(digits), project=str(tmp_path_factory.mktemp("page")), name="run", **arguments)
    return yolo


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return Path(run.trainer.save_dir) / "qc"


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def check_alone(shown: Page) -> None:
    """Nothing is loaded from elsewhere, and what a page refers to is in it."""
    assert not {"script", "link", "iframe", "object"} & set(shown.tags)
    assert all(link.startswith(("data:image/", "#")) for link in shown.links)
    assert {link[1:] for link in shown.links if link.startswith("#")} <= set(shown.ids)
    assert not re.search(r"@import|https?://", shown.text) and not re.search(r"url\((?!#)", shown.text)


def test_the_page_stands_alone_and_has_every_section(folder, report):
    shown = Page(folder / "report.html")
    check_alone(shown)
    assert shown.headings == list(page.SECTIONS)
    assert {f.name for f in (folder / "plots").glob("*.png")} == {f"{name}.png" for name in page.PICTURES}
    assert shown.tags.count("svg") == len(page.PICTURES) - 1 and shown.tags.count("img") == 8
    assert "prefers-color-scheme: dark" in shown.text
    for stage, figures in report["metrics"].items():
        assert f"{console.STAGES[stage]}" in shown.text and f"<td>{100 * figures['map50_95']:.2f}</td>" in shown.text
    assert report["training"]["command"].startswith(f"yolo train model={FLOAT} data=")
    assert sections.escape(report["training"]["command"]) in shown.text
    assert (folder / "report.html").stat().st_size < 2e6


def test_what_changed_is_found_on_both_sides(folder):
    found = json.loads((folder / "plots" / "predictions.json").read_text())["images"]
    assert len(found) == 8 and sum(image["both"] for image in found) > 3
    assert any(image["float_alone"] or image["quantized_alone"] for image in found)
    assert all(re.fullmatch(r"\d 0\.\d\d|\d 1\.00", label) for image in found for label in image["float_alone"])


def test_a_page_of_several_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "FORMATS", ("png",))  # another test draws both
    run = folder.parent
    assert main(["plot", f"runs={run},{run}", f"out={tmp_path}"]) == 0
    shown = Page(tmp_path / "compare.html")
    check_alone(shown)
    assert shown.headings == ["Options", *page.SECTIONS] and "The options are the same." in shown.text
    together = {name for name, picture in page.PICTURES.items() if picture.together}
    of_runs = {f"{name}_{i}" for name in set(page.PICTURES) - together for i in (1, 2)}
    assert {f.stem for f in tmp_path.glob("*.png")} == together | of_runs
    assert shown.text.count("<h3>run 2</h3>") > 5


def test_soft_rounding_is_measured_and_moves_nothing(run, report):
    found = report["rounding"]
    assert (found["k"], found["images"]) == (0.45, 8)
    # the trained form in place of the deployed one: single codes may differ
    assert found["hard"]["map50_95"] == pytest.approx(report["metrics"]["qat"]["map50_95"], abs=0.03)
    assert found["soft"] != found["hard"]
    assert run.returned.box.map == report["metrics"][report["kept"]]["map50_95"]


def test_the_card_has_the_figures_of_the_report(folder, report):
    text = (folder / "MODEL_CARD.md").read_text("utf-8")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    kept = report["metrics"][report["kept"]]
    assert (front["license"], front["library_name"], front["base_model"]) == ("agpl-3.0", "ultralytics", "float")
    assert front["datasets"] == ["digits"] and front["pipeline_tag"] == "object-detection"
    values = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert values == {name: round(kept[name], 4) for name in front["metrics"]} and "map50_95" in values
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("| ")]
    shown = {row[0].removesuffix(" (`best.pt`)"): row[1:] for row in rows}
    for stage in "float", "qat", "qc":
        figures = report["metrics"][stage]
        size = report["size_mb"]["float32" if stage == "float" else "quantized"]
        expected = [100 * figures["map50_95"], 100 * figures["map50"], size]
        assert shown[console.STAGES[stage]] == [f"{value:.2f}" for value in expected]
    best = (folder.parent / "weights" / "best.pt").stat().st_size
    assert shown["`best.pt`"][0] == f"{best / 1e6:.2f}"


def test_a_card_of_names_beyond_ascii(report):
    made = {**report["training"], "data": "/somewhere/K\u00fche \U0001f404.yaml"}
    front = model_card({**report, "training": made}, {"best.pt": 1}).split("---")[1]
    assert yaml.safe_load(front)["datasets"] == ["K\u00fche \U0001f404"]


def test_the_card_says_what_was_done(report):
    """No average and no correction where there was none; whose labels, and of which photographs."""
    plain = {**report, "metrics": {**report["metrics"], "qc": None}, "kept": "qat"}
    plain["config"] = {**report["config"], "ema_decay": 0.0}
    made = {**report["training"], "photographs": "/home/me/cows", "val_by_model": 3, "data": "/run/qc/data/data.yaml"}
    text = model_card({**plain, "training": made}, {"best.pt": 10**6, "qat.pt": 10**6})
    assert "averaged" not in text and "correction" not in text and "`qat.pt`" not in text and METHOD not in text
    assert "- Data: cows, " in text and "labelled 3 of its photographs: agreement with it, not accuracy)." in text
    whole = model_card(report, {"best.pt": 10**6, "qat.pt": 10**6})
    assert "averaged weights and scales, and a correction at its end ([Gupta" in whole and "`qat.pt`" in whole
    assert "validator; the better of QAT and QAT + QC there is kept." in whole


def test_names_of_runs_are_shown_as_they_are(report):
    names = ["x$\\frac$y", "_begun"]
    figure = plots.draw_accuracy([SimpleNamespace(name=name, report=report) for name in names])
    figure.savefig(io.BytesIO())
    assert [label.get_text().strip() for label in figure.axes[0].get_xticklabels()] == ["x\\$\\frac\\$y", "_begun"]
    assert not plots._plain("_begun").startswith("_")


def test_widths_in_short():
    layers = [{"weights": n, "weight_bits": w, "act_bits": 8} for n, w in ((30, 7), (20, 7), (50, 4), (20, 2))]
    assert sections.tile_of_widths(layers) == ("4.9 bits", "of a weight on average; W7A8 for 42% of the weights")
    assert console.in_short(console.weights_by_widths(layers)) == "mixed precision"
    most = [*layers[:2], {**layers[2], "weights": 51}]  # of the layers 7 bits have more
    assert sections.tile_of_widths(most) == ("W4A8", "bits of weights and of activations of 50% of the weights")
    assert console.in_short(console.weights_by_widths(most)) == "W4A8"
    older = [{k: v for k, v in layer.items() if k != "weights"} for layer in most]
    assert console.in_short(console.weights_by_widths(older)) == "W7A8"


def test_the_console_has_the_worst_layers_and_the_file_all(folder, report):
    told = console.summary(report, worst=True)
    layers = report["layers"]
    assert f"operations on bits {report['operations']['percent_of_8_bits']:.1f}% of" in told
    assert len(told.splitlines()) < 17 and f"{len(layers)} layers: " in told
    worst = sorted(layers, key=lambda x: x["oscillating"] * 0.5 ** x["weight_bits"], reverse=True)[:5]
    assert worst[0]["oscillating"] > 0
    rows = [line.split()[0] for line in told.splitlines() if line.startswith("model.")]
    assert rows == [x["name"] for x in worst]
    assert not [line for line in console.summary(report, worst=False).splitlines() if line.startswith("model.")]
    table = (folder / "layers.txt").read_text().splitlines()
    assert [line.split()[0] for line in table[1:]] == [x["name"] for x in layers]


def test_what_fails_is_named_and_the_run_is_whole(train, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr(drawing, "compare_predictions", broken)
    monkeypatch.setattr("yolo_qc_plugin.run.finish.measure_rounding", broken)
    monkeypatch.setitem(page.PICTURES, "codes", replace(page.PICTURES["codes"], draw=broken))
    monkeypatch.setitem(page.SECTIONS, "Layers", ((broken,), ()))
    yolo = train({"correction": "off", "budget": None}, model=FLOAT, plots=True)
    for name in "soft rounding", "predictions", "codes", "Layers":
        assert caplog.text.count(f"{name} left out (RuntimeError: planted).") == 1
    shown = Page(Path(yolo.trainer.save_dir) / "qc" / "report.html")
    missing = {"Predictions", "Codes", "Layers", "Sensitivity and plan"}
    assert shown.headings == [name for name in page.SECTIONS if name not in missing]
    assert YOLO(yolo.trainer.best).model.qc.options.correction == "off"


def test_a_broken_page_is_named_too(tmp_path, caplog):
    with log.naming_what_fails("report.html"):
        page.write_page([Run.load(tmp_path, 100)], tmp_path, tmp_path / "report.html")
    assert "report.html left out (QCError" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [
    {"bits": 3, "correction": "off"},
    {"target": "cpu", "skip": ["model.9.*", "model.1.conv"], "layer_bits": {"model.2.*": "W4A8", "model.3.conv": 6}},
    {"preset": "paper", "edge_bits": 4, "budget": "3.5bits", "freeze_threshold": 0.02},
])  # fmt: skip
def test_the_command_is_read_as_the_options(options):
    config = QCConfig.from_options(options)
    planned = {"model.4.conv": "W3A8"}
    full = replace(config, layer_bits={**config.layer_bits, **planned})
    arguments = {"data": "my data.yaml", "epochs": 7, "lr0": 0.001, "classes": [0], "name": "run", "batch": 16}
    told = train_command(arguments, full, "yolo11n.pt", planned)
    assert told.startswith(
        "yolo train model=yolo11n.pt 'data=my data.yaml' epochs=7 'classes=[0]' lr0=0.001 callbacks=qc"
    )
    read, rest = split_arguments(shlex.split(told)[1:])
    assert read == config and "name=run" not in rest


def test_a_page_of_an_earlier_version(tmp_path):
    """A record without what has been added since gives a page without it."""
    (tmp_path / "qc").mkdir()
    layer = {"name": "model.0.conv", "weight_bits": 4, "act_bits": 4, "weight_scale": [0.1], "act_scale": 0.1}
    layer |= {"act_offset": None, "weight_codes": 16, "weight_clipped": 0.1, "act_clipped": 0.2}
    figures = {"map50_95": 0.5, "map50": 0.7, "fitness": 0.52}
    budget = {"budget": "4%size", "takes": {"MB": 1.0, "%drop": 3.0}, "figure": "map50_95", "measured_drop": 2.0}
    (tmp_path / "qc" / "report.json").write_text(
        json.dumps({
            "config": QCConfig().to_dict(), "versions": {"torch": "2.4"}, "kept": "qat", "layers": [layer],
            "budget": {**budget, "kept": None},
            "metrics": {"float": figures, "qat": figures, "qc": None}, "size_mb": {"float32": 8.0, "quantized": 1.0},
        })
    )  # fmt: skip
    run = Run.load(tmp_path, 100)
    assert run.values.shape == (0, 0, 6) and not np.isnan(run.values).any()
    page.write_page([run], tmp_path / "plots", tmp_path / "report.html")
    shown = Page(tmp_path / "report.html")
    check_alone(shown)
    assert shown.headings == ["Accuracy", "Clipping", "Sensitivity and plan", "Layers", "How it was made"]
