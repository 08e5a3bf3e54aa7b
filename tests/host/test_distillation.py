# yolo_qc_plugin, AGPL-3.0
"""The host's distill_model: a float teacher beside the quantized student, whose outputs are compared too."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import last_epoch
from torch.nn.functional import binary_cross_entropy, kl_div
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.host.distillation import Distillation, Gains, features_loss, others_loss, outputs_loss
from yolo_qc_plugin.host.teacher import Teacher, feature_layers
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import is_quantized
from yolo_qc_plugin.run.callbacks import QCCallbacks

DETECTORS = "yolov5n", "yolo26n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb"
STUDENT = "yolov5n.yaml"  # the teacher's architecture, so that layers match
OPTIONS = {"correction": "off", "output_bits": None}


def outputs(seed: int, reg_max: int = 4) -> dict:
    """Raw outputs of a head with two feature maps, 3 classes and 2 images."""
    draw = torch.Generator().manual_seed(seed)
    feats = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3)]
    return {
        "scores": torch.randn(2, 3, 30, generator=draw),
        "boxes": torch.randn(2, 4 * reg_max, 30, generator=draw),
        "feats": feats,
    }


def test_the_loss_is_that_of_its_definition():
    """Against loops over images, places, classes and sides."""
    student, teacher = outputs(0), outputs(1)
    scores = sides = confidence = 0.0
    for image in range(2):
        for place in range(30):
            p, q = (o["scores"][image, :, place].double().sigmoid() for o in (student, teacher))
            scores += binary_cross_entropy(p, q, reduction="sum") - binary_cross_entropy(q, q, reduction="sum")
            confidence += q.max()
            for side in range(4):
                rows = slice(4 * side, 4 * side + 4)
                log_p, log_q = (o["boxes"][image, rows, place].double().log_softmax(0) for o in (student, teacher))
                sides += q.max() / 4 * kl_div(log_p, log_q.exp(), reduction="sum")
    expected = (0.5 * scores + 1.5 * sides) / confidence
    assert outputs_loss(student, teacher, 4, 0.5, 1.5) == pytest.approx(expected.item(), rel=1e-5)


def test_distances_are_compared_in_sizes_of_the_image():
    """Where a head has no distributions: 8 px of 48 by 32 at stride 8 are 1 / 6 and 1 / 4."""
    student, teacher = outputs(0, reg_max=1), outputs(1, reg_max=1)
    student["scores"] = teacher["scores"]
    teacher["boxes"] = student["boxes"].clone()
    teacher["boxes"][0, 0, 5] += 1  # to the left, first feature map
    teacher["boxes"][1, 3, 27] -= 1  # to the bottom, second one
    confidence = teacher["scores"].sigmoid().amax(1)
    expected = (confidence[0, 5] / 6 + confidence[1, 27] / 2) / 4 / confidence.sum()
    assert outputs_loss(student, teacher, 1, 0.5, 1.0) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("reg_max", [4, 1])
def test_outputs_that_agree_have_no_loss_and_no_gradient(reg_max):
    student, teacher = outputs(0, reg_max), outputs(0, reg_max)
    leaves = [student[k].requires_grad_() for k in ("scores", "boxes")]
    loss = outputs_loss(student, teacher, reg_max, 0.5, 1.5)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(g.abs().max() < 1e-7 for g in torch.autograd.grad(loss, leaves))


def batch(images: int = 2) -> dict:
    torch.manual_seed(3)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]]).repeat(images, 1)
    where = {"batch_idx": torch.arange(images).float(), "cls": torch.zeros(images, 1), "bboxes": boxes}
    return {"img": torch.rand(images, 3, 64, 64), **where}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_loss_is_added_for_one_pass(name):
    """To what the host's model returns, once per image, for every head; copies and later passes are without it."""
    torch.manual_seed(0)
    student = YOLO(f"{name}.yaml").model
    student.args = get_cfg(overrides={"imgsz": 64, "dis": 0.0})
    teacher = deepcopy(student)
    for p in teacher.parameters():
        p.data += 0.01 * torch.randn_like(p)
    model = DistillationModel(teacher, student).train()
    data = batch()
    if student.task == "segment":
        data["masks"] = torch.zeros(2, 16, 16)
    elif student.task == "pose":
        data["keypoints"] = torch.rand(2, 17, 3)
    elif student.task == "obb":
        data["bboxes"] = torch.cat([data["bboxes"], torch.zeros(2, 1)], 1)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 0.0  # three passes alike
    alone, shown = model(data)
    gains = Gains(outputs=2.0, features=1.0, labels=1.0, cls=0.5, dfl=1.5)
    distillation = Distillation(model, gains)
    distillation.prepare()
    total, more = model(data)
    added = more["dis_loss"] - shown["dis_loss"]
    assert added > 0
    assert (total.sum() - alone.sum()).item() == pytest.approx(2 * added.item(), rel=1e-3)  # two images
    total.sum().backward()
    assert all(p.grad is None for p in model.teacher_model.parameters())
    again, _ = model(data)
    assert torch.equal(again, alone)
    assert not distillation._hooks and not distillation._seen


