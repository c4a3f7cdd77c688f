"""One product for a frozen layer and its adapter: the low-rank term is added in the accumulator."""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels._lora_linear_kernels import _keep_tile

__all__ = ["_lora_gemm_kernel"]


@triton.jit
def _wide_term(
    acc, x_desc, w_desc, row, column, features,
    TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x w^T (w: (N, K), TRANSPOSED) or x w (w: (K, N)) for one tile."""
    for k in range(0, features, BLOCK_K):
        x = x_desc.load([row, k])
        if TRANSPOSED:
            acc = tl.dot(x, w_desc.load([column, k]).T, acc)
        else:
            acc = tl.dot(x, w_desc.load([k, column]), acc)
    return acc


@triton.jit
def _thin_term(
    acc, s_ptr, l_ptr, mask_ptr, scale, row, column, M, N, r,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + keep * s (scale l): l is (r, N), or (N, r) where TRANSPOSED. The scale goes into l
    before it is rounded to s's type, as the library way's bordered weights have it."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if MASKED else acc
    for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
        rank = r0 + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_ptr + rows[:, None].to(tl.int64) * r + rank[None, :],
            mask=(rows < M)[:, None] & (rank < r)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            offset = columns[None, :] * r + rank[:, None]
        else:
            offset = rank[:, None] * N + columns[None, :]
        low = tl.load(l_ptr + offset, mask=(rank < r)[:, None] & (columns < N)[None, :], other=0.0)
        term = tl.dot(s, (low.to(tl.float32) * scale).to(s.dtype), term)
    if MASKED:
        keep = _keep_tile(mask_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
        return acc + tl.where(keep, term, 0.0)
    return term


@triton.jit(do_not_specialize=["M", "programs"])
def _lora_gemm_kernel(
    x0_desc, x1_desc, x2_desc,  # (M, K_i)
    w0_desc, w1_desc, w2_desc,  # (K_i, N), or (N, K_i) where TRANSPOSED
    y_desc,  # (M, N)
    s0_ptr, s1_ptr, s2_ptr,  # (M, r_i)
    l0_ptr, l1_ptr, l2_ptr,  # (r_i, N), or (N, r_i) where TRANSPOSED
    mask0_ptr, mask1_ptr, mask2_ptr,  # uint8 (M, ceil(N / 8))
    bias_ptr,  # (N,)
    M, N, k0, k1, k2, r0, r1, r2, scale0, scale1, scale2, programs,
    SIBLINGS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = sum_i x_i w_i + keep_i * scale_i * s_i l_i, + bias: y is written once and never read.

    Persistent: ``programs`` of them walk all tiles, GROUP_M rows of tiles at a time, so that the
    operands of neighbours meet in the second-level cache.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, programs):
        group = tile // (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        inside = tile % (GROUP_M * tiles_n)
        row = (group * GROUP_M + inside % height) * BLOCK_M
        column = (inside // height) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _wide_term(acc, x0_desc, w0_desc, row, column, k0, TRANSPOSED, BLOCK_K)
        if SIBLINGS > 1:
            acc = _wide_term(acc, x1_desc, w1_desc, row, column, k1, TRANSPOSED, BLOCK_K)
        if SIBLINGS > 2:
            acc = _wide_term(acc, x2_desc, w2_desc, row, column, k2, TRANSPOSED, BLOCK_K)
        acc = _thin_term(
            acc, s0_ptr, l0_ptr, mask0_ptr, scale0, row, column, M, N, r0,
            TRANSPOSED, MASKED, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if SIBLINGS > 1:
            acc = _thin_term(
                acc, s1_ptr, l1_ptr, mask1_ptr, scale1, row, column, M, N, r1,
                TRANSPOSED, MASKED, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        if SIBLINGS > 2:
            acc = _thin_term(
                acc, s2_ptr, l2_ptr, mask2_ptr, scale2, row, column, M, N, r2,
                TRANSPOSED, MASKED, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        if HAS_BIAS:
            columns = column + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, column], acc.to(y_desc.dtype))
