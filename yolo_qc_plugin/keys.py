# yolo_qc_plugin, AGPL-3.0
"""Keys of a command line, read from the function that they are for: its signature, and "Args" of its docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SWITCH = {"true": True, "1": True, "false": False, "0": False}
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Key:
    """A key of a command.

    Attributes:
        hint: Type of its value, as a function's parameter has it.
        meaning: One sentence.
        default: In words; empty where there is none to tell.
        required: Whether it must be given.
    """

    hint: Any
    meaning: str
    default: str = ""
    required: bool = False

    @property
    def accepted(self) -> str:
        """What it takes, in words."""
        return _words(self.hint)

    def read(self, text: str) -> Any:
        """The value that a text stands for, of the first type of `hint` that has such a value.

        Raises:
            ValueError: If no type has.
        """
        return _read(text, self.hint)


def keys_of(function: Callable) -> dict[str, Key]:
    """Name -> key of every parameter but **arguments, in the signature's order."""
    hints, meanings = get_type_hints(function), documented(function)
    keys = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.VAR_KEYWORD:
            default = "" if p.default in (None, p.empty) else str(p.default).strip("()").replace(", ", ",")
            keys[p.name] = Key(hints[p.name], meanings[p.name], default, required=p.default is p.empty)
    return keys


def documented(thing: Any) -> dict[str, str]:
    """Argument -> the first sentence on it in the docstring of a function or class."""
    return {name: re.split(r"(?<=\.) ", text)[0] for name, text in described(thing).items()}


def described(thing: Any) -> dict[str, str]:
    """Argument -> what the docstring of a function or class says on it."""
    section = (inspect.getdoc(thing) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _types(hint: Any) -> list[Any]:
    """The types of a union that a text can be read as; a path is a text."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    types = dict.fromkeys(str if t is Path else t for t in parts if t is not NoneType)
    return [t for t in types if t in SCALARS or get_origin(t) in (Literal, Sequence)]


def _words(hint: Any) -> str:
    words: list[str] = []
    for kind in _types(hint):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is Sequence:
            words += [*({_words(*get_args(kind))} - set(words)), "several with commas"]
        else:
            words.append(SCALARS[kind])
    return " or ".join(words)


def _read(text: str, hint: Any) -> Any:
    for kind in _types(hint):
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is bool and text.lower() in SWITCH:
            return SWITCH[text.lower()]
        try:
            if get_origin(kind) is Sequence:
                inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
                return [_read(part, *get_args(kind)) for part in inner.split(",")]
            if kind in (int, float, str) and text:
                return kind(text)
        except ValueError:
            continue
    raise ValueError(text)
