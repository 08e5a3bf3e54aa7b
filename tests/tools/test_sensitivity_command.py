# yolo_qc_plugin, AGPL-3.0
"""`yolo-qc sensitivity`: its files and what it refuses."""

from __future__ import annotations

import json

import pytest
from conftest import CHECKPOINTS, FLOAT

from yolo_qc_plugin.cli import main
from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.data.digits import compose
from yolo_qc_plugin.tools.sensitivity import format_sensitivity, sensitivity


def test_the_command_writes_a_file_and_a_picture(digits, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"model={FLOAT}", f"data={digits}", "bits=2,8", "images=2", "imgsz=64", f"out={out}"]
    assert main(["sensitivity", *arguments]) == 0
    text = capsys.readouterr().out
    found = json.loads((out / "sensitivity.json").read_text())
    of_weights, of_tensors = (found["costs"][kind] for kind in ("weights", "activations"))
    assert list(of_weights) == list(found["about"]["layers"]) and list(of_tensors) == list(found["about"]["tensors"])
    assert all(costs["2"] > costs["8"] > 0 for costs in [*of_weights.values(), *of_tensors.values()])
    worst = max(of_weights, key=lambda name: of_weights[name]["2"])
    assert text.partition("that cost most:\n")[2].startswith(f"  {worst} ") and "written to" in text
    assert (out / "sensitivity.png").stat().st_size > 10_000 and (out / "sensitivity.pdf").exists()


def test_costs_of_other_images_and_of_other_widths_are_not_taken(digits, tmp_path):
    """Images of another set have the same names; a measurement with other widths ended before its end."""
    given = dict(model=FLOAT, images=2, imgsz=64, out=tmp_path / "out")
    first = sensitivity(data=digits, bits=[2], **given)
    other = compose(tmp_path / "other", 24, 1, 64, seed=5)
    assert sensitivity(data=other, bits=[2], **given)["costs"] != first["costs"]
    file = tmp_path / "out" / "sensitivity.json"
    found = json.loads(file.read_text())
    del found["costs"]["weights"]["model.1.conv"]
    file.write_text(json.dumps(found))
    later = sensitivity(data=other, bits=[4], **given)
    assert {width for of in later["costs"].values() for costs in of.values() for width in costs} == {"4"}
    assert "weights at 4 bits" in format_sensitivity(later) and "2 bits" not in format_sensitivity(later)


@pytest.mark.parametrize("content", ['{"mine": 1}', "no JSON"])
def test_another_file_of_that_name_is_not_written_over(content, digits, tmp_path):
    file = tmp_path / "sensitivity.json"
    file.write_text(content)
    with pytest.raises(QCError, match=f"{file} is no record of costs; move it"):
        sensitivity(FLOAT, digits, out=tmp_path)
    assert file.read_text() == content


@pytest.mark.parametrize("arguments,message", [
    ({"bits": [1, 4]}, r"bits=\[1, 4\] is not accepted; give whole numbers from 2 to 8"),
    ({"bits": []}, r"bits=\[\] is not accepted"),
    ({"model": "missing.pt"}, r"model=missing.pt does not exist"),
    ({"imgsz": 0}, r"imgsz=0 is not accepted; give a whole number of at least 32"),
    ({"images": 0}, r"images=0 is not accepted; give a whole number of at least 1"),
    ({"model": CHECKPOINTS / "quantized.pt"}, r"quantized.pt is quantized; give the float checkpoint"),
])  # fmt: skip
def test_refusals_come_before_the_work(arguments, message, digits, tmp_path):
    with pytest.raises(QCError, match=message):
        sensitivity(**{"model": FLOAT, "data": digits, "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
