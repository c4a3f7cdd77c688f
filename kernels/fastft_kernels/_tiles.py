"""Tiles of the LoRA products: data, one table a product and architecture."""

from __future__ import annotations

from dataclasses import dataclass

from fastft_kernels.config import Launch

__all__ = ["FORMS", "GEMM_RANKS", "GemmTile", "TileConfig", "TileTable"]


@dataclass(frozen=True)
class TileConfig:
    """A two-dimensional tile: ``block_m`` tokens by ``block_n`` features; ``resident``: programs
    that a multiprocessor runs at a time, for sums whose programs are split to fill all."""

    block_m: int
    block_n: int
    launch: Launch
    resident: int = 2


# One matrix, siblings that share a launch, and either with dropout.
FORMS = ("one", "several", "masked")
# Key: (bytes of an element of x, rank block, form).
TileTable = dict[tuple[int, int, str], TileConfig]


@dataclass(frozen=True)
class GemmTile:
    """A tile of the persistent LoRA product; ``part``: columns that get their thin terms, and are
    stored, at a time; ``early``: what few ranks read is asked for before the product; ``group_m``:
    rows of tiles that are walked together."""

    block_m: int
    block_n: int
    block_k: int
    part: int
    launch: Launch
    early: bool = True
    group_m: int = 8


def _forms(table: dict[tuple[int, int, bool], TileConfig]) -> TileTable:
    """A table whose last key says only whether a launch has siblings or dropout."""
    names = {False: FORMS[:1], True: FORMS[1:]}
    return {(*key, form): tile for (*key, more), tile in table.items() for form in names[more]}  # type: ignore[misc]


# Consumer parts (99 KiB of shared memory): shallow pipelines. Where a launch serves one matrix
# without dropout the tile may be wider; three accumulators and the unpacked keep bits need more
# warps to stay in registers.
SHRINK_SMALL: TileTable = _forms(
    {
        (2, 16, False): TileConfig(64, 64, Launch(4, 3)),
        (2, 32, False): TileConfig(64, 64, Launch(4, 3)),
        (2, 64, False): TileConfig(64, 64, Launch(4, 3)),
        (4, 16, False): TileConfig(64, 32, Launch(4, 3)),
        (4, 32, False): TileConfig(64, 32, Launch(4, 2)),
        (2, 16, True): TileConfig(64, 64, Launch(8, 3)),
        (2, 32, True): TileConfig(64, 64, Launch(8, 3)),
        (2, 64, True): TileConfig(32, 64, Launch(8, 2)),
        (4, 16, True): TileConfig(64, 32, Launch(4, 2)),
        (4, 32, True): TileConfig(64, 32, Launch(8, 2)),
    }
)
EXPAND_SMALL: TileTable = _forms(
    {
        (2, 16, False): TileConfig(64, 128, Launch(4, 2)),
        (2, 32, False): TileConfig(64, 128, Launch(4, 2)),
        (2, 64, False): TileConfig(64, 128, Launch(8, 2)),
        (4, 16, False): TileConfig(64, 64, Launch(8, 2)),
        (4, 32, False): TileConfig(64, 64, Launch(8, 2)),
        (2, 16, True): TileConfig(64, 128, Launch(8, 2)),
        (2, 32, True): TileConfig(64, 128, Launch(8, 2)),
        (2, 64, True): TileConfig(64, 64, Launch(8, 2)),
        (4, 16, True): TileConfig(64, 64, Launch(8, 2)),
        (4, 32, True): TileConfig(32, 64, Launch(8, 2)),
    }
)
OUTER_SMALL: TileTable = _forms(
    {
        (2, 16, False): TileConfig(64, 64, Launch(4, 3)),
        (2, 32, False): TileConfig(64, 64, Launch(4, 3)),
        (2, 64, False): TileConfig(64, 64, Launch(4, 3)),
        (4, 16, False): TileConfig(32, 64, Launch(4, 3)),
        (4, 32, False): TileConfig(32, 64, Launch(8, 2)),
        (2, 16, True): TileConfig(64, 64, Launch(4, 3)),
        (2, 32, True): TileConfig(32, 64, Launch(8, 3)),
        (2, 64, True): TileConfig(32, 64, Launch(8, 3), 1),
        (4, 16, True): TileConfig(16, 64, Launch(8, 2)),
        (4, 32, True): TileConfig(16, 64, Launch(8, 2), 1),
    }
)

