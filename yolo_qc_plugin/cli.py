# yolo_qc_plugin, AGPL-3.0
"""The command lines: what the plugin adds to the stock `yolo`, and the program `yolo-qc`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path

from .cfg import with_our_models
from .config import QCConfig, QCError

CALLBACKS = ("qc",)
OPTION = "qc_"


def split_arguments(arguments: Sequence[str]) -> tuple[QCConfig | dict | None, list[str]]:
    """Take the plugin's own arguments out of a `yolo` command line.

    Args:
        arguments: Without the program's name, and with 'key=value' in one piece.

    Returns:
        The config of a training, the options of an export, or None where the plugin is not asked for; and the arguments
        that are the host's.

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
        if unknown := options.keys() - {"onnx"}:
            raise QCError(f"QC: {', '.join(OPTION + k for k in sorted(unknown))} is of training; export takes qc_onnx.")
        return options, rest
    if not {"train", "mode=train"} & set(rest):
        raise QCError(
            "QC: callbacks=qc applies to 'yolo train' and 'yolo export'; val, predict and track open a checkpoint of "
            "ours without it."
        )
    return QCConfig.from_options(options), rest


def wrap_entrypoint(module) -> None:
    """Make `ultralytics.cfg.entrypoint` understand callbacks=qc, qc_ options and the names of our models.

    Args:
        module: The module ultralytics.cfg, just loaded; its `entrypoint` is replaced.

    Raises:
        QCError: If the module has not what the plugin needs of it.
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
                module.ARGV[:] = command  # sys.argv itself: what runs later sees a command line of the host's
            run = partial(original, " ".join(command) if debug else "")
            return run() if config is None else _with_callbacks(config, run)
        except QCError as e:
            raise SystemExit(str(e)) from None

    entrypoint.__module__ = __name__
    module.entrypoint = entrypoint


def _with_callbacks(options: QCConfig | dict, command) -> None:
    """Run a command whose YOLO object is made with the plugin's callbacks among the host's default ones."""
    from ultralytics.utils.callbacks.base import default_callbacks

    from .run.callbacks import QCCallbacks, attach
    from .run.export import export_events

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `yolo-qc`: correct, eval, check, plot, digits, hook."""
    parser = argparse.ArgumentParser(prog="yolo-qc", description="Tools beside `yolo train ... callbacks=qc`.")
    commands = parser.add_subparsers(dest="command", required=True)

    for name, purpose, usage in (
        (
            "correct",
            "correct a finished run again",
            "yolo-qc correct model=RUN/weights/qat.pt [data= correction=channel|tensor correction_scale= "
            "correction_shift=\n       correction_epochs= correction_lr= device= batch= seed= project= name=]",
        ),
        (
            "eval",
            "AP by pycocotools",
            "yolo-qc eval model=best.pt data=data.yaml [imgsz= batch= device= split= conf= iou= max_det= json=FILE]\n"
            "       yolo-qc eval annotations=gt.json detections=dt.json [max_det= json=FILE]",
        ),
        (
            "check",
            "compare a checkpoint with its ONNX file",
            "yolo-qc check model=best.pt onnx=best.onnx data=data.yaml [images= split= conf= iou= json=FILE]",
        ),
    ):
        command = commands.add_parser(name, help=purpose, usage=usage)
        command.add_argument("pairs", nargs="+", metavar="key=value")

    plot = commands.add_parser("plot", help="pictures of runs", usage="yolo-qc plot RUN [RUN...] [out=DIR steps=4000]")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; out=DIR: other than RUN/qc/plots")

    digits = commands.add_parser("digits", help="compose a data set from pixels that installed packages ship")
    digits.add_argument("--out", required=True, type=Path, help="new folder")
    digits.add_argument("--train", type=int, default=300, help="training images (300)")
    digits.add_argument("--val", type=int, default=100, help="validation images (100)")
    digits.add_argument("--imgsz", type=int, default=160, help="image side in pixels, a multiple of 32 (160)")
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--task", default="detect", help="detect, segment, pose, obb or classify (detect)")
    levels = "plain, hard (20 classes, clutter, fainter) or wide (hard in all sizes) (plain)"
    digits.add_argument("--level", default="plain", help=levels)

    hook = commands.add_parser("hook", help="the start-up hook of `yolo`: needed by hand for editable installs only")
    hook.add_argument("action", choices=("install", "remove", "status"))

    args = parser.parse_args(arguments)
    programs = {"correct": _correct, "eval": _eval, "check": _check, "plot": _plot, "digits": _digits, "hook": _hook}
    try:
        passed = programs[args.command](args)
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        print(f"yolo-qc {args.command}: {e}", file=sys.stderr)
        return 1
    return int(passed is False)


