# yolo_qc_plugin, AGPL-3.0
"""What a process gets when it opens a checkpoint of ours, of which it may know nothing else.

The name by which a checkpoint asks for its record, `yolo_qc_plugin.QuantRecord`, leads here: importing this file
attaches the plugin to Ultralytics.
"""

from ..host.record import QuantRecord
from .callbacks import attach

__all__ = ["QuantRecord"]

attach()
