# yolo_qc_plugin, AGPL-3.0
"""A budget: the integer program, and a run whose layers have the widths that it decides."""

import json
from collections import Counter
from itertools import product

import pytest
import torch

from tests.conftest import FLOAT
from yolo_qc_plugin.config import QCConfig, QCError
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.run.allocation import Layer, Problem
from yolo_qc_plugin.run.budget import PLAN, check_reach, solve
