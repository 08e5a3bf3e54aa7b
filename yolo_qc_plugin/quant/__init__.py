# yolo_qc_plugin, AGPL-3.0
"""Quantizers and quantized layers: plain torch modules, which know nothing of Ultralytics."""
