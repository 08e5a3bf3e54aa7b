# yolo_qc_plugin, AGPL-3.0
"""weights/resume.pt, which a run keeps beside last.pt until its end: found, judged, deleted."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # the error alone
from shutil import copyfile

import torch
from ultralytics.nn.tasks import load_checkpoint

from ..files import AtomicPath, replacing
from ..host import log
from ..host.record import own_record, record_of, strip
from ..quant.layers import quant_convs

FILE = "resume.pt"
FORMAT = 4  # raise it when older files cannot be read as they are
UNREADABLE = OSError, RuntimeError, EOFError, UnpicklingError, TypeError, KeyError  # Ultralytics' own and torch's


def conclude(last: AtomicPath) -> None:
    """The last acts of a run, when all else is on disk: delete what only a run in progress needs, strip last.pt."""
    last.with_name(FILE).unlink(missing_ok=True)
    strip(last)


def find_state(last: Path, checkpoint: dict) -> tuple[dict | None, str]:
    """The state beside last.pt, or None and why."""
    file = last.with_name(FILE)
    if last.name != "last.pt" or not file.exists():
        return None, f"there is no {FILE} for {last}"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        return None, f"{file} cannot be read ({error})"
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return None, f"{file} is of another version of yolo-qc-plugin"
    if state["run"] != own_record(checkpoint["ema"]).run:
        return None, f"{file} is of another run"
    if state["epoch"] < checkpoint["epoch"]:
        return None, f"{file} is older than {last.name}"
    return state, ""


def has_ended(last: Path, run: str) -> bool:
    """Whether best.pt is what `finish` made of it, the last thing it does: then the run was killed in `conclude`.

    Where it makes nothing of it (float outputs, no correction or none that was kept), a report and no resume.pt say so.
    """
    best, report = last.with_name("best.pt"), last.parent.with_name("qc") / "report.json"
    if last.name != "last.pt" or not best.exists():
        return False
    try:
        model = load_checkpoint(best)[0]
    except UNREADABLE:
        return False
    record = record_of(model)
    if record is None or record.run != run:
        return False
    finished = any(conv.correction for _, conv in quant_convs(model))
    return finished or (report.exists() and not last.with_name(FILE).exists())


def mend_best(last: Path) -> None:
    """Put last.pt in the place of a damaged best.pt, without which the run could not be finished."""
    best = last.with_name("best.pt")
    if last.name != "last.pt" or not best.exists():
        return
    try:
        load_checkpoint(best)
    except UNREADABLE:
        log.warning(f"{best} cannot be read; {last.name} takes its place until an epoch is better")
        with replacing(best) as temporary:
            copyfile(last, temporary)


def drop_rows(csv: Path, epochs: int) -> None:
    """Keep the rows of the first `epochs` epochs of results.csv; the others are about to be written again."""
    lines = csv.read_text(encoding="utf-8").splitlines(keepends=True) if csv.exists() else []
    rows = [line for line in lines[1:] if line.partition(",")[0].isdigit() and int(line.partition(",")[0]) <= epochs]
    if rows:
        with replacing(csv) as temporary:
            temporary.write_text("".join([lines[0], *rows]), encoding="utf-8")
    else:
        csv.unlink(missing_ok=True)
