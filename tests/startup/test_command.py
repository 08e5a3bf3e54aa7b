# yolo_qc_plugin, AGPL-3.0
"""What is taken out of a `yolo` command line, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.startup.command import split_arguments


def test_own_arguments_are_taken_out():
    config, rest = split_arguments(
        [
            "train",
            "model=a.pt",
            "callbacks=qc",
            "qc_bits=3",
            "--qc_skip=model.9.*,model.2.*",
            "qc_ema_decay=0",
            "imgsz=64",
        ]
    )
    assert rest == ["train", "model=a.pt", "imgsz=64"]
    assert (config.bits, config.skip, config.ema_decay) == (3, ("model.9.*", "model.2.*"), 0)


def test_without_callbacks_nothing_is_touched():
    assert split_arguments(["val", "model=a.pt"]) == (None, ["val", "model=a.pt"])


def test_every_option_has_its_argument():
    text = {"skip": "a", "layer_bits": "a:4", "scale_init": "lsq", "correction": "tensor"}
    for f in fields(QCConfig):
        value = text.get(f.name, str(f.default))
        config, _ = split_arguments(["train", "callbacks=qc", f"qc_{f.name}={value}"])
        assert isinstance(config, QCConfig)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "callbacks=foo"], "Accepted: qc"),
        (["train", "callbacks="], "Accepted: qc"),
        (["train", "callbacks=qc", "qc_bit=4"], "Did you mean bits"),
        (["train", "callbacks=qc", "qc_bits=16"], "bits=16 is not accepted; give a whole number from 2 to 8"),
        (["train", "callbacks=qc", "qc_bits=four"], "bits='four'"),
        (["train", "callbacks=qc", "qc_correction=row"], "'channel' or 'tensor' or 'off'"),
        (["train", "callbacks=qc", "qc_per_channel"], "needs a value"),
        (["train", "qc_bits=4"], "needs callbacks=qc"),
        (["val", "callbacks=qc"], "yolo train"),
        (["train", "callbacks=qc", "bits=4", "imgsz=64"], "bits is no argument of `yolo`; give qc_bits"),
    ],
)
def test_refusals_name_the_argument_and_what_is_accepted(arguments, message):
    with pytest.raises(QCError, match=message):
        split_arguments(arguments)


OURS = "callbacks=qc --callbacks=qc callbacks=[qc] callbacks = qc qc_ train export mode=train".split()
ARGUMENTS = st.lists(
    st.sampled_from([*OURS, *(f"qc_{f.name}={f.default}" for f in fields(QCConfig))])
    | st.builds("{}qc_{}={}".format, st.sampled_from(["", "--"]), st.sampled_from(["bits", "skip", "onnx"]), st.text())
    | st.text()
    | st.text("-=qc_albks,[]()'"),
    max_size=6,
)


@given(ARGUMENTS)
@example(["train", "callbacks=qc,qc", "qc_bits=3,"])
@settings(max_examples=300, deadline=None)
def test_any_command_line_is_split_or_refused(arguments):
    """Never another exception; Ultralytics gets its own arguments in their order, and none of ours."""
    try:
        config, rest = split_arguments(arguments)
    except QCError as e:
        assert str(e).startswith("QC: ")
    else:
        ours = [a for a in arguments if (a.lstrip("-") + "=").startswith(("callbacks=", "qc_"))]
        assert rest == [a for a in arguments if a not in ours]
        assert (config is not None) is any(a.lstrip("-").startswith("callbacks") for a in ours)
