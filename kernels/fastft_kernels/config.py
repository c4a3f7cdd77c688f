"""Launch configurations: data, one table per GPU architecture, no autotuning.

A configuration is chosen from the architecture and the call's sizes only, so the same call on the
same kind of GPU always runs the same code and gives the same bits. LoRA's are in ``lora_config``.
``fastft_kernels.aot`` compiles every entry and holds it under ``Arch.shared_limit``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "ARCHS",
    "AdamWConfig",
    "Arch",
    "BlockConfig",
    "CrossEntropyConfig",
    "Launch",
    "NormConfig",
    "RopeConfig",
    "RowConfig",
    "for_device",
    "processors",
]


@dataclass(frozen=True)
class Launch:
    """Compiler options of a launch."""

    num_warps: int = 4
    num_stages: int = 2
    # Registers of a thread at most, where fewer let more programs run at a time.
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch and of ``triton.compile`` alike.

        Fused multiply-add is named because its default differs between Triton versions, and with
        it the last bit of results.
        """
        chosen: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return chosen if self.registers is None else {**chosen, "maxnreg": self.registers}


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
    """One GPU architecture and what is launched on it."""

    name: str
    capability: int
    # Shared memory that one block may use, in bytes.
    shared_limit: int
    # Of the largest such part, for the split of sums over tokens.
    multiprocessors: int
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

ARCHS: dict[int, Arch] = {
    arch.capability: arch
    for arch in (
        Arch("sm_80", 80, 163 * _KIB, 108),
        Arch("sm_86", 86, 99 * _KIB, 84),
        Arch("sm_89", 89, 99 * _KIB, 128),
        Arch("sm_90", 90, 227 * _KIB, 132),
        Arch("sm_100", 100, 227 * _KIB, 148),
        Arch("sm_120", 120, 99 * _KIB, 170),
    )
}


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
