"""The gradient of ``embedding`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def bwd(d_weight: Tensor, dy: Tensor, order: Tensor, ids: Tensor, *, padding: int) -> None:
    """Adds the sums of dy's rows (tokens, features) to a d_weight of zeros; ids: sorted, order:
    where each was, padding: the id of no gradient, or -1."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    rows = dy[order].to(wide)
    if padding >= 0:
        rows = rows.masked_fill((ids == padding)[:, None], 0)
    d_weight += torch.zeros_like(d_weight, dtype=wide).index_add_(0, ids, rows)
