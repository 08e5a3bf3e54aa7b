# yolo_qc_plugin, AGPL-3.0
"""The photographs that a user gives, a data YAML or a folder, and the label files that some of them may have.

Paths are found by Ultralytics' own rules. What it asks for beside the photographs (names, a validation set, labels) may
be missing here.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultralytics.data.utils import IMG_FORMATS, check_det_dataset, find_dataset_yaml, img2label_paths
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_file

from ..config import QCError

YAMLS = {".yaml", ".yml"}
HELD_OUT = 10  # where no validation set is given, one of so many photographs validates
# keys of a data YAML that say where it is, or what is told again of the data set that is written
PLACES = "path", "train", "val", "validation", "test", "minival", "download", "names", "nc"


@dataclass(frozen=True)
class Photographs:
    """What was found.

    Attributes:
        data: As the user named it.
        splits: "train" and "val", each photograph -> its label file, or None where it has none; sorted by path.
        names: Class index -> name, or None where the data set names none.
        own_val: Whether the validation set is the user's; else every tenth photograph was held out.
        others: What else the YAML says, such as kpt_shape, and a test set's paths.
    """

    data: str
    splits: dict[str, dict[Path, Path | None]]
    names: dict[int, str] | None
    own_val: bool
    others: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether Ultralytics trains on it as it is, and every photograph has a label file."""
        labels = [label for split in self.splits.values() for label in split.values()]
        return self.own_val and self.names is not None and None not in labels


def read_photographs(data: str | Path, leave_out: Path) -> Photographs:
    """Find photographs and their label files.

    Args:
        data: A data YAML with `train`, or a folder of photographs, which is searched with all folders in it.
        leave_out: A folder whose photographs do not count: that in which the labelled data set is written.

    Raises:
        QCError: If there are no photographs, or too few to hold one out; or on a data set that cannot be read.
    """
    given = _contents(str(data))
    own_val = bool(given.get("val") or given.get("validation"))
    named = given.get("names") is not None or "nc" in given
    completed = {**given, "names": given.get("names") if named else ["object"]}
    if not own_val:
        completed["val"] = given.get("train")
    checked = _check(completed, str(data))
    train = _with_labels(_images(checked["train"], str(data)), leave_out)
    if own_val:
        val = _with_labels(_images(checked["val"], str(data)), leave_out)
    else:
        held_out = list(train)[HELD_OUT - 1 :: HELD_OUT] or list(train)[-1:]
        val = {photo: train.pop(photo) for photo in held_out}
    if not train or not val:
        wanted = "some for training and some for validation" if own_val else "at least two"
        found = f"{len(train) + len(val)} photographs ({', '.join(sorted(IMG_FORMATS))})"
        raise QCError(f"QC: data={data} has {found}; give {wanted}.")
    others = {key: value for key, value in given.items() if key not in PLACES}
    if checked.get("test"):
        others["test"] = checked["test"]
    return Photographs(str(data), {"train": train, "val": val}, checked["names"] if named else None, own_val, others)


def image_files(places: str | Path | list[str], data: str) -> list[Path]:
    """Images of some folders, or of text files that list them, in the order of their paths.

    Args:
        places: As Ultralytics' checked data set has them.
        data: Its name, for messages.

    Raises:
        QCError: If there are none.
    """
    files = _images(list(map(str, places)) if isinstance(places, list) else str(places), data)
    if not files:
        raise QCError(f"QC: data={data} has no images ({', '.join(sorted(IMG_FORMATS))}) in {places}.")
    return files


def any_labels(places: str | list[str], data: str) -> bool:
    """Whether a photograph of some folders, or text files that list them, has a label; searches up to the first."""
    labels = (Path(*img2label_paths([image])) for image in _found(places, data))
    return any(label.is_file() and label.stat().st_size for label in labels)


def is_plain_folder(data: str | Path) -> bool:
    """Whether it is a folder without a data YAML at its top."""
    return Path(data).is_dir() and not any(Path(data).glob("*.y*ml"))


def has_no_yaml(data: str | Path) -> bool:
    """Whether it is a folder without a data YAML anywhere in it, where Ultralytics looks for one."""
    return Path(data).is_dir() and not any(Path(data).rglob("*.y*ml"))


def _contents(data: str) -> dict[str, Any]:
    """What the YAML says, with the path that Ultralytics would take where it names none."""
    if is_plain_folder(data):
        folder = str(Path(data).resolve())
        return {"path": folder, "train": folder}
    try:
        file = Path(data if Path(data).suffix in YAMLS or Path(data).is_dir() else f"{data}.yaml")  # as coco8
        file = find_dataset_yaml(file) if file.is_dir() else Path(check_file(file))
        given = YAML.load(file)
    except (OSError, AssertionError) as e:
        raise QCError(f"QC: data={data} cannot be read ({e}); give a data YAML or a folder of photographs.") from None
    return {**given, "path": str(given.get("path") or file.parent.resolve())}


def _check(contents: dict[str, Any], data: str) -> dict[str, Any]:
    """What Ultralytics makes of it: paths found, names by index."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.yaml"
        YAML.save(file, contents)
        try:
            return check_det_dataset(file)
        except (OSError, SyntaxError, TypeError, KeyError) as e:
            reason = " ".join(str(e).replace(str(file), data).split())
            raise QCError(
                f"QC: data={data} is not accepted ({reason}); give a data YAML or a folder of photographs."
            ) from None


def _images(places: str | list[str], data: str) -> list[Path]:
    """Photographs in the order of their paths."""
    return sorted(set(map(Path, _found(places, data))))


def _found(places: str | list[str], data: str) -> Iterator[str]:
    """Photographs of folders and of text files that list them, as Ultralytics' data set finds them."""
    for place in map(Path, [places] if isinstance(places, str) else places):
        if place.is_dir():
            files: Iterable[str] = glob.iglob(str(Path(glob.escape(str(place))) / "**" / "*.*"), recursive=True)
        elif place.is_file():
            lines = map(str.strip, place.read_text(encoding="utf-8-sig").splitlines())
            files = (str(place.parent / line[2:]) if line.startswith("./") else line for line in lines)
        else:
            raise QCError(f"QC: data={data} names {place}, which does not exist; give a folder or a list of files.")
        yield from (os.path.abspath(f) for f in files if f.rpartition(".")[-1].lower() in IMG_FORMATS)


def _with_labels(images: Iterable[Path], leave_out: Path) -> dict[Path, Path | None]:
    """Photograph -> its label file, or None."""
    images = [image for image in images if not image.is_relative_to(leave_out.resolve())]
    labels = map(Path, img2label_paths([str(image) for image in images]))
    return {image: label if label.is_file() else None for image, label in zip(images, labels)}
