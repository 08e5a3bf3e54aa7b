# yolo_qc_plugin, AGPL-3.0
"""A small data set for each task from real pixels that installed packages ship.

Handwritten digits (scikit-learn's `load_digits`: 1797 scans of 8x8 pixels) are pasted over crops of the photographs in
Ultralytics' assets. Nothing is downloaded. Train and val share neither a digit scan nor a photograph's pixel.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils import ASSETS, TQDM

# What decides the pixels. Whoever changes one of these, or a level below, raises VERSION, for the same arguments then
# give other pixels.
VERSION = 1
TINT = 30.0  # standard deviation of the ink's colour per channel, in grey levels
OPACITY = (0.8, 1.0)
MAX_COVER = 0.4  # of a digit's box, by all digits pasted later
TRIES = 20  # placements tried before a digit is given up
CROP = (120, 280)  # side of a background crop, in pixels of the photograph
SHARE = 0.65  # of each photograph's width (from the left) and of the digit scans, for train; the rest for val
JPEG_QUALITY = 92

PHOTOGRAPHS = ("bus.jpg", "zidane.jpg")
SPLITS = ("train", "val")
TASKS = ("detect", "segment", "pose", "obb", "classify")
KEYPOINTS = 4  # of a digit: the ends of its ink at the top, right, bottom and left
# Intensities between which ink goes from transparent to opaque. The lower one is well above 0 so that a tight box is
# tight to the eye too, not to a halo.
INK = (0.3, 0.55)


@dataclass(frozen=True)
class Level:
    """How hard a set is; of two numbers, draws are uniform between them unless said otherwise.

    Attributes:
        objects: Digits per image.
        size: A digit's height over the image side, log-uniform.
        rotation: Degrees either way.
        contrast: Ink against the mean of what it covers, in grey levels.
        noise: Standard deviation of the sensor noise, in grey levels.
        clutter: Scrambled digits per image, pasted before the digits and not labelled.
        hue: How far ink is redder than blue, or bluer than red, in grey levels; above 0, classes tell which: 20 instead
            of 10.
    """

    objects: tuple[int, int] = (1, 8)
    size: tuple[float, float] = (1 / 12, 1 / 2.5)
    rotation: float = 15.0
    contrast: tuple[float, float] = (80.0, 180.0)
    noise: tuple[float, float] = (0.0, 6.0)
    clutter: tuple[int, int] = (0, 0)
    hue: float = 0.0


LEVELS = {
    "plain": Level(),
    "hard": Level((4, 10), (1 / 14, 1 / 3), 25.0, (50.0, 160.0), (0.0, 10.0), clutter=(4, 10), hue=100.0),
}


def compose(
    out: str | Path, train: int, val: int, imgsz: int, seed: int = 0, task: str = "detect", level: str = "plain"
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
        task: What the labels are for, one of TASKS. All tasks but "classify" have the same images.
        level: How hard the set is, a name of LEVELS.

    Returns:
        `out/digits.yaml`, beside `images/{train,val}/*.jpg` and `labels/{train,val}/*.txt`; classes 0 to 9, or these in
        dark and in light, as the level has it. Masks are convex outlines of the ink, oriented boxes the smallest around
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
    names = _class_names(LEVELS[level])
    text = _yaml_text(out, counts, imgsz, seed, task, level)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(out, text, counts, task)
        return data

    scans, classes = _load_scans(seed)
    partial = out.with_name(f".{out.name}.{os.getpid()}")  # beside `out`, so that the last step is one rename
    try:
        for index, split in enumerate(SPLITS):
            for folder in _folders(partial, split, task, names):
                folder.mkdir(parents=True)
            photographs = _load_photographs(split)
            for i in TQDM(range(counts[split]), desc=f"digits {split}"):
                rng = np.random.default_rng([seed, index, i])
                canvas = _crop_background(rng, photographs, imgsz)
                if LEVELS[level].clutter[1]:
                    _paste_clutter(rng, canvas, scans[split], LEVELS[level])
                rows, outlines = _paste_digits(rng, canvas, scans[split], classes[split], LEVELS[level])
                canvas = _add_noise(rng, canvas, LEVELS[level])
                if task == "classify":  # the last digit, which no other covers
                    image = partial / split / names[rows[-1][0]] / f"{i:05d}.jpg"
                    canvas = _cut_out(canvas, *rows[-1][1:])
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


def _class_names(level: Level) -> list[str]:
    """Names of the classes; with hues, class c is digit c % 10."""
    digits = [str(digit) for digit in range(10)]
    return [f"{digit} {hue}" for hue in ("blue", "red") for digit in digits] if level.hue else digits


def _folders(root: Path, split: str, task: str, names: list[str]) -> list[Path]:
    """Where a split's files go: images and labels, or one folder for each class."""
    if task == "classify":
        return [root / split / name for name in names]
    return [root / "images" / split, root / "labels" / split]


