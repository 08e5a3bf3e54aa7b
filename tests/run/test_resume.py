# yolo_qc_plugin, AGPL-3.0
"""Runs that were killed or interrupted go on as if they had not been."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_YAML, steps_of
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

from yolo_qc_plugin import add_qc_callbacks, compose
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.files import AtomicPath
from yolo_qc_plugin.qat.ema import ConstantEMA
from yolo_qc_plugin.quant.layers import is_quantized, quant_convs
from yolo_qc_plugin.run import finish, resume, state
from yolo_qc_plugin.run.steps import Steps


def tensors(value, name=""):
    """Name -> tensor of all tensors and numbers in nested containers."""
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {} if value is None or isinstance(value, str) else {name: torch.as_tensor(value)}
    return {k: v for key, item in value for k, v in tensors(item, f"{name}/{key}").items()}


def same(a, b) -> bool:
    """Whether tensors are equal; telemetry has NaN where there is nothing to note."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def snapshot(trainer) -> dict:
    """All that the rest of a run depends on, while the first batch of an epoch is about to be trained on."""
    model, loader = trainer.model, trainer.train_loader
    return deepcopy(
        tensors(
            {
                "weights": dict(model.state_dict()),
                "gradients": {k: p.grad for k, p in model.named_parameters()},
                "ema": [dict(trainer.ema.ema.state_dict()), trainer.ema.updates],
                "optimizer": trainer.optimizer.state_dict(),
                "stopper": vars(trainer.stopper),
                "numbers": [trainer.epoch, trainer.accumulate, trainer.best_fitness, model.criterion.updates],
                "loss weights": [model.criterion.o2m, model.criterion.o2o],
                "random": [random.getstate(), np.random.get_state()[1].astype(np.int64), torch.get_rng_state()],
                "order": loader.generator.get_state(),
                "mosaic": [loader.dataset.buffer, loader.dataset.ims],
                "callbacks": steps_of(trainer).state_dict(),
            }
        )
    )


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    """(folder of a run that stopped in the second of three epochs, its state there)."""
    seen = {}

    def look(trainer):
        if trainer.epoch == 1:
            seen.update(snapshot(trainer))
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("runs")
    yolo = YOLO("yolo26n.yaml")
    add_qc_callbacks(
        yolo,
        bits=3,
        rounding="nearest",
        dampening_weight=0.1,
        freeze_threshold=0.01,
        correction="off",
        output_bits=None,
    )
    yolo.add_callback("on_train_batch_start", look)
    arguments = {**TINY, "epochs": 3, "nbs": 16, "warmup_epochs": 1, "close_mosaic": 1, "patience": 2, "amp": False}
    with pytest.raises(KeyboardInterrupt):
        yolo.train(**arguments, data=str(digits), project=str(folder), name="run")
    return folder / "run", seen


@pytest.fixture
def go_on(interrupted, tmp_path):
    """Resume a copy of the interrupted run until its next batch: go_on(change=what to do to the copy first)."""

    def run(change=lambda weights: None, **arguments):
        seen = {}

        def look(trainer):
            seen.update(snapshot(trainer), batch=trainer.batch_size)
            raise KeyboardInterrupt

        copy = tmp_path / "copy"
        shutil.copytree(interrupted[0], copy)
        change(copy / "weights")
        yolo = YOLO(copy / "weights" / "last.pt")
        yolo.add_callback("on_train_batch_start", look)
        with pytest.raises(KeyboardInterrupt):
            yolo.train(resume=True, save_dir=str(copy), **arguments)
        return seen

    return run


def test_all_state_comes_back(interrupted, go_on):
    """Every weight, average, waiting gradient, momentum, random number and buffered image, without a word of ours."""
    before, after = interrupted[1], go_on()
    after.pop("batch")
    assert before.keys() == after.keys() and not [k for k in before if not same(before[k], after[k])]
    names = {k.split("/")[1] for k in before}
    assert names == {"weights", "gradients", "ema", "optimizer", "stopper", "numbers", "loss weights", "random",
                     "order", "mosaic", "callbacks"}  # fmt: skip
    assert {"/callbacks/progress", "/callbacks/oscillation/frequency", "/callbacks/oscillation/held"} < before.keys()
    half = load_checkpoint(interrupted[0] / "weights" / "last.pt")[0].state_dict()
    assert any(not torch.equal(v, before[f"/weights/{k}"]) for k, v in half.items())  # what the host would start from


def test_a_script_with_the_same_two_lines_resumes(interrupted):
    """Its options come second to those in the checkpoint; a finished one is refused, as ever."""
    yolo = YOLO(interrupted[0] / "weights" / "last.pt")
    assert add_qc_callbacks(yolo, target="cpu").target == "cpu"
    yolo.ckpt["optimizer"] = None
    with pytest.raises(QCError, match="already quantized"):
        add_qc_callbacks(yolo, target="cpu")


