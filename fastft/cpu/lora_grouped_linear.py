"""CPU launcher of ``lora_grouped_linear``: library products, a group of rows at a time."""

from __future__ import annotations

from torch import Tensor

from fastft.cpu.lora_linear import supports
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, scratch

__all__ = ["bwd", "fwd", "supports"]


def _segments(ends: Tensor) -> list[tuple[int, slice]]:
    stops = ends.tolist()
    pairs = zip([0, *stops[:-1]], stops, strict=True)
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairs) if a < b]


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
    for e, rows in _segments(ends):
        mm_nt(s[rows], x[rows], lora_a[e].to(x.dtype))
        mm_nt(y[rows], x[rows], weight[e])
        mm_nt(y[rows], s[rows], lora_b[e].to(x.dtype), alpha=scaling, accumulate=True)


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
    for e, rows in _segments(ends):
        ds = scratch("s_all", (rows.stop - rows.start, s.shape[1]), x.dtype)
        mm_nn(ds, dy[rows], lora_b[e].to(x.dtype), alpha=scaling)
        if dx is not None:
            mm_nn(dx[rows], dy[rows], weight[e])
            mm_nn(dx[rows], ds, lora_a[e].to(x.dtype), accumulate=True)
        if da is not None:
            mm_tn(da[e], ds, x[rows])
        if db is not None:
            mm_tn(db[e], dy[rows], s[rows], alpha=scaling)
