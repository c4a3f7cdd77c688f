"""CPU launcher of ``lora_grouped_linear``: library products, a group of rows at a time.

The library makes code for every size it meets, and routing gives each group another. Groups are
therefore multiplied with some rows of the next one, up to a multiple of 16: what lands there is
overwritten when that group's turn comes, and sums over rows see zeros in their place.
"""

from __future__ import annotations

from torch import Tensor

from fastft.cpu.lora_linear import supports
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, scratch

__all__ = ["bwd", "fwd", "supports"]

_STEP = 16


def _segments(ends: Tensor) -> list[tuple[int, int, slice]]:
    """Of each group that has rows: its number, how many they are, and the rows to multiply."""
    stops = ends.tolist()
    found = []
    for e, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        if start < stop:
            rounded = -(-(stop - start) // _STEP) * _STEP
            found.append((e, stop - start, slice(start, min(stops[-1], start + rounded))))
    return found


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
    for e, _, rows in _segments(ends):
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
    for e, own, rows in _segments(ends):
        size = (rows.stop - rows.start, s.shape[1])
        ds = scratch("s_all", size, x.dtype)
        mm_nn(ds, dy[rows], lora_b[e].to(x.dtype), alpha=scaling)
        if dx is not None:
            mm_nn(dx[rows], dy[rows], weight[e])
            mm_nn(dx[rows], ds, lora_a[e].to(x.dtype), accumulate=True)
        if da is not None:
            ds[own:].zero_()
            mm_tn(da[e], ds, x[rows])
        if db is not None:
            group = scratch("s_group", size, x.dtype).copy_(s[rows])
            group[own:].zero_()
            mm_tn(db[e], dy[rows], group, alpha=scaling)
