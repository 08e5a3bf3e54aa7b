# yolo_qc_plugin, AGPL-3.0
"""A data set in which every photograph has a label file: the user's, or else a model's.

It is an ordinary data set, which can be looked at, corrected and trained on again:

    data.yaml             for Ultralytics
    images/train, val     links to the photographs
    labels/train, val     copies of the user's label files, and the model's for the others
    labels.json           what the model's files depend on; as long as that holds, none is predicted again. A hash of
                          each label file as it was written: one that was changed since is kept. And what was placed
                          here: whatever else there is, is not touched
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ultralytics.utils import YAML

from ..config import QCError
from ..files import replacing
from ..host import log
from ..host.labelling import Labeller
from ..host.photographs import Photographs

YAML_FILE, RECORD = "data.yaml", "labels.json"


@dataclass(frozen=True)
class Entry:
    """A photograph in the data set: what it is made of, and its two files there."""

    split: str
    photo: Path
    label: Path | None
    image: Path
    text: Path


def write_labelled(photographs: Photographs, labeller: Labeller, folder: Path) -> dict[str, Any]:
    """Write the data set, or what is missing of it.

    Args:
        photographs: What the user has.
        labeller: Labels those that have no label file.
        folder: New, empty, or a data set that was begun here.

    Returns:
        The YAML's path as `data`; numbers of photographs `train`, `val`, `by_data`, `by_model`, `val_by_model`,
        `by_hand` (whose labels were changed here), `without_find` and `unreadable`; `boxes`, class name -> objects that
        the model found; its `settings`; and `photographs`, the data that they are from.

    Raises:
        QCError: If the folder holds something else, or labels of other data, the classes are not the model's, or it
            finds nothing at all.
    """
    description = labeller.description(photographs)
    folder = folder.resolve()
    entries = _entries(photographs, folder)
    source = str(Path(photographs.data).resolve())
    corrected = _make_room(entries, labeller.settings, source, folder)

    def record(summary: dict[str, Any]) -> None:
        written = {_key(entry): _hash(entry.text) for entry in entries if entry.text.exists()} | corrected
        placed = {"source": source, "placed": [_key(entry) for entry in entries], "written": written}
        _write_json(folder / RECORD, {**summary, **placed})

    record({"settings": labeller.settings})
    try:
        for entry in entries:
            _place(entry, keep_label=_key(entry) in corrected)
        labeller.write({entry.image: entry.text for entry in entries if not entry.text.exists()})
    finally:  # interrupted too, lest what is changed by hand before the work goes on counts as the model's
        record({"settings": labeller.settings})
    readable = [entry for entry in entries if entry.text.exists()]
    for image in {entry.image for entry in entries} - {entry.image for entry in readable}:
        image.unlink()
    by_hand = {entry for entry in readable if _key(entry) in corrected}
    summary = _count(readable, by_hand, labeller)
    summary |= {"data": str(folder / YAML_FILE), "unreadable": len(entries) - len(readable)}
    summary["photographs"] = str(photographs.data)
    if not summary["boxes"]:
        _say_nothing_was_found(photographs, labeller, summary)
    YAML.save(folder / YAML_FILE, {"train": "images/train", "val": "images/val", **description})
    record(summary)
    return summary


def _entries(photographs: Photographs, folder: Path) -> list[Entry]:
    """One for each photograph; where several have one name, each gets a hash of its path, whatever others there are."""
    entries = []
    for split, labels in photographs.splits.items():
        often = Counter(photo.stem.lower() for photo in labels)
        for photo, label in labels.items():
            unique = often[photo.stem.lower()] == 1
            stem = photo.stem if unique else f"{photo.stem}-{sha256(str(photo).encode()).hexdigest()[:8]}"
            image = folder / "images" / split / f"{stem}{photo.suffix}"
            entries.append(Entry(split, photo, label, image, folder / "labels" / split / f"{stem}.txt"))
    return entries


def _make_room(entries: list[Entry], settings: dict, source: str, folder: Path) -> dict[str, str]:
    """Make the folders, and delete what was placed there of other photographs or by another model.

    Returns:
        Of the label files that were changed by hand: their names, and their hashes as they had been written.
    """
    record = folder / RECORD
    if folder.exists() and any(folder.iterdir()) and not record.exists():
        raise QCError(f"QC: {folder} holds other files than a labelled data set; give a new folder.")
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    other = before.get("source", source)
    if other != source and Path(other).exists():  # else it has moved
        raise QCError(
            f"QC: {folder} holds labels of {other}, which may have been corrected, not of {source}; give another "
            "folder (of a run: another name=), or delete it."
        )
    written = before.get("written", {})
    placed = set(before.get("placed", written))
    there = {_key(entry): entry for entry in entries if _key(entry) in written and entry.text.exists()}
    corrected = {name: written[name] for name, entry in there.items() if _hash(entry.text) != written[name]}
    same = before.get("settings") == settings
    kept = {entry.image for entry in entries}
    kept |= {entry.text for entry in entries if same or _key(entry) in corrected}
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            for file in set((folder / kind / split).iterdir()) - kept:
                if f"{split}/{file.stem}.txt" in placed:
                    file.unlink()
    for cache in (folder / "labels").glob("*.cache"):  # Ultralytics' summary of label files
        cache.unlink()
    return corrected


def _key(entry: Entry) -> str:
    """A label file's name in the record."""
    return f"{entry.split}/{entry.text.name}"


