"""Eager calls of the operations: recorded by autograd where it records, else the forward alone; and
their backward as torch operations, where that is what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["call", "differentiably", "gradients_of"]


class _Unrecorded:
    """The context of a forward that has no backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is saved."""


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which costs 5 us, or the function's forward where no gradients are
    recorded, as in generation."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return function.forward(_Unrecorded(), *arguments)


def differentiably(*d_outputs: Tensor) -> bool:
    """Whether a backward must be torch operations: gradients of it are wanted (create_graph=True),
    or it is mapped over a batch of gradients (is_grads_batched=True)."""
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled()
        or functorch.peek_interpreter_stack() is not None
        or any(functorch.is_legacy_batchedtensor(d) for d in d_outputs)
    )


def gradients_of(
    compute: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    d_outputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of ``compute(*inputs)``, one tensor or several, for those inputs that need one."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where an input depends on another, or is it, each is asked for its own share alone.
        own = [t if t is None or not need else t.view_as(t) for t, need in zip(inputs, needs)]
        found = compute(*own)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        pairs = [(y, d) for y, d in zip(outputs, d_outputs, strict=True) if y.requires_grad]
        wanted = [t for t, need in zip(own, needs) if need and t is not None]
        gradients = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [d for _, d in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(gradients) if need and t is not None else None for t, need in zip(own, needs)]
