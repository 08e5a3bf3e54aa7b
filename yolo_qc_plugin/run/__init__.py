# yolo_qc_plugin, AGPL-3.0
"""One run: the callbacks, and what they do from the start of training to the report."""
