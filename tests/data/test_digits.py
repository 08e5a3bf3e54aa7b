# yolo_qc_plugin, AGPL-3.0
"""The digits set: same arguments give the same bytes, boxes fit the ink, nothing of the user's is overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from ultralytics.data.utils import check_cls_dataset, check_det_dataset

from yolo_qc_plugin.data import digits, scenes

IMGSZ = 96
PLAIN = scenes.LEVELS["plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 + 8 images."""
    return digits.compose(tmp_path_factory.mktemp("digits") / "set", 24, 8, IMGSZ).parent


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the YAML, which holds the folder's own path, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "digits.yaml"
    }


def read_rows(file: Path) -> np.ndarray:
    """Label rows (n, 5) of one file."""
    return np.loadtxt(file, ndmin=2)


def test_layout_is_what_ultralytics_reads(folder: Path):
    info = check_det_dataset(folder / "digits.yaml")
    assert info["names"] == {i: str(i) for i in range(10)}
    for split, count in (("train", 24), ("val", 8)):
        images = sorted(Path(info[split]).glob("*.jpg"))
        assert len(images) == count
        assert all(cv2.imread(str(image)).shape == (IMGSZ, IMGSZ, 3) for image in images)
    assert len(contents(folder)) == 2 * (24 + 8)


def test_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path):
    digits.compose(tmp_path / "again", 24, 8, IMGSZ)
    assert contents(tmp_path / "again") == contents(folder)


def test_first_images_do_not_depend_on_the_counts(folder: Path, tmp_path: Path):
    digits.compose(tmp_path / "fewer", 3, 2, IMGSZ)
    fewer, more = contents(tmp_path / "fewer"), contents(folder)
    assert len(fewer) == 10
    assert all(more[name] == data for name, data in fewer.items())


def test_another_seed_gives_other_images(folder: Path, tmp_path: Path):
    digits.compose(tmp_path / "other", 3, 2, IMGSZ, seed=1)
    other, one = contents(tmp_path / "other"), contents(folder)
    assert all(one[name] != data for name, data in other.items() if name.endswith("jpg"))


def test_boxes_lie_in_the_image_and_cover_each_other_little(folder: Path):
    counts = []
    for file in sorted(folder.glob("labels/*/*.txt")):
        rows = read_rows(file)
        counts.append(len(rows))
        low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
        assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6 and rows[:, 3:].min() > 0
        for i in range(len(rows)):  # rows stand in the order of pasting
            sides = np.minimum(high[i], high[i + 1 :]) - np.maximum(low[i], low[i + 1 :])
            covered = sides.clip(0).prod(axis=1).sum()
            assert covered <= scenes.MAX_COVER * rows[i, 3:].prod() + 1e-4
    assert min(counts) >= 1 and max(counts) <= 8 and len(set(counts)) > 3


def test_boxes_are_tight_around_the_ink():
    scans, classes = scenes.load_scans(0)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        canvas = np.full((160, 160, 3), 128, np.uint8)
        boxes = np.array(scenes._paste_digits(rng, canvas, scans["train"], classes["train"], PLAIN)[0])[:, 1:]
        changed = (canvas != 128).any(axis=2)
        inside = np.zeros_like(changed)
        for x, y, w, h in boxes:
            inside[y : y + h, x : x + w] = True
        assert not (changed & ~inside).any()
        if len(boxes) == 1 or not any(scenes._intersection(boxes[0], box) for box in boxes[1:]):
            x, y, w, h = boxes[0]
            rows, columns = np.nonzero(changed[y : y + h, x : x + w])
            # The outermost ink may be too transparent to move an integer grey level, hence 2 pixels of slack.
            assert rows.min() <= 2 and columns.min() <= 2 and rows.max() >= h - 3 and columns.max() >= w - 3


def test_ink_stands_out_in_the_written_images(folder: Path):
    """Shuffling the boxes among the images must lose the ink: the labels belong to their images."""

    def spread(shift: int) -> float:
        files = sorted(folder.glob("labels/train/*.txt"))
        values = []
        for i, file in enumerate(files):
            image = cv2.imread(str(folder / "images/train" / f"{(i + shift) % len(files):05d}.jpg"))
            for _, x, y, w, h in read_rows(file) * IMGSZ:
                values.append(image[round(y - h / 2) : round(y + h / 2), round(x - w / 2) : round(x + w / 2)].std())
        return float(np.median(values))

    assert spread(0) > 1.3 * spread(7)


