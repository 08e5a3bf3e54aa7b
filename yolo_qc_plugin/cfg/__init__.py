# yolo_qc_plugin, AGPL-3.0
"""Model YAMLs of ours, for models that Ultralytics has not, and how a `yolo` command line finds them.

The start-up files name them too: an argument with such a value asks for the plugin.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..config import QCError

MODELS = ("yolov7-tiny",)
FOLDER = Path(__file__).parent


def model_yaml(name: str) -> str:
    """The path of a model YAML of ours, for `YOLO(...)`.

    Args:
        name: One of MODELS, with or without the suffix .yaml.

    Raises:
        QCError: On another name.

    Examples:
        >>> from yolo_qc_plugin import model_yaml
        >>> YOLO(model_yaml("yolov7-tiny"))
    """
    if name.removesuffix(".yaml") not in MODELS:
        raise QCError(f"QC: model {name!r} is not one of ours; accepted: {', '.join(MODELS)}.")
    return str(FOLDER / f"{name.removesuffix('.yaml')}.yaml")


def with_our_models(arguments: Sequence[str]) -> list[str]:
    """A `yolo` command line with the path of a model YAML of ours in the place of its name.

    A file of that name in the working directory is the user's own and stays.

    Args:
        arguments: Without the program's name, and with 'key=value' in one piece.
    """
    ours = {f"model={name}.yaml": model_yaml(name) for name in MODELS if not os.path.exists(f"{name}.yaml")}
    return [f"model={ours[a.lstrip('-')]}" if a.lstrip("-") in ours else a for a in arguments]