def _yaml_text(out: Path, counts: dict[str, int], imgsz: int, seed: int, task: str, level: str) -> str:
    """The data YAML; its first line says what made the folder."""
    names = "".join(f"  {c}: '{name}'\n" for c, name in enumerate(_class_names(LEVELS[level])))
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


def _load_scans(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Digit scans (n, 8, 8) in 0..1 and their classes (n,), by split; the splits share none."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError("the digits set needs scikit-learn: pip install yolo-qc-plugin[demo]") from e
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    parts = dict(zip(SPLITS, np.split(order, [int(SHARE * len(order))])))
    scans = {split: (bunch.images[part] / 16.0).astype(np.float32) for split, part in parts.items()}
    return scans, {split: bunch.target[part] for split, part in parts.items()}


def _load_photographs(split: str) -> list[np.ndarray]:
    """The split's part of each photograph, (H, W, 3) uint8 BGR."""
    parts = []
    for name in PHOTOGRAPHS:
        image = cv2.imread(str(ASSETS / name))
        if image is None:
            raise FileNotFoundError(f"{ASSETS / name} is missing: reinstall ultralytics")
        edge = int(SHARE * image.shape[1])
        parts.append(image[:, :edge] if split == "train" else image[:, edge:])
    return parts


def _crop_background(rng: np.random.Generator, photographs: list[np.ndarray], imgsz: int) -> np.ndarray:
    """A random square crop, mirrored half the time, as (imgsz, imgsz, 3) uint8."""
    image = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(CROP[0], min(*CROP[1:], *image.shape[:2]) + 1))
    y, x = (int(rng.integers(n - side + 1)) for n in image.shape[:2])
    crop = image[y : y + side, x : x + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    shrinks = side > imgsz
    return cv2.resize(crop, (imgsz, imgsz), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _paste_clutter(rng: np.random.Generator, canvas: np.ndarray, scans: np.ndarray, level: Level) -> None:
    """Paste scrambled digits into `canvas`, in place: a scan's quadrants changed crosswise, strokes of no digit."""
    imgsz = canvas.shape[0]
    for _ in range(rng.integers(level.clutter[0], level.clutter[1] + 1)):
        alpha = _draw_random(rng, np.roll(scans[rng.integers(len(scans))], (4, 4), (0, 1)), imgsz, level)
        h, w = alpha.shape
        x, y = int(rng.integers(imgsz - w + 1)), int(rng.integers(imgsz - h + 1))
        under = canvas[y : y + h, x : x + w]
        _blend(under, alpha, _pick_ink(rng, under, level))


def _paste_digits(
    rng: np.random.Generator, canvas: np.ndarray, scans: np.ndarray, classes: np.ndarray, level: Level
) -> tuple[list[tuple[int, int, int, int, int]], list[np.ndarray]]:
    """Paste digits into `canvas`, in place.

    Returns:
        Rows (class, x, y, w, h), corner and size, and outlines (n, 2), in pixels.
    """
    imgsz = canvas.shape[0]
    rows: list[tuple[int, int, int, int, int]] = []
    outlines: list[np.ndarray] = []
    covered: list[int] = []  # pixels of each row's box that later boxes cover, an upper bound where those overlap
    for _ in range(rng.integers(level.objects[0], level.objects[1] + 1)):
        k = rng.integers(len(scans))
        alpha = _draw_random(rng, scans[k], imgsz, level)
        h, w = alpha.shape
        for _ in range(TRIES):
            x, y = int(rng.integers(imgsz - w + 1)), int(rng.integers(imgsz - h + 1))
            overlap = [_intersection((x, y, w, h), row[1:]) for row in rows]
            if all(c + o <= MAX_COVER * row[3] * row[4] for c, o, row in zip(covered, overlap, rows)):
                under = canvas[y : y + h, x : x + w]
                ink = _pick_ink(rng, under, level)
                red = level.hue and ink[2] > ink[0]
                _blend(under, alpha, ink)
                covered = [c + o for c, o in zip(covered, overlap)] + [0]
                rows.append((int(classes[k]) + 10 * bool(red), x, y, w, h))
                outlines.append(_outline(alpha) + (x, y))
                break
    return rows, outlines


def _draw_random(rng: np.random.Generator, scan: np.ndarray, imgsz: int, level: Level) -> np.ndarray:
    """A scan (8, 8) in a random size, turn and strength, as opacity (h, w)."""
    size = imgsz * np.exp(rng.uniform(*np.log(level.size)))
    return _draw_glyph(scan, size, rng.uniform(-level.rotation, level.rotation)) * rng.uniform(*OPACITY)


def _draw_glyph(scan: np.ndarray, size: float, degrees: float) -> np.ndarray:
    """A scan (8, 8) enlarged to about `size` pixels a side and turned, as opacity 0..1 cropped to its ink (h, w)."""
    scale = size / scan.shape[0]
    side = int(np.ceil(1.5 * size)) + 2  # room for the corners of a turned square
    matrix = cv2.getRotationMatrix2D(((scan.shape[1] - 1) / 2, (scan.shape[0] - 1) / 2), degrees, scale)
    matrix[:, 2] += (side - 1) / 2 - np.array([scan.shape[1] - 1, scan.shape[0] - 1]) / 2
    drawn = cv2.warpAffine(scan, matrix, (side, side), flags=cv2.INTER_CUBIC)
    alpha = np.clip((drawn - INK[0]) / (INK[1] - INK[0]), 0.0, 1.0)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outline(alpha: np.ndarray) -> np.ndarray:
    """Convex outline (n, 2) of a glyph's ink as x, y in its pixels, corners of pixels included."""
    ink = np.argwhere(alpha > 0)[:, ::-1]
    corners = np.concatenate([ink + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return cv2.convexHull(corners.astype(np.int32))[:, 0]


def _cut_out(canvas: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
    """The square around a box, of the canvas' size."""
    imgsz, side = canvas.shape[0], max(w, h)
    x, y = (min(max(start - (side - n) // 2, 0), imgsz - side) for start, n in ((x, w), (y, h)))
    return cv2.resize(canvas[y : y + side, x : x + side], (imgsz, imgsz), interpolation=cv2.INTER_LINEAR)


def _intersection(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two boxes (x, y, w, h) share."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def _pick_ink(rng: np.random.Generator, under: np.ndarray, level: Level) -> np.ndarray:
    """A colour (3,) lighter or darker than the pixels `under` (h, w, 3) it will cover."""
    step = rng.uniform(*level.contrast) * rng.choice([-1.0, 1.0])
    mean = under.mean(axis=(0, 1))
    if not 0 <= mean.mean() + step <= 255:  # no room on this side
        step = -step
    ink = np.clip(mean + step + rng.normal(0.0, TINT, 3), 0, 255)
    if level.hue:
        half = level.hue / 2
        middle = np.clip(ink[[0, 2]].mean(), half, 255 - half)  # room for both
        ink[[0, 2]] = middle + half * rng.choice([(-1.0, 1.0), (1.0, -1.0)])
    return ink


def _blend(under: np.ndarray, alpha: np.ndarray, ink: np.ndarray) -> None:
    """Lay `ink` (3,) over the pixels `under` (h, w, 3) with opacity `alpha` (h, w), in place."""
    alpha = alpha[..., None]
    under[:] = np.round(under * (1 - alpha) + ink * alpha)


def _add_noise(rng: np.random.Generator, canvas: np.ndarray, level: Level) -> np.ndarray:
    """The image with sensor noise, (H, W, 3) uint8."""
    noise = rng.normal(0.0, rng.uniform(*level.noise), canvas.shape)
    return np.clip(np.round(canvas + noise), 0, 255).astype(np.uint8)


def _label_text(rows: list[tuple[int, int, int, int, int]], outlines: list[np.ndarray], imgsz: int, task: str) -> str:
    """A task's rows: class, then x y w h (centre and size) and keypoints, or corners; all over the image side."""
    lines = []
    for (c, x, y, w, h), outline in zip(rows, outlines):
        values = [x + w / 2, y + h / 2, w, h]
        if task == "segment":
            values = outline.flatten()
        elif task == "obb":
            values = cv2.boxPoints(cv2.minAreaRect(outline)).clip(0, imgsz).flatten()
        elif task == "pose":
            ends = outline[:, 1].argmin(), outline[:, 0].argmax(), outline[:, 1].argmax(), outline[:, 0].argmin()
            values += outline[list(ends)].flatten().tolist()
        lines.append(" ".join([str(c), *(f"{v / imgsz:.6f}" for v in values)]) + "\n")
    return "".join(lines)