def _options(pairs: Sequence[str], kinds: dict[str, type]) -> dict:
    """key=value pairs as a dict, each value of its kind."""
    options = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or key not in kinds:
            raise ValueError(f"{pair!r} is not accepted; give key=value with a key of {', '.join(kinds)}")
        try:
            options[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"{pair!r} is not accepted; {key} takes a {kinds[key].__name__}") from None
    return options


def _write_json(result: dict, target: str | None) -> None:
    if target:
        Path(target).write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"written to {target}")


def _correct(args: argparse.Namespace) -> None:
    kinds = {f.name: str for f in fields(QCConfig) if f.name.startswith("correction")}
    kinds |= dict(model=str, data=str, device=str, batch=int, seed=int, project=str, name=str)
    options = _options(args.pairs, kinds)
    if "model" not in options:
        raise ValueError("give model=RUN/weights/qat.pt")
    from .run.standalone import correct

    correct(**options)


def _check(args: argparse.Namespace) -> bool:
    options = _options(
        args.pairs, dict(model=str, onnx=str, data=str, json=str, split=str, images=int, conf=float, iou=float)
    )
    if missing := {"model", "onnx", "data"} - options.keys():
        raise ValueError(f"give {', '.join(f'{k}=' for k in sorted(missing))}")
    from .tools.check import check, format_check

    target = options.pop("json", None)
    result = check(**options)
    print(format_check(result))
    _write_json(result, target)
    return result["passed"]


def _eval(args: argparse.Namespace) -> None:
    kinds = dict(model=str, data=str, annotations=str, detections=str, json=str, device=str, split=str)
    kinds |= dict(imgsz=int, batch=int, max_det=int, conf=float, iou=float)
    options = _options(args.pairs, kinds)
    target = options.pop("json", None)
    if {"annotations", "detections"} <= options.keys():
        from .tools.coco import coco_metrics

        if extra := options.keys() - {"annotations", "detections", "max_det"}:
            raise ValueError(f"{', '.join(sorted(extra))} is not accepted with annotations= and detections=")
        result = coco_metrics(**options)
        print("\n".join(f"{k:<8}{'-' if v is None else f'{v:.4f}'}" for k, v in result.items() if k != "per_class"))
    elif {"model", "data"} <= options.keys():
        from .tools.evaluate import evaluate, format_table

        result = evaluate(**options)
        print(format_table(result))
    else:
        raise ValueError("give model= and data=, or annotations= and detections=")
    _write_json(result, target)


def _plot(args: argparse.Namespace) -> None:
    runs = [r for r in args.runs if not r.startswith(("out=", "steps="))]
    options = _options([r for r in args.runs if r not in runs], dict(out=str, steps=int))
    if not runs:
        raise ValueError("give the folder of a run")
    from .tools.plot import plot

    table, files = plot(runs, **options)
    print("\n".join([table, *(f"written to {file}" for file in files)]))


def _digits(args: argparse.Namespace) -> None:
    from .data.digits import compose

    print(compose(args.out, args.train, args.val, args.imgsz, args.seed, args.task, args.level))


def _hook(args: argparse.Namespace) -> None:
    from .startup import hook

    if args.action == "status":
        print(hook.status())
        return
    done = hook.install() if args.action == "install" else hook.remove()
    print("\n".join(f"{args.action.removesuffix('e')}ed {p}" for p in done) or "nothing to remove")