def test_without_its_state_a_run_goes_on_from_the_average(interrupted, go_on, caplog):
    after = go_on(lambda weights: (weights / "resume.pt").unlink())
    assert "there is no resume.pt" in caplog.text and "not exactly" in caplog.text
    half = load_checkpoint(interrupted[0] / "weights" / "last.pt")[0].state_dict()
    assert all(torch.equal(v, after[f"/weights/{k}"]) for k, v in half.items() if v.ndim == 4)
    assert after["/numbers/0"] == 1 and after["/ema/1"] == interrupted[1]["/ema/1"]


def test_a_state_that_does_not_belong_to_the_checkpoint_is_left_alone(interrupted, tmp_path):
    last, file = tmp_path / "last.pt", tmp_path / "resume.pt"
    checkpoint = load_checkpoint(interrupted[0] / "weights" / "last.pt")[1]
    whole = (interrupted[0] / "weights" / "resume.pt").read_bytes()
    file.write_bytes(whole)
    found, why = resume.find_state(last, checkpoint)
    assert found["epoch"] == 1 and not why
    whole_state = found
    assert resume.find_state(last.with_name("epoch0.pt"), checkpoint)[0] is None  # the user's choice stands
    for change, expected in (({"run": "x"}, "another run"), ({"format": 0}, "version"), ({"epoch": -1}, "is older")):
        torch.save({**whole_state, **change}, file)
        found, why = resume.find_state(last, checkpoint)
        assert found is None and expected in why
    for damaged in whole[:1000], b"", b"no state":
        file.write_bytes(damaged)
        assert "cannot be read" in resume.find_state(last, checkpoint)[1]


def test_a_damaged_best_checkpoint_does_not_stop_a_run_that_goes_on(interrupted, tmp_path, caplog):
    """Without it nothing could be finished: the last one takes its place."""
    weights = shutil.copytree(interrupted[0] / "weights", tmp_path / "weights")
    last, best = weights / "last.pt", weights / "best.pt"
    whole, run = best.read_bytes(), load_checkpoint(last)[0].qc.run
    resume.mend_best(last)
    assert best.read_bytes() == whole
    for damaged in whole[:1000], b"", b"no checkpoint":
        best.write_bytes(damaged)
        assert not resume.has_ended(last, run)
        resume.mend_best(last)
        assert (
            best.read_bytes() == last.read_bytes() and f"{best} cannot be read; last.pt takes its place" in caplog.text
        )
        caplog.clear()


def test_a_resumed_run_mends_its_best_checkpoint(go_on, caplog):
    go_on(lambda weights: (weights / "best.pt").write_bytes(b"no checkpoint"))
    assert "best.pt cannot be read; last.pt takes its place" in caplog.text


def test_state_of_steps_starts_anew_with_an_epoch(train):
    """An epoch that Ultralytics begins again after a lack of memory holds nothing of the pass that failed."""
    seen = []

    def leave_something(trainer):
        steps = steps_of(trainer)
        x = torch.rand(1, 8, 4, 4)
        for quant in steps._shared:
            quant(x)
        seen.append(len([quant for quant in steps._shared if quant._kept]))
        steps.begin_epoch(trainer)
        seen.append(len([quant for quant in steps._shared if quant._kept or quant._reads]))

    train({"budget": None, "correction": "off"}, {"on_train_batch_start": leave_something})
    assert seen[0] > 1 and set(seen[1::2]) == {0}


def test_averages_of_an_optimizer_take_the_memory_format_of_the_model():
    """As fused steps want, whatever the device was that the file is from."""
    convs = [torch.nn.Conv2d(4, 8, 3) for _ in range(2)]
    convs[1].load_state_dict(convs[0].state_dict())
    convs[1].to(memory_format=torch.channels_last)
    optimizers = [torch.optim.AdamW(conv.parameters(), fused=True) for conv in convs]
    for _ in range(2):
        convs[0].zero_grad()
        convs[0](torch.ones(1, 4, 6, 6)).square().sum().backward()
        optimizers[0].step()
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    state.lay_out(optimizers[1])
    for theirs, conv, was in zip(convs[0].parameters(), [convs[1].weight, convs[1].bias], [True, False]):
        found, before = optimizers[1].state[conv], optimizers[0].state[theirs]
        assert found["exp_avg"].stride() == conv.stride() and torch.equal(found["exp_avg"], before["exp_avg"])
        assert (before["exp_avg"].stride() != conv.stride()) is was and found["step"] == 2


