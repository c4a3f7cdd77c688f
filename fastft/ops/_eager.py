"""Eager calls of the operations: recorded by autograd where it records, else the forward alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["call", "recording"]


class _Unrecorded:
    """The context of a forward that has no backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is saved."""


def recording() -> bool:
    """Whether derivatives are taken of what runs now: backward, or along (forward-mode), which
    ``no_grad`` does not end."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which costs 5 us, or the function's forward where no gradients are
    recorded, as in generation."""
    if recording():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return function.forward(_Unrecorded(), *arguments)
