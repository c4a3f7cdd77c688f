"""``rope`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fwd", "rope", "supports"]


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    half_tables: bool,
    backward: bool = False,
) -> Tensor:
    """The pairs (a, b) of the first features of x (batch, heads, tokens, width) turned:
    (a cos_a - b sin_a, b cos_b + a sin_b), or backward its transpose; at least float32.

    cos, sin: (batch or 1, tokens, rotary), or with half_tables one entry a pair. Differentiable.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    tables = [table.to(wide)[:, None] for table in (cos, sin)]
    if half_tables:
        tables = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1)
                  for t in tables]  # fmt: skip
    rotary = tables[0].shape[-1]
    turning, staying = x.to(wide).split([rotary, x.shape[-1] - rotary], -1)
    (a, b), (ca, cb), (sa, sb) = (
        (t[..., 0::2], t[..., 1::2]) if interleaved else t.chunk(2, -1) for t in (turning, *tables)
    )
    pair = (a * ca + b * sb, b * cb - a * sa) if backward else (a * ca - b * sa, b * cb + a * sb)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, staying], -1)


def fwd(
    outs: list[Tensor],
    xs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
) -> None:
    """Writes the turned heads of each x."""
    options = {"interleaved": interleaved, "half_tables": half_tables, "backward": backward}
    for out, x in zip(outs, xs, strict=True):
        out.copy_(rope(x, cos, sin, **options))