def test_splits_share_no_scan_and_no_photograph_pixel():
    scans, classes = scenes.load_scans(0)
    assert sum(map(len, scans.values())) == sum(map(len, classes.values())) == 1797
    train, val = ({scan.tobytes() for scan in scans[split]} for split in ("train", "val"))
    assert not train & val
    assert all(set(classes[split]) == set(range(10)) for split in scans)
    for name, left, right in zip(scenes.PHOTOGRAPHS, *(scenes.load_photographs(split) for split in scenes.SPLITS)):
        whole = cv2.imread(str(scenes.ASSETS / name))
        assert np.array_equal(np.hstack([left, right]), whole)


def test_a_second_call_rewrites_nothing(folder: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert digits.compose(folder, 24, 8, IMGSZ) == folder / "digits.yaml"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_empty_folder_is_accepted(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert digits.compose(tmp_path / "empty", 1, 1, 64).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]  # and no temporary folder is left


def test_other_parameters_are_refused(folder: Path):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"seed=0.*seed=3.*choose another folder"):
        digits.compose(folder, 24, 8, IMGSZ, seed=3)
    assert contents(folder) == before


def test_a_folder_of_the_user_is_refused(tmp_path: Path):
    (tmp_path / "digits.yaml").write_text("path: mine\n")
    with pytest.raises(ValueError, match=r"not empty.*choose another folder"):
        digits.compose(tmp_path, 1, 1, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["digits.yaml"]
    with pytest.raises(ValueError, match="choose another folder"):
        digits.compose(tmp_path / "digits.yaml", 1, 1, 64)
    assert (tmp_path / "digits.yaml").read_text() == "path: mine\n"


def test_an_incomplete_or_moved_set_is_refused(tmp_path: Path):
    yaml = digits.compose(tmp_path / "set", 2, 1, 64)
    yaml.parent.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="moved"):
        digits.compose(tmp_path / "moved", 2, 1, 64)
    (tmp_path / "moved").rename(tmp_path / "set")
    (tmp_path / "set/labels/train/00001.txt").unlink()
    with pytest.raises(ValueError, match="lacks files in labels/train"):
        digits.compose(tmp_path / "set", 2, 1, 64)


def test_labels_of_other_tasks_fit_the_boxes(folder: Path, tmp_path: Path):
    """The same images; masks, keypoints and oriented boxes span the detection labels' boxes."""
    for task in ("segment", "pose", "obb"):
        other = digits.compose(tmp_path / task, 6, 2, IMGSZ, task=task).parent
        for file in sorted(other.glob("labels/*/*.txt")):
            image = Path("images", *file.relative_to(other / "labels").with_suffix(".jpg").parts)
            assert (other / image).read_bytes() == (folder / image).read_bytes()
            boxes = read_rows(folder / file.relative_to(other))
            lines = [np.array(line.split(), float) for line in file.read_text().splitlines()]
            assert len(lines) == len(boxes)
            for values, (c, x, y, w, h) in zip(lines, boxes):
                if task == "pose":
                    assert np.allclose(values[:5], (c, x, y, w, h))
                points = values[5 if task == "pose" else 1 :].reshape(-1, 2)
                low, high = points.min(0), points.max(0)
                slack = 0.5 if task == "obb" else 1e-5  # a turned rectangle reaches beyond the box of what is in it
                assert values[0] == c and (abs(low - (x - w / 2, y - h / 2)) <= slack * np.array([w, h]) + 1e-5).all()
                assert (abs(high - (x + w / 2, y + h / 2)) <= slack * np.array([w, h]) + 1e-5).all()
    info = check_det_dataset(tmp_path / "pose" / "digits.yaml")
    assert info["kpt_shape"] == [4, 2] and info["flip_idx"] == [0, 3, 2, 1]


