"""The thin products of a mixed batch in one launch each, whatever the number of adapters.

What differs between adapters is read from two tables: ``fields``, int64 (adapters, 8), a row

    address of the wide tensor, its columns, address of the adapter's matrix, address of the thin
    tensor, address of the dropout mask (0: none), rank, first row, row past the last

and ``scales``, float32 (adapters,). The thin tensor and the mask start at the adapter's first row,
the wide one at row 0. A program is told its adapter, or a list of them, and its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels._lora_dropout_kernels import _drop, _keep_bytes

__all__ = ["_routed_expand_kernel", "_routed_outer_kernel", "_routed_shrink_kernel"]

FIELDS: tl.constexpr = tl.constexpr(8)


@triton.jit
def _wide_tensor(field, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """(pointer, columns) of the wide tensor; ALIGNED: both multiples of 16, for vector access."""
    pointer, columns = tl.load(field).to(tl.pointer_type(WIDE)), tl.load(field + 1)
    if ALIGNED:
        pointer, columns = tl.multiple_of(pointer, 16), tl.multiple_of(columns, 16)
    return pointer, columns


@triton.jit
def _thin_tensor(field, WIDE: tl.constexpr):
    """(pointer, rank, address of the mask, first row, number of rows) of an adapter."""
    begin = tl.load(field + 6)
    pointer = tl.load(field + 3).to(tl.pointer_type(WIDE))
    return pointer, tl.load(field + 5), tl.load(field + 4), begin, tl.load(field + 7) - begin


@triton.jit
def _wide_tile(
    x_ptr, mask_address, begin, rows, row, columns, column, count, K,
    WIDE: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """drop(x) for some rows of an adapter's and some columns."""
    x = tl.load(
        x_ptr + (begin + rows)[:, None] * K + columns[None, :],
        mask=(rows < count)[:, None] & (columns < K)[None, :],
        other=0.0,
    )
    if MASKED:
        words = _words(mask_address, row, column, count, K, BLOCK_M, BLOCK_K)
        x = _drop(x, words, 0, BLOCK_M, BLOCK_K)
    return x.to(WIDE)


