"""Losses over a language model's head that hold no logits: log-probabilities, preference and policy
losses on them, and distillation."""

from __future__ import annotations

from fastft.losses.log_probs import (
    distillation_loss,
    log_probs,
    reference_log_probs,
    token_log_probs,
)
from fastft.losses.preference import dpo_loss, grpo_loss, kto_loss, orpo_loss, simpo_loss
from fastft.losses.trl import deferred_in_trl
from fastft.nn.head import deferred_logits

__all__ = [
    "deferred_in_trl",
    "deferred_logits",
    "distillation_loss",
    "dpo_loss",
    "grpo_loss",
    "kto_loss",
    "log_probs",
    "orpo_loss",
    "reference_log_probs",
    "simpo_loss",
    "token_log_probs",
]
