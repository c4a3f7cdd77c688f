"""Launchers of the thin products of ``lora_linear``: shrink, expand-add, outer. Up to three
adapters a launch share the wide operand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_kernels import lora_config
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_linear_kernels import (
    _expand_add_kernel,
    _outer_partial_kernel,
    _shrink_kernel,
)
from fastft_kernels._lora_reduce import add_up, cast, padded, reduce_outers, split_rows, trio

__all__ = [
    "Copy",
    "casts",
    "expand_add",
    "expand_launch",
    "outer",
    "outer_launch",
    "shrink",
    "shrink_launch",
]

# Every program of a shrink reads the whole of the adapters' matrices. Where these have more ranks
# together than this (without dropout, with it), each counted as its block, wider ones than x are
# cast before, in one launch. Tiles are made for that: three blocks of 64 fit as 16 bits only.
_CAST_RANKS = {False: 48, True: 32}
# Blocks of features that a split of a shrink has at least: two more are its begin and its end.
_FEWEST_STEPS = 4


@dataclass(frozen=True)
class Copy:
    """Where a thin product leaves what it read, and its result, for a bordered product.

    wide: (M, features), columns of the bordered operand. thin: (M, r) each, its border's.
    """

    wide: Tensor
    thin: list[Tensor]

    def first(self, i: int) -> int:
        """The column of ``thin[i]``, counted from the end of ``wide``."""
        offset = self.thin[i].storage_offset() - self.wide.storage_offset()
        return offset - self.wide.shape[1]


@functools.lru_cache(maxsize=256)
def _groups(masked: tuple[bool, ...]) -> tuple[tuple[tuple[int, ...], bool], ...]:
    """Siblings that share a launch, and whether they have masks: at most three, all or none."""
    groups = []
    for kind in (False, True):
        members = tuple(i for i, own in enumerate(masked) if own == kind)
        step = lora_config.MAX_SIBLINGS
        groups += [(members[i : i + step], kind) for i in range(0, len(members), step)]
    return tuple(groups)


def _masked(masks: Sequence[Tensor | None]) -> tuple[bool, ...]:
    return tuple([mask is not None for mask in masks])


def _own_masks(masks: Sequence[Tensor | None], group: Sequence[int]) -> list[Tensor]:
    return [mask for i in group if (mask := masks[i]) is not None]


def _ranks(tensors: Sequence[Tensor], group: Sequence[int]) -> tuple[int, ...]:
    return tuple([tensors[i].shape[1] for i in group])


def _scales(scales: Sequence[float], group: Sequence[int]) -> tuple[float, ...]:
    return tuple([float(scales[i]) for i in group])


def casts(siblings: int, block_r: int, masked: bool) -> bool:
    """Whether a shrink casts matrices that are wider than x."""
    return siblings * block_r > _CAST_RANKS[masked]


def _as_read(
    matrices: Sequence[Tensor], x: Tensor, r: int, masked: tuple[bool, ...]
) -> Sequence[Tensor]:
    """The matrices of a shrink, the largest of rank r, in x's dtype where a cast pays."""
    size = x.element_size()
    if matrices[0].element_size() <= size:
        return matrices
    if not casts(len(matrices), lora_config.block_r_for(r, size), True in masked):
        return matrices
    return cast(matrices, x.dtype)


def shrink(
    outs: Sequence[Tensor],
    x: Tensor,
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
    copy: Copy | None = None,
) -> None:
    """out_i (M, r_i) = scale_i * drop_i(x) a_i^T; a_i is (r_i, K), or (K, r_i) if transposed."""
    tokens, features = x.shape
    if tokens == 0:
        return
    kinds = _masked(masks)
    matrices = _as_read(matrices, x, max([out.shape[1] for out in outs]), kinds)
    for number, (group, masked) in enumerate(_groups(kinds)):
        group_outs = [outs[i] for i in group]
        own = copy if number == 0 else None
        place, target = None, []
        if own is not None:
            place, target = (own.wide.stride(0), *[own.first(i) for i in group]), [own.wide]
        ranks, factors = _ranks(outs, group), _scales(scales, group)
        launch, splits = shrink_launch(
            x.device, x.element_size(), tokens, features, ranks, factors, masked, transposed, place
        )
        results = group_outs
        if splits > 1:  # parts, scaled when they are added up
            results = [x.new_empty((splits, tokens, r), dtype=torch.float32) for r in ranks]
        launch(x, *[matrices[i] for i in group], *results, *_own_masks(masks, group), *target)
        if splits > 1:
            thins = None if own is None else [own.thin[i] for i in group]
            add_up(group_outs, thins, results, factors)
        if copy is not None and own is None:
            for i in group:
                copy.thin[i].copy_(outs[i])


