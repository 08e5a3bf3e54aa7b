# yolo_qc_plugin, AGPL-3.0
"""The digits data set on disk: pictures (`scenes`) of pixels that installed packages ship, and labels of any task.

Nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils import TQDM

from .scenes import LEVELS, SPLITS, VERSION, class_names, cut_out, draw_scene, load_photographs, load_scans

JPEG_QUALITY = 92
TASKS = ("detect", "segment", "pose", "obb", "classify")
KEYPOINTS = 4  # of a digit: the ends of its ink at the top, right, bottom and left


def compose(
    out: str | Path,
    train: int = 300,
    val: int = 100,
    imgsz: int = 160,
    seed: int = 0,
    task: str = "detect",
    level: str = "plain",
) -> Path:
    """Write the data set in Ultralytics' layout and return what `data=` takes.

    The same arguments give the same bytes, and the first n images of a split depend on `imgsz`, `seed` and `level`
    alone, not on how many are made. The folder appears only when it is complete: an interrupted call leaves none. A
    second call with the same arguments returns at once.

    Args:
        out: Folder to make; it must be absent or empty, or hold the same set already.
        train: Images of the train split, >= 1.
        val: Images of the val split, >= 1.
        imgsz: Side of the square images in pixels, a multiple of 32, >= 64.
        seed: Seed of every random draw, >= 0.
        task: What the labels are for: detect, segment, pose, obb or classify. All tasks but the last have the same
            images.
        level: How hard the set is: plain, hard (20 classes, clutter, fainter) or wide (hard in all sizes).

    Returns:
        `out/digits.yaml`, beside `images/{train,val}/*.jpg` and `labels/{train,val}/*.txt`; classes 0 to 9, or these in
        blue and in red, as the level has it. Masks are convex outlines of the ink, oriented boxes the smallest around
        it. For "classify" `out` itself, with `{train,val}/{class}/*.jpg`, one digit each, cut out of that image.

    Raises:
        ValueError: An option is out of range, or `out` holds anything else than this very set.
        ImportError: scikit-learn is not installed.
    """
    _check_options(train=train, val=val, imgsz=imgsz, seed=seed)
    for name, value, accepted in (("task", task, TASKS), ("level", level, LEVELS)):
        if value not in accepted:
            raise ValueError(f"{name}={value!r} is not accepted: it must be one of {', '.join(accepted)}")
    out = Path(out).resolve()
    yaml = out / "digits.yaml"
    data = out if task == "classify" else yaml
    counts = {"train": train, "val": val}
    names = class_names(LEVELS[level])
    text = _yaml_text(out, counts, imgsz, seed, task, level)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(out, text, counts, task)
        return data

    scans, classes = load_scans(seed)
    partial = out.with_name(f".{out.name}.{os.getpid()}")  # beside `out`, so that the last step is one rename
    try:
        for index, split in enumerate(SPLITS):
            for folder in _folders(partial, split, task, names):
                folder.mkdir(parents=True)
            photographs = load_photographs(split)
            for i in TQDM(range(counts[split]), desc=f"digits {split}"):
                rng = np.random.default_rng([seed, index, i])
                canvas, rows, outlines = draw_scene(
                    rng, photographs, scans[split], classes[split], imgsz, LEVELS[level]
                )
                if task == "classify":  # the last digit, which no other covers
                    image = partial / split / names[rows[-1][0]] / f"{i:05d}.jpg"
                    canvas = cut_out(canvas, *rows[-1][1:])
                else:
                    image, label = (d / f"{i:05d}" for d in _folders(partial, split, task, names))
                    image = image.with_suffix(".jpg")
                    label.with_suffix(".txt").write_text(_label_text(rows, outlines, imgsz, task), encoding="utf-8")
                jpeg = cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
                image.write_bytes(jpeg.tobytes())
        (partial / yaml.name).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()  # it is empty; not every system renames over a folder
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return data


def _check_options(**options: int) -> None:
    """Raise a ValueError for the first option out of its range."""
    minimum = {"train": 1, "val": 1, "imgsz": 64, "seed": 0}
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum[name]:
            raise ValueError(f"{name}={value!r} is not accepted: it must be an integer >= {minimum[name]}")
    if options["imgsz"] % 32:
        raise ValueError(f"imgsz={options['imgsz']} is not accepted: it must be a multiple of 32")


def _folders(root: Path, split: str, task: str, names: list[str]) -> list[Path]:
    """Where a split's files go: images and labels, or one folder for each class."""
    if task == "classify":
        return [root / split / name for name in names]
    return [root / "images" / split, root / "labels" / split]


def _yaml_text(out: Path, counts: dict[str, int], imgsz: int, seed: int, task: str, level: str) -> str:
    """The data YAML; its first line says what made the folder."""
    names = "".join(f"  {c}: '{name}'\n" for c, name in enumerate(class_names(LEVELS[level])))
    other = ("" if task == "detect" else f" task={task}") + ("" if level == "plain" else f" level={level}")
    flipped = [0, *range(KEYPOINTS - 1, 0, -1)]  # mirrored, left is right
    keypoints = f"kpt_shape: [{KEYPOINTS}, 2]\nflip_idx: {flipped}\n" if task == "pose" else ""
    return (
        f"# yolo_qc_plugin digits, version {VERSION}: train={counts['train']} val={counts['val']} imgsz={imgsz} "
        f"seed={seed}{other}\npath: '{str(out).replace(chr(39), chr(39) * 2)}'\n"
        f"train: images/train\nval: images/val\nnames:\n{names}{keypoints}"
    )


def _check_same(out: Path, text: str, counts: dict[str, int], task: str) -> None:
    """Raise a ValueError unless the folder `out` holds all of the set whose YAML is `text`."""
    yaml = out / "digits.yaml"
    found = yaml.read_text(encoding="utf-8") if yaml.is_file() else ""
    first, wanted = found.partition("\n")[0], text.partition("\n")[0]
    if not first.startswith("# yolo_qc_plugin digits"):
        raise ValueError(f"out='{out}' is not empty and no digits set: choose another folder")
    if first != wanted:
        raise ValueError(f"out='{out}' holds '{first[2:]}', not '{wanted[2:]}': choose another folder")
    if found != text:
        raise ValueError(f"out='{out}' was moved or its digits.yaml edited: choose another folder")
    for split, count in counts.items():
        for folder in [out / split] if task == "classify" else _folders(out, split, task, []):
            if not {f"{i:05d}" for i in range(count)} <= {f.stem for f in folder.rglob("*.*")}:
                where = folder.relative_to(out).as_posix()
                raise ValueError(f"out='{out}' lacks files in {where}: delete it or choose another folder")


def _label_text(rows: list[tuple[int, int, int, int, int]], outlines: list[np.ndarray], imgsz: int, task: str) -> str:
    """A task's rows: class, then x y w h (centre and size) and keypoints, or corners; all over the image side."""
    lines = []
    for (c, x, y, w, h), outline in zip(rows, outlines):
        values: tuple[float, ...] | np.ndarray = (x + w / 2, y + h / 2, w, h)
        if task == "segment":
            values = outline.flatten()
        elif task == "obb":
            values = cv2.boxPoints(cv2.minAreaRect(outline)).clip(0, imgsz).flatten()
        elif task == "pose":
            ends = outline[:, 1].argmin(), outline[:, 0].argmax(), outline[:, 1].argmax(), outline[:, 0].argmin()
            values = (*values, *outline[list(ends)].flatten().tolist())
        lines.append(" ".join([str(c), *(f"{v / imgsz:.6f}" for v in values)]) + "\n")
    return "".join(lines)