def test_the_hard_level(folder: Path, tmp_path: Path):
    """More and smaller digits of twice the classes, red where the ink is, and ink that no label covers."""
    hard = digits.compose(tmp_path / "hard", 24, 8, IMGSZ, level="hard").parent
    names = check_det_dataset(hard / "digits.yaml")["names"]
    assert len(names) == 20 and (names[3], names[13]) == ("3 blue", "3 red")
    rows = {level: np.concatenate([read_rows(f) for f in path.glob("labels/*/*.txt")])
            for level, path in (("plain", folder), ("hard", hard))}  # fmt: skip
    assert len(rows["hard"]) > 1.4 * len(rows["plain"])
    assert np.median(rows["hard"][:, 4]) < 0.95 * np.median(rows["plain"][:, 4])
    assert rows["plain"][:, 0].max() == 9 and {r // 10 for r in rows["hard"][:, 0]} == {0, 1}
    with pytest.raises(ValueError, match=r"level=hard.*choose another folder"):
        digits.compose(hard, 24, 8, IMGSZ)

    scans, classes = scenes.load_scans(0)
    single = replace(scenes.LEVELS["hard"], objects=(1, 1))
    seen = set()
    for seed in range(8):
        rng, canvas = np.random.default_rng(seed), np.full((160, 160, 3), 128, np.uint8)
        ((c, x, y, w, h),), _ = scenes._paste_digits(rng, canvas, scans["train"], classes["train"], single)
        blue, _, red = canvas[y : y + h, x : x + w].mean(axis=(0, 1))
        assert (red > blue + 10) == (c >= 10) == (blue < red - 10)
        seen.add(c >= 10)
        before = canvas.copy()
        scenes._paste_clutter(rng, canvas, scans["train"], single)
        assert (canvas != before).any()
    assert seen == {False, True}


def test_the_wide_level(tmp_path: Path):
    """The hard level's classes in sizes for every stride of a detector, the coarsest of 32 pixels among them."""
    wide = digits.compose(tmp_path / "wide", 24, 1, IMGSZ, level="wide").parent
    assert len(check_det_dataset(wide / "digits.yaml")["names"]) == 20
    heights = np.concatenate([read_rows(f) for f in wide.glob("labels/*/*.txt")])[:, 4]
    assert heights.min() < 0.12 and heights.max() > 0.6
    assert 0.1 < np.mean(heights > 0.4) < 0.5


def test_the_largest_digits_fit_into_the_picture():
    """Some scrambled scans of three quarters of the side, turned, are a pixel larger than the picture."""
    scans = np.roll(scenes.load_scans(0)[0]["train"], (4, 4), (1, 2))[:200]
    assert any(max(scenes._draw_glyph(scan, 0.75 * 320, 25.0).shape) > 320 for scan in scans)
    most = SimpleNamespace(uniform=lambda low, high: high)
    assert all(max(scenes._draw_random(most, scan, 320, scenes.LEVELS["wide"]).shape) <= 320 for scan in scans)


def test_classes_are_folders(tmp_path: Path):
    data = digits.compose(tmp_path / "set", 24, 8, IMGSZ, task="classify")
    info = check_cls_dataset(data)
    assert info["names"] == {i: str(i) for i in range(10)}
    assert [len(list(Path(info[split]).glob("*/*.jpg"))) for split in ("train", "val")] == [24, 8]
    assert digits.compose(data, 24, 8, IMGSZ, task="classify") == data
    next(data.glob("val/*/00003.jpg")).unlink()
    with pytest.raises(ValueError, match="lacks files in val"):
        digits.compose(data, 24, 8, IMGSZ, task="classify")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"train": 0}, "train=0"),
        ({"val": -1}, "val=-1"),
        ({"train": 2.0}, "train=2.0.*integer"),
        ({"imgsz": 32}, "imgsz=32.*>= 64"),
        ({"imgsz": 100}, "imgsz=100.*multiple of 32"),
        ({"seed": -1}, "seed=-1"),
        ({"task": "depth"}, "task='depth'.*classify"),
        ({"level": "easy"}, "level='easy'.*plain, hard, wide"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        digits.compose(tmp_path / "set", **{"train": 1, "val": 1, "imgsz": 64, **options})
    assert not (tmp_path / "set").exists()


def test_an_interrupted_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_label_text", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.compose(tmp_path / "set", 2, 1, 64)
    assert not list(tmp_path.iterdir())
