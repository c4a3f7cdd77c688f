"""A model's loss, computed for the samples of each adapter of a mixed batch apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastft.errors import FastftError
from fastft.nn.deferred import DeferredLogits
from fastft.nn.head import head_losses
from fastft.nn.mixed import mixed_batch
from fastft.patch.rules import language_model_of
from fastft.train.data import IGNORE_INDEX

__all__ = ["LossesApart", "adapters_apart", "losses_apart"]

_WHERE = "train_together"


class LossesApart:
    """Stands in for a model's loss function: a loss for each adapter, their sum for autograd."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._expected: list[tuple[str, int, Any, int]] = []
        self._found: dict[str, Any] = {}

    def expect(self, parts: list[tuple[str, int, Any, int]]) -> None:
        """What the next batch holds, in its order: adapter, samples, the tokens to divide its loss
        by, or None for the mean over that many micro-batches."""
        self._expected, self._found = parts, {}

    def take(self) -> dict[str, Any]:
        """The loss of each adapter in the last batch, detached."""
        if not self._found:
            raise FastftError(
                _WHERE,
                "model",
                expected="a causal language model that computes its loss with loss_function",
                got="one that does not call it",
            )
        return self._found

    def __call__(self, logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
        total: Any = 0.0
        kwargs.pop("num_items_in_batch", None)
        # One product with the head for all adapters, where each token's loss can be had without
        # making the logits again.
        tokens = None
        if isinstance(logits, DeferredLogits) and not logits.source.trained():
            found = head_losses(logits, labels, shift=True, reduction="none")
            tokens = None if found is NotImplemented else found
        start = 0
        for name, samples, count, micro_batches in self._expected:
            rows = slice(start, start + samples)
            start += samples
            if tokens is not None:
                counted = (labels[rows, 1:] != IGNORE_INDEX).sum() if count is None else count
                loss = tokens[rows].sum() / counted
            else:
                loss = self.original(
                    logits[rows], labels[rows], vocab_size, num_items_in_batch=count, **kwargs
                )
            if count is None:
                loss = loss / micro_batches
            self._found[name] = loss.detach()
            total = total + loss
        return total


@contextmanager
def adapters_apart(model: Any, samples: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Inside, each batch has so many samples of each adapter, which go through it and have a loss
    of their own, the mean over their tokens; the backward belongs inside as well. One adapter, or
    none, needs nothing of it."""
    if len(samples) < 2:
        yield
        return
    names = [name for name, size in samples for _ in range(size)]
    with losses_apart(model) as losses_of, mixed_batch(model, names):
        losses_of.expect([(name, size, None, 1) for name, size in samples])
        yield


@contextmanager
def losses_apart(model: Any) -> Iterator[LossesApart]:
    """Inside, the model's loss is computed apart; what it had before comes back."""
    owner = language_model_of(model)
    if owner is None or not hasattr(owner, "loss_function"):
        raise FastftError(
            _WHERE, "model", expected="a causal language model", got=type(model).__name__
        )
    had, before = "_loss_function" in owner.__dict__, owner.loss_function
    losses = LossesApart(before)
    owner.loss_function = losses
    try:
        yield losses
    finally:
        if had:
            owner.loss_function = before
        else:
            del owner._loss_function
