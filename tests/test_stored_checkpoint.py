# yolo_qc_plugin, AGPL-3.0
"""checkpoints/quantized.pt, which every version from the one that wrote it must open and find the same in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import CHECKPOINTS

# a program that knows nothing of the plugin: it opens, predicts and validates
OPEN = """
import json, sys
from ultralytics import YOLO
file, data, images, folder = sys.argv[1:]
common = {"imgsz": 64, "device": "cpu", "verbose": False, "project": folder}
found = YOLO(file).predict(images, **common)
metrics = YOLO(file).val(data=data, plots=False, **common)
hook = "_yolo_qc_startup" in sys.modules
print(json.dumps({"boxes": [len(r.boxes) for r in found], "map50_95": metrics.box.map, "map50": metrics.box.map50,
                  "hook": hook}))
"""


@pytest.mark.parametrize("safe", [False, True], ids=["", "restricted"])
def test_it_opens_and_gives_its_figures(digits, tmp_path, safe):
    file, images = CHECKPOINTS / "quantized.pt", digits.parent / "images" / "val"
    environment = {k: v for k, v in os.environ.items() if k != "ULTRALYTICS_SAFE_LOAD"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, file, digits, images, tmp_path],
        env=environment | ({"ULTRALYTICS_SAFE_LOAD": "1"} if safe else {}),
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found, stored = json.loads(done.stdout.splitlines()[-1]), json.loads((CHECKPOINTS / "quantized.json").read_text())
    assert found["hook"] is safe and stored["map50_95"] > 0.2 and sum(found["boxes"]) > 8
    for name in ("map50_95", "map50"):  # other processors round otherwise, and one box of 8 images may change
        assert found[name] == pytest.approx(stored[name], abs=0.01)


def test_its_run_would_go_on_as_it_began():
    """Options of later versions are what 0.2.0 did, not what is the default now."""
    from ultralytics import YOLO

    record = YOLO(CHECKPOINTS / "quantized.pt").model.qc
    options = record.options
    assert (options.rounding, options.relative_steps, options.teacher) == ("nearest", False, "off")
    assert (options.budget, options.target, options.labels, options.bn_freeze) == (None, None, "data", False)
    assert (options.correction, options.ema_decay) == ("channel", 0.99)  # of the file
    record.config |= {"dampening_weight": 0.01}  # which annealed rounding refuses
    assert record.options.dampening_weight == 0.01


def test_its_codes_are_those_that_were_stored():
    from checkpoints.make import SIZE, hash_of_codes
    from ultralytics import YOLO

    file = CHECKPOINTS / "quantized.pt"
    assert file.stat().st_size < SIZE
    assert hash_of_codes(YOLO(file).model) == json.loads((CHECKPOINTS / "quantized.json").read_text())["codes"]
