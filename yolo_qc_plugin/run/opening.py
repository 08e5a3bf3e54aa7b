# yolo_qc_plugin, AGPL-3.0
"""What a process gets when it opens a checkpoint of ours, of which it may know nothing else.

The name by which a checkpoint asks for its record, `yolo_qc_plugin.QuantRecord`, leads here: importing this file
attaches to Ultralytics what it takes to predict with the checkpoint, to validate, export and resume it.
"""

from __future__ import annotations

from ..host.record import QuantRecord
from .callbacks import attach_for_opening

__all__ = ["QuantRecord"]

attach_for_opening()
