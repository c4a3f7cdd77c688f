"""Launcher of dS and dB of ``lora_linear`` in one read of the gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_kernels import lora_config
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_pair_kernels import _pair_partial_kernel
from fastft_kernels._lora_reduce import add_up, reduce_outers, split_rows
from fastft_kernels._lora_skinny import Copy

__all__ = [
    "PairParts",
    "pair",
    "pair_block",
    "pair_launch",
    "pair_pays",
    "pairs_well",
    "reduce_pairs",
]


def pairs_well(dy: Tensor, r: int) -> bool:
    """Whether :func:`pair` moves fewer bytes than a shrink and an outer of their own.

    The parts of dS, float32 and written and read once, are 8 r / block_n bytes for each element
    that is not read a second time. Rows of dY that are no whole vectors would spill.
    """
    table = lora_config.for_device(dy.device).pair
    return 0 not in dy.shape and pair_pays(table, dy.element_size(), dy.shape[1], r)


def pair_pays(table: dict[int, lora_config.TileConfig], size: int, features: int, r: int) -> bool:
    """The same of sizes, by the tiles of rank blocks; size: bytes of an element of dY."""
    if size != 2 or r > max(table) or features % 16:
        return False
    return 8 * r < size * table[pair_block(table, r)].block_n


def pair_block(table: dict[int, lora_config.TileConfig], r: int) -> int:
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
    r = b.shape[1]
    stride = None if copy is None else copy.wide.stride(0)
    launch, strips, splits = pair_launch(dy.device, tokens, features, r, stride)
    ds_parts = dy.new_empty((strips, tokens, r), dtype=torch.float32)
    db_parts = dy.new_empty((splits, r, features), dtype=torch.float32)
    launch(dy, b, s, ds_parts, db_parts, *(() if copy is None else (copy.wide,)))
    return PairParts(ds, db, None if copy is None else copy.thin[0], ds_parts, db_parts, scale)


@functools.lru_cache(maxsize=KEPT)
def pair_launch(
    device: torch.device, tokens: int, features: int, r: int, stride: int | None
) -> tuple[Prepared, int, int]:
    """The launch, and the strips and splits of its parts. stride: of a copy, if there is one."""
    arch, copies = lora_config.for_device(device), stride is not None
    block_r = pair_block(arch.pair, r)
    tile = (arch.pair_copy if copies else arch.pair)[block_r]
    strips = cdiv(features, tile.block_n)
    splits, rows = split_rows(tokens, tile.block_m, strips, arch.multiprocessors * tile.resident)
    launch = Prepared(
        _pair_partial_kernel, (strips, splits), (0, 1, 2, 3, 4, 5 if copies else 0),
        (tokens, features, r, rows, stride or 0),
        COPY=copies, BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_N=tile.block_n,
        **tile.launch.options(),
    )  # fmt: skip
    return launch, strips, splits


def reduce_pairs(pairs: Sequence[PairParts]) -> None:
    """The ds and dbs of layers over the same rows, three at a time; all leave a copy of ds in one
    bordered operand, or none does."""
    for begin in range(0, len(pairs), lora_config.MAX_SIBLINGS):
        group = pairs[begin : begin + lora_config.MAX_SIBLINGS]
        scales = [p.scale for p in group]
        thins = [p.thin for p in group if p.thin is not None]
        add_up([p.ds for p in group], thins or None, [p.ds_parts for p in group], scales)
        reduce_outers([p.db for p in group], [p.db_parts for p in group], scales, transposed=True)
