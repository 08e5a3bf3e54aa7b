# yolo_qc_plugin, AGPL-3.0
"""QCConfig: what it accepts, what it refuses and how it says so, reading text."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolo_qc_plugin.config import PRESETS, TARGETS, QCConfig, QCError

NAN, INF = float("nan"), float("inf")
NAMES = [f.name for f in fields(QCConfig)]

# option -> (what the message must contain beside the option's name, values to refuse)
BITS = ("2 to 8", [1, 0, 9, 16, -4, 4.0, True, "4", "four", NAN, [4]])
FACTOR = ("above 0", [0, -0.1, NAN, INF, -INF, True, "1", None])
WEIGHT = ("at least 0", [-0.1, NAN, INF, -INF, True, "0.1", None])
COUNT = ("at least 1", [0, -1, 1.0, 1.5, True, "1", None, INF])
FLAG = ("True or False", [0, 1, None, "true", "yes", 1.0])
REFUSED = {
    "target": (
        "'cpu' or 'openvino' or 'tensorrt' or 'litert' or 'fpga', or None",
        ["", "CPU", "gpu", True, 8, ["cpu"]],
    ),
    "bits": (BITS[0], [*BITS[1], None]),
    "edge_bits": BITS,
    "weight_bits": BITS,
    "act_bits": BITS,
    "output_bits": BITS,
    "per_channel": FLAG,
    "act_offset": FLAG,
    "correction_scale": FLAG,
    "correction_shift": FLAG,
    "scale_init": ("'mse' or 'lsq'", ["", "MSE", "minmax", None, 1, True, ["mse"]]),
    "labels": ("'data' or 'teacher'", ["", "model", None, True, ["data"]]),
    "label_confidence": ("above 0 and below 1", [0, 1, 1.0, -0.1, NAN, INF, True, "0.5", None]),
    "correction": ("'channel' or 'tensor' or 'off'", ["", "channels", "none", None, False, 0]),
    "scale_lr": FACTOR,
    "correction_lr": FACTOR,
    "correction_epochs": COUNT,
    "calibration_batches": COUNT,
    "ema_decay": ("at least 0 and below 1;", [-0.1, 1, 1.0, 1.5, NAN, INF, -INF, True, "0.9", None]),
    "dampening_weight": WEIGHT,
    "teacher": ("'start' or 'off'", ["", "Start", "auto", None, 1, True]),
    "distill_outputs": WEIGHT,
    "distill_features": WEIGHT,
    "label_weight": WEIGHT,
    "freeze_threshold": ("above 0 and below 1, or None for off", [0, -0.1, 1, 1.0, NAN, INF, True, "0.01"]),
    "relative_steps": FLAG,
    "rounding": ("'annealed' or 'nearest'", ["", "soft", "Nearest", None, True, 0]),
    "bn_freeze": FLAG,
    "telemetry": FLAG,
    "coco_eval": FLAG,
    "skip": ("non-empty strings", ["", ("",), ("a", 3), (None,), b"model", 5, None]),
    "layer_bits": (
        "",
        [
            None,
            5,
            "a:6",
            [("a", 6)],
            {"": 4},
            {3: 4},
            {"a": 1},
            {"a": 9},
            {"a": 4.0},
            {"a": True},
            {"a": "4"},
            {"a": ""},
            {"a": "W9"},
            {"a": "W4A1"},
            {"a": "A8W4"},
            {"a": "W"},
        ],
    ),
}
REFUSED["budget"] = (
    "'1.4MB' (of the file), '110%size'",
    [
        "",
        "1.4",
        "MB",
        "0MB",
        "0.0bits",
        "-1MB",
        "1.4 GB",
        "4bit",
        "30%",
        "30%BOPS",
        "1e3MB",
        "9" * 400 + "MB",
        "٤MB",
        4,
        True,
    ],
)
CASES = [(name, accepted, value) for name, (accepted, values) in REFUSED.items() for value in values]


def test_every_option_has_refused_values():
    assert REFUSED.keys() == set(NAMES)


@pytest.mark.parametrize("name,accepted,value", CASES, ids=[f"{n}={v!r}" for n, _, v in CASES])
def test_refusal_names_the_option_and_what_is_accepted(name, accepted, value):
    with pytest.raises(QCError) as e:
        QCConfig(**{name: value})
    message = str(e.value)
    assert message.startswith("QC: ") and name in message and "give " in message and accepted in message


@pytest.mark.parametrize("value", [{"a": 1}, {"a": 16}, {"b": 4, "a": "4"}])
def test_layer_bits_refusal_names_the_pattern(value):
    with pytest.raises(QCError, match=r"layer_bits\['a'\].*2 to 8"):
        QCConfig(layer_bits=value)


@pytest.mark.parametrize(
    "name,value",
    [
        *((n, b) for n in ("bits", "edge_bits", "weight_bits", "act_bits") for b in range(2, 9)),
        ("weight_bits", None), ("act_bits", None), ("output_bits", None),
        ("ema_decay", 0), ("ema_decay", 0.0), ("ema_decay", 0.9999),
        ("dampening_weight", 0), ("rounding", "nearest"), ("distill_outputs", 0), ("distill_outputs", 100.0),
        ("teacher", "off"), ("label_weight", 0), ("distill_features", 2.5),
        ("freeze_threshold", None),
        ("scale_lr", 1e-9), ("scale_lr", 3), ("correction_lr", 1e9),
        ("correction_epochs", 1), ("calibration_batches", 1000),
        ("scale_init", "lsq"), ("correction", "tensor"), ("correction", "off"),
        ("target", None), ("target", "cpu"), ("target", "litert"),
        ("skip", ()), ("skip", ("a", "b.*")), ("layer_bits", {"a.*": 2, "b": 8}),
        ("layer_bits", {"a": "W4A8", "b": "A8", "c": "W2"}),
        ("budget", None), ("budget", "auto"), ("budget", "1.4MB"), ("budget", "110%size"), ("budget", "4.0bits"),
        ("budget", "30%bops"), ("budget", "1.0%drop"),
    ],
)  # fmt: skip
def test_accepted_values_are_kept(name, value):
    assert getattr(QCConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name,value", [("dampening_weight", 100.0), ("freeze_threshold", 1e-9)])
def test_what_works_on_rounded_weights_needs_them(name, value):
    with pytest.raises(QCError, match=rf"rounding='annealed'.*'nearest' with .*{name}"):
        QCConfig(**{name: value})
    assert getattr(QCConfig(**{name: value}, rounding="nearest"), name) == value


def test_correction_needs_a_factor():
    with pytest.raises(QCError, match=r"correction=.*correction_scale=True or correction_shift=True.*'off'"):
        QCConfig(correction_scale=False, correction_shift=False)
    QCConfig(correction="off", correction_scale=False, correction_shift=False)
    QCConfig(correction_scale=False)
    QCConfig(correction_shift=False)


def test_skip_and_layer_bits_are_copied_and_normalised():
    assert QCConfig(skip="model.9.*").skip == ("model.9.*",)
    assert QCConfig(skip=["a", "b"]).skip == ("a", "b")
    widths = {"a": 4}
    config = QCConfig(layer_bits=widths)
    widths["a"] = 1
    assert config.layer_bits == {"a": 4}


@pytest.mark.parametrize("options,expected", [
    ({}, (4, 4)), ({"bits": 3}, (3, 3)), ({"weight_bits": 2}, (2, 4)), ({"act_bits": 8, "bits": 5}, (5, 8)),
])  # fmt: skip
def test_body_bits(options, expected):
    assert QCConfig(**options).body_bits == expected


@pytest.mark.parametrize("name,text,value", [
    ("bits", "3", 3), ("bits", " 8 ", 8), ("edge_bits", "2", 2),
    ("weight_bits", "none", None), ("act_bits", "None", None), ("act_bits", "", None), ("weight_bits", "6", 6),
    ("per_channel", "true", True), ("per_channel", "True", True), ("per_channel", "1", True),
    ("act_offset", "false", False), ("act_offset", "False", False), ("act_offset", "0", False),
    ("scale_init", "lsq", "lsq"), ("scale_init", " mse ", "mse"), ("correction", "tensor", "tensor"),
    ("correction_scale", "false", False), ("correction_shift", "0", False),
    ("scale_lr", "0.5", 0.5), ("correction_lr", "1e-4", 1e-4), ("ema_decay", "0", 0.0), ("ema_decay", ".999", 0.999),
    ("dampening_weight", "1e-1", 0.1), ("distill_outputs", "2", 2.0),
    ("freeze_threshold", "0.01", 0.01), ("freeze_threshold", "none", None),
    ("coco_eval", "true", True), ("telemetry", "false", False), ("correction_epochs", "2", 2),
    ("calibration_batches", "16", 16),
    ("target", "none", None), ("target", " cpu ", "cpu"),
    ("skip", "", ()), ("skip", "model.9.*", ("model.9.*",)), ("skip", "a, b.*", ("a", "b.*")),
    ("skip", "[a,b]", ("a", "b")), ("skip", "('a', \"b\",)", ("a", "b")), ("skip", "a.[01].b", ("a.[01].b",)),
    ("skip", "model.[01]", ("model.[01]",)),
    ("skip", "[ab].x,c.[01]", ("[ab].x", "c.[01]")), ("skip", "a,model.[01]", ("a", "model.[01]")),
    ("skip", "[model.[01], b]", ("model.[01]", "b")), ("skip", "['[ab].x', '*.[cd]']", ("[ab].x", "*.[cd]")),
    ("budget", " 1.4MB ", "1.4MB"), ("budget", "auto", "auto"), ("budget", "none", None),
    ("budget", "30%bops", "30%bops"),
    ("layer_bits", "", {}), ("layer_bits", "model.24.*:6", {"model.24.*": 6}),
    ("layer_bits", "a:W4A8,b:a8, c: W6", {"a": "W4A8", "b": "A8", "c": "W6"}),
    ("layer_bits", "{'a': 'A8'}", {"a": "A8"}),
    ("layer_bits", "a:6, b.*: 2", {"a": 6, "b.*": 2}), ("layer_bits", "{'a': 6, 'b': 3}", {"a": 6, "b": 3}),
])  # fmt: skip
def test_text_is_read_by_the_options_type(name, text, value):
    read = getattr(QCConfig.from_options({"rounding": "nearest", name: text}), name)
    assert read == value and type(read) is type(value)


def test_layer_bits_can_be_a_plan(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"budget": "4bits", "layer_bits": {"a": "W4A8", "b.*": 3}}))
    assert QCConfig.from_options({"layer_bits": str(plan)}).layer_bits == {"a": "W4A8", "b.*": 3}


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"layer_bits": 4}', '{"layer_bits": {"a": 9}}', "\xff"]
)
def test_a_file_that_is_no_plan_is_refused(content, tmp_path):
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content, encoding="latin1")
    reason = r"layer_bits.*(not accepted|does not exist|has no widths); give "
    with pytest.raises(QCError, match=reason):
        QCConfig.from_options({"layer_bits": str(plan)})


@pytest.mark.parametrize("name,text", [
    ("bits", "4.0"), ("bits", "four"), ("bits", ""), ("bits", "none"), ("bits", "9"), ("edge_bits", "true"),
    ("weight_bits", "nan"), ("per_channel", "yes"), ("per_channel", "2"), ("act_offset", "none"),
    ("scale_lr", "fast"), ("scale_lr", "0"), ("scale_lr", "nan"), ("correction_lr", "1e999"), ("ema_decay", "1"),
    ("dampening_weight", "none"), ("dampening_weight", "-1"), ("freeze_threshold", "0"), ("bn_freeze", "yes"),
    ("correction_epochs", "1.5"), ("calibration_batches", "0"), ("scale_init", "max"), ("correction", "on"),
    ("layer_bits", "6"), ("layer_bits", "a:"), ("layer_bits", "a:b"), ("layer_bits", ":6"), ("layer_bits", "a:9"),
    ("layer_bits", "a:-4"), ("layer_bits", "a:W4A9"),
    ("layer_bits", "a:wa"), ("layer_bits", "a:²"), ("layer_bits", "a:" + "9" * 5000),
])  # fmt: skip
def test_text_of_the_wrong_type_or_range_is_refused_by_name(name, text):
    with pytest.raises(QCError, match=name):
        QCConfig.from_options({name: text})


@pytest.mark.parametrize("name,near", [("bit", "bits"), ("ema_decy", "ema_decay"), ("weights_bits", "weight_bits")])
def test_unknown_option_suggests_and_lists(name, near):
    with pytest.raises(QCError) as e:
        QCConfig.from_options({name: 4, "bits": 4})
    message, _, listed = str(e.value).partition("Accepted: ")
    assert repr(name) in message and f"Did you mean {near}" in message
    assert listed.rstrip(".").split(", ") == ["preset", *NAMES]


def test_unknown_option_that_resembles_nothing_gets_no_suggestion():
    with pytest.raises(QCError) as e:
        QCConfig.from_options({"zzz": 1, "qqq": 2})
    assert "'zzz', 'qqq'" in str(e.value) and "Did you mean" not in str(e.value)


def test_defaults_survive_a_round_trip():
    assert QCConfig.from_options(QCConfig().to_dict()) == QCConfig()


WIDTHS = st.integers(2, 8) | st.from_regex(r"\A(W[2-8])?A[2-8]\Z|\AW[2-8]\Z")
configs = st.builds(
    QCConfig,
    rounding=st.just("nearest"),
    target=st.sampled_from([None, "cpu", "litert"]),  # those that bear all
    bits=st.integers(2, 8),
    weight_bits=st.none() | st.integers(2, 8),
    act_bits=st.none() | st.integers(2, 8),
    output_bits=st.none() | st.integers(2, 8),
    edge_bits=st.none() | st.integers(2, 8),
    per_channel=st.booleans(),
    act_offset=st.booleans(),
    scale_init=st.sampled_from(["mse", "lsq"]),
    scale_lr=st.floats(1e-6, 100),
    ema_decay=st.floats(0, 1, exclude_max=True),
    dampening_weight=st.floats(0, 100),
    teacher=st.sampled_from(["start", "off"]),
    distill_outputs=st.floats(0, 100),
    distill_features=st.floats(0, 100),
    label_weight=st.floats(0, 100),
    labels=st.sampled_from(["data", "teacher"]),
    label_confidence=st.floats(0, 1, exclude_min=True, exclude_max=True),
    freeze_threshold=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    telemetry=st.booleans(),
    correction=st.sampled_from(["channel", "tensor", "off"]),
    correction_scale=st.just(True),
    correction_shift=st.booleans(),
    correction_epochs=st.integers(1, 9),
    correction_lr=st.floats(1e-6, 100),
    calibration_batches=st.integers(1, 99),
    skip=st.lists(st.text(min_size=1)).map(tuple),
    layer_bits=st.dictionaries(st.text(min_size=1), WIDTHS),
    budget=st.none()
    | st.sampled_from(["auto", "1.4MB", "4bits", "4.0 bits", "30%bops", ".5%drop", "1.%drop", "99.5%size"]),
)


@given(configs)
@settings(max_examples=100, deadline=None)
def test_to_dict_is_json_and_round_trips(config):
    plain = config.to_dict()
    assert list(plain) == NAMES and json.loads(json.dumps(plain)) == plain
    assert QCConfig.from_options(json.loads(json.dumps(plain))) == config


plain_patterns = st.text("abc.*?0123456789", min_size=1, max_size=12)


@given(configs, st.lists(plain_patterns), st.dictionaries(plain_patterns, WIDTHS))
@settings(max_examples=100, deadline=None)
def test_every_value_can_be_given_as_text(config, skip, layer_bits):
    config = replace(config, skip=skip, layer_bits=layer_bits)
    texts = {name: str(value) for name, value in config.to_dict().items()}
    texts |= {"skip": ",".join(skip), "layer_bits": ",".join(f"{k}:{v}" for k, v in layer_bits.items())}
    assert QCConfig.from_options(texts) == config


TEXTS = st.text() | st.text("-+.eE_0123456789") | st.text("{}()[]'\"abc*,: 09²٣")


@given(st.sampled_from(NAMES), TEXTS)
@example("layer_bits", "a:²")
@example("skip", "()")
@example("bits", "٤")  # a digit of another script is a digit to int()
@example("scale_lr", "1_0")
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_config_or_a_qc_error(name, text):
    try:
        config = QCConfig.from_options({name: text})
    except QCError as e:
        assert name in str(e)
    else:
        assert QCConfig.from_options(json.loads(json.dumps(config.to_dict()))) == config


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=4,
)


@given(st.sampled_from(NAMES), ANY)
@settings(max_examples=300, deadline=None)
def test_any_value_gives_a_config_or_a_qc_error(name, value):
    try:
        config = QCConfig.from_options({name: value})
    except QCError as e:
        assert name in str(e)
    else:
        assert QCConfig.from_options(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(preset):
    values = PRESETS[preset]
    assert QCConfig.from_options({"preset": preset, "bits": "3"}) == QCConfig(bits=3, **values)
    for name, value in values.items():
        other = {
            "correction": "tensor",
            "scale_init": "mse",
            "teacher": "start",
            "rounding": "annealed",
            "correction_shift": False,
            "act_bits": 4,
            "budget": "4bits",
        }.get(name, 6)
        other = not value if isinstance(value, bool) else 0.5 if isinstance(value, float) else other
        given = QCConfig.from_options({"preset": preset, name: str(other)})
        assert getattr(given, name) == other and replace(given, **{name: value}) == QCConfig(**values)


def test_the_papers_preset_is_what_it_states():
    """LSQ per tensor, EMA of 0.9999, QC per channel at 1e-4; its "4-bit*" has no wider edges."""
    config = QCConfig.from_options({"preset": "paper"})
    assert (config.per_channel, config.act_offset, config.edge_bits, config.bits) == (False, False, 8, 4)
    assert (config.ema_decay, config.correction_lr, config.correction_epochs) == (0.9999, 1e-4, 1)
    assert (config.correction, config.correction_scale, config.correction_shift) == ("channel", True, True)
    assert config.output_bits is None and config.teacher == "off"
    starred = QCConfig.from_options({"preset": "paper", "edge_bits": "4"})
    assert starred == replace(config, edge_bits=4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_fills_what_is_not_given(target):
    filled = QCConfig.from_options({"target": f" {target} "})
    assert filled == QCConfig(target=target, **TARGETS[target].fills)
    assert filled.symmetric == (target == "tensorrt") and filled.narrow == (target in {"tensorrt", "litert"})
    given = QCConfig.from_options({"target": target, "per_channel": "false", "bits": "3", "act_bits": "5"})
    assert not given.per_channel and given.body_bits == (3, 5)
    of_paper = QCConfig.from_options({"target": target, "preset": "paper"})  # which comes before
    assert of_paper == QCConfig(**{**TARGETS[target].fills, **PRESETS["paper"], "target": target})


@pytest.mark.parametrize("more,cpu,other", [
    ({}, "110%size", "100%ops"), ({"bits": "4"}, "110%size", "100%ops"), ({"bits": "8"}, None, None),
    ({"weight_bits": "3"}, None, "100%ops"), ({"bits": "8", "weight_bits": "4"}, "110%size", "100%ops"),
    ({"budget": "auto"}, "110%size", "100%ops"), ({"budget": "none"}, None, None),
    ({"budget": "4.5bits"}, "4.5bits", "4.5bits"), ({"layer_bits": "model.2.*:8"}, None, None),
    ({"preset": "paper"}, None, None),
])  # fmt: skip
def test_widths_are_planned_where_nothing_else_says_them(more, cpu, other):
    """By what pays on the target; and a config that was written and read again is the same."""
    for target, budget in {"cpu": cpu, "fpga": other, "none": other}.items():
        config = QCConfig.from_options({"target": target, **more})
        assert config.chosen_budget == budget and QCConfig.from_options(config.to_dict()) == config


def test_targets_of_cpus():
    config = QCConfig.from_options({"target": "cpu"})
    assert config.per_channel and config.output_bits == 8 and config.act_offset and config.body_bits == (4, 8)
    openvino = QCConfig.from_options({"target": "openvino"})
    assert openvino == replace(config, target="openvino") and openvino.chosen_budget == config.chosen_budget
    assert openvino.edge_widths == config.edge_widths == (7, 8) and QCConfig().edge_widths == (8, 8)
    for edge_bits, widths in {"8": [(8, 8), (7, 8)], "6": [(6, 6), (6, 6)], "none": [(7, 8), (7, 8)]}.items():
        given = [QCConfig.from_options({"target": t, "edge_bits": edge_bits}) for t in ("cpu", "openvino")]
        assert [config.edge_widths for config in given] == widths
    for target in "cpu", "openvino":  # of 8 bits OpenVINO computes in float
        assert QCConfig.from_options({"target": target, "bits": "8"}).body_bits == (7, 8)
    assert QCConfig.from_options({"target": "cpu", "weight_bits": "8"}).body_bits == (8, 8)
    narrow = QCConfig.from_options({"target": "openvino", "edge_bits": "6", "layer_bits": "model.0.conv:8"})
    assert narrow.bits_of("model.1.conv", edge=True) == (6, 6) and narrow.bits_of("model.0.conv", edge=True) == (8, 8)


def test_without_a_target_the_options_decide_alone():
    assert QCConfig.from_options({}) == QCConfig() and QCConfig().target is None and not QCConfig().symmetric
    stored = QCConfig().to_dict()
    del stored["target"]  # as a checkpoint of an earlier version has it
    assert QCConfig.from_options(stored) == QCConfig()


@pytest.mark.parametrize("target,option,value,accepted", [
    ("tensorrt", "act_offset", "true", "False"), ("tensorrt", "output_bits", "8", "None"),
    ("fpga", "act_offset", "true", "False"), ("fpga", "output_bits", "8", "None"),
    ("openvino", "weight_bits", "8", "None or 2 or 3 or 4 or 5 or 6 or 7"),
])  # fmt: skip
def test_what_a_target_cannot_bear_is_refused_by_name(target, option, value, accepted):
    with pytest.raises(QCError, match=rf"{option}=.* is not accepted; give {accepted} with target='{target}'"):
        QCConfig.from_options({"target": target, option: value})
    QCConfig.from_options({"target": "cpu", option: value})


@pytest.mark.parametrize("preset", ["", "Paper", "paper,best", "best", None, ["paper"], 1])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(QCError, match=r"preset=.*give 'paper'"):
        QCConfig.from_options({"preset": preset})