def test_other_outputs_are_compared_in_units_of_their_spread():
    """Keypoints weighted by confidence, prototypes not; none where a head has none."""
    student, teacher = outputs(0), outputs(1)
    assert others_loss(student, teacher) == 0
    torch.manual_seed(0)
    for o in student, teacher:
        o["kpts"], o["proto"] = torch.randn(2, 6, 30), torch.randn(2, 4, 8, 8)
    confidence = teacher["scores"].double().sigmoid().amax(1)
    kpts, proto = (
        (student[k].double() - teacher[k]) ** 2 / teacher[k].double().transpose(0, 1).flatten(1).var(1).view(-1, *ones)
        for k, ones in (("kpts", (1,)), ("proto", (1, 1)))
    )
    expected = (kpts.mean(1) * confidence).sum() / confidence.sum() + proto.mean()
    assert others_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-4)
    student["kpts_sigma"], student["proto"] = (
        student["kpts"],
        (student["proto"], student["boxes"]),
    )  # YOLO26's, training
    assert others_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-4)


def test_features_are_compared_in_units_of_their_spread():
    """Against the formula in double precision, with its gradient by autograd."""
    torch.manual_seed(0)
    ours, theirs, spreads = [], [], []
    for shape in (2, 3, 4, 5), (2, 6, 2, 3):
        ours.append(torch.randn(shape, requires_grad=True))
        theirs.append(torch.randn(shape))
        spreads.append(torch.rand(shape[1]) + 0.1)
    loss = features_loss(ours, theirs, spreads)
    doubles = [x.detach().double().requires_grad_() for x in ours]
    parts = [((x - t) ** 2 / s[:, None, None]).mean() for x, t, s in zip(doubles, theirs, spreads)]
    expected = torch.stack(parts).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for x, reference in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, doubles)):
        assert torch.allclose(x.double(), reference, rtol=1e-4, atol=1e-7)


def start(name: str) -> DetectionModel:
    torch.manual_seed(0)
    model = YOLO(f"{name}.yaml").model
    model.args = get_cfg(overrides={"imgsz": 64})
    return model


@pytest.mark.parametrize("name", [*DETECTORS, "yolo26n-seg", "yolo26n-pose", "yolo11n-cls"])
def test_the_start_teaches(name):
    """Of a copy that has moved the loss is what it says, beside the labels' own times its weight; none of one that
    has not."""
    model = start(name).train()
    teacher = Teacher(model)
    teacher.measure([torch.rand(2, 3, 64, 64)])
    data = batch()
    if name.endswith("-cls"):
        data["cls"] = torch.zeros(2, dtype=torch.long)
    elif name.endswith("-seg"):
        data["masks"], data["sem_masks"] = torch.zeros(2, 16, 16), torch.zeros(2, 8, 8)
    elif name.endswith("-pose"):
        data["keypoints"] = torch.rand(2, 17, 3)
    elif name.endswith("-obb"):
        data["bboxes"] = torch.cat([data["bboxes"], torch.zeros(2, 1)], 1)
    for m in model.modules():
        if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
            m.eval()
    model.load_state_dict(teacher.model.state_dict())  # both in half precision
    times = 1 if name.endswith("-cls") else 2
    gains = Gains(outputs=2.0, features=3.0, labels=0.25, cls=0.5, dfl=1.5)
    distillation = Distillation(model, gains, teacher, summed=times == 2)
    distillation.prepare()
    _, shown = model(data)
    assert shown["teacher_loss"].item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    alone, _ = model(data)
    distillation.prepare()
    total, shown = model(data)
    assert shown["teacher_loss"] > 0.01
    expected = 0.25 * alone.sum() + times * shown["teacher_loss"]
    assert total.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    total.sum().backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert torch.equal(model(data)[0], alone)
    assert not distillation._hooks and not distillation._seen


