"""Triton kernels of ``lora_linear``: shrink, expand-add and the two-stage outer sum.

Each serves up to three siblings, which share the wide operand (x, or dx), in one pass over it.
A wide row is addressed from an int64 base; inside a tile int32 offsets suffice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels._lora_dropout_kernels import _drop, _keep_bytes, _keep_words

__all__ = [
    "_expand_add_kernel",
    "_outer_partial_kernel",
    "_shrink_kernel",
]


@triton.jit
def _shrink_step(
    acc, x, a_ptr, words, k0, r0, K, r, SIBLING: tl.constexpr,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + drop(x) a^T for one block of the contracted axis; a is cast to x's type on load."""
    rank = r0 + tl.arange(0, BLOCK_R)
    k = k0 + tl.arange(0, BLOCK_K)
    # a^T as (BLOCK_K, BLOCK_R): a is (r, K), or (K, r) where TRANSPOSED.
    if TRANSPOSED:
        a_offset = k[:, None] * r + rank[None, :]
    else:
        a_offset = rank[None, :] * K + k[:, None]
    a = tl.load(a_ptr + a_offset, mask=(k < K)[:, None] & (rank < r)[None, :], other=0.0)
    if MASKED:
        x = _drop(x, words, SIBLING, BLOCK_M, BLOCK_K)
    return tl.dot(x, a.to(x.dtype), acc, input_precision="ieee")


