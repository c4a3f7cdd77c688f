"""Launchers of the thin products of ``lora_linear``: shrink, expand-add, outer, and the pair of
shrink and outer that shares one read. Up to three adapters a launch share the wide operand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._lora_linear_kernels import (
    _expand_add_kernel,
    _outer_partial_kernel,
    _shrink_kernel,
)
from fastft_kernels._lora_pair_kernels import _pair_partial_kernel
from fastft_kernels._lora_reduce_kernels import (
    _cast_kernel,
    _outer_reduce_kernel,
    _pair_reduce_kernel,
)

__all__ = [
    "Copy",
    "PairParts",
    "casts",
    "expand_add",
    "outer",
    "padded",
    "pair",
    "pair_block",
    "pairs_well",
    "reduce_pairs",
    "shrink",
    "split_rows",
]

# Grid axes 1 and 2 hold at most 65535 programs; rank blocks and splits stay far below.
_MAX_SPLITS = 1024
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


def _groups(masks: Sequence[Tensor | None]) -> list[list[int]]:
    """Siblings that share a launch: at most three, all with a mask or all without."""
    groups = []
    for masked in (False, True):
        members = [i for i, mask in enumerate(masks) if (mask is not None) == masked]
        step = config.MAX_SIBLINGS
        groups += [members[i : i + step] for i in range(0, len(members), step)]
    return groups


def padded(values: Sequence) -> list:
    """Fills the kernel's three places; the kernel never touches the repeated ones."""
    return [*values, *[values[0]] * (config.MAX_SIBLINGS - len(values))]


def _ranks(tensors: Sequence[Tensor]) -> list[int]:
    return [t.shape[1] for t in padded(tensors)]


def _pick(tensors: Sequence[Tensor], group: Sequence[int]) -> list[Tensor]:
    return padded([tensors[i] for i in group])


def _pick_masks(masks: Sequence[Tensor | None], group: Sequence[int], stand_in: Tensor) -> list:
    """The group's masks, or (never read) stand-ins where it has none."""
    chosen = [m for i in group if (m := masks[i]) is not None]
    return padded(chosen or [stand_in])


def _scales(scales: Sequence[float], group: Sequence[int]) -> list[float]:
    return padded([float(scales[i]) for i in group])


def casts(siblings: int, block_r: int, masked: bool) -> bool:
    """Whether a shrink casts matrices that are wider than x."""
    return siblings * block_r > _CAST_RANKS[masked]


