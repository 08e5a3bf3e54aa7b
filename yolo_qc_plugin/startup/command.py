# yolo_qc_plugin, AGPL-3.0
"""What the plugin adds to the command `yolo`: callbacks=qc, qc_ options and the names of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial, wraps

from ..cfg import with_our_models
from ..config import QCConfig, QCError

CALLBACKS = ("qc",)
OPTION = "qc_"


def split_arguments(arguments: Sequence[str]) -> tuple[QCConfig | dict | None, list[str]]:
    """Take the plugin's own arguments out of a `yolo` command line.

    Args:
        arguments: Without the program's name, and with 'key=value' in one piece.

    Returns:
        The config of a training, the options of an export, or None where the plugin is not asked for; and the arguments
        that are left for Ultralytics.

    Raises:
        QCError: On an unknown name after callbacks=, an unknown or malformed qc_ option, qc_ options without
            callbacks=qc, or a mode other than train and export.
    """
    names, options, rest = [], {}, []
    for argument in arguments:
        key, sep, value = argument.lstrip("-").partition("=")
        if key == "callbacks":
            names += [v.strip(" '\"") for v in value.strip("[]()").split(",") if v.strip(" '\"")] or [""]
        elif key.startswith(OPTION):
            if not sep:
                raise QCError(f"QC: {key} needs a value, as in {key}=...")
            options[key.removeprefix(OPTION)] = value.rstrip(",")
        else:
            rest.append(argument)
    if unknown := [n for n in names if n not in CALLBACKS]:
        raise QCError(
            f"QC: callbacks={','.join(unknown)!r} is not known. Accepted: {', '.join(CALLBACKS)}, with the options "
            f"{', '.join(OPTION + name for name in ('preset', *(f.name for f in fields(QCConfig))))}."
        )
    if options and not names:
        raise QCError(f"QC: {', '.join(OPTION + k for k in options)} needs callbacks=qc.")
    if not names:
        return None, rest
    if {"export", "mode=export"} & set(rest):
        if of_training := sorted(options.keys() - {"onnx", "litert"}):
            given = ", ".join(OPTION + k for k in of_training)
            raise QCError(f"QC: {given} is of training; export takes qc_onnx and qc_litert.")
        return options, rest
    if not {"train", "mode=train"} & set(rest):
        raise QCError(
            "QC: callbacks=qc applies to 'yolo train' and 'yolo export'; val, predict and track open a checkpoint of "
            "ours without it."
        )
    keys = {argument.lstrip("-").partition("=")[0] for argument in rest}
    if bare := sorted(keys & {f.name for f in fields(QCConfig)}):
        raise QCError(f"QC: {', '.join(bare)} is no argument of `yolo`; give {', '.join(OPTION + k for k in bare)}.")
    return QCConfig.from_options(options), rest


def wrap_entrypoint(module) -> None:
    """Make `ultralytics.cfg.entrypoint` understand callbacks=qc, qc_ options and the names of our models.

    Args:
        module: The module ultralytics.cfg, just loaded; its `entrypoint` is replaced.

    Raises:
        QCError: If the module lacks what the plugin needs of it.
    """
    if missing := [name for name in ("entrypoint", "merge_equals_args", "ARGV") if not hasattr(module, name)]:
        raise QCError(f"QC: {module.__name__} has no {', '.join(missing)}")
    original = module.entrypoint

    @wraps(original)
    def entrypoint(debug: str = "") -> None:
        program, *arguments = debug.split(" ") if debug else module.ARGV
        try:
            config, rest = split_arguments(with_our_models(module.merge_equals_args(arguments)))
            command = [program, *rest]
            if not debug:
                module.ARGV[:] = command  # sys.argv itself: what reads it later finds Ultralytics' own arguments
            run = partial(original, " ".join(command) if debug else "")
            if config is None:
                run()
            else:
                _with_callbacks(config, rest, run)
        except QCError as e:
            raise SystemExit(str(e)) from None

    entrypoint.__module__ = __name__
    module.entrypoint = entrypoint


def _with_callbacks(options: QCConfig | dict, arguments: Sequence[str], command) -> None:
    """Run a command with the plugin's callbacks among Ultralytics' default ones, which its YOLO object starts with."""
    from ultralytics.utils.callbacks.base import default_callbacks

    from ..run.callbacks import QCCallbacks, attach
    from ..run.export import export_events
    from ..run.start import check_file

    if isinstance(options, QCConfig):
        check_file(next((a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("model=")), ""))
    attach()
    events = QCCallbacks(options).events() if isinstance(options, QCConfig) else export_events(**options)
    before = {event: default_callbacks.get(event) for event in events}
    try:
        for event, callback in events.items():
            default_callbacks[event] = [*(before[event] or []), callback]
        command()
    finally:
        for event, callbacks in before.items():
            if callbacks is None:
                default_callbacks.pop(event)
            else:
                default_callbacks[event] = callbacks
