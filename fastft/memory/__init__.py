"""Activations that fit: what each layer keeps for its backward, chosen by policy or by budget."""

from __future__ import annotations

from fastft.memory._attention import keep_attention
from fastft.memory._layers import POLICIES
from fastft.memory.contexts import context_fn
from fastft.memory.policy import checkpoint, explain, restore

__all__ = ["POLICIES", "checkpoint", "context_fn", "explain", "keep_attention", "restore"]
