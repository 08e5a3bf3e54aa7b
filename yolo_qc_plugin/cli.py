# yolo_qc_plugin, AGPL-3.0
"""The program `yolo-qc`: functions of the package as commands that take key=value, as `yolo` does.

Nothing heavy is imported before a command is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from .config import QCConfig
from .keys import Key, documented, keys_of

PROGRAM = "yolo-qc"
HELP = {"--help", "-h"}
VERSION = {"--version", "version"}


@dataclass(frozen=True)
class Form:
    """A function as a command.

    Attributes:
        module: Where it is, relative to the package.
        function: Its name.
        show: What makes a text of its result: a function, or the name of one beside it. None prints nothing.
        also: Keys that it takes beside those of its signature.
        json: Whether json=FILE writes its result.
    """

    module: str
    function: str
    show: str | Callable[[Any], str] | None = None
    also: dict[str, Key] = field(default_factory=dict)
    json: bool = False

    def find(self, name: str) -> Callable:
        """A function of the module."""
        return getattr(import_module(f".{self.module}", __package__), name)

    def keys(self) -> dict[str, Key]:
        """Every key by name."""
        keys = keys_of(self.find(self.function)) | self.also
        return keys | {"json": Key(str, "File to write the result to, as JSON.")} if self.json else keys


OF_CORRECTION = {
    name: Key(hint, documented(QCConfig)[name], "the run's")
    for name, hint in get_type_hints(QCConfig).items()
    if name.startswith("correction")
}
OF_YOLO = {
    "device": Key(str, "Where to compute: cpu, 0, ...", "the run's"),
    "batch": Key(int, "Images a batch.", "the run's"),
    "seed": Key(int, "Seed of the images' order and augmentation.", "the run's"),
    "project": Key(str, "Folder of runs, as of `yolo train`."),
    "name": Key(str, "Folder of this run, as of `yolo train`.", "correct"),
}
# name -> what it is for, and its forms, of which the keys that are given choose one
COMMANDS = {
    "correct": (
        "correct a finished run again",
        [Form("run.standalone", "correct", also=OF_CORRECTION | OF_YOLO)],
    ),
    "eval": (
        "AP by pycocotools, of a model or of files in COCO form",
        [
            Form("tools.evaluate", "evaluate", "format_table", json=True),
            Form("coco.metrics", "coco_metrics", "format_metrics", json=True),
        ],
    ),
    "compare": (
        "the difference of two models' AP, and its interval over images",
        [
            Form("tools.intervals", "compare", "format_comparison", json=True),
            Form("tools.intervals", "bootstrap", "format_comparison", json=True),
        ],
    ),
    "check": (
        "compare a checkpoint with an exported file; exit status 1 where they differ",
        [Form("tools.check", "check", "format_check", json=True)],
    ),
    "benchmark": (
        "size, accuracy and latency of all that can be exported of a checkpoint and run here",
        [Form("tools.benchmark", "benchmark", "format_benchmark")],
    ),
    "plot": ("draw pictures of runs", [Form("tools.plot", "plot", "format_plot")]),
    "sensitivity": (
        "what each layer of a float model costs alone at each width",
        [Form("tools.sensitivity", "sensitivity", "format_sensitivity")],
    ),
    "label": (
        "label photographs by a trained model and write a data set to train on",
        [Form("run.labels", "label", "format_labels", json=True)],
    ),
    "options": (
        "every option of a run: default, what it takes, meaning",
        [Form("tools.options", "options", str)],
    ),
    "digits": (
        "compose a data set from pixels that installed packages ship",
        [Form("data.digits", "compose", str)],
    ),
    "hook": (
        "the start-up hook of `yolo`, needed by hand for editable installs only",
        [Form("startup.hook", "manage", str)],
    ),
}

# of which one line is shown; Ultralytics raises the last two of a data YAML that lacks a key or is none
FAILURES = ValueError, OSError, ImportError, RuntimeError, SyntaxError, AssertionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 1 where it is refused, fails, or says that something has not passed."""
    name, *pairs = (sys.argv[1:] if arguments is None else arguments) or HELP
    try:
        if name in HELP:
            print(overview())
        elif name in VERSION:
            print(f"{PROGRAM} {version('yolo-qc-plugin')}")
        elif name not in COMMANDS:
            raise ValueError(f"there is no such command.{_nearest(name, COMMANDS)}")
        elif HELP & set(pairs):
            print(usage(name))
        else:
            return run(COMMANDS[name][1], pairs)
    except FAILURES as e:
        print(f"{PROGRAM} {name}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    return 0


def run(forms: Sequence[Form], pairs: Sequence[str]) -> int:
    """Call the function that the keys are for and print its result; returns the exit status."""
    form, values = choose(forms, pairs)
    target = values.pop("json", None)
    if target and not Path(target).resolve().parent.is_dir():  # before what takes minutes
        raise ValueError(f"json={target}: its folder does not exist")
    result = form.find(form.function)(**values)
    show = form.find(form.show) if isinstance(form.show, str) else form.show
    if show:
        print(show(result))
    if target:
        Path(target).write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"written to {target}")
    return int(isinstance(result, dict) and result.get("passed") is False)


def choose(forms: Sequence[Form], pairs: Sequence[str]) -> tuple[Form, dict[str, Any]]:
    """The first form of which all required keys are given, and the values of its keys.

    Raises:
        ValueError: On an argument that is not key=value, an unknown key, a missing one, or a value of another type.
    """
    split = [pair.lstrip("-").partition("=") for pair in pairs]
    given = {key: text for key, _, text in split}
    all_keys = [form.keys() for form in forms]
    required = [[name for name, key in keys.items() if key.required] for keys in all_keys]
    found = next((i for i, names in enumerate(required) if given.keys() >= set(names)), None)
    keys = {name: key for of in all_keys for name, key in of.items()} if found is None else all_keys[found]
    for pair, (name, sep, _) in zip(pairs, split):
        if not sep:
            raise ValueError(f"{pair!r} is not accepted; give key=value with a key of {', '.join(keys)}")
        if name not in keys:
            raise ValueError(f"{pair!r} is not accepted.{_nearest(name, keys)}")
    if found is None:
        raise ValueError("give " + ", or ".join(" and ".join(f"{name}=" for name in names) for names in required))
    values = {}
    for name, text in given.items():
        try:
            values[name] = keys[name].read(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} is not accepted; give {keys[name].accepted}") from None
    return forms[found], values


def overview() -> str:
    """All commands, one a line."""
    commands = [f"  {name:<11} {purpose}" for name, (purpose, _) in COMMANDS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} COMMAND key=value ...", "", *commands, "", f"{PROGRAM} COMMAND --help lists its keys."]
    )


def usage(name: str) -> str:
    """The keys of a command, one a line: name, type, default, meaning."""
    purpose, forms = COMMANDS[name]
    lines = [f"{PROGRAM} {name}: {purpose}"]
    for form in forms:
        keys = form.keys()
        needed = " ".join(f"{key}=..." for key, of in keys.items() if of.required)
        lines += ["", f"usage: {PROGRAM} {name} {needed} [key=value ...]"]
        for key, of in keys.items():
            kind = ", ".join(["required"] * of.required + [of.accepted] + [f"default {of.default}"] * bool(of.default))
            lines.append(f"  {key:<18} {of.meaning} ({kind})")
    return "\n".join(lines)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant, and what is accepted."""
    near = get_close_matches(name, known, n=1)
    return "".join(f" Did you mean {n}?" for n in near) + f" Accepted: {', '.join(known)}."
