# yolo_qc_plugin, AGPL-3.0
"""The options of a run: one dataclass, one spelling each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from .options import (
    AUTO,
    BUDGET,
    FLAG,
    PATTERNS,
    Kind,
    QCError,
    choice,
    number,
    option,
    or_none,
    refuse,
    split_widths,
    whole,
    widths,
)
from .targets import ANYWHERE, MAX_BITS, MIN_BITS, TARGETS, Target

WIDTH = whole(MIN_BITS, MAX_BITS)
# name -> values of options that are not given
PRESETS: dict[str, dict[str, Any]] = {
    # what the paper's main text states; docs/coco.md names what is not an option here, such as Adam at 1e-4
    "paper": {
        "per_channel": False,
        "act_offset": False,
        "scale_lr": 1.0,  # scales are learned at the weights' rate (our reading)
        "scale_init": "lsq",  # LSQ's own (our reading)
        "relative_steps": False,
        "rounding": "nearest",
        "teacher": "off",
        "edge_bits": 8,  # its "4-bit*" is edge_bits=4 beside the preset
        "budget": None,
        "output_bits": None,
        "ema_decay": 0.9999,  # from 0 at the start; the length of the warm-up is ours (qat/ema.py)
        "correction": "channel",
        "correction_scale": True,
        "correction_shift": True,
        "correction_epochs": 1,
        "correction_lr": 1e-4,  # its fall to 0 by a cosine is ours
    },
}


@dataclass(frozen=True)
class QCConfig:
    """What to quantize, how to average, how to correct.

    "One default changed at a time" in docs/results/coco.md has the defaults against what they could be, on photographs
    of COCO, and "QC's learning rate" that of `correction_lr`.

    Args:
        target: What the model is to run on: "cpu", "openvino", "tensorrt", "litert" or "fpga". `from_options` fills the
            options that are not given by what pays there, what cannot run there is refused, and exports write what runs
            there. None: the options decide alone.
        bits: Width of weights and activations, 2 to 8; for the targets "cpu" and "openvino" weights have 7 at most.
        weight_bits: Width of weights where it differs from `bits`, 2 to 8.
        act_bits: Width of activations where it differs from `bits`, 2 to 8.
        edge_bits: Width of the first convolution, of the head's bare output convolutions and of the last of mask
            prototypes, 2 to 8; None is 8, for the targets "cpu" and "openvino" 7 for their weights. For "openvino" a
            given width gives weights 7 at most.
        output_bits: Width of the convolutions' outputs in the finished model, 2 to 8, or None to leave them in float.
            Integer kernels give 8-bit outputs; the grid is set after QAT, before the correction. Of the head's bare
            convolutions class scores get one, and box sides where they are distributions (DFL).
        per_channel: One weight scale per output channel instead of one per tensor.
        act_offset: Learn an offset for activations (LSQ+); False is plain LSQ.
        scale_init: Start of the scales: "mse" (least squared error on the calibration batches) or "lsq"
            (2 * mean|x| / sqrt(quant_max), Esser et al. 2020).
        scale_lr: Learning rate of scales and offsets as a factor of `lr0`, above 0.
        relative_steps: Take an adaptive optimizer's steps on weights in proportion to the size of their layer's.
        rounding: Of weights in training: "annealed" hardens over nine tenths of the run, "nearest" rounds with
            straight-through gradients (LSQ), which dampening and freezing need.
        ema_decay: Constant decay of the EMA of weights, scales and offsets, in [0, 1), in place of Ultralytics' own; 0
            is plain LSQ.
        dampening_weight: Final weight of the loss that draws weights to their grid points (oscillation dampening), at
            least 0; 0 is off.
        freeze_threshold: Final frequency of oscillation above which a weight's code is fixed (iterative weight
            freezing), in (0, 1), or None for off.
        teacher: "start" draws the model to the float model that training starts from, where that one finds what the
            data set names; "off" trains on labels alone. Ultralytics' `distill_model` names another one in its place.
        distill_outputs: Weight of the loss that draws class scores and box sides to the teacher's, at least 0; 0 is
            off.
        distill_features: Weight of the loss that draws the outputs of the top-level layers to those of the start, at
            least 0; 0 is off. (Ultralytics compares features with a `distill_model` itself; `dis` is its weight.)
        label_weight: Weight of Ultralytics' loss of the labels where there is a teacher, at least 0.
        bn_freeze: Keep the batch norm statistics of the start where it teaches: what is drawn to it is normalized as it
            is.
        correction: QC factors per "channel", per "tensor", or "off".
        correction_scale: Learn QC's scale gamma.
        correction_shift: Learn QC's shift beta.
        correction_epochs: Epochs of QC over the training loader, at least 1.
        correction_lr: Learning rate of QC (Adam, by a cosine to 0), above 0.
        labels: Where labels come from: "data", the data set; or "teacher", where a photograph has no label file there,
            from the float model that training starts from, whose predictions they are.
        label_confidence: Least confidence of a prediction that becomes a label, in (0, 1).
        calibration_batches: Training batches that start the activation scales, at least 1.
        telemetry: Record scales, code flips and oscillation at each optimizer step, in qc/telemetry.parquet.
        coco_eval: Measure all that is reported by pycocotools too: AP of boxes, masks and keypoints in qc/report.json.
        skip: Names or patterns (fnmatch) of convolutions to leave in float, e.g. ("model.9.*",).
        layer_bits: Name or pattern -> width of weights and activations there, e.g. {"model.24.*": 6}, or of one of the
            two, as "W6", "A8" or "W4A8". Where several match, the last that names a width sets it. As text also the
            plan.json of a run with a `budget`.
        budget: What the widths of layers are chosen by, in place of one for all: "1.4MB" of the file, "110%size" of
            what it has at the widths that other options give, "4.0bits" of a weight on average, "30%bops" of the
            operations on bits at 8 bits everywhere, "100%ops" of those at the widths that other options give, or
            "1.0%drop" of the float model's accuracy, predicted; None for no choice. The layers that cost least have the
            fewest bits. Widths of edges and those in `layer_bits` stay, and widths of activations too, except where the
            budget is of operations. "auto" is "100%ops" or what the target has; None with `layer_bits`, where weights
            leave no choice, and for a model that is not trained yet.

    Raises:
        QCError: Where an option is out of its range; the message names it and what is accepted.
    """

    target: str | None = option(None, or_none(choice(*TARGETS)))
    bits: int = option(4, WIDTH)
    weight_bits: int | None = option(None, or_none(WIDTH, " for `bits`"))
    act_bits: int | None = option(None, or_none(WIDTH, " for `bits`"))
    edge_bits: int | None = option(None, or_none(WIDTH, " for what the target has"))
    output_bits: int | None = option(8, or_none(WIDTH, " for float"))
    per_channel: bool = option(True, FLAG)
    act_offset: bool = option(True, FLAG)
    scale_init: str = option("mse", choice("mse", "lsq"))
    scale_lr: float = option(10.0, number(above=0))
    relative_steps: bool = option(True, FLAG)
    rounding: str = option("annealed", choice("annealed", "nearest"))
    ema_decay: float = option(0.99, number(at_least=0, below=1, note="; 0 is plain LSQ without EMA"))
    dampening_weight: float = option(0.0, number(at_least=0, note="; 0 is off"))
    freeze_threshold: float | None = option(None, or_none(number(above=0, below=1), " for off"))
    teacher: str = option("start", choice("start", "off"))
    distill_outputs: float = option(1.0, number(at_least=0, note="; 0 is off"))
    distill_features: float = option(8.0, number(at_least=0, note="; 0 is off"))
    label_weight: float = option(1.0, number(at_least=0))
    bn_freeze: bool = option(True, FLAG)
    correction: str = option("channel", choice("channel", "tensor", "off"))
    correction_scale: bool = option(True, FLAG)
    correction_shift: bool = option(True, FLAG)
    correction_epochs: int = option(1, whole(1))
    correction_lr: float = option(1e-3, number(above=0))
    labels: str = option("data", choice("data", "teacher"))
    label_confidence: float = option(0.25, number(above=0, below=1))
    calibration_batches: int = option(8, whole(1))
    telemetry: bool = option(True, FLAG)
    coco_eval: bool = option(False, FLAG)
    skip: tuple[str, ...] = option((), PATTERNS)
    layer_bits: Mapping[str, int | str] = option({}, widths(WIDTH))
    budget: str | None = option(AUTO, or_none(BUDGET, " for widths by the other options"))

    def __post_init__(self):
        for name, kind in self.kinds().items():
            object.__setattr__(self, name, kind.check(name, getattr(self, name)))
        if self.correction != "off" and not (self.correction_scale or self.correction_shift):
            accepted = "correction_scale=True or correction_shift=True with it, or correction='off'"
            refuse("correction", self.correction, accepted)
        if self.rounding == "annealed" and (self.dampening_weight or self.freeze_threshold):
            refuse("rounding", self.rounding, "'nearest' with dampening_weight or freeze_threshold")
        for name, values in self.runs_on.bears.items():
            if getattr(self, name) not in values:
                accepted = f"{' or '.join(map(repr, values))} with target={self.target!r}"
                refuse(name, getattr(self, name), accepted)

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """What each option may be, by name, in the order of the fields."""
        return {f.name: f.metadata["kind"] for f in fields(cls)}

    @property
    def body_bits(self) -> tuple[int, int]:
        """(weight bits, activation bits) of a convolution that is neither an edge nor named in `layer_bits`."""
        return self.weight_bits or min(self.bits, self.runs_on.body_weights), self.act_bits or self.bits

    @property
    def edge_widths(self) -> tuple[int, int]:
        """(weight bits, activation bits) of an edge that is not named in `layer_bits`."""
        if self.edge_bits is None:
            return self.runs_on.edge_weights, MAX_BITS
        return min(self.edge_bits, self.runs_on.widest_edge_weights), self.edge_bits

    def bits_of(self, name: str, edge: bool) -> tuple[int, int]:
        """(weight bits, activation bits) of a convolution by its name and whether it is an edge."""
        weight_bits, act_bits = self.edge_widths if edge else self.body_bits
        named_weight, named_act = self.named_bits(name)
        return named_weight or weight_bits, named_act or act_bits

    def named_bits(self, name: str) -> tuple[int | None, int | None]:
        """(weight bits, activation bits) that `layer_bits` names for a convolution, None where it names none."""
        found: tuple[int | None, int | None] = (None, None)
        for pattern, given in self.layer_bits.items():
            if fnmatchcase(name, pattern):
                weight_bits, act_bits = split_widths(given)
                found = weight_bits or found[0], act_bits or found[1]
        return found

    @property
    def runs_on(self) -> Target:
        """What `target` names."""
        return TARGETS[self.target] if self.target else ANYWHERE

    @property
    def chosen_budget(self) -> str | None:
        """`budget`, where it is "auto" what that means for a trained model."""
        if self.budget != AUTO:
            return self.budget
        wider = self.body_bits[0] in self.runs_on.widths[:-1]  # there is something to choose
        return self.runs_on.budget if wider and not self.layer_bits else None

    @property
    def narrow(self) -> bool:
        """Whether the target wants weights of 8 bits without the code -128."""
        return self.runs_on.narrow

    @property
    def sum_bits(self) -> int:
        """Width of what residual sums add, where the target quantizes that.

        8, or on symmetric grids, where all that read a tensor are to share one, that of convolutions' inputs.
        """
        return self.body_bits[1] if self.symmetric else MAX_BITS

    @property
    def symmetric(self) -> bool:
        """Whether the target wants symmetric grids (see `Target`)."""
        return self.runs_on.symmetric

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> QCConfig:
        """Build a config from named options whose values may be text, as on a command line.

        `preset`, a name of PRESETS, fills the fields that are not given, and `target` those that are left. The config
        holds the preset's values, not its name.

        Text is read as data: numbers, true/false, none, comma-separated patterns for `skip`, and comma-separated
        `pattern:width` for `layer_bits`.

        Raises:
            QCError: On an unknown name (listing those accepted) or a value that is not of the option's type.
        """
        options, kinds = dict(options), cls.kinds()
        preset = PRESETS[choice(*PRESETS).check("preset", options.pop("preset"))] if "preset" in options else {}
        if unknown := [name for name in options if name not in kinds]:
            near = [m for name in unknown for m in get_close_matches(name, kinds, n=2)]
            hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
            raise QCError(
                f"QC: unknown option {', '.join(repr(n) for n in unknown)}.{hint} Accepted: preset, {', '.join(kinds)}."
            )
        given = {name: kinds[name].parse(v) if isinstance(v, str) else v for name, v in options.items()}
        target = kinds["target"].check("target", given.get("target"))
        fills = TARGETS[target].fills if target else {}
        return cls(**{**fills, **preset, **given})
