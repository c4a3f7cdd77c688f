"""Optimizers whose step is one call over all parameters."""

from __future__ import annotations

from fastft.optim.adamw import AdamW

__all__ = ["AdamW"]
