"""RMS norms of any model, fused; their convention is found by trying, not by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.swap import Swapped, call_refusal

__all__ = ["FusedRMSNorm", "epsilon", "norm_facts"]

_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# (offset, round_first): Llama, OLMo 2, Gemma, and the fourth for completeness.
_CONVENTIONS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))


class FusedRMSNorm(Swapped):
    """The forward of an RMS norm; offset, round_first and narrow are facts of the class.

    narrow: a 16-bit input under a float32 weight (a query's norm under autocast) is computed in
    float32, and the result is "wide" (float32) or as the "input"; None: not known, left alone.
    """

    fastft_offset: float
    fastft_round_first: bool
    fastft_narrow: str | None
    weight: nn.Parameter

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """:func:`fastft.ops.rms_norm`, or the original's forward, counted with its reason."""
        reason = "arguments passed to the layer" if args or kwargs else None
        x, dtype = hidden_states, None
        if self.fastft_narrow is not None and _is_narrow(x, self.weight):
            dtype = x.dtype if self.fastft_narrow == "input" else self.weight.dtype
            x = x.to(self.weight.dtype)
        reason = reason or call_refusal("rms_norm", x, self.weight)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        y = ops.rms_norm(
            x,
            self.weight,
            epsilon(self) or 0.0,
            offset=self.fastft_offset,
            round_first=self.fastft_round_first,
        )
        return y if dtype is None else y.to(dtype)


def _is_narrow(x: Any, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def epsilon(module: nn.Module) -> float | None:
    """The module's epsilon, by whichever of its usual names; None when it has none."""
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


def norm_facts(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """What makes this module an RMS norm of ours: its offset, its rounding and what it does with a
    narrower input, found by running it on a random input with a random weight; None when it
    computes something else."""
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(9, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    x, random = draw[1:], draw[0]
    with torch.no_grad():
        expected = functional_call(module, {"weight": random}, (x,)).double()
        narrow = None
        if weight.dtype == torch.float32:
            narrow = functional_call(module, {"weight": random}, (x.bfloat16(),))
        errors = []
        for offset, round_first in _CONVENTIONS:
            y = ops.rms_norm(
                x, random, epsilon(module) or 0.0, offset=offset, round_first=round_first
            )
            errors.append((float((y.double() - expected).norm()), offset, round_first))
    error, offset, round_first = min(errors, key=lambda e: e[0])
    bound = 2 * torch.finfo(weight.dtype).eps * float(expected.norm())
    if not error <= bound:
        return None
    return (
        ("fastft_offset", offset),
        ("fastft_round_first", round_first),
        ("fastft_narrow", _narrow_fact(narrow, expected)),
    )


def _narrow_fact(got: Tensor | None, expected: Tensor) -> str | None:
    """What the module gave for a bfloat16 input: "wide", "input", or None for something else."""
    if got is None:
        return None
    # The input was rounded, xhat may have been, and the result: three relative errors of eps / 2.
    eps = torch.finfo(torch.bfloat16).eps
    if not float((got.double() - expected).norm()) <= 1.5 * eps * float(expected.norm()):
        return None
    return {torch.float32: "wide", torch.bfloat16: "input"}.get(got.dtype)
