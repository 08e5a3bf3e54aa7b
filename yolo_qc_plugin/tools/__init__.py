# yolo_qc_plugin, AGPL-3.0
"""The tools beside training: evaluation, comparison with an exported file, pictures."""
