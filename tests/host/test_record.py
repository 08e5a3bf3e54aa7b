# yolo_qc_plugin, AGPL-3.0
"""The record in a checkpoint."""

import pickle

import pytest

from yolo_qc_plugin import QCConfig
from yolo_qc_plugin.host.record import FORMAT, QuantRecord


def test_plugins_that_would_misread_a_checkpoint_refuse_it():
    record = QuantRecord(QCConfig().to_dict())
    assert record.format == FORMAT and pickle.loads(pickle.dumps(record)) == record
    record.format = FORMAT + 1
    with pytest.raises(RuntimeError, match="Upgrade yolo-qc-plugin"):
        pickle.loads(pickle.dumps(record))
