"""Eager calls of the operations: recorded by autograd where it records, else the forward alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["call", "dispatched", "recording"]

_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})
_NONE = torch._C._disabled_torch_dispatch_impl


class _Unrecorded:
    """The context of a forward that has no backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is saved."""

    def set_materialize_grads(self, value: bool) -> None:
        """There are no gradients."""


def recording() -> bool:
    """Whether derivatives are taken of what runs now: backward, or along (forward-mode), which
    ``no_grad`` does not end."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def dispatched(*tensors: Any) -> bool:
    """Whether a call on these is the registered operation: compiled, or of tensors that have no
    memory of their own (fake ones, sharded ones), whose address a kernel must not be given."""
    if torch.compiler.is_compiling():
        return True
    if _PLAIN.issuperset(map(type, tensors)):
        return False
    return any(getattr(type(t), "__torch_dispatch__", _NONE) is not _NONE for t in tensors)


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which costs 5 us, or the function's forward where no gradients are
    recorded, as in generation."""
    if recording():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return function.forward(_Unrecorded(), *arguments)