@triton.jit
def _words(mask_address, row, column, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The packed keep bits of a tile; all of it where the adapter has no mask."""
    mask = mask_address.to(tl.pointer_type(tl.uint8))
    limit = tl.where(mask_address == 0, 0, rows)  # nothing is loaded through a null pointer
    bits = _keep_bytes(mask, row, column, limit, columns, BLOCK_M, BLOCK_N).to(tl.int32)
    return tl.where(mask_address == 0, 255, bits)


@triton.jit
def _routed_shrink_kernel(
    fields_ptr,
    scales_ptr,
    programs_ptr,  # int32 (programs, 2): adapter, first row within its rows
    WIDE: tl.constexpr,
    ADAPTER: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """s = scale * drop(x) a^T; a is (r, K), or (K, r) where TRANSPOSED."""
    adapter = tl.load(programs_ptr + 2 * tl.program_id(0)).to(tl.int64)
    row = tl.load(programs_ptr + 2 * tl.program_id(0) + 1)
    field = fields_ptr + adapter * FIELDS
    x_ptr, K = _wide_tensor(field, WIDE, ALIGNED)
    a_ptr = tl.load(field + 2).to(tl.pointer_type(ADAPTER))
    s_ptr, r, mask_address, begin, count = _thin_tensor(field, WIDE)
    rows = row + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _wide_tile(
            x_ptr, mask_address, begin, rows, row, k, k0, count, K, WIDE, MASKED, BLOCK_M, BLOCK_K
        )  # fmt: skip
        if TRANSPOSED:
            offset = k[:, None] * r + rank[None, :]
        else:
            offset = rank[None, :] * K + k[:, None]
        a = tl.load(a_ptr + offset, mask=(k < K)[:, None] & (rank < r)[None, :], other=0.0)
        acc = tl.dot(x, a.to(WIDE), acc, input_precision="ieee")
    tl.store(
        s_ptr + rows[:, None] * r + rank[None, :],
        (acc * tl.load(scales_ptr + adapter)).to(WIDE),
        mask=(rows < count)[:, None] & (rank < r)[None, :],
    )


@triton.jit
def _routed_expand_kernel(
    fields_ptr,
    scales_ptr,
    programs_ptr,  # int32 (programs, 3): first row within the rows, first and past the last member
    members_ptr,  # int32: adapters, those of a program next to each other, over the same rows
    WIDE: tl.constexpr,
    ADAPTER: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += sum over the members of keep * scale * s w; w is (r, N), or (N, r) where TRANSPOSED."""
    row = tl.load(programs_ptr + 3 * tl.program_id(0))
    first = tl.load(programs_ptr + 3 * tl.program_id(0) + 1)
    last = tl.load(programs_ptr + 3 * tl.program_id(0) + 2)
    shared = fields_ptr + tl.load(members_ptr + first).to(tl.int64) * FIELDS
    y_ptr, N = _wide_tensor(shared, WIDE, ALIGNED)
    begin = tl.load(shared + 6)
    count = tl.load(shared + 7) - begin
    column = tl.program_id(1) * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for place in range(first, last):
        adapter = tl.load(members_ptr + place).to(tl.int64)
        field = fields_ptr + adapter * FIELDS
        w_ptr = tl.load(field + 2).to(tl.pointer_type(ADAPTER))
        s_ptr = tl.load(field + 3).to(tl.pointer_type(WIDE))
        r = tl.load(field + 5)
        term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in range(0, r, BLOCK_R):
            rank = r0 + tl.arange(0, BLOCK_R)
            s = tl.load(
                s_ptr + rows[:, None] * r + rank[None, :],
                mask=(rows < count)[:, None] & (rank < r)[None, :],
                other=0.0,
            )
            if TRANSPOSED:
                offset = columns[None, :] * r + rank[:, None]
            else:
                offset = rank[:, None] * N + columns[None, :]
            w = tl.load(
                w_ptr + offset, mask=(rank < r)[:, None] & (columns < N)[None, :], other=0.0
            )
            term = tl.dot(s, w.to(WIDE), term, input_precision="ieee")
        term *= tl.load(scales_ptr + adapter)
        if MASKED:
            mask_address = tl.load(field + 4)
            words = _words(mask_address, row, column, count, N, BLOCK_M, BLOCK_N)
            term = _drop(term, words, 0, BLOCK_M, BLOCK_N)
        acc += term
    inside = (rows < count)[:, None] & (columns < N)[None, :]
    tile = y_ptr + (begin + rows)[:, None] * N + columns[None, :]
    y = tl.load(tile, mask=inside, other=0.0)
    tl.store(tile, (y.to(tl.float32) + acc).to(WIDE), mask=inside)


@triton.jit
def _routed_outer_kernel(
    fields_ptr,
    scales_ptr,
    outs_ptr,  # int64 (adapters,): addresses of the results
    programs_ptr,  # int32 (programs, 2): adapter, first column
    WIDE: tl.constexpr,
    ADAPTER: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = scale * s^T drop(x), (r, K), or (K, r) where TRANSPOSED; all rows by one program."""
    adapter = tl.load(programs_ptr + 2 * tl.program_id(0)).to(tl.int64)
    column = tl.load(programs_ptr + 2 * tl.program_id(0) + 1)
    field = fields_ptr + adapter * FIELDS
    x_ptr, K = _wide_tensor(field, WIDE, ALIGNED)
    s_ptr, r, mask_address, begin, count = _thin_tensor(field, WIDE)
    columns = column + tl.arange(0, BLOCK_K)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for row in range(0, count, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        x = _wide_tile(
            x_ptr, mask_address, begin, rows, row, columns, column, count, K,
            WIDE, MASKED, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        s = tl.load(
            s_ptr + rows[None, :] * r + rank[:, None],
            mask=(rows < count)[None, :] & (rank < r)[:, None],
            other=0.0,
        )
        acc = tl.dot(s, x, acc, input_precision="ieee")
    if TRANSPOSED:
        target = columns[None, :] * r + rank[:, None]
    else:
        target = rank[:, None] * K + columns[None, :]
    out_ptr = tl.load(outs_ptr + adapter).to(tl.pointer_type(ADAPTER))
    tl.store(
        out_ptr + target,
        (acc * tl.load(scales_ptr + adapter)).to(ADAPTER),
        mask=(rank < r)[:, None] & (columns < K)[None, :],
    )
