# yolo_qc_plugin, AGPL-3.0
"""Files read and written whole: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file, or one of something else."""
    found = None
    with suppress(ValueError):
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if isinstance(found, dict) else {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`.

    A reader sees the old file or the new one, never a part; an error leaves the old one, and an OSError names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.errno:
            e.filename = str(path)  # a write to a full disk names no file
        raise
    finally:
        with suppress(OSError):  # of a folder that forbids writing; it would hide the first one
            temporary.unlink(missing_ok=True)


class AtomicPath(type(Path())):  # type: ignore[misc]  # before Python 3.12, Path itself has no subclasses
    """A path whose `write_bytes` replaces the file as a whole, and from which such paths are joined."""

    def write_bytes(self, data: bytes | memoryview) -> int:
        """Write `data` atomically; returns their number."""
        with replacing(Path(self)) as temporary:
            return temporary.write_bytes(data)
