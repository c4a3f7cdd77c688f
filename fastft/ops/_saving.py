"""What ``fastft.memory`` tells the operations of this thread, and they tell it.

An operation whose result is cheap to make again says so with :func:`note`; a policy that keeps
little saves the recipe in place of the result. In a recompute, a product saves before it computes
its value: torch ends a recompute with the last tensor that is saved, and the value of whoever saved
it is then never needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]

__all__ = [
    "Late",
    "Notebook",
    "attended",
    "attending",
    "note",
    "noted",
    "noting",
    "registered",
    "saves_first",
    "saving_first",
    "values_wanted",
    "without_values",
]


class Notebook(Protocol):
    """Who keeps recipes."""

    def add(self, result: Tensor, inputs: Inputs, make: Callable[..., Tensor]) -> None:
        """``make(*inputs)`` gives the bits of ``result`` again."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.notebook: Notebook | None = None
        self.saves_first = False
        self.values = True
        self.attending: AbstractContextManager[Any] | None = None


_thread = _Thread()


def note(result: Tensor, inputs: Inputs, make: Callable[..., Tensor]) -> None:
    """Says how ``result`` is made again from ``inputs``, where anybody keeps such recipes."""
    if _thread.notebook is not None:
        _thread.notebook.add(result, inputs, make)


def noted() -> bool:
    """Whether anybody keeps recipes."""
    return _thread.notebook is not None


@contextmanager
def noting(notebook: Notebook | None) -> Iterator[None]:
    """Inside, the operations of this thread note their recipes in ``notebook``."""
    outer, _thread.notebook = _thread.notebook, notebook
    try:
        yield
    finally:
        _thread.notebook = outer


def saves_first() -> bool:
    """Whether a product saves for its backward before it computes its value."""
    return _thread.saves_first


@contextmanager
def saving_first() -> Iterator[None]:
    """Inside a recompute: products of this thread save before they compute their values."""
    outer, _thread.saves_first = _thread.saves_first, True
    try:
        yield
    finally:
        _thread.saves_first = outer


class Late:
    """The value of a call that has returned room for it and saved what its backward needs."""

    work: Callable[[], object]

    def compute(self) -> None:
        """Writes it into the tensors the call has returned."""
        with torch.no_grad():
            self.work()


def values_wanted() -> bool:
    """Whether a product that has saved goes on to compute its value."""
    return _thread.values


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, products of this thread that can save first never compute their values: the caller
    will not read them."""
    outer, _thread.values = _thread.values, False
    try:
        with saving_first():
            yield
    finally:
        _thread.values = outer


def attended() -> AbstractContextManager[Any] | None:
    """What attention of this thread runs within, where anybody asks for it."""
    return _thread.attending


@contextmanager
def attending(watch: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside, attention of this thread runs within ``watch``."""
    outer, _thread.attending = _thread.attending, watch
    try:
        yield
    finally:
        _thread.attending = outer


def registered() -> bool:
    """Whether a call goes through torch's dispatcher: compiled, or watched by a dispatch mode (a
    selective checkpoint), which sees registered operations only."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
