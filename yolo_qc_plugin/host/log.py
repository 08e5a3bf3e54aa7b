# yolo_qc_plugin, AGPL-3.0
"""Lines of ours in Ultralytics' log, each marked with QC."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ultralytics.utils import LOGGER, colorstr

PREFIX = colorstr("QC: ")


def info(text: str) -> None:
    """Log what happens."""
    LOGGER.info(f"{PREFIX}{text}")


def warning(text: str) -> None:
    """Log what the user may want to mend."""
    LOGGER.warning(f"{PREFIX}{text}")


def error(text: str) -> None:
    """Log what went wrong."""
    LOGGER.error(f"{PREFIX}{text}")


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing below a warning is logged, and Ultralytics' progress bars that begin there are not shown."""
    level = LOGGER.level
    LOGGER.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        LOGGER.setLevel(level)


@contextmanager
def naming_what_fails(what: str) -> Iterator[None]:
    """Within, an error ends in a warning that names what failed: for what no run is to fail for."""
    try:
        yield
    except Exception as error:
        warning(f"{what} left out ({type(error).__name__}: {str(error).partition(chr(10))[0]}).")
