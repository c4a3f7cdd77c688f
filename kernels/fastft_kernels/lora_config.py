"""Launch configurations of ``lora_linear``: data, one table per GPU architecture.

Apart from those of other operations, which a change of these does not touch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastft_kernels import _tiles as tiles
from fastft_kernels import config
from fastft_kernels._tiles import FORMS, GemmTile, TileConfig, TileTable
from fastft_kernels.config import BlockConfig

__all__ = [
    "ARCHS",
    "BLOCK_RS",
    "FORMS",
    "MAX_SIBLINGS",
    "GemmTile",
    "LoraArch",
    "TileConfig",
    "TileTable",
    "block_r_for",
    "for_device",
    "form_of",
    "tile_for",
]

# Siblings (q/k/v, gate/up) that one launch serves in one read of x; more are served in groups.
MAX_SIBLINGS = 3

# Rank blocks a kernel is built for, by the bytes of an element of x; a larger rank is walked in
# blocks of the largest. Exact float32 products run on the ordinary cores, from registers: their
# operands leave room for 32.
BLOCK_RS: dict[int, tuple[int, ...]] = {2: (16, 32, 64), 4: (16, 32)}


def block_r_for(r: int, element_size: int) -> int:
    """The smallest rank block that holds ``r``, or the largest there is."""
    blocks = BLOCK_RS[element_size]
    return next((block for block in blocks if r <= block), blocks[-1])


def tile_for(table: TileTable, element_size: int, r: int, form: str) -> tuple[int, TileConfig]:
    """(rank block, tile) of a launch; form: one of ``FORMS``."""
    block_r = block_r_for(r, element_size)
    return block_r, table[element_size, block_r, form]


def form_of(siblings: int, masked: bool) -> str:
    """Which of ``FORMS`` a launch has."""
    return "masked" if masked else ("several" if siblings > 1 else "one")


_ELEMENTS, _CAST = BlockConfig(512), BlockConfig(1024)


@dataclass(frozen=True, kw_only=True)
class LoraArch(config.Arch):
    """One GPU architecture with the tiles of LoRA's products."""

    # s = x A^T and dS = scaling dY B: tokens by contracted features.
    shrink: TileTable
    # y += bias + s B^T and dx += dS A: tokens by output features.
    expand: TileTable
    # dA = dS^T x and dB = dY^T s: contracted tokens by features.
    outer: TileTable
    # dS and dB in one read of a 16-bit dY, by rank block: tokens by a strip of features; with a
    # copy of dY.
    pair: dict[int, TileConfig]
    pair_copy: dict[int, TileConfig]
    # The same of gate and up in the backward of their unit, which holds five such tiles.
    glu_pair: dict[int, TileConfig]
    # The persistent product, with dropout or without; None without tensor memory descriptors,
    # where Triton walks them by hand and does not pipeline.
    gemm: dict[bool, GemmTile] | None
    # Dropout mask: bytes of eight elements; second stage of dA and dB: elements.
    mask: BlockConfig = _ELEMENTS
    reduce: BlockConfig = _ELEMENTS
    # Adapters cast for a shrink: elements.
    cast: BlockConfig = _CAST


def _arch(capability: int, **tables: object) -> LoraArch:
    return LoraArch(**vars(config.ARCHS[capability]), **tables)  # type: ignore[arg-type]


ARCHS: dict[int, LoraArch] = {
    arch.capability: arch
    for arch in (
        _arch(
            80, shrink=tiles.SHRINK_SM80, expand=tiles.EXPAND_LARGE, outer=tiles.OUTER_LARGE,
            pair=tiles.PAIR_SMALL, pair_copy=tiles.PAIR_SMALL, glu_pair=tiles.GLU_PAIR_LARGE,
            gemm=None,
        ),
        *(
            _arch(
                capability, shrink=tiles.SHRINK_SMALL, expand=tiles.EXPAND_SMALL,
                outer=tiles.OUTER_SMALL, pair=tiles.PAIR_SMALL, pair_copy=tiles.PAIR_SMALL,
                glu_pair=tiles.GLU_PAIR_SMALL, gemm=gemm,
            )
            for capability, gemm in ((86, None), (89, None), (120, tiles.GEMM_SM120))
        ),
        _arch(
            90, shrink=tiles.SHRINK_SM90, expand=tiles.EXPAND_SM90, outer=tiles.OUTER_SM90,
            pair=tiles.PAIR_SM90, pair_copy=tiles.PAIR_LARGE, glu_pair=tiles.GLU_PAIR_SM90,
            gemm=tiles.GEMM_SM90,
        ),
        _arch(
            100, shrink=tiles.SHRINK_LARGE, expand=tiles.EXPAND_LARGE, outer=tiles.OUTER_LARGE,
            pair=tiles.PAIR_LARGE, pair_copy=tiles.PAIR_LARGE, glu_pair=tiles.GLU_PAIR_LARGE,
            gemm=tiles.GEMM_SM100,
        ),
    )
}  # fmt: skip


def for_device(device: torch.device) -> LoraArch:
    """The table for ``device``, as ``config.for_device``."""
    return ARCHS[config.for_device(device).capability]
