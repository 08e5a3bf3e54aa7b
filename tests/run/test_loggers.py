# yolo_qc_plugin, AGPL-3.0
"""What loggers and results.csv get: by the interface that loggers share, and with two of them for real."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import FLOAT, TINY
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils.plotting import plot_results

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.report.traces import COLUMNS, FILE, read

RUN = {**TINY, "epochs": 2, "nbs": 8, "lr0": 0.01, "amp": False}


@pytest.fixture(scope="module")
def told(digits, tmp_path_factory):
    """(folder of a run, what a logger saw: pairs of an epoch and `trainer.metrics`)."""
    seen = []
    yolo = YOLO(FLOAT)
    # a logger is there before us: Ultralytics adds its own to the trainer, we ours to a model that may have some
    yolo.add_callback("on_fit_epoch_end", lambda trainer: seen.append((trainer.epoch, dict(trainer.metrics))))
    add_qc_callbacks(yolo, bits=3, calibration_batches=1, coco_eval=True)
    folder = tmp_path_factory.mktemp("loggers")
    yolo.train(**RUN, data=str(digits), project=str(folder), name="run")
    assert yolo.trainer.epoch == 1
    return folder / "run", seen


def ours(metrics: dict) -> dict:
    """What is not Ultralytics'."""
    return {name: value for name, value in metrics.items() if name.startswith("qc")}


def test_an_epoch_tells_shares_and_scales(told):
    run, seen = told
    layers, steps, values = read(run / "qc" / FILE)
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3] and len(steps) == 6
    for (_, metrics), last in zip(seen[:2], (2, 5)):
        for name, found in zip(COLUMNS, values[last].T):
            if name == "flips":
                found = values[last - 2 : last + 1, :, COLUMNS.index("flips")].mean(0)
            wanted = {f"qc_{name}/{layer}": float(v) for layer, v in zip(layers, found) if not math.isnan(v)}
            told_of = {key: value for key, value in metrics.items() if key.startswith(f"qc_{name}/")}
            assert told_of == pytest.approx(wanted, rel=1e-6) and wanted
        assert 0 < metrics["qc/flips"] < 1 and 0 <= metrics["qc/oscillating"] < 1
        assert all(isinstance(value, float) for value in ours(metrics).values())  # MLflow and JSON take no others
    assert not ours(seen[2][1])  # Ultralytics' own evaluation of best.pt


def test_the_end_tells_what_is_reported(told):
    run, seen = told
    report, (_, metrics) = json.loads((run / "qc" / "report.json").read_text()), seen[-1]
    for stage in ("float", "qat", "qc"):
        figures = report["metrics"][stage]
        assert metrics[f"qc/{stage}_map50_95"] == figures["map50_95"] and metrics[f"qc/{stage}_fitness"] > 0
        assert metrics[f"qc/{stage}_coco_bbox_AP"] == figures["coco"]["bbox"]["AP"]
    assert metrics["qc/size_mb_quantized"] == report["size_mb"]["quantized"] < metrics["qc/size_mb_float32"]
    assert metrics["metrics/mAP50-95(B)"] == report["metrics"][report["kept"]]["map50_95"]
    assert seen[2][1]["metrics/mAP50-95(B)"] == report["metrics"]["float_outputs"]["map50_95"]
    assert all(isinstance(value, float) for value in ours(metrics).values())


def test_results_csv_has_the_end_and_can_be_drawn(told, tmp_path, caplog):
    run, seen = told
    with (run / "results.csv").open() as file:
        *epochs, end = csv.DictReader(file)
    assert [row["epoch"] for row in epochs] == ["1", "2"] and end["epoch"] == "4" and not ours(end)
    for name, value in end.items():
        if name.startswith("metrics/"):
            assert float(value) == pytest.approx(seen[-1][1][name], rel=1e-5)
        elif name not in ("epoch", "time"):
            assert math.isnan(float(value)) and not math.isnan(float(epochs[-1][name]))
    assert None not in end and None not in end.values()  # as many columns as the head has
    (tmp_path / "results.csv").write_bytes((run / "results.csv").read_bytes())
    plot_results(tmp_path / "results.csv")
    assert (tmp_path / "results.png").exists() and "Plotting error" not in caplog.text


