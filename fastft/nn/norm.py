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


def norm_facts(module: Any) -> tuple[tuple[str, Any], ...] | None:
    """What makes this module an RMS norm of ours: its offset, its rounding and what it does with a
    narrower input, found by running it on a random input with a random weight; None when it
    computes something else."""
    dtype = module.weight.dtype
    # In float32 the place of the rounding does not show; it will once the model is cast.
    offset, round_first = min(
        _CONVENTIONS, key=lambda convention: _error(module, torch.bfloat16, convention)
    )
    if not _error(module, dtype, (offset, round_first)) <= 2 * torch.finfo(dtype).eps:
        return None
    narrow = None
    if dtype == torch.float32:
        x, weight = _draw(module, dtype)
        with torch.no_grad():
            wide = functional_call(module, {"weight": weight}, (x,)).double()
            got = functional_call(module, {"weight": weight}, (x.bfloat16(),))
        narrow = _narrow_fact(got, wide)
    return (
        ("fastft_offset", offset),
        ("fastft_round_first", round_first),
        ("fastft_narrow", narrow),
    )


def _draw(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random input (8, features) and a random weight."""
    generator = torch.Generator().manual_seed(0)
    weight: Tensor = module.weight
    draw = torch.randn(9, weight.shape[0], generator=generator).to(weight.device, dtype)
    return draw[1:], draw[0]


def _error(module: Any, dtype: torch.dtype, convention: tuple[float, bool]) -> float:
    """How far :func:`fastft.ops.rms_norm` is from the module in ``dtype``, relative."""
    x, weight = _draw(module, dtype)
    offset, round_first = convention
    with torch.no_grad():
        expected = functional_call(module, {"weight": weight}, (x,)).double()
        y = ops.rms_norm(x, weight, epsilon(module) or 0.0, offset=offset, round_first=round_first)
    return float((y.double() - expected).norm() / expected.norm())


def _narrow_fact(got: Tensor, expected: Tensor) -> str | None:
    """What the module gave for a bfloat16 input: "wide", "input", or None for something else."""
    # The input was rounded, xhat may have been, and the result: three relative errors of eps / 2.
    eps = torch.finfo(torch.bfloat16).eps
    if not float((got.double() - expected).norm()) <= 1.5 * eps * float(expected.norm()):
        return None
    return {torch.float32: "wide", torch.bfloat16: "input"}.get(got.dtype)
