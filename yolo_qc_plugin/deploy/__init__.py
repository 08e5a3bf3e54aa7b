# yolo_qc_plugin, AGPL-3.0
"""The deployed form of a model, and the graphs that are written of it."""
