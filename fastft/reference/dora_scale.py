"""``dora_scale`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def dora_scale(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """z scale + bias, in the wider of the dtypes, rounded once; differentiable."""
    y = z.to(torch.promote_types(z.dtype, scale.dtype)) * scale
    return (y if bias is None else y + bias).to(z.dtype)


def fwd(y: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Writes y (rows, columns)."""
    y.copy_(dora_scale(z, scale, bias))


def bwd(dz: Tensor, d_scale: Tensor | None, dy: Tensor, z: Tensor, scale: Tensor) -> None:
    """Writes dz, and d_scale where it is wanted."""
    wide = torch.promote_types(z.dtype, scale.dtype)
    dz.copy_(dy.to(wide) * scale)
    if d_scale is not None:
        d_scale.copy_((dy.to(wide) * z.to(wide)).sum(0))