def _hash(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def _place(entry: Entry, keep_label: bool) -> None:
    """Link the photograph, or copy it where links are not to be had; copy its label file, unless that here is kept.

    Labels of what was there before go with it, but not what a user has changed: the photographs may have moved.
    """
    if not _is_placed(entry):
        for file in [entry.image] if keep_label else [entry.image, entry.text]:
            file.unlink(missing_ok=True)
        for place in (os.symlink, os.link, shutil.copy2):
            with suppress(OSError, NotImplementedError):
                place(entry.photo, entry.image)
                break
        else:
            raise QCError(f"QC: {entry.photo} can neither be linked nor copied to {entry.image.parent}.")
    if entry.label and not (keep_label and entry.text.exists()):
        with replacing(entry.text) as temporary:
            shutil.copyfile(entry.label, temporary)


def _is_placed(entry: Entry) -> bool:
    """Whether the file there is this photograph."""
    if entry.image.is_symlink():
        return Path(os.readlink(entry.image)) == entry.photo
    if not (entry.image.exists() and entry.photo.exists()):
        return False
    there, here = entry.image.stat(), entry.photo.stat()
    return (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns)


def _count(entries: list[Entry], by_hand: set[Entry], labeller: Labeller) -> dict[str, Any]:
    """Numbers for the summary, from the files: the same whether or not the work was interrupted."""
    by_model = [entry for entry in entries if not entry.label and entry not in by_hand]
    rows = {entry: entry.text.read_text(encoding="utf-8").splitlines() for entry in by_model}
    boxes = Counter(labeller.names[int(row.split()[0])] for found in rows.values() for row in found if row)
    return {
        "train": sum(entry.split == "train" for entry in entries),
        "val": sum(entry.split == "val" for entry in entries),
        "by_data": len(entries) - len(rows) - len(by_hand),
        "by_hand": len(by_hand),
        "by_model": len(rows),
        "val_by_model": sum(entry.split == "val" for entry in rows),
        "without_find": sum(not found for found in rows.values()),
        "boxes": dict(boxes.most_common()),
        "settings": labeller.settings,
    }


def _say_nothing_was_found(photographs: Photographs, labeller: Labeller, summary: dict) -> None:
    """Refuse where that leaves no labels; a few photographs of background among labelled ones are none."""
    settings = labeller.settings
    what = f"{settings['model']} finds nothing in {summary['by_model']} photographs of data={photographs.data} that "
    what += f"have no label file, with a confidence of at least {settings['confidence']} at {settings['imgsz']} px"
    if not summary["by_data"] + summary["by_hand"]:
        raise QCError(f"QC: {what}; give a lower confidence, or a model trained for such photographs.")
    if summary["by_model"]:
        log.warning(what)


def _write_json(file: Path, content: dict) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
