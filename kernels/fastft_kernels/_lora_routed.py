"""Launchers of a mixed batch: the thin products of all its adapters in one launch each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import lora_config
from fastft_kernels._lora_routed_kernels import (
    _routed_expand_kernel,
    _routed_outer_kernel,
    _routed_shrink_kernel,
)
from fastft_kernels.multi_tensor import to_device

__all__ = ["Route", "fits", "routes"]

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Span = tuple[int, int]


@functools.lru_cache(maxsize=256)
def fits(owners: tuple[int, ...], spans: tuple[Span, ...]) -> bool:
    """Whether one launch can serve a call: more than one span, and any two the same rows or none in
    common, so that no two programs add to the same rows."""
    distinct = sorted(set(spans))
    apart = all(a[1] <= b[0] for a, b in itertools.pairwise(distinct))
    return len(distinct) > 1 and apart and len(set(zip(owners, spans))) == len(spans)


def routes(owners: Sequence[int], spans: Sequence[Span], x: Tensor) -> bool:
    """Whether this call takes one launch for all adapters. Not while a CUDA graph is captured: a
    replay would copy the tables from host memory that has long been reused."""
    if not fits(tuple(owners), tuple(spans)):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


# What follows is cached on the host and copied at each call, on the stream that reads it.


@functools.lru_cache(maxsize=256)
def _row_programs(spans: tuple[Span, ...], block: int) -> tuple[tuple[int, ...], ...]:
    """(adapter, first row) of every block of rows of every adapter; siblings side by side."""
    programs = []
    for span in sorted(set(spans)):
        members = [j for j, other in enumerate(spans) if other == span]
        rows = range(0, span[1] - span[0], block)
        programs += [(j, row) for row in rows for j in members]
    return tuple(programs)


@functools.lru_cache(maxsize=256)
def _group_programs(
    groups: tuple[tuple[int, ...], ...], spans: tuple[Span, ...], block: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """(first row, first and past the last member) of every block of rows of every group, and the
    members: adapters that add to the same rows of the same tensor."""
    programs, members = [], []
    for group in groups:
        first = len(members)
        members += list(group)
        start, stop = spans[group[0]]
        programs += [(row, first, len(members)) for row in range(0, stop - start, block)]
    return tuple(programs), tuple(members)


@functools.lru_cache(maxsize=256)
def _column_programs(widths: tuple[int, ...], block: int) -> tuple[tuple[int, ...], ...]:
    """(adapter, first column) of every block of columns of every adapter."""
    return tuple((j, c) for j, width in enumerate(widths) for c in range(0, width, block))


def _table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return to_device([value for row in rows for value in row], torch.int32, device)


class Route:
    """One pass over a mixed batch: every adapter's wide tensor, matrix, thin tensor, scale and mask
    in a table on the device."""

    def __init__(
        self,
        wides: Sequence[Tensor],
        matrices: Sequence[Tensor],
        thins: Sequence[Tensor],
        spans: Sequence[Span],
        scales: Sequence[float],
        masks: Sequence[Tensor | None],
    ) -> None:
        self.wides, self.matrices, self.spans = wides, matrices, tuple(spans)
        self.masked = any(mask is not None for mask in masks)
        device = wides[0].device
        fields: list[int] = []
        for wide, matrix, thin, span, mask in zip(
            wides, matrices, thins, spans, masks, strict=True
        ):
            address = 0 if mask is None else mask.data_ptr()
            fields += [wide.data_ptr(), wide.shape[1], matrix.data_ptr(), thin.data_ptr(), address]
            fields += [thin.shape[1], *span]
        self.fields = to_device(fields, torch.int64, device)
        self.scales = to_device(scales, torch.float32, device)
        self.device, self.rank = device, max(t.shape[1] for t in thins)
        self.aligned = all(w.data_ptr() % 16 == 0 and w.shape[1] % 16 == 0 for w in wides)
        self.arch = lora_config.for_device(device)

    def _tile(self, table: lora_config.TileTable) -> tuple[int, lora_config.TileConfig]:
        return lora_config.tile_for(table, self.wides[0].element_size(), self.rank, "masked")

    def _constants(
        self, transposed: bool, block_r: int, tile: lora_config.TileConfig
    ) -> dict[str, Any]:
        return {
            "WIDE": _TYPES[self.wides[0].dtype],
            "ADAPTER": _TYPES[self.matrices[0].dtype],
            "MASKED": self.masked,
            "TRANSPOSED": transposed,
            "ALIGNED": self.aligned,
            "BLOCK_M": tile.block_m,
            "BLOCK_R": block_r,
            **tile.launch.options(),
        }

    def shrink(self, *, transposed: bool) -> None:
        """thin_j = scale_j * drop_j(wide_j[span_j]) a_j^T; a_j is (r, K), or (K, r)."""
        block_r, tile = self._tile(self.arch.shrink)
        programs = _row_programs(self.spans, tile.block_m)
        if programs:
            _routed_shrink_kernel[(len(programs), triton.cdiv(self.rank, block_r))](
                self.fields, self.scales, _table(programs, self.device), BLOCK_K=tile.block_n,
                **self._constants(transposed, block_r, tile),
            )  # fmt: skip

    def expand(self, groups: Sequence[Sequence[int]], *, transposed: bool) -> None:
        """wide[span] += sum over a group of keep_j * scale_j * thin_j w_j; a group's adapters share
        wide tensor and span; w_j is (r, N), or (N, r)."""
        block_r, tile = self._tile(self.arch.expand)
        chosen = tuple(tuple(group) for group in groups)
        programs, members = _group_programs(chosen, self.spans, tile.block_m)
        widest = max(w.shape[1] for w in self.wides)
        if programs and widest:
            _routed_expand_kernel[(len(programs), triton.cdiv(widest, tile.block_n))](
                self.fields, self.scales, _table(programs, self.device),
                to_device(members, torch.int32, self.device), BLOCK_N=tile.block_n,
                **self._constants(transposed, block_r, tile),
            )  # fmt: skip

    def outer(self, outs: Sequence[Tensor], *, transposed: bool) -> None:
        """out_j (r, K), or (K, r), = scale_j * thin_j^T drop_j(wide_j[span_j]). Every program walks
        all rows of its adapter: no partial sums, and the order is fixed."""
        dense = [out if out.is_contiguous() else out.new_empty(out.shape) for out in outs]
        block_r, tile = self._tile(self.arch.outer)
        widths = tuple(w.shape[1] for w in self.wides)
        programs = _column_programs(widths, tile.block_n)
        addresses = to_device([out.data_ptr() for out in dense], torch.int64, self.device)
        if programs:
            table = _table(programs, self.device)
            _routed_outer_kernel[(len(programs), triton.cdiv(self.rank, block_r))](
                self.fields, self.scales, addresses, table, BLOCK_K=tile.block_n,
                **self._constants(transposed, block_r, tile),
            )  # fmt: skip
        for out, made in zip(outs, dense, strict=True):
            if out is not made:
                out.copy_(made)
