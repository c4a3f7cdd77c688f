"""Derivatives that no kernel has: second ones, and those of a batch of gradients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["batched", "plain_gradients", "transform", "wanted"]


def transform() -> str | None:
    """What torch makes of this call besides its value and gradients: a kernel cannot."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def batched(*upstream: Tensor | None) -> bool:
    """Whether these are batches of upstream gradients (is_grads_batched=True)."""
    of = torch._C._functorch
    given = [t for t in upstream if t is not None]
    return any(of.is_batchedtensor(t) or of.is_legacy_batchedtensor(t) for t in given)


def wanted(*upstream: Tensor | None) -> bool:
    """Whether a backward is asked for gradients that only torch's own operations give: with a graph
    (create_graph=True), or of a batch of upstream gradients."""
    return torch.is_grad_enabled() or batched(*upstream)


def plain_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Any]:
    """Gradients of ``function(*inputs)``, which is plain torch; None where none is needed.

    upstream: of each result; None: none has reached it.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradient is that of the function alone, though one input be made of another.
        own = [None if t is None else t.view_as(t) for t in inputs]
        results = function(*own)
    reached = [(y, dy) for y, dy in zip(results, upstream, strict=True) if dy is not None]
    leaves = [t for t, need in zip(own, needs, strict=True) if t is not None and need]
    ys, dys = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(ys, leaves, dys, create_graph=graph))
    return [next(found) if need else None for need in needs]