@pytest.mark.parametrize(
    "hours,elapsed,expected", [(None, 99, 0.375), (1.0, 900, 0.375), (1.0, 1800, 0.5), (0.1, 999, 1.0)]
)
def test_how_much_of_a_run_is_over(monkeypatch, hours, elapsed, expected):
    """Of its epochs; of its hours too, where it is given some, whose epochs Ultralytics counts after the first."""
    monkeypatch.setattr("time.time", lambda: 1000 + elapsed)
    trainer = SimpleNamespace(epoch=1, epochs=4, train_loader=range(8), args=SimpleNamespace(time=hours))
    trainer.train_time_start = 1000
    assert Steps._share_done(SimpleNamespace(_batches=4), trainer) == pytest.approx(expected)


def test_a_run_of_other_scales_is_refused(go_on):
    """As of a version that learned the image's scale: by name, not by what torch says of the optimizer."""

    def change(weights):
        (weights / "resume.pt").unlink()
        checkpoint = torch.load(weights / "last.pt", weights_only=False)
        groups = checkpoint["optimizer"]["param_groups"]
        next(g for g in groups if g["param_group"] == "scale")["params"].append(10**6)
        torch.save(checkpoint, weights / "last.pt")

    with pytest.raises(QCError, match=r"last\.pt was begun with another version of yolo-qc-plugin"):
        go_on(change)


def test_another_batch_size_keeps_all_but_the_order(interrupted, go_on, caplog):
    after = go_on(batch=4)
    assert "not exactly as the uninterrupted run, which had batch=8 (now 4)" in caplog.text
    assert after["batch"] == 4
    for key in (k for k in after if k.startswith(("/weights", "/ema", "/optimizer/state"))):
        assert torch.equal(after[key], interrupted[1][key])


def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    """SIGKILL while last.pt or best.pt is written; more phases in docs/results/resume.md."""
    script = Path(__file__).resolve().parents[2] / "examples" / "experiments" / "kill_and_resume.py"
    options = "--kills=1", "--epochs=3", "--phases", "last.pt and best.pt", "--out", str(tmp_path)
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "resume.json").read_text())["runs"]
    assert len(run["kills"]) == 1 and run["kills"][0]["went on from"] == "last.pt" and run["different"] == []


def test_a_classifier_has_the_same_images_after_its_loader_was_restarted(train, tmp_path):
    """Which Ultralytics does where it closes the mosaic of others, in the first of these epochs."""
    data = compose(tmp_path / "digits", train=24, val=8, imgsz=64, seed=0, task="classify")
    options = {"teacher": "off", "correction": "off", "output_bits": None, "telemetry": False}
    arguments = {"model": "yolov8n-cls.yaml", "data": str(data), "epochs": 3}
    train(options, name="whole", **arguments)

    def kill(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options, {"on_train_batch_end": kill}, name="killed", **arguments)
    YOLO(tmp_path / "killed" / "weights" / "last.pt").train(resume=True)
    whole, resumed = (
        load_checkpoint(tmp_path / n / "weights" / "last.pt")[0].state_dict() for n in ("whole", "killed")
    )
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


def test_a_loss_of_nan_goes_back_to_the_last_checkpoint(train, monkeypatch, caplog):
    """The host's recovery restores weights and scales, and no room for resume.pt stops no run."""
    seen = []

    def full(*_):
        raise OSError("no space left")

    def spoil(trainer):
        if trainer.epoch == 1 and not seen:
            seen.append({k: v.float() for k, v in load_checkpoint(trainer.last)[0].state_dict().items()})
            trainer.loss = torch.tensor(float("nan"))

    def look(trainer):
        if len(seen) == 1:
            seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
            assert isinstance(trainer.ema, ConstantEMA)

    monkeypatch.setattr(state, "write_checkpoint", full)
    options = {"correction": "off", "output_bits": None}
    train(options, {"on_train_epoch_end": spoil, "on_train_epoch_start": look}, epochs=2, nbs=8)
    assert "recovering from last.pt" in caplog.text and "resume.pt could not be written" in caplog.text
    assert all(torch.equal(v, seen[1][k]) for k, v in seen[0].items()) and len(seen) == 2


def test_a_run_killed_in_its_last_acts_has_ended(train, tmp_path, monkeypatch):
    """best.pt is the last file that matters; what follows is made up for, and the corrected model stays."""

    def kill(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(finish, "conclude", kill)
        train({"bits": 4, "correction": "off"})
    best = (tmp_path / "run" / "weights" / "best.pt").read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "later")
    (tmp_path / "later" / "weights" / "resume.pt").unlink()
    for run in (tmp_path / "run", tmp_path / "later"):
        weights = run / "weights"
        with pytest.raises(AssertionError, match="nothing to resume"):
            YOLO(weights / "last.pt").train(resume=True, save_dir=str(run))
        assert {f.name for f in weights.iterdir()} == {"last.pt", "best.pt", "qat.pt"}
        assert (weights / "best.pt").read_bytes() == best
        assert load_checkpoint(weights / "last.pt")[1]["optimizer"] is None


