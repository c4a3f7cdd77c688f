"""Derivatives that no kernel has: second ones, and those of a batch of gradients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["batched", "plain_gradients", "transform", "wanted"]


def transform() -> str | None:
    """What torch makes of this call besides its value and gradients, following each of its own
    operations: a kernel cannot. Compiled graphs see registered operations."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    proxy = torch._C._TorchDispatchModeKey.PROXY
    if torch._C._get_dispatch_mode(proxy) is not None or torch._C._get_tracing_state() is not None:
        return "a trace"
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
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Any]:
    """Gradients of ``function(*inputs)``, which is plain torch and gives one tensor or several;
    None where none is needed.

    upstream: of each result; None: none has reached it.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradient is that of the function alone, though one input be made of another.
        own = [None if t is None else t.view_as(t) for t in inputs]
        if not graph:  # then what was not kept has been made again without one
            lost = [t is not None and n and not t.requires_grad for t, n in zip(own, needs)]
            own = [t.detach().requires_grad_() if gone else t for t, gone in zip(own, lost)]  # type: ignore[union-attr]
        found = function(*own)
    results = [found] if isinstance(found, Tensor) else found
    reached = [
        (y, dy)
        for y, dy in zip(results, upstream, strict=True)
        if dy is not None and y.requires_grad
    ]
    asked = [t is not None and need for t, need in zip(own, needs, strict=True)]
    leaves = [t for t, ask in zip(own, asked) if ask and t is not None]
    ys, dys = [y for y, _ in reached], [dy for _, dy in reached]
    gradients = iter(torch.autograd.grad(ys, leaves, dys, create_graph=graph, allow_unused=True))
    return [next(gradients) if ask else None for ask in asked]
