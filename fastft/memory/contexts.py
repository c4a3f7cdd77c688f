"""Policies for who checkpoints by torch's own means: Transformers' switch, a Trainer's flags."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastft.errors import ArgumentError, nearest
from fastft.memory._attention import Contexts, compiling, full_contexts, keep_attention
from fastft.memory._layers import POLICIES
from fastft.memory._saved import saving

__all__ = ["context_fn", "keep_input", "keep_products"]


def context_fn(policy: str) -> Callable[[], Contexts]:
    """A policy of :func:`fastft.memory.checkpoint` as ``context_fn`` of
    ``torch.utils.checkpoint.checkpoint(use_reentrant=False)``.

    Through a Trainer: ``TrainingArguments(activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": context_fn("lora")})``;
    an older Transformers says ``gradient_checkpointing``.

    Args:
        policy: "lora", "attention" or "full". "none" is no checkpoint, and a ``context_fn`` is
            told neither of a layer's inputs, which "offload" moves, nor of its neighbours, between
            which "auto" chooses.

    Returns:
        A function that pickles.

    Raises:
        ArgumentError: another policy.
    """
    if policy in _CONTEXTS:
        return _CONTEXTS[policy]
    others = "fastft.memory.checkpoint(model, policy) has the others."
    raise ArgumentError(
        "fastft.memory.context_fn",
        "policy",
        expected=f"one of {', '.join(_CONTEXTS)}",
        got=repr(policy),
        remedy=others if policy in (*POLICIES, "auto") else nearest(str(policy), _CONTEXTS) or None,
    )


def keep_products() -> Contexts:
    """Of "lora". These hooks are within the checkpoint's own, which therefore see nothing, and
    nothing is recomputed but what is made again from saved tensors."""
    if compiling():
        return create_selective_checkpoint_contexts(_save)
    return saving(recipes=True), nullcontext()


def keep_input() -> Contexts:
    """Of "full": all is recomputed but the last product."""
    if compiling():
        return create_selective_checkpoint_contexts(_recompute)
    return full_contexts()


def _save(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_SAVE


def _recompute(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS: dict[str, Callable[[], Contexts]] = {
    "lora": keep_products,
    "attention": keep_attention,
    "full": keep_input,
}