def test_a_run_without_a_correction_killed_before_its_last_checkpoint_was_stripped_has_ended(
    train, tmp_path, monkeypatch
):
    """Its best.pt is as the host wrote it, but its report is there and its state is not."""

    strip = resume.strip

    def kill(file, *args):
        if file.name == "last.pt":
            raise KeyboardInterrupt
        return strip(file, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(resume, "strip", kill)
        train({"correction": "off", "output_bits": None})
    weights = tmp_path / "run" / "weights"
    assert {f.name for f in weights.iterdir()} == {"last.pt", "best.pt", "qat.pt"}
    with pytest.raises(AssertionError, match="nothing to resume"):
        YOLO(weights / "last.pt").train(resume=True)
    assert load_checkpoint(weights / "last.pt")[1]["optimizer"] is None


def test_a_run_killed_before_its_best_checkpoint_was_replaced_ends_again(train, tmp_path, monkeypatch):
    """One epoch, the only one: its state before it is what the correction is done again from."""

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(finish, "write_report", kill)
        train({"bits": 3, "correction": "off"})
    weights = tmp_path / "run" / "weights"
    codes = {n: c.weight_codes() for n, c in quant_convs(load_checkpoint(weights / "qat.pt")[0])}
    assert all(c.correction is None for _, c in quant_convs(load_checkpoint(weights / "best.pt")[0]))
    YOLO(weights / "last.pt").train(resume=True)
    report = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())
    assert report["config"]["bits"] == 3 and not (weights / "resume.pt").exists()
    again = {n: c.weight_codes() for n, c in quant_convs(load_checkpoint(weights / "best.pt")[0])}
    assert all(torch.equal(codes[n], c) for n, c in again.items())
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 3  # an epoch, and the end, once


def test_a_class_branch_of_another_width_stays_ours_and_can_be_left(digits, tmp_path):
    """A model fine-tuned to fewer classes keeps a wider branch than its YAML has, which Ultralytics copies as it is."""
    (tmp_path / "tiny.yaml").write_text(TINY_YAML.read_text().replace("nc: 10", "nc: 80"))
    YOLO(tmp_path / "tiny.yaml").save(tmp_path / "start.pt")

    def stop(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    model = YOLO(tmp_path / "start.pt")
    add_qc_callbacks(model, bits=4, correction="off")
    model.add_callback("on_train_batch_start", stop)
    with pytest.raises(KeyboardInterrupt):
        model.train(**{**TINY, "epochs": 2}, data=str(digits), project=str(tmp_path), name="run")
    trained = load_checkpoint(tmp_path / "run" / "weights" / "last.pt")[0]
    assert trained.model[-1].cv3[0][-1].in_channels == 80 != max(32, min(trained.yaml["nc"], 100))

    resumed = YOLO(tmp_path / "run" / "weights" / "last.pt")
    resumed.train(resume=True)
    names = {name for name, _ in quant_convs(trained)}
    assert {name for name, _ in quant_convs(load_checkpoint(tmp_path / "run" / "weights" / "best.pt")[0])} == names

    longer = YOLO(tmp_path / "run" / "weights" / "best.pt")  # without the plugin: float, from the latent weights
    longer.train(**TINY, data=str(digits), project=str(tmp_path), name="float")
    assert not is_quantized(longer.trainer.model) and longer.trainer.model.model[-1].cv3[0][-1].in_channels == 80


def test_rows_of_epochs_that_are_done_again_are_dropped(tmp_path):
    csv = tmp_path / "results.csv"
    csv.write_text("epoch,time,loss\n1,2.5,3\n2,5,2\n3,7.5,1\n4,1")
    resume.drop_rows(csv, 2)
    assert csv.read_text() == "epoch,time,loss\n1,2.5,3\n2,5,2\n"
    resume.drop_rows(csv, 0)
    assert not csv.exists()  # the host writes the head of a file that is not there
    resume.drop_rows(csv, 0)


def test_an_atomic_path_writes_all_or_nothing(tmp_path, monkeypatch):
    path = AtomicPath(tmp_path) / "last.pt"
    assert path.write_bytes(b"old") == 3 and path.read_bytes() == b"old"

    def half(self, data):
        with open(self, "wb") as f:
            f.write(data[:2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        path.write_bytes(b"new one")
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["last.pt"]
