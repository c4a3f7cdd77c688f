"""One product for a frozen layer and its adapter: the low-rank term is added in the accumulator."""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels._lora_dropout_kernels import _drop, _keep_bytes, _keep_words

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
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's columns as two tiles; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _load_words(
    mask0_ptr, mask1_ptr, mask2_ptr, row, column, M, N,
    SIBLINGS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Packed keep bits of all layers for a tile."""
    bits0 = _keep_bytes(mask0_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
    bits1, bits2 = bits0, bits0
    if SIBLINGS > 1:
        bits1 = _keep_bytes(mask1_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
    if SIBLINGS > 2:
        bits2 = _keep_bytes(mask2_ptr, row, column, M, N, BLOCK_M, BLOCK_N)
    return _keep_words(bits0, bits1, bits2, SIBLINGS)


@triton.jit
def _load_s(s_ptr, row, first, M, r, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """s of a tile's rows, ranks from ``first`` on."""
    rows, rank = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_R)
    at = rows[:, None].to(tl.int64) * r + rank[None, :]
    return tl.load(s_ptr + at, mask=(rows < M)[:, None] & (rank < r)[None, :], other=0.0)


@triton.jit
def _load_l(
    l_ptr, column, first, N, r, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """l of some columns, ranks from ``first`` on: l is (r, N), or (N, r) where TRANSPOSED."""
    columns, rank = column + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_R)
    if TRANSPOSED:
        at = columns[None, :] * r + rank[:, None]
    else:
        at = rank[:, None] * N + columns[None, :]
    return tl.load(l_ptr + at, mask=(rank < r)[:, None] & (columns < N)[None, :], other=0.0)


@triton.jit
def _scaled(low, scale, s):
    """scale low in s's type; the scale goes in before low is rounded, as the library way's bordered
    weights have it."""
    return (low.to(tl.float32) * scale).to(s.dtype)


@triton.jit
def _thin_term(
    acc, s_ptr, l_ptr, scale, row, column, M, N, r,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + s (scale l), a block of ranks at a time."""
    for first in tl.range(0, r, BLOCK_R, num_stages=1):
        s = _load_s(s_ptr, row, first, M, r, BLOCK_M, BLOCK_R)
        low = _load_l(l_ptr, column, first, N, r, TRANSPOSED, BLOCK_N, BLOCK_R)
        acc = tl.dot(s, _scaled(low, scale, s), acc)
    return acc


@triton.jit(do_not_specialize=["M", "programs"])
def _lora_gemm_kernel(
    x0_desc, x1_desc, x2_desc,  # (M, K_i)
    w0_desc, w1_desc, w2_desc,  # (K_i, N), or (N, K_i) where TRANSPOSED
    y_desc,  # (M, N), stored PART columns at a time
    s0_ptr, s1_ptr, s2_ptr,  # (M, r_i)
    l0_ptr, l1_ptr, l2_ptr,  # (r_i, N), or (N, r_i) where TRANSPOSED
    mask0_ptr, mask1_ptr, mask2_ptr,  # uint8 (M, ceil(N / 8))
    bias_ptr,  # (N,)
    M, N, k0, k1, k2, r0, r1, r2, scale0, scale1, scale2, programs,
    SIBLINGS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    EARLY: tl.constexpr,  # no rank is above BLOCK_R
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART: tl.constexpr,  # BLOCK_N, a half or a quarter of it
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = sum_i x_i w_i + keep_i * scale_i * s_i l_i, + bias: y is written once and never read.

    Persistent: ``programs`` of them walk all tiles, GROUP_M rows of tiles at a time, so that the
    operands of neighbours meet in the second-level cache. EARLY: what the thin terms read is asked
    for before a tile's product. A masked term is a sum apart until its mask has met it, and
    registers hold one beside the accumulator only a part of a tile at a time.
    """
    PARTS: tl.constexpr = BLOCK_N // PART
    xs, ws = (x0_desc, x1_desc, x2_desc), (w0_desc, w1_desc, w2_desc)
    ss, ls = (s0_ptr, s1_ptr, s2_ptr), (l0_ptr, l1_ptr, l2_ptr)
    depths, ranks, scales = (k0, k1, k2), (r0, r1, r2), (scale0, scale1, scale2)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, programs):
        group = tile // (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        inside = tile % (GROUP_M * tiles_n)
        row = (group * GROUP_M + inside % height) * BLOCK_M
        column = (inside // height) * BLOCK_N
        early_s, early_l, early_words = (), (), ()
        if EARLY:
            for i in tl.static_range(SIBLINGS):
                early_s += (_load_s(ss[i], row, 0, M, ranks[i], BLOCK_M, BLOCK_R),)
            for part in tl.static_range(PARTS):
                at = column + part * PART
                for i in tl.static_range(SIBLINGS):
                    low = _load_l(ls[i], at, 0, N, ranks[i], TRANSPOSED, PART, BLOCK_R)
                    early_l += (_scaled(low, scales[i], early_s[i]) if MASKED else low,)
                if MASKED:
                    words = _load_words(
                        mask0_ptr, mask1_ptr, mask2_ptr, row, at, M, N, SIBLINGS, BLOCK_M, PART
                    )
                    early_words += (words,)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(SIBLINGS):
            acc = _wide_term(acc, xs[i], ws[i], row, column, depths[i], TRANSPOSED, BLOCK_K)
        if BLOCK_N == PART:
            parts = (acc,)
        elif BLOCK_N == 2 * PART:
            parts = _halves(acc, BLOCK_M, BLOCK_N)
        else:
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            parts = _halves(left, BLOCK_M, 2 * PART) + _halves(right, BLOCK_M, 2 * PART)
        for part in tl.static_range(PARTS):
            at = column + part * PART
            y = parts[part]
            words = 0
            if MASKED and EARLY:
                words = early_words[part]
            elif MASKED:
                words = _load_words(
                    mask0_ptr, mask1_ptr, mask2_ptr, row, at, M, N, SIBLINGS, BLOCK_M, PART
                )
            for i in tl.static_range(SIBLINGS):
                term = tl.zeros((BLOCK_M, PART), tl.float32) if MASKED else y
                if EARLY:
                    s, low = early_s[i], early_l[part * SIBLINGS + i]
                    if not MASKED:
                        # Changes nothing but when: what is made here goes to shared memory behind
                        # the product, what was loaded would at once, and be waited for.
                        s = tl.where(tl.arange(0, BLOCK_R)[None, :] < ranks[i], s, 0.0).to(s.dtype)
                        low = _scaled(low, scales[i], s)
                    term = tl.dot(s, low, term)
                else:
                    term = _thin_term(
                        term, ss[i], ls[i], scales[i], row, at, M, N, ranks[i],
                        TRANSPOSED, BLOCK_M, PART, BLOCK_R,
                    )  # fmt: skip
                y = y + _drop(term, words, i, BLOCK_M, PART) if MASKED else term
            if HAS_BIAS:
                columns = at + tl.arange(0, PART)
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
                y += bias.to(tl.float32)[None, :]
            y_desc.store([row, at], y.to(y_desc.dtype))
