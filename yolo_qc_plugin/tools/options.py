# yolo_qc_plugin, AGPL-3.0
"""All options in a table: for the console, or as the page docs/options.md."""

from __future__ import annotations

from textwrap import wrap

from ..config import PRESETS, TARGETS, QCConfig
from ..keys import described

WIDTH = 100  # of lines on the console
HEAD = """# Options

Written by `yolo-qc options markdown=true` from the docstring of `QCConfig`. On the command line of `yolo` an option is
`qc_<name>=<value>`, in Python a keyword of `add_qc_callbacks` or of `QCConfig.from_options`. `preset=NAME` and
`target=NAME` give values to the options that are not given (a `QCConfig(target=NAME)` of its own fills none).

| option | default | meaning |
|---|---|---|"""


def options(markdown: bool = False) -> str:
    """Every option of a run, every target and every preset.

    Args:
        markdown: Write the page docs/options.md in place of a text for the console.

    Returns:
        The text.
    """
    default, meanings = QCConfig(), described(QCConfig)
    rows = [(name, _word(getattr(default, name)), meanings[name]) for name in QCConfig.kinds()]
    given = {f"target={k}": {**target.fills, "budget": target.budget} for k, target in TARGETS.items()}
    given |= {f"preset={k}": PRESETS[k] for k in PRESETS}
    rows += [(name, "", ", ".join(f"{k}={_word(v)}" for k, v in values.items())) for name, values in given.items()]
    if markdown:
        escaped = ((name, value, text.replace("|", r"\|")) for name, value, text in rows)
        return "\n".join([HEAD, *(f"| `{name}` | {value} | {text} |" for name, value, text in escaped)])
    return "\n".join(
        line
        for name, value, text in rows
        for line in (
            f"{name}{f' ({value})' if value else ''}",
            *wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    "),
        )
    )


def _word(value: object) -> str:
    """A value as it is given on a command line."""
    return "none" if value is None else "" if value in ((), {}) else str(value)
