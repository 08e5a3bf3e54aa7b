# yolo_qc_plugin, AGPL-3.0
"""Telemetry: what is recorded, what is kept, that it survives resume; and the pictures drawn from it."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, steps_of
from torch import nn
from ultralytics import YOLO

from yolo_qc_plugin import QCConfig, add_qc_callbacks
from yolo_qc_plugin.cli import main
from yolo_qc_plugin.files import AtomicPath
from yolo_qc_plugin.qat.oscillation import Oscillation
from yolo_qc_plugin.qat.prepare import TrainedWeights
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.report.smoothness import smoothness
from yolo_qc_plugin.report.traces import COLUMNS, FILE, read
from yolo_qc_plugin.run import steps, telemetry
from yolo_qc_plugin.run.telemetry import Telemetry, kept

OPTIONS = {"bits": 3, "correction": "off", "output_bits": None, "calibration_batches": 1}
ARGUMENTS = {**TINY, "epochs": 2, "nbs": 8, "lr0": 0.02, "amp": False}


class BruteForce:
    """The record as one would write it without a thought for time."""

    def __init__(self):
        self.rows = {}  # step -> layer -> the columns

    def start(self, trainer):
        self.convs, self.twins = (dict(quant_convs(m)) for m in (trainer.model, trainer.ema.ema))
        self.codes = {n: c.weight_codes().numpy().astype(int) for n, c in self.convs.items()}
        self.direction = {n: np.zeros_like(c) for n, c in self.codes.items()}
        self.frequency = {n: np.zeros(c.shape) for n, c in self.codes.items()}

    def look(self, trainer):
        if (step := trainer.ema.updates) in self.rows or not step:
            return
        row, seen = self.rows.setdefault(step, {}), set()
        for name, conv in self.convs.items():
            now = conv.weight_codes().numpy().astype(int)
            change = np.sign(now - self.codes[name])
            self.frequency[name] = 0.99 * self.frequency[name] + 0.01 * (change * self.direction[name] < 0)
            self.direction[name] = np.where(change, change, self.direction[name])
            self.codes[name] = now
            own = conv.act_quant.learned and conv.act_quant not in seen
            seen.add(conv.act_quant)
            twin = self.twins[name]
            row[name] = [
                conv.weight_quant.scale.mean().item(),
                twin.weight_quant.scale.mean().item(),
                conv.act_quant.scale.item() if own else np.nan,
                twin.act_quant.scale.item() if own else np.nan,
                (change != 0).mean(),
                (self.frequency[name] > 0.005).mean(),
            ]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """(folder of a run, what was recorded of it by brute force, copy of it as a kill in the second epoch leaves it)."""
    brute, folder = BruteForce(), tmp_path_factory.mktemp("telemetry")

    def copy(trainer):
        if trainer.ema.updates == 4:
            shutil.copytree(folder / "run", folder / "killed")

    yolo = YOLO("yolov5n.yaml")
    add_qc_callbacks(yolo, **OPTIONS)
    yolo.add_callback("on_pretrain_routine_end", brute.start)
    yolo.add_callback("on_train_batch_end", brute.look)
    yolo.add_callback("on_train_batch_end", copy)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "EVERY", 3)  # the file is written after the first epoch
        yolo.train(**ARGUMENTS, data=str(digits), project=str(folder), name="run")
    return folder / "run", brute, folder / "killed"


def test_telemetry_is_what_brute_force_records(trained):
    folder, brute, _ = trained
    layers, steps, values = read(folder / "qc" / FILE)
    assert list(steps) == list(brute.rows) == list(range(1, 7))
    expected = np.array([[row[name] for name in layers] for row in brute.rows.values()], np.float32)
    assert layers == list(brute.convs) and np.allclose(values, expected, rtol=1e-6, atol=0, equal_nan=True)
    scales, shares = values[..., :4], values[..., 4:]
    assert (np.isnan(scales) == np.isnan(expected[..., :4])).all() and np.isnan(scales[:, 0, 2]).all()  # the image's
    assert (np.nanmin(scales, (0, 1)) > 0).all() and (shares.max((0, 1)) > 0).all()  # codes do flip and oscillate


def test_a_resumed_run_writes_what_the_uninterrupted_one_does(trained):
    folder, _, killed = trained
    assert list(read(killed / "qc" / FILE)[1]) == [1, 2, 3]
    YOLO(killed / "weights" / "last.pt").train(resume=True, save_dir=str(killed))
    resumed, whole = (read(f / "qc" / FILE) for f in (killed, folder))
    assert resumed[0] == whole[0] and list(resumed[1]) == list(whole[1])
    np.testing.assert_array_equal(resumed[2], whole[2])


def test_it_is_off_where_it_is_not_asked_for(train, tmp_path):
    def stop(trainer):
        assert steps_of(trainer).telemetry is None and steps_of(trainer).oscillation is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train({**OPTIONS, "telemetry": False}, {"on_pretrain_routine_end": stop})


def test_what_is_kept_is_bounded_and_depends_on_the_last_step_alone():
    steps = np.arange(1, 1001)
    for last in (1, 8, 9, 16, 17, 100, 1000):
        now = steps[:last][kept(steps[:last], window=8)]
        assert list(now[-8:]) == list(range(max(last - 7, 1), last + 1)) and len(now) <= 16
        old = now[:-8]
        assert len(set(np.diff(old))) <= 1 and (len(old) == 0 or len(old) >= min(4, last - 8))
        seen = np.zeros(0, int)
        for step in steps[:last]:  # step by step, as a run thins
            seen = np.append(seen, step)
            seen = seen[kept(seen, window=8)]
        assert list(seen) == list(now)


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Make a Telemetry of a little model and a function that trains it to a step: recorder() -> telemetry, go."""
    monkeypatch.setattr(telemetry, "kept", partial(kept, window=8))
    monkeypatch.setattr(telemetry, "BUFFER", 5)

    def make(per_channel=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        inject(model, QCConfig(bits=2, per_channel=per_channel))
        record = Telemetry(model, Oscillation(TrainedWeights(model)), tmp_path / "qc")
        record.watch(model, deepcopy(model))

        def go(steps):
            for step in steps:
                generator = torch.Generator().manual_seed(step)
                with torch.no_grad():
                    for _, conv in quant_convs(model):
                        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
                        conv.weight_quant.scale.uniform_(0.5, 1, generator=generator)
                record.oscillation.weights.read()
                record.oscillation.step()
                record.record(step)
            return model

        return record, go

    return make


@pytest.mark.parametrize("written,saved,killed,last", [
    (6, 13, 20, 100), (0, 13, 13, 100), (13, 13, 90, 100), (40, 41, 60, 100), (5, 12, 12, 14), (5, 12, 13, 14),
])  # fmt: skip
def test_interrupted_anywhere_the_record_ends_the_same(recorder, written, saved, killed, last):
    """The file as of one step, resume.pt as of another, then a file that was written before the kill."""
    whole, go = recorder()
    go(range(1, last + 1))
    whole.collect()
    first, go = recorder()
    go(range(1, written + 1))
    first.write()
    go(range(written + 1, saved + 1))
    state = deepcopy({"oscillation": first.oscillation.state_dict(), "telemetry": first.state_dict()})
    go(range(saved + 1, killed + 1))
    if killed > saved:
        first.write()
    second, go = recorder()
    second.oscillation.load_state_dict(state["oscillation"])
    second.load_state_dict(state["telemetry"])
    go(range(saved + 1, last + 1))
    second.collect()
    assert np.array_equal(whole.steps, second.steps) and len(whole.steps) <= 16
    assert np.array_equal(whole.values, second.values, equal_nan=True)


def test_steps_that_come_again_replace_the_earlier_ones(recorder):
    """As after a recovery, which goes back to the last checkpoint."""
    record, go = recorder()
    go([1, 2, 3, 4, 3])
    record.collect()
    assert list(record.steps) == [1, 2, 3]
    go([2])
    record.collect()
    assert list(record.steps) == [1, 2]


def test_the_scale_of_a_layer_with_several_is_their_mean(recorder):
    record, go = recorder(per_channel=True)
    model = go([1])
    record.collect()
    means = [conv.weight_quant.scale.mean().item() for _, conv in quant_convs(model)]
    assert np.allclose(record.values[0, :, COLUMNS.index("weight_scale")], means, rtol=1e-6)


def test_a_file_that_cannot_be_written_or_read_stops_no_run(recorder, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    record, go = recorder()
    go([1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(AtomicPath, "write_bytes", full)
        record.write()
        record.write()
    assert caplog.text.count("could not be written ([Errno 28] No space left on device)") == 1
    record.write()
    state = record.state_dict()
    record.file.write_bytes(record.file.read_bytes()[:100])
    other, _ = recorder()
    other.load_state_dict(state)
    assert "goes on without what the run had written" in caplog.text and len(other.steps) == 0


def test_without_resume_pt_the_file_is_gone_on_from(recorder):
    record, go = recorder()
    go([1, 2, 3])
    record.write()
    other, go = recorder()
    other.reread(2)  # as the average in last.pt says
    go([3, 4])
    other.collect()
    assert list(other.steps) == [1, 2, 3, 4] and np.array_equal(other.values[:2], record.values[:2], equal_nan=True)


def test_loggers_get_shares_and_last_scales(recorder):
    record, go = recorder()
    assert record.scalars() == {}
    go([1, 2, 3])
    found = record.scalars()
    flips = record.values[..., COLUMNS.index("flips")].mean(0)
    assert found["qc/flips"] == pytest.approx((flips * [12, 8]).sum() / 20) and found["qc_flips/1"] == flips[1]
    assert found["qc_oscillating/0"] == record.values[-1, 0, COLUMNS.index("oscillating")]
    assert found["qc_weight_scale/0"] == record.values[-1, 0, 0]
    learned = ~np.isnan(record.values[-1, :, COLUMNS.index("act_scale")])
    assert [f"qc_act_scale/{i}" in found for i in (0, 1)] == learned.tolist() and not np.isnan(
        list(found.values())
    ).any()
    assert record.scalars() == {}  # nothing new
    go([4])
    assert record.scalars()["qc_flips/1"] == record.values[-1, 1, COLUMNS.index("flips")]


def test_smoothness_is_numpys():
    trace = np.random.default_rng(0).normal(2, 0.1, 500).astype(np.float32)
    found, wide = smoothness(trace), trace.astype(float)
    around = [wide[i] - wide[i - 50 : i + 51].mean() for i in range(50, 450)]
    assert found["fluctuation"] == pytest.approx(np.mean(np.square(around)) / wide.mean() ** 2)
    assert found["variance"] == pytest.approx(np.var(wide / wide.mean()))
    assert found["steps"] == pytest.approx(np.var(wide[1:] - wide[:-1]) / wide.mean() ** 2)
    assert smoothness(wide[:1])["fluctuation"] == smoothness(np.ones(7))["steps"] == 0


def test_plot_draws_all_pictures_and_says_how_smooth(trained, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main(["plot", f"runs={trained[0]}", f"out={out}"]) == 0
    names = "weight_scales act_scales oscillation codes report sizes latent clipped".split()
    assert {f.name for f in out.iterdir()} == {
        "smoothness.json", "report.html", *(f"{n}.{kind}" for n in names for kind in ("png", "pdf"))
    }  # fmt: skip
    layers, _, values = read(trained[0] / "qc" / FILE)
    rows = json.loads((out / "smoothness.json").read_text())["scales"]
    assert [r["layer"] for r in rows if r["scale"] == "weight_scale" and r["shown"]] == layers[1:5]
    assert len([r for r in rows if r["scale"] == "act_scale" and r["shown"]]) == 4
    for row in rows:
        for side, column in (("without", row["scale"]), ("with", f"{row['scale']}_ema")):
            assert row[side] == smoothness(values[:, layers.index(row["layer"]), COLUMNS.index(column)])
    assert f"written to {out / 'codes.pdf'}" in capsys.readouterr().out
    (out / "report.png").write_bytes(b"a picture of the user's")
    assert main(["plot", f"runs={trained[0]}", f"out={out}"]) == 1
    assert "report.png was not made by yolo-qc plot" in capsys.readouterr().err
    assert (out / "report.png").read_bytes() == b"a picture of the user's"


@pytest.mark.parametrize("arguments,message", [
    (["runs=missing"], "telemetry.parquet; it is written by a run of callbacks=qc with qc_telemetry=True"),
    (["out=x"], "give runs="),
    (["runs=broken"], "cannot be read"),
    (["runs=broken", "steps=5000"], "give 1 to 4000"),
])  # fmt: skip
def test_plot_refuses_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken" / "qc").mkdir(parents=True)
    (tmp_path / "broken" / "qc" / FILE).write_bytes(b"PAR1")
    assert main(["plot", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
