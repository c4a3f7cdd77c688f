"""``glu`` in plain torch, right in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; differentiable."""
    return _ACTIVATIONS[activation](gate) * up


def fwd(out: Tensor, gate: Tensor, up: Tensor, *, activation: str) -> None:
    """Writes out."""
    out.copy_(glu(gate, up, activation))


def bwd(
    d_gate: Tensor, d_up: Tensor, d_out: Tensor, gate: Tensor, up: Tensor, *, activation: str
) -> None:
    """Writes the gradients."""
    with torch.enable_grad():
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        gradients = torch.autograd.grad(glu(*leaves, activation), leaves, d_out)
    d_gate.copy_(gradients[0])
    d_up.copy_(gradients[1])
