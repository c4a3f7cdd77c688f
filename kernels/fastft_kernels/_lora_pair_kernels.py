"""dS = dY B and dB = dY^T S in one read of dY, which is the widest tensor of a LoRA backward.

dS sums over the columns of dY and dB over its rows, so a tile of dY gives a part of both: a program
keeps one strip of columns and some rows, and a second pass adds the parts in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["_pair_partial_kernel"]


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _pair_partial_kernel(
    dy_ptr,  # (M, N)
    b_ptr,  # (N, r)
    s_ptr,  # (M, r)
    ds_ptr,  # float32 (strips, M, r)
    db_ptr,  # float32 (splits, r, N)
    copy_ptr,  # (M, copy_stride)
    M, N, r, rows_per_split, copy_stride,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One strip of BLOCK_N columns over one split of the rows; r <= BLOCK_R.

    With COPY also dY itself, into its columns of a library product's bordered operand.
    """
    strip, split = tl.program_id(0), tl.program_id(1)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    b = tl.load(
        b_ptr + columns[:, None] * r + rank[None, :],
        mask=(columns < N)[:, None] & (rank < r)[None, :],
        other=0.0,
    ).to(dy_ptr.dtype.element_ty)
    rows = tl.arange(0, BLOCK_M)
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for step in range(0, rows_per_split, BLOCK_M):
        row = (begin + step).to(tl.int64)
        in_rows = row + rows < end
        inside = in_rows[:, None] & (columns < N)[None, :]
        in_rank = in_rows[:, None] & (rank < r)[None, :]
        dy = tl.load(
            dy_ptr + row * N + rows[:, None] * N + columns[None, :], mask=inside, other=0.0
        )
        if COPY:
            target = copy_ptr + row * copy_stride + rows[:, None] * copy_stride + columns[None, :]
            tl.store(target, dy, mask=inside)
        s = tl.load(
            s_ptr + row * r + rows[None, :] * r + rank[:, None],
            mask=in_rows[None, :] & (rank < r)[:, None],
            other=0.0,
        )
        ds = tl.dot(dy, b, input_precision="ieee")
        tl.store(
            ds_ptr + (strip.to(tl.int64) * M + row + rows[:, None]) * r + rank[None, :],
            ds,
            mask=in_rank,
        )
        db = tl.dot(s, dy, db, input_precision="ieee")
    tl.store(
        db_ptr + (split.to(tl.int64) * r + rank[:, None]) * N + columns[None, :],
        db,
        mask=(rank < r)[:, None] & (columns < N)[None, :],
    )
