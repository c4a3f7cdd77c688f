"""Launch configurations: data, one table per GPU architecture, no autotuning.

A configuration is chosen from the architecture, the element size and the rank block only, so the
same call on the same kind of GPU always runs the same code and gives the same bits.
``fastft_kernels.aot`` compiles every entry and holds it under ``Arch.shared_limit``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastft_kernels import _tiles as tiles
from fastft_kernels._tiles import FORMS, GemmTile, Launch, TileConfig, TileTable

__all__ = [
    "ARCHS",
    "BLOCK_RS",
    "FORMS",
    "MAX_SIBLINGS",
    "AdamWConfig",
    "Arch",
    "BlockConfig",
    "CrossEntropyConfig",
    "GemmTile",
    "Launch",
    "NormConfig",
    "RopeConfig",
    "RowConfig",
    "TileConfig",
    "TileTable",
    "block_r_for",
    "for_device",
    "form_of",
    "processors",
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


@dataclass(frozen=True)
class BlockConfig:
    """A one-dimensional kernel: ``block`` items for each program."""

    block: int
    launch: Launch = Launch()


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Row kernels of the loss: one program for each row, ``block_v`` logits at a time."""

    block_v: int = 4096
    launch: Launch = Launch(num_warps=16)


@dataclass(frozen=True)
class AdamWConfig:
    """Multi-tensor AdamW: a program updates ``chunk`` elements, ``block`` at a time."""

    chunk: int = 8192
    block: int = 1024
    launch: Launch = Launch()
    # The single program between the two passes: partial sums, then tensors, at a time.
    prepare_sums: int = 4096
    prepare: BlockConfig = BlockConfig(256, Launch(num_warps=8))


@dataclass(frozen=True)
class RowConfig:
    """A row kernel: a program takes ``rows`` rows, ``block`` features of them at a time."""

    block: int
    launch: Launch
    rows: int = 1


@dataclass(frozen=True)
class NormConfig:
    """Row kernels of the norms: as much of a row at a time as fits, several rows of a head's width.
    ``layer_norm`` takes one row always."""

    # A longer row is walked in blocks of the largest.
    rows: tuple[RowConfig, ...] = (
        RowConfig(128, Launch(num_warps=4), rows=16),
        RowConfig(1024, Launch(num_warps=4)),
        RowConfig(2048, Launch(num_warps=4)),
        RowConfig(4096, Launch(num_warps=4)),
        RowConfig(8192, Launch(num_warps=8)),
    )
    # The weight's gradient: columns of a program, and the rows one program sums. Fixed, so that
    # sums have one order on every GPU.
    weight: BlockConfig = BlockConfig(256, Launch(num_warps=4))
    rows_per_split: int = 128

    def row(self, columns: int) -> RowConfig:
        """The smallest block that holds a row, or the largest there is."""
        return next((b for b in self.rows if columns <= b.block), self.rows[-1])


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: a program takes ``heads`` heads of a token, each whole."""

    heads: int = 8
    launch: Launch = Launch(num_warps=4)


@dataclass(frozen=True)
class Arch:
    """One GPU architecture and everything that is launched on it."""

    name: str
    capability: int
    # Shared memory that one block may use, in bytes.
    shared_limit: int
    # Multiprocessors of the largest such part, for the split of sums over tokens.
    multiprocessors: int
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
    gemm: dict[bool, GemmTile] | None = None
    # Dropout mask: bytes of eight elements; second stage of dA and dB: elements.
    mask: BlockConfig = BlockConfig(512)
    reduce: BlockConfig = BlockConfig(512)
    # Adapters cast for a shrink: elements.
    cast: BlockConfig = BlockConfig(1024)
    cross_entropy: CrossEntropyConfig = CrossEntropyConfig()
    divergence: CrossEntropyConfig = CrossEntropyConfig(block_v=2048)
    # A head's gradient times the loss's: columns of one row.
    scaled: BlockConfig = BlockConfig(2048)
    adamw: AdamWConfig = AdamWConfig()
    # Gated linear units: elements of one row.
    elementwise: BlockConfig = BlockConfig(1024)
    norm: NormConfig = NormConfig()
    rope: RopeConfig = RopeConfig()


_KIB = 1024

# fmt: off
ARCHS: dict[int, Arch] = {
    arch.capability: arch
    for arch in (
        Arch(
            "sm_80", 80, 163 * _KIB, 108, tiles.SHRINK_SM80, tiles.EXPAND_LARGE, tiles.OUTER_LARGE,
            tiles.PAIR_SMALL, tiles.PAIR_SMALL, tiles.GLU_PAIR_LARGE,
        ),
        Arch(
            "sm_86", 86, 99 * _KIB, 84, tiles.SHRINK_SMALL, tiles.EXPAND_SMALL, tiles.OUTER_SMALL,
            tiles.PAIR_SMALL, tiles.PAIR_SMALL, tiles.GLU_PAIR_SMALL,
        ),
        Arch(
            "sm_89", 89, 99 * _KIB, 128, tiles.SHRINK_SMALL, tiles.EXPAND_SMALL, tiles.OUTER_SMALL,
            tiles.PAIR_SMALL, tiles.PAIR_SMALL, tiles.GLU_PAIR_SMALL,
        ),
        Arch(
            "sm_90", 90, 227 * _KIB, 132, tiles.SHRINK_SM90, tiles.EXPAND_SM90, tiles.OUTER_SM90,
            tiles.PAIR_SM90, tiles.PAIR_LARGE, tiles.GLU_PAIR_SM90, tiles.GEMM_SM90,
        ),
        Arch(
            "sm_100", 100, 227 * _KIB, 148, tiles.SHRINK_LARGE, tiles.EXPAND_LARGE,
            tiles.OUTER_LARGE, tiles.PAIR_LARGE, tiles.PAIR_LARGE, tiles.GLU_PAIR_LARGE,
            tiles.GEMM_SM100,
        ),
        Arch(
            "sm_120", 120, 99 * _KIB, 170, tiles.SHRINK_SMALL, tiles.EXPAND_SMALL,
            tiles.OUTER_SMALL, tiles.PAIR_SMALL, tiles.PAIR_SMALL, tiles.GLU_PAIR_SMALL,
            tiles.GEMM_SM120,
        ),
    )
}
# fmt: on


@functools.cache
def _for_capability(capability: int) -> Arch:
    known = [c for c in ARCHS if c <= capability]
    return ARCHS[max(known) if known else min(ARCHS)]


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def for_device(device: torch.device) -> Arch:
    """The table for ``device``: the newest architecture that is not newer than it.

    A CPU tensor only gets here under Triton's interpreter, which runs the oldest table that has
    every kernel.
    """
    if device.type != "cuda":
        return ARCHS[90]
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _for_capability(_capability(index))


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors: what a persistent kernel starts; a few under the interpreter, so
    that each walks several tiles there too."""
    if device.type != "cuda":
        return 3
    return _processors(device.index if device.index is not None else torch.cuda.current_device())
