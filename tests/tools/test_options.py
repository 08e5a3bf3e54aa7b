# yolo_qc_plugin, AGPL-3.0
"""The table of options: every one is there, and docs/options.md is what the code says."""

from pathlib import Path

from yolo_qc_plugin.cli import main
from yolo_qc_plugin.config import PRESETS, TARGETS, QCConfig
from yolo_qc_plugin.tools.options import options

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == options(markdown=True) + "\n"


def test_every_option_and_preset_has_a_row():
    rows = [
        line.split("|")[1].strip(" `") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"
    ]
    filling = [*(f"target={name}" for name in TARGETS), *(f"preset={name}" for name in PRESETS)]
    assert rows == [*QCConfig.kinds(), *filling]


def test_the_console_tells_defaults_and_whole_meanings(capsys):
    assert main(["options"]) == 0
    told = capsys.readouterr().out
    assert "\nact_bits (none)\n    Width of activations where it differs from `bits`" in told
    assert "\nema_decay (0.99)\n" in told and max(map(len, told.splitlines())) <= 100
    meanings = " ".join(told.split())
    assert "Where several match, the last that names a width sets it." in meanings
