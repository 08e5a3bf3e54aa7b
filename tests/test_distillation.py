# yolo_qc_plugin, AGPL-3.0
"""The host's distill_model: a float teacher beside the quantized student."""

from __future__ import annotations

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.inject import inject
from yolo_qc_plugin.layers import is_quantized

OPTIONS = {"correction": "off", "output_bits": None}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(1)
    YOLO("yolov5n.yaml").save(file)
    return file


def test_a_student_is_quantized_trained_and_resumed(train, teacher, tmp_path):
    """The teacher stays float and as it is; after a kill the run goes on with it; no checkpoint of the end has it."""
    before = load_checkpoint(teacher)[0].state_dict()
    seen = {}

    def look(trainer):
        student = trainer.model.student_model
        seen.setdefault("scale", student.model[1].conv.act_quant.scale.clone())
        seen["model"] = trainer.model
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(OPTIONS, {"on_train_batch_start": look}, distill_model=str(teacher), epochs=2, nbs=8)
    model = seen["model"]
    assert isinstance(model, DistillationModel) and is_quantized(model.student_model)
    assert not is_quantized(model.teacher_model) and not is_quantized(model.projector)
    assert all(torch.equal(v, before[k].float()) for k, v in model.teacher_model.state_dict().items())
    assert not torch.equal(seen["scale"], model.student_model.model[1].conv.act_quant.scale)

    folder = tmp_path / "run" / "weights"
    state = torch.load(folder / "resume.pt", weights_only=True)
    assert not [k for k in state["weights"] if k.startswith("teacher")]
    assert [k for k in state["weights"] if k.startswith("projector")]
    resumed = YOLO(folder / "last.pt")
    resumed.train(resume=True)
    assert resumed.trainer.tloss["dis_loss"] > 0
    for name in ("best.pt", "last.pt"):
        one, _ = load_checkpoint(folder / name)
        assert type(one) is DetectionModel and is_quantized(one)
        assert one.qc.run == state["run"] and one.qc.float_metrics != {}
        assert not [k for k in one.state_dict() if k.startswith(("teacher", "projector"))]


def test_a_quantized_teacher_is_refused(train, teacher, tmp_path):
    model, checkpoint = load_checkpoint(teacher)
    inject(model, QCConfig())
    torch.save({**checkpoint, "model": model}, tmp_path / "quantized.pt")
    with pytest.raises(QCError, match="distill_model=.*is quantized"):
        train(OPTIONS, distill_model=str(tmp_path / "quantized.pt"))