@functools.lru_cache(maxsize=KEPT)
def shrink_launch(
    device: torch.device,
    size: int,
    tokens: int,
    features: int,
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    masked: bool,
    transposed: bool,
    place: tuple[int, ...] | None,
) -> tuple[Prepared, int]:
    """The launch, and in how many parts it makes each result. place: of a copy, its stride and the
    first column of each result."""
    arch, siblings = lora_config.for_device(device), len(ranks)
    form = lora_config.form_of(siblings, masked)
    block_r, tile = lora_config.tile_for(arch.shrink, size, max(ranks), form)
    grid = (cdiv(tokens, tile.block_m), cdiv(max(ranks), block_r))
    splits, k_per_split = _split_features(
        features, tile.block_n, grid[0] * grid[1], arch.multiprocessors
    )
    factors = scales if splits == 1 else (1.0,) * siblings
    stride, *firsts = (0, 0) if place is None else place
    n, end = siblings, 1 + (3 if masked else 2) * siblings
    places = (0, *trio(1, n), *trio(1 + n, n), *trio(1 + 2 * n, n if masked else 0))
    launch = Prepared(
        _shrink_kernel, (*grid, splits), (*places, 0 if place is None else end),
        (tokens, features, *padded(ranks), *padded(factors), stride, *padded(firsts), k_per_split),
        SIBLINGS=siblings, MASKED=masked, TRANSPOSED=transposed, COPY=place is not None,
        SPLIT=splits > 1, BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_n,
        **tile.launch.options(),
    )  # fmt: skip
    return launch, splits


def _split_features(features: int, block_k: int, programs: int, slots: int) -> tuple[int, int]:
    """(splits, features in each) of a shrink whose programs alone would leave a GPU idle."""
    steps = cdiv(features, block_k)
    splits = min(slots // programs, steps // _FEWEST_STEPS)
    if splits < 2:
        return 1, features
    width = cdiv(steps, splits) * block_k
    return cdiv(features, width), width


def expand_add(
    y: Tensor,
    bias: Tensor | None,
    ss: Sequence[Tensor],
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
    fresh: bool = False,
) -> None:
    """y (M, N) += bias + sum_i keep_i * scale_i * s_i w_i; w_i is (r_i, N), or (N, r_i). fresh: y
    holds nothing yet."""
    tokens, features = y.shape
    if tokens == 0 or features == 0:
        return
    for group, masked in _groups(_masked(masks)):
        launch = expand_launch(
            y.device, y.element_size(), tokens, features, _ranks(ss, group), _scales(scales, group),
            masked, transposed, bias is not None, fresh,
        )  # fmt: skip
        launch(
            y, *(() if bias is None else (bias,)), *[ss[i] for i in group],
            *[matrices[i] for i in group], *_own_masks(masks, group),
        )  # fmt: skip
        bias, fresh = None, False


@functools.lru_cache(maxsize=KEPT)
def expand_launch(
    device: torch.device,
    size: int,
    tokens: int,
    features: int,
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    masked: bool,
    transposed: bool,
    has_bias: bool,
    fresh: bool,
) -> Prepared:
    table, form = lora_config.for_device(device).expand, lora_config.form_of(len(ranks), masked)
    block_r, tile = lora_config.tile_for(table, size, max(ranks), form)
    n, first = len(ranks), 1 + has_bias
    places = (0, int(has_bias), *trio(first, n), *trio(first + n, n))
    return Prepared(
        _expand_add_kernel, (cdiv(tokens, tile.block_m) * cdiv(features, tile.block_n),),
        (*places, *trio(first + 2 * n, n if masked else 0)),
        (tokens, features, *padded(ranks), *padded(scales)),
        SIBLINGS=len(ranks), HAS_BIAS=has_bias, FRESH=fresh, MASKED=masked, TRANSPOSED=transposed,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r, **tile.launch.options(),
    )  # fmt: skip


def outer(
    outs: Sequence[Tensor],
    x: Tensor,
    ds: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
) -> None:
    """out_i (r_i, K), or (K, r_i) if transposed, = scale_i * d_i^T drop_i(x), in two stages."""
    tokens, features = x.shape
    if tokens == 0 or features == 0:
        for out in outs:
            out.zero_()
        return
    for group, masked in _groups(_masked(masks)):
        ranks = _ranks(ds, group)
        launch, splits = outer_launch(x.device, x.element_size(), tokens, features, ranks, masked)
        partials = [x.new_empty((splits, r, features), dtype=torch.float32) for r in ranks]
        launch(x, *[ds[i] for i in group], *partials, *_own_masks(masks, group))
        reduce_outers(
            [outs[i] for i in group], partials, _scales(scales, group), transposed=transposed
        )


@functools.lru_cache(maxsize=KEPT)
def outer_launch(
    device: torch.device,
    size: int,
    tokens: int,
    features: int,
    ranks: tuple[int, ...],
    masked: bool,
) -> tuple[Prepared, int]:
    """The launch, and in how many parts it makes each result."""
    arch, form = lora_config.for_device(device), lora_config.form_of(len(ranks), masked)
    block_r, tile = lora_config.tile_for(arch.outer, size, max(ranks), form)
    blocks = (cdiv(features, tile.block_n), cdiv(max(ranks), block_r))
    slots = arch.multiprocessors * tile.resident
    splits, rows = split_rows(tokens, tile.block_m, blocks[0] * blocks[1], slots)
    n = len(ranks)
    places = (0, *trio(1, n), *trio(1 + n, n), *trio(1 + 2 * n, n if masked else 0))
    launch = Prepared(
        _outer_partial_kernel, (*blocks, splits), places, (tokens, features, *padded(ranks), rows),
        SIBLINGS=len(ranks), MASKED=masked, BLOCK_M=tile.block_m, BLOCK_R=block_r,
        BLOCK_K=tile.block_n, **tile.launch.options(),
    )  # fmt: skip
    return launch, splits
