# yolo_qc_plugin, AGPL-3.0
"""The command that a run amounts to, however it was started: what differs from the defaults, and where from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ultralytics.utils import DEFAULT_CFG_DICT

from ..config import QCConfig

# of Ultralytics: what is told apart, follows from the model, or says where the run is written
OTHERS = {"task", "mode", "model", "resume", "project", "name", "exist_ok", "save_dir"}


def train_command(args: Mapping[str, Any], config: QCConfig, start: str, planned: Mapping[str, Any]) -> str:
    """`yolo train ...`, quoted for a shell.

    Args:
        args: Of the trainer.
        config: Options of the run.
        start: What training began with.
        planned: Widths of layers that the budget of the run has chosen, which the command is not to name.
    """
    keys = [key for key, default in DEFAULT_CFG_DICT.items() if key not in OTHERS and args.get(key, default) != default]
    usual = QCConfig.from_options({"target": config.target} if config.target else {}).to_dict()
    options = config.to_dict()
    options["layer_bits"] = {k: v for k, v in options["layer_bits"].items() if k not in planned}
    told = {"model": start, **{key: args[key] for key in keys}, "callbacks": "qc"}
    told |= {"qc_target": config.target} if config.target else {}
    told |= {f"qc_{name}": _text(value) for name, value in options.items() if value != usual[name]}
    return shlex.join(["yolo", "train", *(f"{key}={value}" for key, value in told.items())])


def _text(value: Any) -> str:
    """A value of an option of ours as the command line takes it; Ultralytics takes its lists as Python writes them."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{width}" for key, width in value.items())
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