# Data-centre parts: more bytes in flight to cover the latency of their memory.
SHRINK_LARGE: TileTable = {
    **SHRINK_SMALL,
    (2, 16, "one"): TileConfig(64, 128, Launch(4, 4)),
    (2, 32, "one"): TileConfig(64, 64, Launch(4, 4)),
    (2, 64, "one"): TileConfig(64, 64, Launch(4, 4)),
    **dict.fromkeys([(2, 16, form) for form in FORMS[1:]], TileConfig(64, 64, Launch(4, 4))),
    **dict.fromkeys([(2, 64, form) for form in FORMS[1:]], TileConfig(64, 32, Launch(8, 4))),
}
# Without Hopper's matrix unit, whose operands stay in shared memory, that tile spills.
SHRINK_SM80: TileTable = {
    **SHRINK_LARGE,
    **dict.fromkeys([(2, 64, form) for form in FORMS[1:]], TileConfig(32, 64, Launch(8, 3))),
}
EXPAND_LARGE: TileTable = {**EXPAND_SMALL, (2, 16, "one"): TileConfig(128, 128, Launch(8, 2))}
OUTER_LARGE: TileTable = {
    **OUTER_SMALL,
    **dict.fromkeys([(2, 16, form) for form in FORMS], TileConfig(64, 64, Launch(4, 4))),
    **dict.fromkeys([(2, 64, form) for form in FORMS[1:]], TileConfig(32, 64, Launch(8, 4), 1)),
}
# Measured on an H200, 2026-11-26 and 27, 8192 tokens: the fastest of eight to fifteen tiles each.
SHRINK_SM90: TileTable = {
    **SHRINK_LARGE,
    (2, 16, "several"): TileConfig(64, 128, Launch(4, 4)),
    (2, 16, "masked"): TileConfig(32, 64, Launch(4, 4)),
    (2, 64, "one"): TileConfig(64, 128, Launch(4, 4)),
    (2, 64, "several"): TileConfig(64, 64, Launch(4, 5)),
}
EXPAND_SM90: TileTable = {
    **EXPAND_LARGE,
    (2, 16, "one"): TileConfig(64, 128, Launch(4, 2)),
    (2, 16, "several"): TileConfig(64, 64, Launch(4, 2)),
    (2, 16, "masked"): TileConfig(32, 128, Launch(4, 2)),
    (2, 64, "one"): TileConfig(64, 64, Launch(4, 2)),
    (2, 64, "masked"): TileConfig(64, 64, Launch(4, 2)),
}
OUTER_SM90: TileTable = {
    **OUTER_LARGE,
    (2, 16, "one"): TileConfig(128, 64, Launch(4, 3)),
    (2, 16, "several"): TileConfig(128, 64, Launch(4, 3)),
    (2, 16, "masked"): TileConfig(32, 64, Launch(4, 4), 4),
    (2, 64, "one"): TileConfig(128, 64, Launch(4, 3)),
    (2, 64, "several"): TileConfig(64, 128, Launch(4, 3)),
}

# Registers bound how many run at a time. Without Hopper's matrix unit, whose operands stay in
# shared memory, Triton 3.6 and 3.7 spill a tile of 64 tokens.
PAIR_SMALL = dict.fromkeys((16, 32), TileConfig(32, 256, Launch(8, 3), 1))
PAIR_LARGE = {16: TileConfig(64, 128, Launch(4, 3), 2)}
PAIR_SM90 = {16: TileConfig(64, 256, Launch(8, 3, registers=128), 2)}
# Of wider adapters the parts of dS would be as many bytes as another read of the gradients.
GLU_PAIR_SMALL = {16: TileConfig(16, 128, Launch(4, 2, registers=128), 3)}
GLU_PAIR_LARGE = {16: TileConfig(16, 128, Launch(4, 2, registers=128), 4)}
GLU_PAIR_SM90 = {16: TileConfig(16, 128, Launch(4, 3, registers=128), 4)}

# Ranks of a thin term at a time: of few ranks, which are one block, and of more.
GEMM_RANKS = {True: 16, False: 32}
# The masked product holds its thin term apart from the accumulator until the mask has met it.
GEMM_SM90 = {
    False: GemmTile(128, 256, 64, 256, Launch(8, 3)),
    True: GemmTile(128, 256, 64, 64, Launch(8, 3)),
}
# Terms in sight of each other are given tensor memory of their own (Triton 3.6, 3.7): too much.
GEMM_SM100 = {
    False: GemmTile(128, 256, 64, 256, Launch(8, 3), early=False),
    True: GemmTile(128, 64, 64, 64, Launch(8, 4), early=False),
}
GEMM_SM120 = {
    False: GemmTile(128, 64, 64, 64, Launch(8, 3)),
    True: GemmTile(64, 128, 32, 128, Launch(8, 3)),
}
