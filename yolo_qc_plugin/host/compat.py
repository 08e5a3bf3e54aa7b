# yolo_qc_plugin, AGPL-3.0
"""The supported versions of Ultralytics, and what the plugin uses of it: before training both are looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import metadata

from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.data import utils as data_utils
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn import tasks
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules import Conv, ConvTranspose, Detect
from ultralytics.utils import DEFAULT_CFG_DICT, TQDM, torch_utils
from ultralytics.utils.callbacks.base import default_callbacks
from ultralytics.utils.checks import check_version as is_version

from ..config import QCError

# what is called, and the parameters that it is given
CALLED = {
    (BaseTrainer, "run_callbacks"): ["event"],
    (data_utils, "check_det_dataset"): ["dataset"],
    (data_utils, "find_dataset_yaml"): ["path"],
    (data_utils, "img2label_paths"): ["img_paths"],
    (BaseTrainer, "preprocess_batch"): ["batch"],
    (BaseTrainer, "progress_string"): [],
    (BaseTrainer, "save_metrics"): ["metrics"],
    (BaseTrainer, "_model_train"): [],
    (BaseTrainer, "_setup_train"): [],
    (BaseTrainer, "_close_dataloader_mosaic"): [],
    (BaseTrainer, "_get_memory"): [],
    (tasks.BaseModel, "init_criterion"): [],
    (tasks.BaseModel, "info"): ["verbose", "imgsz"],
    (tasks, "load_checkpoint"): ["weight", "device"],
    (tasks, "torch_safe_load"): ["weight"],
    (DistillationModel, "__init__"): ["teacher_model", "student_model"],
    (Conv, "forward_fuse"): ["x"],
    (ConvTranspose, "forward_fuse"): ["x"],
    (Detect, "fuse"): [],
    (InfiniteDataLoader, "reset"): [],
    (TQDM, "__init__"): ["iterable", "total"],
    (TQDM, "set_description"): [],
    (TQDM, "update"): [],
    (torch_utils, "unwrap_model"): [],
    (torch_utils, "fuse_conv_and_bn"): ["conv", "bn"],
    (torch_utils, "fuse_deconv_and_bn"): ["deconv", "bn"],
    (torch_utils.ModelEMA, "update"): ["model"],
    (torch_utils.ModelEMA, "update_attr"): ["model", "include", "exclude"],
}
ARGUMENTS = "task model resume device amp compile quantize distill_model cls dfl format plots save_json".split()
EVENTS = """on_pretrain_routine_start on_pretrain_routine_end on_train_epoch_start on_train_batch_start
            on_train_batch_end on_train_epoch_end on_fit_epoch_end on_train_end on_val_start on_val_batch_end teardown
            on_export_start""".split()
AT_START = "args resume device world_size save_dir wdir last best callbacks validator metrics".split()
WHEN_READY = """model amp csv ema.ema ema.updates optimizer.param_groups train_loader.reset train_loader._get_iterator
                train_loader.generator.get_state test_loader validator.metrics validator.training
                validator.args.quantize freeze_layer_names""".split()


def supported_versions() -> str:
    """Supported Ultralytics versions as this package's metadata state them, e.g. ">=8.4.150,<8.5"; "" if unknown."""
    try:
        requirements = metadata.requires("yolo-qc-plugin") or []
    except metadata.PackageNotFoundError:  # run from a checkout without installing: functions alone are looked at
        return ""
    ours = next(r for r in requirements if r.startswith("ultralytics"))
    return ours.removeprefix("ultralytics").split(";")[0].strip()


def version_difference() -> str:
    """In words that the installed version is not supported; empty if it is."""
    supported = supported_versions()
    # compared bound by bound: pip writes the bounds in any order
    if not supported or all(is_version(ULTRALYTICS_VERSION, bound) for bound in supported.split(",")):
        return ""
    return f"ultralytics {ULTRALYTICS_VERSION} is not supported; yolo-qc-plugin supports ultralytics{supported}"


def check_version() -> None:
    """Refuse an Ultralytics that is not supported.

    Raises:
        QCError: Naming the version and the supported ones.
    """
    if difference := version_difference():
        raise QCError(f"QC: {difference}.")


def refuse(differences: Iterable[str]) -> None:
    """Refuse an Ultralytics that does not look as expected.

    Args:
        differences: In words; empty ones do not count.

    Raises:
        QCError: If there are any, naming them, the version and the supported ones.
    """
    if found := "; ".join(filter(None, differences)):
        accepted = f"yolo-qc-plugin supports ultralytics{supported_versions()}"
        raise QCError(f"QC: ultralytics {ULTRALYTICS_VERSION} differs: {found}; {accepted}.")


def differences() -> list[str]:
    """What of the installed Ultralytics is not as the plugin uses it, in words."""
    found = []
    for (owner, name), parameters in CALLED.items():
        where = f"{owner.__name__.rpartition('.')[2]}.{name}"
        function = getattr(owner, name, None)
        if function is None:
            found.append(f"{where} is missing")
        elif lacking := [p for p in parameters if p not in inspect.signature(function).parameters]:
            found.append(f"{where} takes no {', '.join(lacking)}")
    found += [f"there is no argument {name}" for name in ARGUMENTS if name not in DEFAULT_CFG_DICT]
    return found + [f"there is no event {name}" for name in EVENTS if name not in default_callbacks]


def check_trainer(trainer: BaseTrainer, names: list[str]) -> None:
    """Refuse a trainer without what the plugin reads from it.

    Args:
        trainer: At the event whose list of names is given.
        names: AT_START or WHEN_READY; a dot leads into an attribute.

    Raises:
        QCError: Naming what is missing.
    """
    for name in names:
        owner = trainer
        for part in name.split("."):
            if not hasattr(owner, part):
                raise QCError(
                    f"QC: trainer.{name} is missing in {type(trainer).__name__} of ultralytics {ULTRALYTICS_VERSION}; "
                    "this trainer, or this version, does not work with callbacks=qc."
                )
            owner = getattr(owner, part)
