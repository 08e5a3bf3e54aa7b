# yolo_qc_plugin, AGPL-3.0
"""Photographs are found by Ultralytics' rules, in folders and data YAMLs that need not be complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ultralytics.data import utils as data_utils

from yolo_qc_plugin.config import QCError
from yolo_qc_plugin.host.photographs import read_photographs

NOWHERE = Path("nowhere")


def photographs(folder: Path, *names: str) -> list[Path]:
    """Small pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
    return [folder / name for name in names]


def yaml(folder: Path, text: str) -> Path:
    (folder / "photos.yaml").write_text(text)
    return folder / "photos.yaml"


def test_a_folder_is_searched_and_every_tenth_photograph_held_out(tmp_path):
    made = photographs(tmp_path, *(f"{'b/c/' if i % 2 else 'a/'}{i:02}.jpg" for i in range(24)), "a/30.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no photograph")
    found = read_photographs(tmp_path, NOWHERE)
    assert list(found.splits["val"]) == sorted(made)[9::10] and len(found.splits["val"]) == 2
    assert sorted({**found.splits["train"], **found.splits["val"]}) == sorted(made)
    assert found.names is None and not found.own_val and not found.complete
    assert set(found.splits["train"].values()) == {None}


def test_labels_are_where_ultralytics_looks_for_them(tmp_path):
    beside, _, bare = photographs(tmp_path, "x/0.jpg", "images/train/1.jpg", "x/2.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for file in (beside.with_suffix(".txt"), tmp_path / "labels" / "train" / "1.txt"):
        file.write_text("")
    splits = read_photographs(tmp_path, NOWHERE).splits
    labels = {**splits["train"], **splits["val"]}
    assert list(labels.values()) == [tmp_path / "labels" / "train" / "1.txt", beside.with_suffix(".txt"), None]
    assert bare in labels


def test_what_is_written_itself_is_left_out(tmp_path):
    made = photographs(tmp_path, "0.jpg", "1.jpg", "out/images/train/0.jpg")
    found = read_photographs(tmp_path, tmp_path / "out").splits
    assert [*found["train"], *found["val"]] == made[:2]


@pytest.mark.parametrize("path", ["", "path: sets/digits\n"])
def test_paths_of_a_yaml(tmp_path, monkeypatch, path):
    """Relative to the YAML where it has no path, to Ultralytics' folder of data sets where it names one."""
    monkeypatch.setattr(data_utils, "DATASETS_DIR", tmp_path)
    root = tmp_path / ("sets/digits" if path else ".")
    first, second, third = photographs(root, "pictures/0.jpg", "more/1.jpg", "val/2.jpg")
    (root / "listed.txt").write_text("./more/1.jpg\n")
    file = yaml(tmp_path, f"{path}train: [pictures, listed.txt]\nval: val\nkpt_shape: [4, 2]\n")
    found = read_photographs(file, NOWHERE)
    assert found.splits == {"train": {second: None, first: None}, "val": {third: None}}
    assert found.own_val and found.others == {"kpt_shape": [4, 2]}


def test_a_complete_data_set(digits):
    found = read_photographs(digits, NOWHERE)
    assert found.complete and list(found.names.values()) == list("0123456789")
    assert {split: len(of) for split, of in found.splits.items()} == {"train": 24, "val": 8}


@pytest.mark.parametrize("text, message", [
    ("val: pictures\n", "'train:' key missing"),
    ("train: pictures\nval: missing\n", "images not found, missing path .*missing"),
    ("train: missing\nval: pictures\n", "names .*missing, which does not exist"),
    ("train: pictures\n", "has 1 photographs .*give at least two"),
    ("train: empty\nval: pictures\n", "has 1 photographs .*some for training and some for validation"),
    ("train: pictures\nnames: [a, b]\nnc: 3\n", "'names' length 2 and 'nc: 3' must match"),
])  # fmt: skip
def test_refusals_of_a_yaml(tmp_path, text, message):
    photographs(tmp_path, "pictures/0.jpg")
    (tmp_path / "empty").mkdir()
    file = yaml(tmp_path, text)
    with pytest.raises(QCError, match=f"QC: data={file} .*{message}"):
        read_photographs(file, NOWHERE)


@pytest.mark.parametrize(
    "data, message", [("", "has 0 photographs"), ("no.yaml", "cannot be read"), ("no", "cannot be")]
)
def test_refusals_of_other_data(tmp_path, data, message):
    with pytest.raises(QCError, match=f"QC: data={tmp_path / data} {message}"):
        read_photographs(tmp_path / data, NOWHERE)
