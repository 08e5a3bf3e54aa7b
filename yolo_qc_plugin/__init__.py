# yolo_qc_plugin, AGPL-3.0
"""Low-bit YOLO for the stock Ultralytics training loop: LSQ quantizers, an EMA of weights and scales, QC.

Importing the package is cheap: torch and Ultralytics are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.3.0.dev0"

# public name -> module that defines it; none is named as its module, which would hide it once imported
_PUBLIC = {
    "QCConfig": "config",
    "add_qc_callbacks": "run.callbacks",
    "choose_onnx_kind": "run.export",
    "choose_litert_kind": "run.export",
    "correct": "run.standalone",
    "QuantConv2d": "quant.layers",
    "remove": "quant.inject",
    "compose": "data.digits",
    "model_yaml": "cfg",
}
# Classes that a checkpoint is made of. It names them as `yolo_qc_plugin.NAME`, wherever they are defined
# (`quant.precision.stored`), so that a file opens whatever the layout.
_STORED = {
    "QuantRecord": "run.opening",  # every checkpoint has one: with it the process gets what opening takes
    "ActQuantizer": "quant.quantizer",
    "WeightQuantizer": "quant.quantizer",
    "ChannelAffine": "quant.layers",
    "Tap": "quant.taps",
    "QuantActivation": "quant.activations",
    "QuantSiLU": "quant.activations",
    "HeadOutput": "quant.activations",
    "RoundedSiLU": "quant.activations",
    "WideBatchNorm2d": "quant.precision",
    "WideConv2d": "quant.precision",
    "WideConvTranspose2d": "quant.precision",
    "WideLinear": "quant.precision",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    module = _PUBLIC.get(name) or _STORED.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__():
    return sorted(__all__)
