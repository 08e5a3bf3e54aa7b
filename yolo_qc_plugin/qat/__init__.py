# yolo_qc_plugin, AGPL-3.0
"""What happens around an optimizer step and after the last one: averaging, oscillation, correction."""