def _as_read(
    matrices: Sequence[Tensor], x: Tensor, r: int, masks: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The matrices of a shrink, the largest of rank r, in x's dtype where a cast pays."""
    size = x.element_size()
    masked = any(mask is not None for mask in masks)
    if matrices[0].element_size() <= size or not casts(
        len(matrices), config.block_r_for(r, size), masked
    ):
        return matrices
    cast = [torch.empty_like(matrix, dtype=x.dtype) for matrix in matrices]
    block = config.for_device(x.device).cast
    for begin in range(0, len(cast), config.MAX_SIBLINGS):
        outs, group = (values[begin : begin + config.MAX_SIBLINGS] for values in (cast, matrices))
        sizes = [out.numel() for out in outs]
        _cast_kernel[(triton.cdiv(max(sizes), block.block), len(outs))](
            *padded(outs), *padded(group), *padded(sizes), BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip
    return cast


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
    arch = config.for_device(x.device)
    matrices = _as_read(matrices, x, max(out.shape[1] for out in outs), masks)
    for number, group in enumerate(_groups(masks)):
        group_outs, group_scales = [outs[i] for i in group], [float(scales[i]) for i in group]
        ranks = _ranks(group_outs)
        masked = masks[group[0]] is not None
        form = config.form_of(len(group), masked)
        block_r, tile = config.tile_for(arch.shrink, x.element_size(), max(ranks), form)
        grid = (triton.cdiv(tokens, tile.block_m), triton.cdiv(max(ranks), block_r))
        copies = copy is not None and number == 0
        target, stride, firsts = x, 0, [0, 0, 0]
        if copy is not None and copies:
            target, stride = copy.wide, copy.wide.stride(0)
            firsts = padded([copy.first(i) for i in group])
        splits, k_per_split = _split_features(
            features, tile.block_n, grid[0] * grid[1], arch.multiprocessors
        )
        results, factors = group_outs, group_scales
        if splits > 1:  # parts, scaled when they are added up
            size, factors = (splits, tokens), [1.0] * len(group)
            results = [x.new_empty(*size, *o.shape[1:], dtype=torch.float32) for o in group_outs]
        _shrink_kernel[(*grid, splits)](
            x, *_pick(matrices, group), *padded(results), *_pick_masks(masks, group, x), target,
            tokens, features, *ranks, *padded(factors), stride, *firsts, k_per_split,
            SIBLINGS=len(group), MASKED=masked, TRANSPOSED=transposed, COPY=copies,
            SPLIT=splits > 1, BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_n,
            **tile.launch.options(),
        )  # fmt: skip
        if splits > 1:
            thins = [copy.thin[i] for i in group] if copy is not None and copies else None
            _add_up(group_outs, thins, results, group_scales)
        if copy is not None and not copies:
            for i in group:
                copy.thin[i].copy_(outs[i])


@functools.lru_cache(maxsize=1024)
def _split_features(features: int, block_k: int, programs: int, slots: int) -> tuple[int, int]:
    """(splits, features in each) of a shrink whose programs alone would leave a GPU idle."""
    steps = triton.cdiv(features, block_k)
    splits = min(slots // programs, steps // _FEWEST_STEPS)
    if splits < 2:
        return 1, features
    width = triton.cdiv(steps, splits) * block_k
    return triton.cdiv(features, width), width


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
    if y.numel() == 0:
        return
    arch = config.for_device(y.device)
    for group in _groups(masks):
        group_ss = _pick(ss, group)
        ranks = _ranks(group_ss)
        masked = masks[group[0]] is not None
        form = config.form_of(len(group), masked)
        block_r, tile = config.tile_for(arch.expand, y.element_size(), max(ranks), form)
        grid = (triton.cdiv(tokens, tile.block_m) * triton.cdiv(features, tile.block_n),)
        _expand_add_kernel[grid](
            y, y if bias is None else bias, *group_ss, *_pick(matrices, group),
            *_pick_masks(masks, group, y), tokens, features, *ranks, *_scales(scales, group),
            SIBLINGS=len(group), HAS_BIAS=bias is not None, FRESH=fresh, MASKED=masked,
            TRANSPOSED=transposed, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r,
            **tile.launch.options(),
        )  # fmt: skip
        bias, fresh = None, False


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
    arch = config.for_device(x.device)
    for group in _groups(masks):
        ranks = _ranks(_pick(ds, group))
        masked = masks[group[0]] is not None
        form = config.form_of(len(group), masked)
        block_r, tile = config.tile_for(arch.outer, x.element_size(), max(ranks), form)
        blocks = (triton.cdiv(features, tile.block_n), triton.cdiv(max(ranks), block_r))
        slots = arch.multiprocessors * tile.resident
        splits, rows = split_rows(tokens, tile.block_m, blocks[0] * blocks[1], slots)
        partials = [
            torch.empty((splits, r, features), dtype=torch.float32, device=x.device)
            for r in ranks[: len(group)]
        ]
        _outer_partial_kernel[(*blocks, splits)](
            x, *_pick(ds, group), *padded(partials), *_pick_masks(masks, group, x),
            tokens, features, *ranks, rows,
            SIBLINGS=len(group), MASKED=masked,
            BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_n,
            **tile.launch.options(),
        )  # fmt: skip
        chosen = [outs[i] for i in group]
        _reduce_outers(chosen, partials, [float(scales[i]) for i in group], transposed=transposed)


def _reduce_outers(
    outs: Sequence[Tensor], partials: Sequence[Tensor], scales: Sequence[float], *, transposed: bool
) -> None:
    """At most three out_i = scale_i * partial_i (splits_i, r_i, K_i) summed over the splits,
    transposed or not."""
    arch = config.for_device(outs[0].device)
    dense = [out if out.is_contiguous() else out.new_empty(out.shape) for out in outs]
    most = max(out.numel() for out in outs)
    shapes = padded([partial.shape for partial in partials])
    _outer_reduce_kernel[(triton.cdiv(most, arch.reduce.block), len(outs))](
        *padded(dense), *padded(partials), *[shape[0] for shape in shapes],
        *[shape[2] for shape in shapes], *[shape[1] for shape in shapes], *padded(scales),
        TRANSPOSED=transposed, BLOCK=arch.reduce.block, **arch.reduce.launch.options(),
    )  # fmt: skip
    for out, made in zip(outs, dense, strict=True):
        if made is not out:
            out.copy_(made)


@functools.lru_cache(maxsize=1024)
def split_rows(tokens: int, block_m: int, blocks: int, slots: int) -> tuple[int, int]:
    """(splits, rows in each) of ``blocks`` programs a split, ``slots`` of which run at a time.

    The least time, counted in blocks of rows: the turns that the programs take, each as long as its
    rows and two more to begin and to end. A few programs beyond what runs at a time would take a
    whole turn more.
    """
    steps = triton.cdiv(tokens, block_m)
    most = min(triton.cdiv(steps, 4), max(4 * slots // blocks, 1), _MAX_SPLITS)

    def time(splits: int) -> int:
        return triton.cdiv(blocks * splits, slots) * (triton.cdiv(steps, splits) + 2)

    rows = triton.cdiv(steps, min(range(1, most + 1), key=time)) * block_m
    return triton.cdiv(tokens, rows), rows


def pairs_well(dy: Tensor, r: int) -> bool:
    """Whether :func:`pair` moves fewer bytes than a shrink and an outer of their own.

    The parts of dS, float32 and written and read once, are 8 r / block_n bytes for each element
    that is not read a second time. Rows of dY that are no whole vectors would spill.
    """
    table = config.for_device(dy.device).pair
    if dy.element_size() != 2 or r > max(table) or 0 in dy.shape or dy.shape[1] % 16:
        return False
    return 8 * r < dy.element_size() * table[pair_block(table, r)].block_n


def pair_block(table: dict[int, config.TileConfig], r: int) -> int:
    """The least rank block that holds r."""
    return next(block for block in sorted(table) if r <= block)


@dataclass(frozen=True)
class PairParts:
    """What :func:`pair` leaves to :func:`reduce_pairs`: parts of dS (strips, M, r) and of dB
    (splits, r, N), and where they belong."""

    ds: Tensor
    db: Tensor
    thin: Tensor | None
    ds_parts: Tensor
    db_parts: Tensor
    scale: float


def pair(
    ds: Tensor, db: Tensor, dy: Tensor, s: Tensor, b: Tensor, scale: float, copy: Copy | None = None
) -> PairParts:
    """ds (M, r) = scale * dy b and db (N, r) = scale * dy^T s in one read of dy (M, N), both in
    parts."""
    tokens, features = dy.shape
    r, arch = b.shape[1], config.for_device(dy.device)
    block_r = pair_block(arch.pair, r)
    copies = copy is not None
    tile = (arch.pair_copy if copies else arch.pair)[block_r]
    strips = triton.cdiv(features, tile.block_n)
    slots = arch.multiprocessors * tile.resident
    splits, rows = split_rows(tokens, tile.block_m, strips, slots)
    ds_parts = torch.empty((strips, tokens, r), dtype=torch.float32, device=dy.device)
    db_parts = torch.empty((splits, r, features), dtype=torch.float32, device=dy.device)
    wide = dy if copy is None else copy.wide
    _pair_partial_kernel[(strips, splits)](
        dy, b, s, ds_parts, db_parts, wide, tokens, features, r, rows, wide.stride(0),
        COPY=copies, BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_N=tile.block_n,
        **tile.launch.options(),
    )  # fmt: skip
    return PairParts(ds, db, None if copy is None else copy.thin[0], ds_parts, db_parts, scale)


def reduce_pairs(pairs: Sequence[PairParts]) -> None:
    """The ds and dbs of layers over the same rows, three at a time; all leave a copy of ds in one
    bordered operand, or none does."""
    for begin in range(0, len(pairs), config.MAX_SIBLINGS):
        group = pairs[begin : begin + config.MAX_SIBLINGS]
        scales = [p.scale for p in group]
        thins = [p.thin for p in group if p.thin is not None]
        _add_up([p.ds for p in group], thins or None, [p.ds_parts for p in group], scales)
        _reduce_outers([p.db for p in group], [p.db_parts for p in group], scales, transposed=True)


def _add_up(
    outs: Sequence[Tensor],
    thins: Sequence[Tensor] | None,
    parts: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    """At most three out_i (M, r_i) = scale_i * parts_i (strips_i, M, r_i) summed over the strips;
    thins: where each belongs in one bordered operand, too."""
    arch = config.for_device(outs[0].device)
    most = max(out.numel() for out in outs)
    strips, rows, ranks = zip(*[part.shape for part in padded(parts)], strict=True)
    copies = list(outs if thins is None else thins)
    _pair_reduce_kernel[(triton.cdiv(most, arch.reduce.block), len(outs))](
        *padded(outs), *padded(copies), *padded(parts), rows[0], *strips, *ranks,
        copies[0].stride(0), *padded(scales),
        COPY=thins is not None, BLOCK=arch.reduce.block, **arch.reduce.launch.options(),
    )  # fmt: skip
