# yolo_qc_plugin, AGPL-3.0
"""Two real processes, started by the host's launcher and trained by its loop, over gloo on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FLOAT, TINY, TINY_YAML, last_epoch
from two_processes import GlooTrainer, Record, states
from ultralytics import YOLO, cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.dist import generate_ddp_file
from ultralytics.utils.torch_utils import unwrap_model

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.quant.layers import is_quantized, scale_parameters
from yolo_qc_plugin.startup.command import wrap_entrypoint
from yolo_qc_plugin.tools.evaluate import evaluate

ARGUMENTS = {**TINY, "epochs": 2, "batch": 16, "nbs": 16, "optimizer": "SGD"}  # two batches of 16 and 8 images an epoch
OPTIONS = {"bits": 4, "rounding": "nearest", "dampening_weight": 1.0}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """The YOLO object after a run of two processes, its folder, and what each rank recorded."""
    yolo, folder = YOLO(TINY_YAML), tmp_path_factory.mktemp("ranks")
    add_qc_callbacks(yolo, **OPTIONS)
    for event, callback in Record().events().items():
        yolo.add_callback(event, callback)
    yolo.train(trainer=GlooTrainer, **ARGUMENTS, data=str(digits), project=str(folder), name="run")
    ranks = [torch.load(folder / "run" / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return yolo, folder / "run", ranks


def test_scales_are_equal_on_both_ranks_after_every_step(run):
    first, second = run[2]
    assert first["quantizers"] == second["quantizers"]  # after calibration, ranges included
    assert first["scales"] == second["scales"] and len(first["scales"]) == len(set(first["scales"])) == 4
    averages = [{k: v for k, v in rank["end"]["ema"].items() if "running" not in k} for rank in (first, second)]
    assert all(torch.equal(v, averages[1][k]) for k, v in averages[0].items())


def test_rank_0_corrects_alone_and_measures_every_image(run, digits):
    yolo, folder, (first, second) = run
    report = json.loads((folder / "qc" / "report.json").read_text())
    assert report["kept"] in {"qat", "qc"} and report["metrics"]["qc"] and is_quantized(yolo.model)
    labels = [f.read_text().splitlines() for f in (digits.parent / "labels" / "val").glob("*.txt")]
    # float model, two epochs, best.pt, with quantized outputs, corrected
    assert first["instances"] == [sum(map(len, labels))] * 6 and second["instances"] == []
    assert len(set(first["corrected"])) == 24 and "corrected" not in second
    assert len({f for rank in (first, second) for batch in rank["batches"] for f in batch["im_file"]}) == 24


def test_a_start_teaches_both_ranks(digits, tmp_path):
    """The other rank measures nothing of the start, and has the calibrated model and the spreads all the same.

    What both predict of their images is scored by pycocotools on rank 0.
    """
    yolo = YOLO(FLOAT)
    add_qc_callbacks(yolo, bits=4, correction="off", output_bits=None, coco_eval=True)
    for event, callback in Record().events().items():
        yolo.add_callback(event, callback)
    arguments = {**ARGUMENTS, "epochs": 1, "data": str(digits), "project": str(tmp_path), "name": "run"}
    yolo.train(trainer=GlooTrainer, **arguments)
    first, second = (torch.load(tmp_path / "run" / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert last_epoch(tmp_path / "run")["train/teacher_loss"] > 0
    measured = json.loads((tmp_path / "run" / "qc" / "report.json").read_text())["metrics"]
    expected = evaluate(FLOAT, digits, imgsz=64, device="cpu", rect=False)["coco"]["bbox"]
    assert measured["float"]["coco"]["bbox"]["AP"] == pytest.approx(expected["AP"], abs=0.02) and expected["AP"] > 0.1
    assert measured["qat"]["coco"]["ground_truth"] == "labels"
    start, other = (rank["start"]["model"] for rank in (first, second))
    assert all(torch.equal(v, other[k]) for k, v in start.items())
    assert first["scales"] == second["scales"] and len(set(first["scales"])) == 2


class Replay:
    """A training loader that gives batches seen before."""

    def __init__(self, loader, batches):
        self.loader, self.batches = loader, iter(batches)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (next(self.batches) for _ in range(len(self)))

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_two_processes_train_as_one_that_accumulates_their_batches(run, digits, train):
    """One process, from the same start, on each rank's batches in turn, a step for every two of them.

    Batch norms see the same batches in either case. Running statistics are left out of the comparison: those saved by
    two processes are of rank 0's batches. What may differ is the order of sums.
    """
    first, second = run[2]
    found = {}

    def start(trainer):
        for model, state in ((unwrap_model(trainer.model), "model"), (trainer.ema.ema, "ema")):
            model.load_state_dict(first["start"][state])
        batches = [batch for pair in zip(first["batches"], second["batches"]) for batch in pair]
        trainer.train_loader = Replay(trainer.train_loader, batches)

    arguments = {**ARGUMENTS, "batch": 6, "nbs": 12}  # four batches an epoch, two of them a step
    train(
        {**OPTIONS, "correction": "off", "output_bits": None},  # what would need the loader again
        {"on_train_start": start, "on_train_epoch_end": lambda trainer: found.update(states(trainer))},
        **arguments,
    )
    moved = 0
    for kind in ("model", "ema"):
        for name, value in found[kind].items():
            if "running" not in name and value.is_floating_point():
                torch.testing.assert_close(value, first["end"][kind][name], rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")
                moved += not torch.equal(value, first["start"][kind][name])
    assert moved > 2 * len(scale_parameters(run[0].model))


class Launched(Exception):
    """In place of the launch."""


def test_a_worker_started_from_the_command_line_has_the_plugin_and_its_options(digits, tmp_path, monkeypatch):
    """The host's script for its workers, written by `yolo train`, run in a fresh process up to the training."""
    files = []

    def launch(trainer):
        files.append(generate_ddp_file(trainer))
        raise Launched

    with monkeypatch.context() as patch, pytest.raises(Launched):
        patch.setattr(BaseTrainer, "train", launch)
        stock = SimpleNamespace(entrypoint=cfg.entrypoint, ARGV=[], merge_equals_args=cfg.merge_equals_args)
        wrap_entrypoint(stock)
        host = {**TINY, "data": digits, "project": tmp_path, "name": "run"}
        options = "callbacks=qc qc_bits=3 qc_skip=model.9.*"
        stock.entrypoint(f"yolo train model=yolov5n.yaml {options} " + " ".join(f"{k}={v}" for k, v in host.items()))
    code = (
        "import json, runpy\nfrom ultralytics.engine.trainer import BaseTrainer\n"
        "def show(trainer):\n"
        "    found = {event: [c for c in cs if type(getattr(c, '__self__', None)).__name__ == 'QCCallbacks']\n"
        "             for event, cs in trainer.callbacks.items()}\n"
        "    ours = {id(c.__self__): c.__self__ for cs in found.values() for c in cs}\n"
        "    print(json.dumps({'events': sorted(e for e in found if found[e]),\n"
        "                      'options': [o.state.config.to_dict() for o in ours.values()],\n"
        "                      'attached': hasattr(BaseTrainer.setup_model, 'qc_patch')}))\n"
        "BaseTrainer.train = show\n"
        f"runpy.run_path({files[0]!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"on_model_setup", "on_pretrain_routine_end", "on_train_batch_end", "on_train_end"} <= set(found["events"])
    assert found["attached"] and [(o["bits"], o["skip"]) for o in found["options"]] == [(3, ["model.9.*"])]
