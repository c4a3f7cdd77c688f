"""Thin products of LoRA on the CPU, each one pass over its wide side: csrc/cpu/thin.inc.

They serve bfloat16 activations on processors that multiply bfloat16 themselves, up to a rank where
the library's products, whose inner sums are then long enough, are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import scratch

__all__ = ["back", "expand", "pair", "serves", "serves_all", "shrink"]

# Up to this sum of ranks one pass of ours is faster than two of the library's (measured at 16, 32
# and 64 on Zen 4); and up to the other under dropout, for which the library wants x dropped first.
_MAX_RANK, _MAX_DROPPED_RANK = 48, 64


def serves(dtype: torch.dtype, r: int, dropped: bool = False) -> bool:
    """Whether these products take activations of ``dtype`` and ``r`` ranks, and pay."""
    most = _MAX_DROPPED_RANK if dropped else _MAX_RANK
    return dtype == torch.bfloat16 and r <= most and _has_bfloat16_products()


def serves_all(dtype: torch.dtype, ranks: Sequence[int], dropped: Sequence[bool]) -> bool:
    """The same of adapters that share an input: those without dropout are read together, each other
    one alone."""
    pairs = list(zip(ranks, dropped, strict=True))
    together = sum(r for r, drops in pairs if not drops)
    alone = max((r for r, drops in pairs if drops), default=0)
    return serves(dtype, together) and serves(dtype, alone, True)


@functools.cache
def _has_bfloat16_products() -> bool:
    return bool(native.build_info()["native_bfloat16"])


def _facts(wide: Tensor, r: int, scale: float, adapter: Tensor) -> tuple[object, ...]:
    """A call's last arguments: sizes, scale, whether adapters are float32, scratch."""
    rows, cols = wide.shape
    words = native.module().thin_scratch(rows, cols, r)
    room = scratch("thin", (words,), torch.float32)
    return rows, cols, r, scale, adapter.dtype == torch.float32, room.data_ptr()


def shrink(s: Tensor, x: Tensor, a: Tensor, mask: Tensor | None, scale: float) -> None:
    """s (M, r) = scale * drop(x) a^T; x: (M, K), a: (r, K); 1 / (1 - p) belongs into the scale."""
    facts = _facts(x, a.shape[0], scale, a)
    native.module().thin_shrink(*map(native.address, (s, x, a, mask)), *facts)


def expand(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    """y (M, N) += scale * s b^T; s: (M, r), b: (N, r)."""
    facts = _facts(y, b.shape[1], scale, b)
    native.module().thin_expand(*map(native.address, (y, s, b)), *facts)


def pair(ds: Tensor, db: Tensor | None, dy: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    """ds (M, r) = scale * dy b and db (N, r) = scale * dy^T s; ds may be columns of a wider one."""
    facts = _facts(dy, b.shape[1], scale, b)
    native.module().thin_pair(
        native.address(ds),
        ds.stride(0),
        *map(native.address, (db, dy, s, b)),
        *facts,
    )


def back(
    dx: Tensor | None,
    da: Tensor | None,
    ds: Tensor,
    x: Tensor,
    a: Tensor,
    mask: Tensor | None,
    scale: float,
) -> None:
    """dx (M, K) += scale * kept * (ds a) and da (r, K) = scale * ds^T drop(x)."""
    facts = _facts(x, a.shape[0], scale, a)
    native.module().thin_back(
        *map(native.address, (dx, da, ds, x, a, mask)),
        *facts,
    )
