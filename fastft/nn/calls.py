"""How often each module ran fused, and how often not and why."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastft.errors import BackendError

__all__ = [
    "CallCounts",
    "call_counts",
    "count",
    "reset_call_counts",
    "strict_modules",
    "uncounted",
]


class CallCounts:
    """fused: number of fused calls; fallback: number of other calls by reason."""

    def __init__(self) -> None:
        self.fused = 0
        self.fallback: Counter[str] = Counter()

    def add(self, reason: str | None) -> None:
        """Counts one call: fused when reason is None."""
        if reason is None:
            self.fused += 1
        else:
            self.fallback[reason] += 1


_TOTAL = CallCounts()
# Beside the modules, not in them: a deep copy or a saved module carries no counters.
_BY_MODULE: weakref.WeakKeyDictionary[nn.Module, dict[str, CallCounts]] = (
    weakref.WeakKeyDictionary()
)
# Modules accelerated with strict=True.
strict_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def count(module: nn.Module, reason: str | None, part: str = "", *, total: bool = True) -> None:
    """Counts one call of ``module``, or of a part of it that is fused apart; in the total, too,
    unless its parts are.

    Raises:
        BackendError: the call cannot be fused and the module is strict.
    """
    if reason is not None and module in strict_modules:
        raise BackendError(
            f"{type(module).__name__} (strict=True)",
            "forward",
            expected="a call that can be fused",
            got=reason,
            remedy="Use strict=False to run such calls through PEFT.",
        )
    if getattr(_thread, "paused", False):
        return
    if total:
        _TOTAL.add(reason)
    parts = _BY_MODULE.get(module)
    if parts is None:
        parts = _BY_MODULE[module] = {}
    counts = parts.get(part)
    if counts is None:
        counts = parts[part] = CallCounts()
    counts.add(reason)


_thread = threading.local()


@contextmanager
def uncounted() -> Iterator[None]:
    """Calls inside count nowhere: verification is no training."""
    _thread.paused = True
    try:
        yield
    finally:
        _thread.paused = False


def call_counts(module: nn.Module | None = None, part: str = "") -> CallCounts:
    """The counts of one module, or of the whole process."""
    return _TOTAL if module is None else _BY_MODULE.get(module, {}).get(part, CallCounts())


def reset_call_counts() -> None:
    """Starts all counts at zero."""
    _TOTAL.__init__()  # type: ignore[misc]
    _BY_MODULE.clear()
