"""Log-probabilities and distillation of a model without its logits.

    chosen = fastft.losses.log_probs(model, labels, input_ids=ids, attention_mask=mask).sum(-1)
    reference = fastft.losses.reference_log_probs(model, labels, input_ids=ids, attention_mask=mask)

An accelerated model defers its logits (:mod:`fastft.nn.deferred`) and each token's log-probability
comes out of the fused head; another model's logits are computed, and the results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import ArgumentError, ShapeError
from fastft.nn.calls import count
from fastft.nn.deferred import DeferredLogits
from fastft.nn.deferred_source import Logits
from fastft.nn.head import deferred_logits, head_losses, refusal
from fastft.ops import Teacher, divergence, linear_divergence

__all__ = ["distillation_loss", "log_probs", "reference_log_probs", "token_log_probs"]


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    shift: bool = True,
) -> Tensor:
    """log softmax(logits / temperature)[label] of each token.

    Args:
        logits: (batch, tokens, vocabulary), deferred or not.
        labels: (batch, tokens) int64; ``ignore_index`` for tokens that do not count.
        shift: position t predicts label t + 1.

    Returns:
        (batch, tokens - 1) with ``shift``, else (batch, tokens); float32 (float64 of float64), 0
        where a token does not count.

    Raises:
        ShapeError: labels of another shape. ArgumentError: a temperature not above 0.
    """
    where = "fastft.losses.token_log_probs"
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        expected = f"logits[:-1] = {tuple(logits.shape[:-1])}"
        raise ShapeError(where, "labels", expected=expected, got=str(tuple(labels.shape)))
    if not temperature > 0:
        raise ArgumentError(where, "temperature", expected="above 0", got=str(temperature))
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if temperature != 1.0:
        logits = logits / float(temperature)
    labels = labels.to(logits.device)
    if isinstance(logits, DeferredLogits):
        losses = head_losses(logits, labels, ignore_index=ignore_index, reduction="none")
        if losses is not NotImplemented:
            return -losses
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="none",
    )
    return -losses.view(labels.shape)


def log_probs(
    model: nn.Module,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    **inputs: Any,
) -> Tensor:
    """Log-probability of each next token under a causal language model.

    Args:
        model: a Transformers model or a PeftModel of one.
        labels: (batch, tokens) int64, unshifted; ``ignore_index`` where none counts.
        inputs: what the model takes: ``input_ids``, ``attention_mask``.

    Returns:
        (batch, tokens - 1), 0 where a token does not count; with gradient where enabled.
    """
    with deferred_logits():
        logits = model(**inputs).logits
    return token_log_probs(logits, labels, ignore_index=ignore_index, temperature=temperature)


@torch.no_grad()
def reference_log_probs(
    model: nn.Module,
    labels: Tensor,
    *,
    reference_model: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """:func:`log_probs` of the reference, without gradient: compute once and cache, or each step.

    Args:
        model: the policy, a PeftModel: its reference is itself with its adapters disabled.
        reference_model: another model to take instead.
        options: as for :func:`log_probs`.

    Raises:
        ArgumentError: no reference_model, and a model whose adapters cannot be disabled.
    """
    if reference_model is not None:
        return log_probs(reference_model, labels, **options)
    with _adapters_disabled(model):
        return log_probs(model, labels, **options)


@contextmanager
def _adapters_disabled(model: Any) -> Iterator[None]:
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        raise ArgumentError(
            "fastft.losses.reference_log_probs",
            "model",
            expected="a PeftModel, or a reference_model",
            got=type(model).__name__,
        )
    with disable():
        yield


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fastft.ops.linear_divergence` of a student's logits from a teacher's.

    Args:
        student: (..., vocabulary), deferred (from inside :func:`fastft.nn.head.deferred_logits`, or
            a forward with labels) or not.
        teacher: (..., vocabulary), deferred too, or logits from anywhere.
        mask: (...) bool, the tokens that count.
        options: ``kind``, ``temperature``, ``beta``, ``reduction``.

    Returns:
        float32: a scalar, or of the shape (...).

    Raises:
        what the operation raises.
    """
    teacher_of = _source(teacher)
    if teacher_of is not None and teacher_of.adapter is not None:
        teacher_of = None
    given: Tensor | Teacher = teacher
    if teacher_of is not None:
        of = teacher_of
        given = Teacher(of.hidden_states, of.weight, of.total_bias(), of.scale, of.softcap or None)
    elif isinstance(teacher, DeferredLogits):
        given = teacher.read()
    own = _source(student)
    if own is not None:
        reason = refusal(own)
        if options.get("reduction") == "none" and own.trained():
            reason = "a loss a token over a trained head"
        count(own.head, reason)
        own = own if reason is None else None
    if own is None:  # logits that exist, or are made: several devices
        plain = student.read() if isinstance(student, DeferredLogits) else student
        logits = teacher.read() if isinstance(teacher, DeferredLogits) else teacher
        return divergence(plain, logits, mask=mask, **options)
    own.check()
    if teacher_of is not None:
        teacher_of.check()
    with own.context(), student.without_logits():  # type: ignore[attr-defined]
        return linear_divergence(
            own.hidden_states,
            own.weight,
            given,
            bias=own.total_bias(),
            logit_scale=own.scale,
            softcap=own.softcap or None,
            mask=mask,
            **(own.adapter._asdict() if own.adapter is not None else {}),
            **options,
        )


def _source(logits: Tensor) -> Logits | None:
    """What deferred logits are made of, where they need not be read."""
    deferred = isinstance(logits, DeferredLogits) and logits.deferrable()
    return logits.source if deferred else None  # type: ignore[attr-defined,no-any-return]
