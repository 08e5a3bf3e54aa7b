# yolo_qc_plugin, AGPL-3.0
"""The data sets that are composed from what installed packages ship."""
