# yolo_qc_plugin, AGPL-3.0
"""The start-up hook of the `yolo` command, and how it is put into site-packages."""
