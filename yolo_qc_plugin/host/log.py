# yolo_qc_plugin, AGPL-3.0
"""Lines of ours in Ultralytics' log, each marked with QC."""

from __future__ import annotations

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
