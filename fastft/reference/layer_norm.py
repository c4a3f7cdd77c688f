"""``layer_norm`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bwd", "fwd", "layer_norm", "supports"]


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) rstd (weight + offset) + bias, mean and rstd = 1 / sqrt(variance + eps);
    differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.to(wide).mean(-1)
    centred = x.to(wide) - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1)
    if round_first:
        y = y.to(x.dtype).to(wide)
    if weight is not None:
        y = y * (weight.to(wide) + offset)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype), mean, rstd


def fwd(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    offset: float,
    round_first: bool,
) -> None:
    """Writes y, mean and rstd."""
    found = layer_norm(x, weight, bias, eps, offset, round_first)
    for out, value in zip((y, mean, rstd), found, strict=True):
        out.copy_(value)


def bwd(
    dx: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    offset: float,
) -> None:
    """Writes dx, and d_weight and d_bias (in their own dtype) where they are wanted."""
    wide = rstd.dtype
    normed = (x.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    g = dy.to(wide) * (1.0 if weight is None else weight.to(wide) + offset)
    means = [(t).mean(-1, keepdim=True) for t in (g, g * normed)]
    dx.copy_(rstd.unsqueeze(-1) * (g - means[0] - normed * means[1]))
    if d_weight is not None:
        d_weight.copy_((dy.to(wide) * normed).sum(0))
    if d_bias is not None:
        d_bias.copy_(dy.to(wide).sum(0))
