# yolo_qc_plugin, AGPL-3.0
"""The one adapter to Ultralytics: its models, its versions, its patches, its checkpoints."""