@triton.jit
def _shrink_store(
    s_ptr, copy, acc, scale, split, row, r0, M, r,
    COPY: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes s, or the split's part of it, and with COPY once more from the pointers ``copy`` on,
    one a row."""
    rows = tl.arange(0, BLOCK_M)
    rank = r0 + tl.arange(0, BLOCK_R)
    s = (acc * scale).to(s_ptr.dtype.element_ty)
    inside = (row + rows < M)[:, None] & (rank < r)[None, :]
    first = row.to(tl.int64) * r
    if SPLIT:
        first += split.to(tl.int64) * M * r
    tl.store(s_ptr + first + rows[:, None] * r + rank[None, :], s, mask=inside)
    if COPY and not SPLIT:
        tl.store(copy + rank[None, :], s, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x_ptr,  # (M, K)
    a0_ptr, a1_ptr, a2_ptr,  # (r_i, K), or (K, r_i) where TRANSPOSED
    s0_ptr, s1_ptr, s2_ptr,  # (M, r_i), or float32 (splits, M, r_i) where SPLIT
    mask0_ptr, mask1_ptr, mask2_ptr,  # uint8 (M, ceil(K / 8))
    copy_ptr,  # (M, copy_stride): x, then every s_i from column K + first_i
    M, K, r0, r1, r2, scale0, scale1, scale2, copy_stride, first0, first1, first2, k_per_split,
    SIBLINGS: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COPY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s_i = scale_i * drop_i(x) a_i^T for all siblings, reading x once (for each rank block).

    With COPY also [x | s_0 | s_1 ..] for a library product on bordered operands; with SPLIT the
    parts of s_i that splits of K make, which ``_pair_reduce_kernel`` adds up.
    """
    row = tl.program_id(0) * BLOCK_M
    rank = tl.program_id(1) * BLOCK_R
    rows = tl.arange(0, BLOCK_M)
    x_tile = x_ptr + row.to(tl.int64) * K + rows[:, None] * K
    copied_columns = tl.where(rank == 0, K, 0)  # by the first rank block alone
    copy_tile = copy_ptr + row.to(tl.int64) * copy_stride + rows[:, None] * copy_stride
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if SIBLINGS > 1:
        acc1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if SIBLINGS > 2:
        acc2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # Bits of a block are loaded while the one before it is multiplied: no copy in the background is
    # as narrow as theirs would be.
    bits0, bits1, bits2 = 0, 0, 0
    split, begin, end = tl.program_id(2), 0, K
    if SPLIT:
        begin = split * k_per_split
        end = tl.minimum(begin + k_per_split, K)
    if MASKED:
        bits0 = _keep_bytes(mask0_ptr, row, begin, M, K, BLOCK_M, BLOCK_K)
        if SIBLINGS > 1:
            bits1 = _keep_bytes(mask1_ptr, row, begin, M, K, BLOCK_M, BLOCK_K)
        if SIBLINGS > 2:
            bits2 = _keep_bytes(mask2_ptr, row, begin, M, K, BLOCK_M, BLOCK_K)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_tile + k[None, :], mask=(row + rows < M)[:, None] & (k < K)[None, :], other=0.0
        )
        next0, next1, next2, words = bits0, bits1, bits2, 0
        if MASKED:
            words = _keep_words(bits0, bits1, bits2, SIBLINGS)
            next0 = _keep_bytes(mask0_ptr, row, k0 + BLOCK_K, M, K, BLOCK_M, BLOCK_K)
            if SIBLINGS > 1:
                next1 = _keep_bytes(mask1_ptr, row, k0 + BLOCK_K, M, K, BLOCK_M, BLOCK_K)
            if SIBLINGS > 2:
                next2 = _keep_bytes(mask2_ptr, row, k0 + BLOCK_K, M, K, BLOCK_M, BLOCK_K)
        if COPY:
            copied = (row + rows < M)[:, None] & (k < copied_columns)[None, :]
            tl.store(copy_tile + k[None, :], x, mask=copied)
            if a0_ptr.dtype.element_ty == x_ptr.dtype.element_ty:
                # Changes nothing but where the products read x, which is not in the buffer that the
                # copies ahead write: where a loaded tile goes into registers too, Triton 3.6 counts
                # one buffer too few for products that run on in the background.
                x = tl.where((row + rows < M)[:, None], x, 0.0).to(x.dtype)
        acc0 = _shrink_step(
            acc0, x, a0_ptr, words, k0, rank, K, r0, 0,
            MASKED, TRANSPOSED, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        if SIBLINGS > 1:
            acc1 = _shrink_step(
                acc1, x, a1_ptr, words, k0, rank, K, r1, 1,
                MASKED, TRANSPOSED, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        if SIBLINGS > 2:
            acc2 = _shrink_step(
                acc2, x, a2_ptr, words, k0, rank, K, r2, 2,
                MASKED, TRANSPOSED, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        bits0, bits1, bits2 = next0, next1, next2
    _shrink_store(
        s0_ptr, copy_tile + K + first0, acc0, scale0, split, row, rank, M, r0,
        COPY, SPLIT, BLOCK_M, BLOCK_R,
    )  # fmt: skip
    if SIBLINGS > 1:
        _shrink_store(
            s1_ptr, copy_tile + K + first1, acc1, scale1, split, row, rank, M, r1,
            COPY, SPLIT, BLOCK_M, BLOCK_R,
        )  # fmt: skip
    if SIBLINGS > 2:
        _shrink_store(
            s2_ptr, copy_tile + K + first2, acc2, scale2, split, row, rank, M, r2,
            COPY, SPLIT, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _expand_term(
    s_ptr, w_ptr, scale, row, column, M, N, r, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale * s w for one tile, in float32."""
    rows = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s_tile = s_ptr + row.to(tl.int64) * r + rows[:, None] * r
    for r0 in range(0, r, BLOCK_R):
        rank = r0 + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_tile + rank[None, :], mask=(row + rows < M)[:, None] & (rank < r)[None, :], other=0.0
        )
        # w as (BLOCK_R, BLOCK_N): w is (r, N), or (N, r) where TRANSPOSED.
        if TRANSPOSED:
            w_offset = columns[None, :] * r + rank[:, None]
        else:
            w_offset = rank[:, None] * N + columns[None, :]
        w = tl.load(w_ptr + w_offset, mask=(rank < r)[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(s, w.to(s.dtype), acc, input_precision="ieee")
    return acc * scale


@triton.jit(do_not_specialize=["M"])
def _expand_add_kernel(
    y_ptr,  # (M, N)
    bias_ptr,  # (N,)
    s0_ptr, s1_ptr, s2_ptr,  # (M, r_i)
    w0_ptr, w1_ptr, w2_ptr,  # (r_i, N), or (N, r_i) where TRANSPOSED
    mask0_ptr, mask1_ptr, mask2_ptr,  # uint8 (M, ceil(N / 8))
    M, N, r0, r1, r2, scale0, scale1, scale2,
    SIBLINGS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FRESH: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += bias + sum_i keep_i * scale_i * s_i w_i: one read and one write of y, or where FRESH,
    without what was in y, only the write."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks_n) * BLOCK_M
    column = (tl.program_id(0) % blocks_n) * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside = (row + rows < M)[:, None] & (columns < N)[None, :]
    y_tile = y_ptr + row.to(tl.int64) * N + rows[:, None] * N + columns[None, :]
    # What comes from memory is asked for before anything is computed.
    if FRESH:
        y = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
    else:
        y = tl.load(y_tile, mask=inside, other=0.0)
    bits0, bits1, bits2 = 0, 0, 0
    if MASKED:
        bits0 = _keep_bytes(mask0_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
        if SIBLINGS > 1:
            bits1 = _keep_bytes(mask1_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
        if SIBLINGS > 2:
            bits2 = _keep_bytes(mask2_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
    acc = _expand_term(
        s0_ptr, w0_ptr, scale0, row, column, M, N, r0, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R
    )
    words = 0
    if MASKED:
        words = _keep_words(bits0, bits1, bits2, SIBLINGS)
        acc = _drop(acc, words, 0, BLOCK_M, BLOCK_N)
    if SIBLINGS > 1:
        term = _expand_term(
            s1_ptr, w1_ptr, scale1, row, column, M, N, r1, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R
        )
        acc += _drop(term, words, 1, BLOCK_M, BLOCK_N) if MASKED else term
    if SIBLINGS > 2:
        term = _expand_term(
            s2_ptr, w2_ptr, scale2, row, column, M, N, r2, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R
        )
        acc += _drop(term, words, 2, BLOCK_M, BLOCK_N) if MASKED else term
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_tile, (y.to(tl.float32) + acc).to(y.dtype), mask=inside)


@triton.jit
def _outer_step(
    acc, x, d_ptr, words, row, r0, end, r, SIBLING: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + d^T drop(x) for one block of tokens."""
    rows = tl.arange(0, BLOCK_M)
    rank = r0 + tl.arange(0, BLOCK_R)
    # d^T as (BLOCK_R, BLOCK_M).
    d = tl.load(
        d_ptr + row.to(tl.int64) * r + rows[None, :] * r + rank[:, None],
        mask=(row + rows < end)[None, :] & (rank < r)[:, None],
        other=0.0,
    )
    if MASKED:
        x = _drop(x, words, SIBLING, BLOCK_M, BLOCK_K)
    return tl.dot(d, x, acc, input_precision="ieee")


@triton.jit
def _outer_store(p_ptr, acc, split, r0, column, K, r, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    rank = r0 + tl.arange(0, BLOCK_R)
    columns = column + tl.arange(0, BLOCK_K)
    tl.store(
        p_ptr + (split.to(tl.int64) * r + rank[:, None]) * K + columns[None, :],
        acc,
        mask=(rank < r)[:, None] & (columns < K)[None, :],
    )


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _outer_partial_kernel(
    x_ptr,  # (M, K)
    d0_ptr, d1_ptr, d2_ptr,  # (M, r_i)
    p0_ptr, p1_ptr, p2_ptr,  # float32 (splits, r_i, K)
    mask0_ptr, mask1_ptr, mask2_ptr,  # uint8 (M, ceil(K / 8))
    M, K, r0, r1, r2, rows_per_split,
    SIBLINGS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p_i[split] = d_i^T drop_i(x) over the split's tokens, reading x once for all siblings."""
    column = tl.program_id(0) * BLOCK_K
    rank = tl.program_id(1) * BLOCK_R
    split = tl.program_id(2)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    rows = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_K)
    acc0 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if SIBLINGS > 1:
        acc1 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if SIBLINGS > 2:
        acc2 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    bits0, bits1, bits2 = 0, 0, 0
    if MASKED:
        bits0 = _keep_bytes(mask0_ptr, begin, column, end, K, BLOCK_M, BLOCK_K)
        if SIBLINGS > 1:
            bits1 = _keep_bytes(mask1_ptr, begin, column, end, K, BLOCK_M, BLOCK_K)
        if SIBLINGS > 2:
            bits2 = _keep_bytes(mask2_ptr, begin, column, end, K, BLOCK_M, BLOCK_K)
    for step in range(0, rows_per_split, BLOCK_M):
        row = begin + step
        x = tl.load(
            x_ptr + row.to(tl.int64) * K + rows[:, None] * K + columns[None, :],
            mask=(row + rows < end)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        next0, next1, next2, words = bits0, bits1, bits2, 0
        if MASKED:
            words = _keep_words(bits0, bits1, bits2, SIBLINGS)
            next0 = _keep_bytes(mask0_ptr, row + BLOCK_M, column, end, K, BLOCK_M, BLOCK_K)
            if SIBLINGS > 1:
                next1 = _keep_bytes(mask1_ptr, row + BLOCK_M, column, end, K, BLOCK_M, BLOCK_K)
            if SIBLINGS > 2:
                next2 = _keep_bytes(mask2_ptr, row + BLOCK_M, column, end, K, BLOCK_M, BLOCK_K)
        acc0 = _outer_step(
            acc0, x, d0_ptr, words, row, rank, end, r0, 0,
            MASKED, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        if SIBLINGS > 1:
            acc1 = _outer_step(
                acc1, x, d1_ptr, words, row, rank, end, r1, 1,
                MASKED, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        if SIBLINGS > 2:
            acc2 = _outer_step(
                acc2, x, d2_ptr, words, row, rank, end, r2, 2,
                MASKED, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        bits0, bits1, bits2 = next0, next1, next2
    _outer_store(p0_ptr, acc0, split, rank, column, K, r0, BLOCK_R, BLOCK_K)
    if SIBLINGS > 1:
        _outer_store(p1_ptr, acc1, split, rank, column, K, r1, BLOCK_R, BLOCK_K)
    if SIBLINGS > 2:
        _outer_store(p2_ptr, acc2, split, rank, column, K, r2, BLOCK_R, BLOCK_K)
