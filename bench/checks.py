"""Is a result right? A number is printed only when it is.

The bound is derived: the error against float64 may be at most `FACTOR` times the error that plain
torch makes in the same dtype on the same inputs, over the whole tensor (2-norm) and at its worst
element.
"""

from __future__ import annotations

import math

import torch

# Another order of summation and one rounding more (S is kept in the inputs' dtype) stay within it.
FACTOR = 4.0
# The worst element of many is a noisier yardstick than the norm.
FACTOR_WORST = 8.0


def errors(got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm and of the worst element; what is not finite is inf wrong."""
    if got.shape != truth.shape:
        return math.inf, math.inf
    difference = got.detach().double() - truth
    norm = float(difference.norm() / truth.norm().clamp_min(1e-300))
    worst = float(difference.abs().max() / truth.abs().max().clamp_min(1e-300))
    return (norm if math.isfinite(norm) else math.inf, worst if math.isfinite(worst) else math.inf)


def compare(
    got: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
) -> str | None:
    """None when every output in `got` is within the bound, else which is not and by how much."""
    for name, tensor in got.items():
        # One unit in the last place of the result itself is always granted.
        floor = torch.finfo(plain[name].dtype).eps
        norm, worst = errors(tensor, truth[name])
        plain_norm, plain_worst = errors(plain[name], truth[name])
        limit = FACTOR * max(plain_norm, floor)
        limit_worst = FACTOR_WORST * max(plain_worst, floor)
        if not (norm <= limit and worst <= limit_worst):
            return (
                f"{name} is wrong: relative error {norm:.2e} (worst element {worst:.2e}), "
                f"allowed {limit:.2e} ({limit_worst:.2e}), "
                f"plain torch {plain_norm:.2e} ({plain_worst:.2e})"
            )
    return None
