# yolo_qc_plugin, AGPL-3.0
"""What is told of a run at its end: the record, the console's summary, the card, the pictures and the page."""