def test_a_teacher_is_the_same_from_its_file(tmp_path):
    teacher = Teacher(start("yolov5n"))
    teacher.measure(torch.rand(2, 1, 3, 64, 64))
    teacher.write(tmp_path)
    again = Teacher.read(tmp_path)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in teacher.model.state_dict().items())
    assert all(map(torch.equal, teacher.spreads, again.spreads))
    assert YOLO(tmp_path / "teacher.pt").predict(torch.rand(1, 3, 64, 64), verbose=False)
    with pytest.raises(QCError, match=r"teacher\.pt is missing"):
        Teacher.read(tmp_path / "elsewhere")


def test_spreads_are_the_variances_of_channels():
    teacher = Teacher(start("yolov5n"))
    images = torch.rand(4, 3, 64, 64)
    teacher.measure([images[:2], images[2:]])
    first = teacher.model.model[0](images)
    variance = first.var((0, 2, 3), unbiased=False)
    assert torch.allclose(teacher.spreads[0], variance + 0.01 * variance.mean(), rtol=1e-4)
    assert len(teacher.spreads) == len(feature_layers(teacher.model))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(1)
    torch.save({"model": DetectionModel("yolov5n.yaml", nc=10, verbose=False)}, file)  # classes of the digits
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
        train(OPTIONS, {"on_train_batch_start": look}, STUDENT, distill_model=str(teacher), epochs=2, nbs=8)
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
    with pytest.raises(QCError, match=r"distill_model=.*is quantized"):
        train(OPTIONS, distill_model=str(tmp_path / "quantized.pt"))


def test_outputs_are_compared_in_a_run_unless_they_are_not_to_be(train, teacher):
    """The host's own loss off, what results.csv shows is ours; and training follows another path."""
    losses, weights = [], []
    for weight in (1.0, 0.0):
        options = {**OPTIONS, "distill_outputs": weight}
        yolo = train(options, model=STUDENT, distill_model=str(teacher), dis=0.0, nbs=8, exist_ok=True)
        losses.append(last_epoch(yolo.trainer.save_dir)["train/dis_loss"])
        weights.append(yolo.trainer.model.student_model.model[1].conv.weight.detach().clone())
    assert losses[0] > 0 and losses[1] == 0
    assert not torch.equal(*weights)


def test_a_resumed_run_goes_on_with_its_own_options(train, tmp_path):
    """One whose teacher has other outputs and is compared by features alone, resumed with the plugin's defaults."""
    torch.save({"model": DetectionModel("yolov5n.yaml", nc=3, verbose=False)}, tmp_path / "other.pt")

    def kill(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    options = {**OPTIONS, "distill_outputs": 0.0}
    with pytest.raises(KeyboardInterrupt):
        arguments = {"distill_model": str(tmp_path / "other.pt"), "epochs": 2, "nbs": 8}
        train(options, {"on_train_batch_start": kill}, STUDENT, **arguments)
    resumed = YOLO(tmp_path / "run" / "weights" / "last.pt")
    QCCallbacks(QCConfig()).register(resumed)  # as callbacks=qc on the command line does
    resumed.train(resume=True)
    assert resumed.trainer.epoch == 1


def test_a_teacher_of_other_outputs_is_refused(train, tmp_path):
    model = DetectionModel("yolov5n.yaml", nc=3, verbose=False)
    torch.save({"model": model}, tmp_path / "other.pt")
    with pytest.raises(QCError, match=r"distill_model has 3 classes, the model 10; .*distill_outputs=0"):
        train(OPTIONS, distill_model=str(tmp_path / "other.pt"))
