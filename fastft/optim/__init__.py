"""Optimizers whose step is one call over all parameters."""

from __future__ import annotations

from fastft.optim._base import FusedOptimizer
from fastft.optim.adafactor import Adafactor
from fastft.optim.adamw import AdamW, AdamW8bit, AdamWBF16
from fastft.optim.groups import param_groups
from fastft.optim.lion import Lion, Lion8bit
from fastft.optim.muon import Muon
from fastft.optim.release import StepInBackward
from fastft.optim.schedule_free import ScheduleFreeAdamW
from fastft.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "AdamWBF16",
    "FusedOptimizer",
    "Lion",
    "Lion8bit",
    "Muon",
    "ScheduleFreeAdamW",
    "StepInBackward",
    "param_groups",
]
