"""``rms_norm`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """x rstd (weight + offset) and rstd = 1 / sqrt(mean(x^2) + eps); differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = (x.to(wide).square().mean(-1) + eps).rsqrt()
    normed = x.to(wide) * rstd.unsqueeze(-1)
    if round_first:
        normed = normed.to(x.dtype).to(wide)
    return (normed * (weight.to(wide) + offset)).to(x.dtype), rstd


def fwd(
    y: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    summed: Tensor | None = None,
    *,
    eps: float,
    offset: float,
    round_first: bool,
) -> None:
    """Writes y and rstd; with a residual, of summed = x + residual, which it writes too."""
    if residual is not None and summed is not None:
        x = torch.add(x, residual, out=summed)
    found, found_rstd = rms_norm(x, weight, eps, offset, round_first)
    y.copy_(found)
    rstd.copy_(found_rstd)


def bwd(
    dx: Tensor,
    d_weight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    more: Tensor | None = None,
    *,
    offset: float,
) -> None:
    """Writes dx, plus ``more`` where given, and d_weight (in its own dtype) where it is wanted."""
    wide = rstd.dtype
    normed = x.to(wide) * rstd.unsqueeze(-1)
    g = dy.to(wide) * (weight.to(wide) + offset)
    found = rstd.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True))
    dx.copy_(found if more is None else found + more)
    if d_weight is not None:
        d_weight.copy_((dy.to(wide) * normed).sum(0))
