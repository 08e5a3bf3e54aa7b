# yolo_qc_plugin, AGPL-3.0
"""Low-bit YOLO for the stock Ultralytics training loop: LSQ quantizers, an EMA of weights and scales, QC.

Importing the package is cheap: torch and Ultralytics are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# public name -> module that defines it; none is named as its module, which would hide it once imported
_EXPORTS = {
    "QCConfig": "config",
    "add_qc_callbacks": "callbacks",
    "correct": "standalone",
    "QuantConv2d": "layers",
    "remove": "inject",
    "compose": "digits",
    "model_yaml": "models",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__():
    return sorted(__all__)
