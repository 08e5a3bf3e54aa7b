# yolo_qc_plugin, AGPL-3.0
"""What pycocotools says of a model's boxes, masks and keypoints."""