def test_a_logger_that_knows_no_such_epoch_fails_no_run(train, caplog):
    seen = []

    def look(trainer):
        seen.append(trainer.epoch)
        assert [True, True][trainer.epoch]  # an epoch, and Ultralytics' evaluation

    yolo = train({"correction": "off", "calibration_batches": 1}, {"on_fit_epoch_end": look})
    assert seen == [0, 1, 2] and yolo.trainer.epoch == 0
    assert "failed on the run's final figures (IndexError" in caplog.text


def test_checkpoints_and_columns_hold_none_of_it(told, digits, tmp_path):
    """Where epochs are not validated, Ultralytics goes on with the metrics that it has."""
    for name in ("best.pt", "last.pt"):
        assert not ours(load_checkpoint(told[0] / "weights" / name)[1]["train_metrics"])
    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, bits=3, calibration_batches=1, correction="off", output_bits=None)
    yolo.train(**{**RUN, "epochs": 3}, data=str(digits), project=str(tmp_path), name="run", val=False)
    rows = [line.split(",") for line in (tmp_path / "run" / "results.csv").read_text().splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])} and not any(name.startswith("qc") for name in rows[0])


LOGGED = """
from ultralytics import YOLO, settings
settings.update({{"tensorboard": {tensorboard}, "mlflow": {mlflow}}})
from yolo_qc_plugin import add_qc_callbacks
yolo = YOLO({model!r})
add_qc_callbacks(yolo, bits=3, calibration_batches=1)
yolo.train(data={data!r}, project={project!r}, name="run", **{arguments})
"""


@pytest.fixture
def logged(digits, tmp_path):
    """Train in a process of its own, for Ultralytics logs no test, with a logger: logged(name) -> folder, report."""

    def run(logger: str):
        code = LOGGED.format(
            tensorboard=logger == "tensorboard",
            mlflow=logger == "mlflow",
            model=str(FLOAT),
            data=str(digits),
            project=str(tmp_path),
            arguments=RUN,
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment |= {"YOLO_CONFIG_DIR": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / "run", json.loads((tmp_path / "run" / "qc" / "report.json").read_text())

    return run


def check_series(series, report: dict) -> None:
    """Of `series(name)`, pairs of a step and a value: two epochs, Ultralytics' evaluation, the end."""
    steps = [step for step, _ in series("metrics/mAP50-95(B)")]
    first = steps[0]
    assert steps == [first, first + 1, first + 2, first + 3]
    kept = report["metrics"][report["kept"]]["map50_95"]
    assert series("metrics/mAP50-95(B)")[-1][1] == pytest.approx(kept, abs=1e-6)
    assert [step for step, _ in series("qc/flips")] == steps[:2]
    layer = report["layers"][1]["name"]
    assert [step for step, _ in series(f"qc_weight_scale_ema/{layer}")] == steps[:2]
    assert series("qc/size_mb_quantized") == [(steps[-1], pytest.approx(report["size_mb"]["quantized"]))]
    assert series("qc/qat_map50_95") == [(steps[-1], pytest.approx(report["metrics"]["qat"]["map50_95"], abs=1e-6))]


def test_tensorboard_has_it(logged):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    folder, report = logged("tensorboard")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    check_series(lambda name: [(e.step, e.value) for e in found.Scalars(name)], report)


def test_mlflow_has_it(logged, tmp_path):
    tracking = pytest.importorskip("mlflow.tracking", reason="no mlflow")
    _, report = logged("mlflow")
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"

    def series(name):
        found = client.get_metric_history(run.info.run_id, name.replace("(", "").replace(")", ""))
        return [(metric.step, metric.value) for metric in sorted(found, key=lambda m: m.step)]

    check_series(series, report)
