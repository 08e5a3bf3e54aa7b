# yolo_qc_plugin, AGPL-3.0
"""The LiteRT graph of a deployed model, written without a converter."""
