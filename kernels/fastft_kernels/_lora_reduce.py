"""Launchers of what the thin products of ``lora_linear`` leave: sums over parts, and casts. Up to
three siblings a launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastft_kernels import lora_config
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_reduce_kernels import (
    _cast_kernel,
    _outer_reduce_kernel,
    _pair_reduce_kernel,
)

__all__ = [
    "add_up",
    "add_up_launch",
    "cast",
    "outers_launch",
    "padded",
    "reduce_outers",
    "split_rows",
    "trio",
]

# Grid axes 1 and 2 hold at most 65535 programs; rank blocks and splits stay far below.
_MAX_SPLITS = 1024


def padded(values: Sequence) -> list:
    """Fills the kernel's three places; the kernel never touches the repeated ones."""
    return [*values, *[values[0]] * (lora_config.MAX_SIBLINGS - len(values))]


def trio(first: int, count: int) -> list[int]:
    """A kernel's three places for so many of a call's tensors from this one on; where there are
    none, for its first, which is never read there."""
    return padded(range(first, first + count)) if count else [0] * lora_config.MAX_SIBLINGS


def cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The matrices in this dtype."""
    made = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
    for begin in range(0, len(made), lora_config.MAX_SIBLINGS):
        end = begin + lora_config.MAX_SIBLINGS
        outs, group = made[begin:end], matrices[begin:end]
        launch = _cast_launch(outs[0].device, tuple([out.numel() for out in outs]))
        launch(*outs, *group)
    return made


@functools.lru_cache(maxsize=KEPT)
def _cast_launch(device: torch.device, sizes: tuple[int, ...]) -> Prepared:
    block, n = lora_config.for_device(device).cast, len(sizes)
    return Prepared(
        _cast_kernel, (cdiv(max(sizes), block.block), n), (*trio(0, n), *trio(n, n)), padded(sizes),
        BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def split_rows(tokens: int, block_m: int, blocks: int, slots: int) -> tuple[int, int]:
    """(splits, rows in each) of ``blocks`` programs a split, ``slots`` of which run at a time.

    The least time, counted in blocks of rows: the turns that the programs take, each as long as its
    rows and two more to begin and to end. A few programs beyond what runs at a time would take a
    whole turn more.
    """
    steps = cdiv(tokens, block_m)
    most = min(cdiv(steps, 4), max(4 * slots // blocks, 1), _MAX_SPLITS)

    def time(splits: int) -> int:
        return cdiv(blocks * splits, slots) * (cdiv(steps, splits) + 2)

    rows = cdiv(steps, min(range(1, most + 1), key=time)) * block_m
    return cdiv(tokens, rows), rows


def reduce_outers(
    outs: Sequence[Tensor], partials: Sequence[Tensor], scales: Sequence[float], *, transposed: bool
) -> None:
    """At most three out_i = scale_i * partial_i (splits_i, r_i, K_i) summed over the splits,
    transposed or not."""
    dense = [out if out.is_contiguous() else out.new_empty(out.shape) for out in outs]
    shapes = tuple([partial.shape for partial in partials])
    launch = outers_launch(outs[0].device, shapes, tuple(scales), transposed)
    launch(*dense, *partials)
    for out, made in zip(outs, dense, strict=True):
        if made is not out:
            out.copy_(made)


@functools.lru_cache(maxsize=KEPT)
def outers_launch(
    device: torch.device,
    shapes: tuple[tuple[int, ...], ...],
    scales: tuple[float, ...],
    transposed: bool,
) -> Prepared:
    block = lora_config.for_device(device).reduce
    splits, ranks, features = zip(*padded(shapes), strict=True)
    n, most = len(shapes), max([r * k for r, k in zip(ranks, features, strict=True)])
    return Prepared(
        _outer_reduce_kernel, (cdiv(most, block.block), n), (*trio(0, n), *trio(n, n)),
        (*splits, *features, *ranks, *padded(scales)),
        TRANSPOSED=transposed, BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip


def add_up(
    outs: Sequence[Tensor],
    thins: Sequence[Tensor] | None,
    parts: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    """At most three out_i (M, r_i) = scale_i * parts_i (strips_i, M, r_i) summed over the strips;
    thins: where each belongs in one bordered operand, too."""
    launch = add_up_launch(
        outs[0].device, tuple([part.shape for part in parts]), tuple(scales),
        None if thins is None else thins[0].stride(0),
    )  # fmt: skip
    launch(*outs, *parts, *(thins or ()))


@functools.lru_cache(maxsize=KEPT)
def add_up_launch(
    device: torch.device,
    shapes: tuple[tuple[int, ...], ...],
    scales: tuple[float, ...],
    stride: int | None,
) -> Prepared:
    """stride: of the copies, where there are any."""
    block = lora_config.for_device(device).reduce
    strips, rows, ranks = zip(*padded(shapes), strict=True)
    n, most = len(shapes), max([rows[0] * r for r in ranks])
    copies = trio(2 * n, 0 if stride is None else n)
    return Prepared(
        _pair_reduce_kernel, (cdiv(most, block.block), n), (*trio(0, n), *copies, *trio(n, n)),
        (rows[0], *strips, *ranks, stride or 0, *padded(scales)),
        COPY=stride is not None, BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip
