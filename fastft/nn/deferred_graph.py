"""Deferred logits in autograd's graph: nodes that make no logits.

C++ asks a tensor for its node without asking Python: an ``autograd.Function``, ``torch.vmap`` and a
reentrant checkpoint do. So deferred logits have one from the start, though nobody may look at them:
the node of the head's product, and one for each thing that was remembered instead of done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastft.nn.deferred import DeferredLogits, taking_views
from fastft.nn.deferred_source import Logits

__all__ = ["deferred", "done", "made_of", "viewed"]


class _Product(torch.autograd.Function):
    """The head's product. ``make`` gives the tensor that stands for it, ``back`` the gradients of
    the inputs that follow, of which those that are needed."""

    @staticmethod
    def forward(
        ctx: Any, make: Callable[[], Tensor], back: Callable[..., list[Any]], *inputs: Tensor | None
    ) -> Tensor:
        ctx.back = back
        return make()

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> Any:
        return None, None, *ctx.back(d_logits, ctx.needs_input_grad[2:])


class _Done(torch.autograd.Function):
    """What was done to ``logits``, of which ``make`` gives the tensor and ``back`` the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, make: Callable[[], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return make()

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        return ctx.back(d_result), None, None


def deferred(source: Logits, dtype: torch.dtype) -> DeferredLogits:
    """A head's product, not computed."""
    return _Product.apply(  # type: ignore[no-untyped-call,no-any-return]
        lambda: DeferredLogits(source, dtype), source.gradients, *source.inputs()
    )


def done(
    logits: DeferredLogits,
    do: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    **change: Any,
) -> DeferredLogits:
    """What ``do`` makes of deferred logits, a copy and not computed.

    Args:
        back: the gradient of the logits, of that of the result.
        dtype: the result's; None: theirs.
        change: to what they are made of.
    """
    source = made_of(logits, **change)

    def make() -> DeferredLogits:
        found: DeferredLogits = DeferredLogits(source, dtype or logits.dtype)
        found.done = logits, do, False
        return found

    return _Done.apply(logits, make, back)  # type: ignore[no-untyped-call,no-any-return]


def viewed(
    logits: DeferredLogits, view: Callable[[Tensor], Tensor], **change: Any
) -> DeferredLogits:
    """A view of deferred logits, not computed; ``change`` as for :func:`done`."""
    source = made_of(logits, **change)
    with taking_views():
        found: Any = view(logits)
    if found is not logits:
        found.source = source
    return found  # type: ignore[no-any-return]


def made_of(logits: DeferredLogits, **change: Any) -> Logits:
    """What something done to deferred logits is made of."""
    source = logits.source
    source.check()
    # Other tensors have other versions: nothing was changed by taking them.
    graph = source.graph and torch.is_grad_enabled()
    return replace(source, **{"versions": (), "graph": graph, **change})
