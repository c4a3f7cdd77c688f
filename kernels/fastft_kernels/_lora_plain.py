"""The plain call of ``lora_linear``: up to three layers with one adapter each over all rows, the
low-rank terms after the library's products. It is what a model's layers call step after step, so
all that depends on sizes alone is kept, and a call is its launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastft_kernels import _lora_pair as pairs
from fastft_kernels import _lora_reduce as sums
from fastft_kernels import _lora_skinny as thin
from fastft_kernels import border, config, ways
from fastft_kernels._launch import KEPT, Prepared

__all__ = ["backward", "forward"]

_FLOAT32 = torch.float32


class _Forward(NamedTuple):
    casts: bool
    shrink: Prepared
    expands: list[Prepared]


class _Backward(NamedTuple):
    """The launches, and the shapes of the parts that sums are made of."""

    pairs: list[Prepared]
    strips: list[tuple[int, int, int]]
    splits: list[tuple[int, int, int]]
    add_up: Prepared
    reduce_db: Prepared
    expand: Prepared
    outer: Prepared
    outer_splits: list[tuple[int, int, int]]
    reduce_da: Prepared


def _expands(
    direction: str,
    arch: config.Arch,
    sizes: tuple[int, int],
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    masked: bool,
) -> bool:
    """Whether such a call is served here, without a border."""
    tokens, features = sizes
    if not tokens or not features or 0 in widths or len(widths) > config.MAX_SIBLINGS:
        return False
    possible = ("expand",) if arch.gemm is None else ("expand", "gemm")
    shape = ways.Shape(direction, tokens, features, widths, max(ranks), masked)
    return ways.pick(arch.name, shape, possible) == "expand"


@functools.lru_cache(maxsize=KEPT)
def _forward(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int],
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    kept: tuple[float, ...],
    masked: bool,
    biased: tuple[bool, ...],
) -> _Forward | None:
    """dtypes: of x and of the adapters. kept: what is kept under dropout is scaled by."""
    arch, size = config.for_device(device), dtypes[0].itemsize
    if not _expands("fwd", arch, sizes, widths, ranks, masked):
        return None
    shrink, parts = thin.shrink_launch(device, size, *sizes, ranks, kept, masked, False, None)
    if parts > 1:
        return None
    block_r = config.block_r_for(max(ranks), size)
    casts = dtypes[1].itemsize > size and thin.casts(len(ranks), block_r, masked)
    expands = [
        thin.expand_launch(device, size, sizes[0], n, (r,), (scaling,), False, True, bias, False)
        for n, r, scaling, bias in zip(widths, ranks, scalings, biased, strict=True)
    ]
    return _Forward(casts, shrink, expands)


def forward(
    ys: Sequence[Tensor],
    ss: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    kept: Sequence[float],
    masks: Sequence[Tensor | None],
) -> bool:
    """Writes the ys and ss; False, and nothing, where the call is not served here."""
    drops = [mask for mask in masks if mask is not None]
    ranks = [a.shape[0] for a in lora_as]
    if len(drops) not in (0, len(masks)) or ways.forced() or border.find(weights, ranks):
        return False
    program = _forward(
        x.device, (x.dtype, lora_as[0].dtype), tuple(x.shape),  # type: ignore[arg-type]
        tuple([y.shape[1] for y in ys]), tuple(ranks), tuple(map(float, scalings)), tuple(kept),
        bool(drops), tuple([bias is not None for bias in biases]),
    )  # fmt: skip
    if program is None:
        return False
    program.shrink(x, *(sums.cast(lora_as, x.dtype) if program.casts else lora_as), *ss, *drops)
    for i, expand in enumerate(program.expands):
        y, bias = ys[i], biases[i]
        torch.mm(x, weights[i].t(), out=y)
        if bias is None:
            expand(y, ss[i], lora_bs[i])
        else:
            expand(y, bias, ss[i], lora_bs[i])
    return True


@functools.lru_cache(maxsize=KEPT)
def _backward(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int],
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    kept: tuple[float, ...],
    masked: bool,
) -> _Backward | None:
    arch, size, (tokens, features) = config.for_device(device), dtypes[0].itemsize, sizes
    if not _expands("bwd", arch, sizes, widths, ranks, masked):
        return None
    if not all(pairs.pair_pays(arch, size, n, r) for n, r in zip(widths, ranks, strict=True)):
        return None
    made = [pairs.pair_launch(device, tokens, n, r, None) for n, r in zip(widths, ranks)]
    strips = [(count, tokens, r) for (_, count, _), r in zip(made, ranks)]
    splits = [(count, r, n) for (_, _, count), r, n in zip(made, ranks, widths)]
    outer, count = thin.outer_launch(device, size, tokens, features, ranks, masked)
    outer_splits = [(count, r, features) for r in ranks]
    return _Backward(
        [launch for launch, _, _ in made], strips, splits,
        sums.add_up_launch(device, tuple(strips), scalings, None),
        sums.outers_launch(device, tuple(splits), scalings, True),
        thin.expand_launch(
            device, size, tokens, features, ranks, kept, masked, False, False, False
        ),
        outer, outer_splits, sums.outers_launch(device, tuple(outer_splits), kept, False),
    )  # fmt: skip


def backward(
    dx: Tensor,
    das: Sequence[Tensor],
    dbs: Sequence[Tensor],
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    kept: Sequence[float],
    masks: Sequence[Tensor | None],
) -> bool:
    """Writes dx, the dAs and dBs; False, and nothing, where the call is not served here."""
    drops = [mask for mask in masks if mask is not None]
    ranks = [a.shape[0] for a in lora_as]
    if len(drops) not in (0, len(masks)) or ways.forced() or border.find(weights, ranks):
        return False
    program = _backward(
        x.device, (x.dtype, lora_as[0].dtype), tuple(x.shape),  # type: ignore[arg-type]
        tuple([dy.shape[1] for dy in dys]), tuple(ranks), tuple(map(float, scalings)), tuple(kept),
        bool(drops),
    )  # fmt: skip
    if program is None or not all(g.is_contiguous() for g in (*das, *dbs)):
        return False
    d_ss = [torch.empty_like(s) for s in ss]
    parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.strips]
    db_parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.splits]
    for i, pair in enumerate(program.pairs):
        pair(dys[i], lora_bs[i], ss[i], parts[i], db_parts[i])
    program.add_up(*d_ss, *parts)
    program.reduce_db(*dbs, *db_parts)
    torch.mm(dys[0], weights[0], out=dx)
    for i in range(1, len(dys)):
        dx.addmm_(dys[i], weights[i])
    program.expand(dx, *d_ss, *lora_as, *drops)
    da_parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.outer_splits]
    program.outer(x, *d_ss, *da_parts, *drops)
    program.reduce_da(*das, *da_parts)
    return True
