# yolo_qc_plugin, AGPL-3.0
"""The program `yolo-qc`: one grammar, help from the functions behind the commands, refusals in a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_qc_plugin import __version__
from yolo_qc_plugin.cli import COMMANDS, main
from yolo_qc_plugin.keys import Key, documented, keys_of


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_commands_are_listed(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert " ".join(COMMANDS) == ("correct eval compare check benchmark plot sensitivity label options digits hook")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_key(name, capsys):
    """One line each, with the function's own default and first sentence."""
    assert main([name, "--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    keys = [(key, of) for form in COMMANDS[name][1] for key, of in form.keys().items()]
    assert [key for key, _ in lines] == [key for key, _ in keys]
    for (_, told), (_, key) in zip(lines, keys):
        assert key.meaning and told.startswith(key.meaning) and key.accepted in told
        assert ("(required, " in told) == key.required and (f"default {key.default}" in told or not key.default)


def test_help_of_a_command_says_what_it_takes(capsys):
    main(["digits", "--help"])
    told = capsys.readouterr().out
    assert "usage: yolo-qc digits out=... [key=value ...]\n" in told
    assert "  train              Images of the train split, >= 1. (a whole number, default 300)\n" in told


def test_eval_of_files(tmp_path, capsys):
    truth = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(json.dumps(found))
    files = [f"annotations={tmp_path / 'gt.json'}", f"detections={tmp_path / 'dt.json'}"]
    assert main(["eval", *files, f"json={tmp_path / 'out.json'}"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["AP"] == pytest.approx(1.0)
    assert "AP50" in capsys.readouterr().out


@pytest.mark.parametrize("arguments,message", [
    (["chek"], "there is no such command. Did you mean check? Accepted: correct, eval,"),
    (["eval", "model=x.pt"], "give model= and data=, or annotations= and detections="),
    (["eval", "modle=x.pt"], "'modle=x.pt' is not accepted. Did you mean model?"),
    (["eval", "imgsz=big", "model=a", "data=b"], "imgsz='big' is not accepted; give a whole number or several with"),
    (["eval", "conf=", "model=a", "data=b"], "conf='' is not accepted; give a number"),
    (["eval", "clip=maybe", "model=a", "data=b"], "clip='maybe' is not accepted; give true or false"),
    (["eval", "model"], "'model' is not accepted; give key=value with a key of model, data,"),
    (["eval", "annotations=a", "detections=b", "imgsz=3"], "'imgsz=3' is not accepted. Accepted: annotations, det"),
    (["check", "model=a", "file=b"], "give model= and file= and data="),
    (["correct", "correction=tensor"], "give model="),
    (["correct", "model=a", "correction_shape=1"], "Did you mean correction_s"),
    (["plot", "runs/a"], "'runs/a' is not accepted; give key=value with a key of runs, out, steps"),
    (["eval", "annotations=a", "detections=b", "json=no/out.json"], "json=no/out.json: its folder does not exist"),
    (["digits"], "give out="),
    (["digits", "out=x", "train=1.5"], "train='1.5' is not accepted; give a whole number"),
    (["digits", "out=x", "train=0"], "train"),
    (["hook", "action=start"], "action='start' is not accepted; give install or remove or status"),
])  # fmt: skip
def test_refusals_take_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"yolo-qc {arguments[0]}: ") and told.err.count("\n") == 1 and message in told.err
    assert told.out == "" and not list(tmp_path.iterdir())


def test_what_ultralytics_asserts_takes_one_line(tmp_path, capsys):
    (tmp_path / "data.json").write_text("{}")
    assert main(["eval", "model=yolov8n.yaml", f"data={tmp_path / 'data.json'}", "imgsz=32"]) == 1
    told = capsys.readouterr().err
    assert told.endswith("\n") and told.count("\n") == 1 and "Not a YAML file" in told


def test_digits_and_hook(tmp_path, capsys):
    assert main(["digits", f"out={tmp_path / 'd'}", "--train=2", "val=1", "imgsz=64"]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'd' / 'digits.yaml'}\n")
    assert (tmp_path / "d" / "digits.yaml").exists()
    assert main(["hook", "action=status"]) == 0
    assert "hook" in capsys.readouterr().out
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out


def example(
    runs: Sequence[str | Path],
    size: int | Sequence[int] | None = None,
    kind: Literal["a", "b"] = "a",
    clip: bool = True,
    rate: float = 0.5,
    **more,
) -> None:
    """Take all kinds.

    Args:
        runs: Folders, at
            least one. They are read.
        size: Side.
        kind: Which.
        clip: Whether.
        rate: How much; in 0..1.
        **more: Of others.

    Returns:
        runs: Not an argument.
    """


def test_keys_are_those_of_a_function():
    keys = keys_of(example)
    assert documented(example)["runs"] == "Folders, at least one." and list(keys) == [
        "runs", "size", "kind", "clip", "rate",
    ]  # fmt: skip
    assert [(k.required, k.default) for k in keys.values()] == [
        (True, ""), (False, ""), (False, "a"), (False, "True"), (False, "0.5"),
    ]  # fmt: skip
    read = {name: key.read(text) for (name, key), text in zip(keys.items(), ("x,y", "64", "b", "FALSE", "1e-3"))}
    assert read == {"runs": ["x", "y"], "size": 64, "kind": "b", "clip": False, "rate": 1e-3}
    assert [keys["size"].read(text) for text in ("64,96", "[64, 96]")] == [[64, 96]] * 2
    assert keys["runs"].read("runs/train (2)") == ["runs/train (2)"]


@given(st.text(), st.sampled_from([int, float, bool, str, int | None, Sequence[int], Literal["a", "b"]]))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused(text, hint):
    try:
        value = Key(hint, "").read(text)
    except ValueError:
        assert hint is not str or text == ""
    else:
        kind = {int | None: int, Sequence[int]: list, Literal["a", "b"]: str}.get(hint, hint)
        assert type(value) is kind
