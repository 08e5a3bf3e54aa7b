# yolo_qc_plugin, AGPL-3.0
"""The options of a run: one dataclass, one spelling each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches

MIN_BITS, MAX_BITS = 2, 8
CORRECTIONS = ("channel", "tensor", "off")
SCALE_INITS = ("mse", "lsq")
# name -> values of options that are not given
PRESETS = {
    "paper": {  # our reading: LSQ as published, QC per channel for an epoch; no learning rate is named
        "per_channel": False,
        "act_offset": False,
        "act_equalize": False,
        "scale_init": "lsq",
        "edge_bits": 8,
        "output_bits": None,
        "ema_decay": 0.99,  # the smallest of the three that are equal in its Table 3
        "correction": "channel",
        "correction_scale": True,
        "correction_shift": True,
        "correction_epochs": 1,
    },
    # beside the defaults; docs/results/presets.md has the runs
    "best": {"per_channel": True, "act_bits": 8},  # no runtime on a CPU or GPU computes narrower activations faster
    "narrow": {"per_channel": True, "act_equalize": True},  # activations as narrow as weights, as some FPGAs have them
}


class QCError(ValueError):
    """What a user can mend: an option, a model or a host that the plugin does not accept."""


@dataclass(frozen=True)
class QCConfig:
    """What to quantize, how to average, how to correct.

    Defaults were chosen by measurement; the record is docs/results/defaults.md.

    Args:
        bits: Width of weights and activations, 2 to 8.
        weight_bits: Width of weights where it differs from `bits`, 2 to 8.
        act_bits: Width of activations where it differs from `bits`, 2 to 8.
        edge_bits: Width of the first convolution and of the head's bare output convolutions, 2 to 8.
        output_bits: Width of the convolutions' outputs in the finished model, 2 to 8, or None to leave them in float.
            Integer kernels give 8-bit outputs; the grid is set after QAT, before the correction.
        per_channel: One weight scale per output channel instead of one per tensor.
        act_offset: Learn an offset for activations (LSQ+); False is plain LSQ.
        act_equalize: Multiply the channels of activations below 8 bits by powers of two, found before training, that
            bring them to one size, and divide the weights that read them by these (`equalization`).
        scale_init: Start of the scales: "mse" (least squared error on the calibration batches) or "lsq"
            (2 * mean|x| / sqrt(quant_max), Esser et al. 2020).
        scale_lr: Learning rate of scales and offsets as a factor of `lr0`, above 0.
        ema_decay: Constant decay of the EMA of weights, scales and offsets, in [0, 1); 0 is plain LSQ.
        dampening_weight: Final weight of the loss that draws weights to their grid points (oscillation dampening), at
            least 0; 0 is off.
        freeze_threshold: Final frequency of oscillation above which a weight's code is fixed (iterative weight
            freezing), in (0, 1), or None for off.
        distill_outputs: Weight of a loss that draws class scores and box sides to those of the host's teacher, where
            `distill_model` names one, at least 0; 0 is off.
        bn_reestimate: Measure batch norm statistics again after training, before the outputs are quantized.
        correction: QC factors per "channel", per "tensor", or "off".
        correction_scale: Learn QC's scale gamma.
        correction_shift: Learn QC's shift beta.
        correction_epochs: Epochs of QC over the training loader, at least 1.
        correction_lr: Learning rate of QC (Adam), above 0.
        calibration_batches: Training batches that start the activation scales, at least 1.
        telemetry: Record scales, code flips and oscillation at each optimizer step, in qc/telemetry.parquet.
        skip: Names or patterns (fnmatch) of convolutions to leave in float, e.g. ("model.9.*",).
        layer_bits: Name or pattern -> width of weights and activations there, e.g. {"model.24.*": 6}.

    Raises:
        QCError: Where an option is out of its range; the message names it and what is accepted.
    """

    bits: int = 4
    weight_bits: int | None = None
    act_bits: int | None = None
    edge_bits: int = 8
    output_bits: int | None = 8
    per_channel: bool = False
    act_offset: bool = True
    act_equalize: bool = False
    scale_init: str = "mse"
    scale_lr: float = 1.0
    ema_decay: float = 0.99
    dampening_weight: float = 0.0
    freeze_threshold: float | None = None
    distill_outputs: float = 1.0
    bn_reestimate: bool = False
    correction: str = "channel"
    correction_scale: bool = True
    correction_shift: bool = True
    correction_epochs: int = 1
    correction_lr: float = 1e-3
    calibration_batches: int = 8
    telemetry: bool = True
    skip: tuple[str, ...] = ()
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.skip, (str, tuple, list)):
            _refuse("skip", self.skip, "names or patterns as non-empty strings, e.g. ('model.9.*',)")
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        if not isinstance(self.layer_bits, Mapping):
            _refuse("layer_bits", self.layer_bits, "a mapping of name patterns to widths, e.g. {'model.24.*': 6}")
        object.__setattr__(self, "layer_bits", dict(self.layer_bits))
        if not all(isinstance(p, str) and p for p in (*self.skip, *self.layer_bits)):
            _refuse("skip and layer_bits", (self.skip, self.layer_bits), "names or patterns as non-empty strings")

        _check_bits("bits", self.bits)
        _check_bits("edge_bits", self.edge_bits)
        for name in ("weight_bits", "act_bits", "output_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        for pattern, bits in self.layer_bits.items():
            _check_bits(f"layer_bits[{pattern!r}]", bits)
        switches = "per_channel", "act_offset", "act_equalize", "bn_reestimate", "telemetry"
        for name in (*switches, "correction_scale", "correction_shift"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        for name, choices in (("scale_init", SCALE_INITS), ("correction", CORRECTIONS)):
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), " or ".join(repr(c) for c in choices))
        for name in ("correction_epochs", "calibration_batches"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                _refuse(name, value, "a whole number of at least 1")
        for name in ("scale_lr", "correction_lr"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < float("inf"):
                _refuse(name, getattr(self, name), "a number above 0")
        if not _is_number(self.ema_decay) or not 0 <= self.ema_decay < 1:
            _refuse("ema_decay", self.ema_decay, "a number in [0, 1); 0 is plain LSQ without EMA")
        for name in ("dampening_weight", "distill_outputs"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < float("inf"):
                _refuse(name, getattr(self, name), "a number of at least 0; 0 is off")
        threshold = self.freeze_threshold
        if threshold is not None and not (_is_number(threshold) and 0 < threshold < 1):
            _refuse("freeze_threshold", threshold, "a number in (0, 1), or None for off")
        if self.correction != "off" and not (self.correction_scale or self.correction_shift):
            _refuse(
                "correction",
                self.correction,
                "correction_scale=True or correction_shift=True with it, or correction='off'",
            )

    @property
    def body_bits(self) -> tuple[int, int]:
        """(weight bits, activation bits) of a convolution that is neither an edge nor named in `layer_bits`."""
        return self.weight_bits or self.bits, self.act_bits or self.bits

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> QCConfig:
        """Build a config from named options whose values may be text, as on a command line.

        `preset`, a name of PRESETS, fills the fields that are not given. The config holds the values, not the name.

        Text is read as data: numbers, true/false, none, comma-separated patterns for `skip`, and comma-separated
        `pattern:bits` for `layer_bits`.

        Raises:
            QCError: On an unknown name (listing those accepted) or a value that is not of the option's type.
        """
        options = dict(options)
        values = {}
        if "preset" in options:
            preset = options.pop("preset")
            if not isinstance(preset, str) or preset not in PRESETS:
                _refuse("preset", preset, " or ".join(repr(name) for name in PRESETS))
            values = PRESETS[preset]
        known = {f.name: str(f.type) for f in fields(cls)}
        if unknown := [name for name in options if name not in known]:
            near = [m for name in unknown for m in get_close_matches(name, known, n=2)]
            hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
            raise QCError(
                f"QC: unknown option {', '.join(repr(n) for n in unknown)}.{hint} Accepted: preset, {', '.join(known)}."
            )
        given = {n: _parse(n, v, known[n]) if isinstance(v, str) else v for n, v in options.items()}
        return cls(**{**values, **given})


_WIDTHS = {str(bits) for bits in range(MIN_BITS, MAX_BITS + 1)}


def _unwrap(text: str, opening: str, closing: str) -> str:
    """Take off one pair of outer brackets; a lone bracket belongs to a pattern such as model.[01]."""
    text = text.strip()
    paired = len(text) > 1 and text[0] in opening and text[-1] == closing[opening.index(text[0])]
    inner = text[1:-1] if paired else text
    depth = 0  # the first bracket's partner must be the last character: "[ab].x,c.[01]" has no outer pair
    for character in inner if paired else "":
        depth += (character == text[0]) - (character == text[-1])
        if depth < 0:
            return text
    return inner


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(name: str, value, accepted: str):
    raise QCError(f"QC: {name}={value!r} is not accepted; give {accepted}.")


def _check_bits(name: str, value) -> None:
    if type(value) is not int or not MIN_BITS <= value <= MAX_BITS:
        _refuse(name, value, f"a whole number from {MIN_BITS} to {MAX_BITS}")


def _parse(name: str, text: str, kind: str):
    """Read `text` as a value of the annotated type `kind`; what cannot be read is refused by name."""
    low = text.strip().lower()
    if "None" in kind and low in {"none", ""}:
        return None
    if kind.startswith("bool"):
        if low not in {"true", "false", "1", "0"}:
            _refuse(name, text, "True or False")
        return low in {"true", "1"}
    if kind.startswith("tuple"):
        return tuple(p for p in (p.strip(" '\"") for p in _unwrap(text, "([", ")]").split(",")) if p)
    if kind.startswith("Mapping"):
        pairs = [p.rpartition(":") for p in _unwrap(text, "{", "}").split(",") if p.strip()]
        if not all(sep and bits.strip() in _WIDTHS for _, sep, bits in pairs):
            _refuse(name, text, "pattern:bits[,pattern:bits...], e.g. model.24.*:6")
        return {pattern.strip(" '\""): int(bits) for pattern, _, bits in pairs}
    if kind.startswith(("int", "float")):
        cast = int if kind.startswith("int") else float
        try:
            return cast(low)  # more digits than Python reads are refused here too
        except ValueError:
            _refuse(name, text, "a whole number" if cast is int else "a number")
    return text.strip()
