"""``lora_grouped_linear`` in plain torch: one group of rows after another."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def segments(ends: Tensor) -> list[tuple[int, int, int]]:
    """(group, first row, past the last row) of the groups that have rows."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    return [(e, a, b) for e, (a, b) in enumerate(zip(starts, stops, strict=True)) if a < b]


def lora_grouped_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ends: Tensor, scaling: float
) -> Tensor:
    """y_e = x_e W_e^T + scaling * x_e A_e^T B_e^T for the rows of each group, differentiable."""
    # Without rows, an empty product: the result hangs on all inputs in any case.
    parts = [x[:0] @ lora_a[0].to(x.dtype).t() @ lora_b[0].to(x.dtype).t()]
    for e, start, stop in segments(ends):
        rows, a, b = x[start:stop], lora_a[e].to(x.dtype), lora_b[e].to(x.dtype)
        parts.append(rows @ weight[e].t() + (rows @ a.t() @ b.t()) * scaling)
    return torch.cat(parts)


def fwd(
    y: Tensor,
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
) -> None:
    """Writes y (M, N) and s = x A^T (M, r), of each group's rows with its matrices."""
    for e, start, stop in segments(ends):
        rows = slice(start, stop)
        s[rows] = x[rows] @ lora_a[e].to(x.dtype).t()
        y[rows] = x[rows] @ weight[e].t() + (s[rows] @ lora_b[e].to(x.dtype).t()) * scaling


def bwd(
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
) -> None:
    """Writes dx (M, K), da (E, r, K), db (E, N, r); None is not wanted."""
    for gradient in (da, db):
        if gradient is not None:
            gradient.zero_()
    for e, start, stop in segments(ends):
        rows = slice(start, stop)
        ds = (dy[rows] @ lora_b[e].to(dy.dtype)) * scaling
        if dx is not None:
            dx[rows] = dy[rows] @ weight[e] + ds @ lora_a[e].to(dy.dtype)
        if da is not None:
            da[e] = ds.t() @ x[rows]
        if db is not None:
            db[e] = (dy[rows].t() @ s[rows]) * scaling
