# yolo_qc_plugin, AGPL-3.0
"""The digits set's pictures: digits and clutter pasted over crops of photographs, with noise.

The handwritten digits are scikit-learn's `load_digits` (1797 scans of 8x8 pixels), the photographs those in
Ultralytics' assets. Train and val share neither a digit scan nor a photograph's pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from ultralytics.utils import ASSETS

# What decides the pixels. Whoever changes one of these, or a level below, raises VERSION, for the same arguments then
# give other pixels.
VERSION = 1
TINT = 30.0  # standard deviation of the ink's colour per channel, in grey levels
OPACITY = (0.8, 1.0)
MAX_COVER = 0.4  # of a digit's box, by all digits pasted later
TRIES = 20  # placements tried before a digit is given up
CROP = (120, 280)  # side of a background crop, in pixels of the photograph
SHARE = 0.65  # of each photograph's width (from the left) and of the digit scans, for train; the rest for val

PHOTOGRAPHS = ("bus.jpg", "zidane.jpg")
SPLITS = ("train", "val")
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
    # hard in all sizes, for all strides of a detector
    "wide": Level((3, 8), (1 / 14, 3 / 4), 25.0, (50.0, 160.0), (0.0, 10.0), clutter=(3, 8), hue=100.0),
}


def class_names(level: Level) -> list[str]:
    """Names of the classes; with hues, class c is digit c % 10."""
    digits = [str(digit) for digit in range(10)]
    return [f"{digit} {hue}" for hue in ("blue", "red") for digit in digits] if level.hue else digits


def load_scans(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
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


def load_photographs(split: str) -> list[np.ndarray]:
    """The split's part of each photograph, (H, W, 3) uint8 BGR."""
    parts = []
    for name in PHOTOGRAPHS:
        image = cv2.imread(str(ASSETS / name))
        if image is None:
            raise FileNotFoundError(f"{ASSETS / name} is missing: reinstall ultralytics")
        edge = int(SHARE * image.shape[1])
        parts.append(image[:, :edge] if split == "train" else image[:, edge:])
    return parts


def draw_scene(
    rng: np.random.Generator,
    photographs: list[np.ndarray],
    scans: np.ndarray,
    classes: np.ndarray,
    imgsz: int,
    level: Level,
) -> tuple[np.ndarray, list[tuple[int, int, int, int, int]], list[np.ndarray]]:
    """One picture of the set.

    Args:
        rng: Of this picture alone.
        photographs: From `load_photographs`.
        scans: Of a split, (n, 8, 8), and
        classes: their digits (n,), from `load_scans`.
        imgsz: Its side in pixels.
        level: How hard it is.

    Returns:
        The picture (imgsz, imgsz, 3) uint8 BGR; rows (class, x, y, w, h), corner and size, and outlines (n, 2) of its
        digits, in pixels.
    """
    canvas = _crop_background(rng, photographs, imgsz)
    if level.clutter[1]:
        _paste_clutter(rng, canvas, scans, level)
    rows, outlines = _paste_digits(rng, canvas, scans, classes, level)
    return _add_noise(rng, canvas, level), rows, outlines


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
                outlines.append(np.add(_outline(alpha), (x, y)))
                break
    return rows, outlines


def _draw_random(rng: np.random.Generator, scan: np.ndarray, imgsz: int, level: Level) -> np.ndarray:
    """A scan (8, 8) in a random size, turn and strength, as opacity (h, w), neither of which is above imgsz."""
    size = imgsz * np.exp(rng.uniform(*np.log(level.size)))
    glyph = _draw_glyph(scan, size, rng.uniform(-level.rotation, level.rotation)) * rng.uniform(*OPACITY)
    return glyph[:imgsz, :imgsz]  # the largest, turned, reach a pixel further


def _draw_glyph(scan: np.ndarray, size: float, degrees: float) -> np.ndarray:
    """A scan (8, 8) enlarged to about `size` pixels a side and turned, as opacity 0..1 cropped to its ink (h, w)."""
    scale = size / scan.shape[0]
    side = int(np.ceil(1.5 * size)) + 2  # room for the corners of a turned square
    matrix = cv2.getRotationMatrix2D(((scan.shape[1] - 1) / 2, (scan.shape[0] - 1) / 2), degrees, scale)
    matrix[:, 2] += [(side - scan.shape[1]) / 2, (side - scan.shape[0]) / 2]
    drawn = cv2.warpAffine(scan, matrix, (side, side), flags=cv2.INTER_CUBIC)
    alpha = np.clip((drawn - INK[0]) / (INK[1] - INK[0]), 0.0, 1.0)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outline(alpha: np.ndarray) -> np.ndarray:
    """Convex outline (n, 2) of a glyph's ink as x, y in its pixels, corners of pixels included."""
    ink = np.argwhere(alpha > 0)[:, ::-1]
    corners = np.concatenate([ink + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return cv2.convexHull(corners.astype(np.int32))[:, 0]


def cut_out(canvas: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
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
