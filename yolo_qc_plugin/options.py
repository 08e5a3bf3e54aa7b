# yolo_qc_plugin, AGPL-3.0
"""Kinds of options: how a value is read from text, which values are accepted, and what is accepted in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NoReturn


class QCError(ValueError):
    """What a user can mend: an option, a model or an Ultralytics version that the plugin does not accept."""


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raise the QCError of an option that has a wrong value."""
    raise QCError(f"QC: {name}={value!r} is not accepted; give {accepted}.")


@dataclass(frozen=True)
class Kind:
    """What an option may be."""

    accepted: str  # in words, to follow "give"
    read: Callable[[str], Any]  # raises ValueError on text that is no such value
    fits: Callable[[Any], bool]
    store: Callable[[str, Any], Any] = lambda name, value: value  # the option's name and a value that fits -> the field

    def parse(self, text: str) -> Any:
        """The value that text stands for; text that is no such value comes back, and `check` refuses it."""
        try:
            return self.read(text)
        except QCError:  # which says more than that
            raise
        except ValueError:
            return text

    def check(self, name: str, value: Any) -> Any:
        """The value as the field holds it; raises QCError on one that is not accepted."""
        return self.store(name, value) if self.fits(value) else refuse(name, value, self.accepted)


def option(default: Any, kind: Kind) -> Any:
    """A field of a dataclass, with its kind as metadata; a dict as the default is copied."""
    start = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    return field(**start, metadata={"kind": kind})


def choice(*names: str) -> Kind:
    """One of some names."""
    return Kind(" or ".join(map(repr, names)), str.strip, lambda v: isinstance(v, str) and v in names)


def whole(low: int, high: float = inf) -> Kind:
    """A whole number, from `low` to `high`."""
    bounds = f"of at least {low}" if high == inf else f"from {low} to {high}"
    return Kind(f"a whole number {bounds}", int, lambda v: type(v) is int and low <= v <= high)


def number(*, above: float = -inf, at_least: float = -inf, below: float = inf, note: str = "") -> Kind:
    """A finite number within bounds; `note` is added to what is accepted."""
    bounds = (f"above {above}" if above > -inf else f"of at least {at_least}") + f" and below {below}" * (below < inf)

    def fits(v: Any) -> bool:
        return isinstance(v, (int, float)) and not isinstance(v, bool) and above < v < below and v >= at_least

    return Kind(f"a number {bounds}{note}", float, fits)


def or_none(kind: Kind, note: str = "") -> Kind:
    """A kind, or None; as text "none" or nothing."""
    return Kind(
        f"{kind.accepted}, or None{note}",
        lambda text: None if text.strip().lower() in {"none", ""} else kind.read(text),
        lambda v: v is None or kind.fits(v),
        lambda name, v: None if v is None else kind.store(name, v),
    )


FLAG = Kind(
    "True or False",
    lambda text: {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text),
    lambda v: isinstance(v, bool),
)


def _parts(text: str) -> list[str]:
    """What commas separate, without spaces, quotes and brackets around all; the brackets of model.[01] stay."""
    if re.fullmatch(r"\[([^][]|\[[^][]*\])*\]|\([^()]*\)|\{[^{}]*\}", text := text.strip()):
        text = text[1:-1]
    return [part for part in (p.strip(" '\"") for p in text.split(",")) if part]


PATTERNS = Kind(  # one may be given alone
    "names or patterns as non-empty strings, e.g. ('model.9.*',)",
    lambda text: tuple(_parts(text)),
    lambda v: isinstance(v, (str, tuple, list)) and v != "" and all(isinstance(p, str) and p for p in v),
    lambda name, v: (v,) if isinstance(v, str) else tuple(v),
)


def widths(width: Kind) -> Kind:
    """Name or pattern -> width: a number, or text as "W4A8", "W6" or "A8"; kept as a copy.

    As text: pattern:width, or the name of a JSON file with such a mapping as its "layer_bits".
    """

    def read(text: str) -> dict[str, int | str]:
        if text.strip().endswith(".json"):
            return _in_file(text.strip())
        pairs = [part.rsplit(":", 1) for part in _parts(text)]
        return {pattern.strip(" '\""): _number_or_text(bits) for pattern, bits in pairs}  # ValueError without a colon

    def store(name: str, value: int | str) -> int | str:
        if not isinstance(value, str):
            return width.check(name, value)
        try:
            fits = all(bits is None or width.fits(bits) for bits in split_widths(value))
        except ValueError:
            fits = False
        accepted = f"{width.accepted}, or such widths of weights and activations as 'W4A8', 'W6' or 'A8'"
        return value.strip().upper() if fits else refuse(name, value, accepted)

    return Kind(
        "names or patterns with their widths, e.g. {'model.24.*': 6, 'model.1.conv': 'W4A8'}, or as text model.24.*:6 "
        "or the plan.json of a run with a budget",
        read,
        lambda v: isinstance(v, Mapping) and all(isinstance(p, str) and p for p in v),
        lambda name, v: {pattern: store(f"{name}[{pattern!r}]", bits) for pattern, bits in v.items()},
    )


def _in_file(name: str) -> dict[str, int | str]:
    """The "layer_bits" of a JSON file; a QCError where it has none."""
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))["layer_bits"]
    except FileNotFoundError:
        reason = "does not exist"
    except (OSError, ValueError, KeyError, TypeError):
        reason = "has no widths"
    raise QCError(f"QC: layer_bits={name} {reason}; give the plan.json of a run with a budget.")


def _number_or_text(text: str) -> int | str:
    """The number that text stands for, if any."""
    try:
        return int(text)
    except ValueError:
        return text.strip(" '\"")


def split_widths(value: int | str) -> tuple[int | None, int | None]:
    """(weight bits, activation bits) of a width as `widths` keeps it, None where it names none; else a ValueError."""
    if isinstance(value, int):
        return value, value
    found = re.fullmatch(r"(?=.)(?:w([0-9]))?(?:a([0-9]))?", value.strip(), re.ASCII | re.IGNORECASE)
    if not found:
        raise ValueError(value)
    weight_bits, act_bits = found.groups()
    return int(weight_bits) if weight_bits else None, int(act_bits) if act_bits else None


AUTO = "auto"
BUDGET_UNITS = "MB", "%size", "bits", "%bops", "%ops", "%drop"


def split_budget(text: str) -> tuple[float, str]:
    """(amount, unit) of a budget such as "1.4MB"; a ValueError where it is none."""
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*({'|'.join(BUDGET_UNITS)})", text.strip())
    if not found or not 0 < float(found[1]) < inf:
        raise ValueError(text)
    return float(found[1]), found[2]


def _is_budget(value: object) -> bool:
    try:
        return value == AUTO or (isinstance(value, str) and bool(split_budget(value)))
    except ValueError:
        return False


BUDGET = Kind(
    "'1.4MB' (of the file), '110%size' (of what it has at the widths that other options give), '4.0bits' (of a weight "
    "on average), '30%bops' (of the operations on bits at 8 bits everywhere), '100%ops' (of those at the widths that "
    "other options give) or '1.0%drop' (of the float model's figure, predicted), with an amount above 0, or 'auto'",
    str.strip,
    _is_budget,
)
