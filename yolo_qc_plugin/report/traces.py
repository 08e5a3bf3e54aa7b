# yolo_qc_plugin, AGPL-3.0
"""What scales and codes did in training: a row per layer and optimizer step, in qc/telemetry.parquet.

column              of a layer that is trained
step                optimizer steps that the EMA has seen, from 1
layer               name of the convolution
weight_scale        scale of its weight in training; of several (per channel) their mean
weight_scale_ema    the same in the EMA model, which is validated and saved
act_scale           scale of its input, where that is learned (the image's is constant); with the first layer, where
                    several read the same input
act_scale_ema       the same in the EMA model
flips               share of its weights whose code changed in this step, 0..1
oscillating         share of its weights that oscillate (see oscillation.py), 0..1
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..config import QCError

FILE = "telemetry.parquet"  # in a run's qc/
WINDOW = 4000  # steps at full rate, as in the paper's figures
SCALES = ("weight_scale", "weight_scale_ema", "act_scale", "act_scale_ema")
COLUMNS = (*SCALES, "flips", "oscillating")


def read(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Layers, steps and values (see `run.telemetry.Telemetry`) of a run's telemetry.parquet.

    Args:
        path: The file.

    Raises:
        QCError: If the file is missing or is not one of ours.
    """
    import polars as pl

    if not path.is_file():
        raise QCError(f"QC: there is no {path}; it is written by a run of callbacks=qc with qc_telemetry=True.")
    try:
        table = pl.read_parquet(io.BytesIO(path.read_bytes()))
        layers = table["layer"].unique(maintain_order=True).to_list()
        values = [table[name].cast(pl.Float32).fill_null(float("nan")).to_numpy() for name in COLUMNS]
        steps = table["step"].to_numpy().reshape(len(layers), -1)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise QCError(f"QC: {path} cannot be read ({error}).") from None
    return layers, steps[0].copy(), np.stack(values, 1).reshape(*steps.shape, -1).swapaxes(0, 1).copy()
