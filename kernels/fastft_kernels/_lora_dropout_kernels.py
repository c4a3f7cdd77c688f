"""Dropout of ``lora_linear`` in Triton: how keep bits are drawn, and how a tile meets them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels import _common

__all__ = ["_drop", "_dropout_mask_kernel", "_keep_bytes", "_keep_words"]

INTERPRETED: tl.constexpr = tl.constexpr(_common.INTERPRETED)


@triton.jit
def _philox(low, high, seed):
    """Philox-4x32-7 (Salmon et al. 2011), the fewest rounds that pass BigCrush, with the counter
    (low, high, 0, 0): four uint32. A product is one 64-bit one, which makes both its halves."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = low, high
    c2, c3 = tl.zeros_like(low), tl.zeros_like(low)
    for _ in tl.static_range(7):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ key0, (a >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _halves_kept(word, least, small):
    """Bits 15 and 31: whether each half of the word is at least the threshold, of which ``least``
    has the lower 15 bits in each half, and ``small`` bits 15 and 31 where there is no more."""
    lower = (word | 0x80008000) - least  # bit 15: the lower 15 bits are at least the threshold's
    return (word & lower) | ((word | lower) & small)


@triton.jit(do_not_specialize=["threshold"])
def _dropout_mask_kernel(
    out_ptr,  # uint8 (M, ceil(K / 8))
    seed_ptr,  # int64 (1,)
    n_bytes,
    threshold,  # an element is dropped where its 16 random bits are below this
    BLOCK: tl.constexpr,
):
    """out[m, j] = eight keep bits, of the eight halves of Philox's four words with the byte's index
    as the counter: the bits of a CPU."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = _philox(index.to(tl.uint32), (index >> 32).to(tl.uint32), tl.load(seed_ptr))
    both = threshold.to(tl.uint32) * 0x10001
    least, small = both & 0x7FFF7FFF, both ^ 0xFFFFFFFF
    # Even bits of the byte from bit 0 on, odd ones from bit 16 on; none where all are dropped.
    first = tl.where(threshold < 65536, 0x10001, 0).to(tl.uint32)
    spread = tl.zeros((BLOCK,), tl.uint32)
    for i in tl.static_range(4):
        spread |= (_halves_kept(words[i], least, small) >> (15 - 2 * i)) & (first << 2 * i)
    tl.store(out_ptr + index, (spread | (spread >> 15)).to(tl.uint8), mask=index < n_bytes)


@triton.jit
def _keep_bytes(mask_ptr, row, column, end, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The packed keep bits of a (BLOCK_M, BLOCK_N) tile of rows below ``end``."""
    row_bytes = (K + 7) // 8
    rows = tl.arange(0, BLOCK_M)
    bytes_ = column // 8 + tl.arange(0, BLOCK_N // 8)
    return tl.load(
        mask_ptr + tl.cast(row, tl.int64) * row_bytes + rows[:, None] * row_bytes + bytes_[None, :],
        mask=(row + rows < end)[:, None] & (bytes_ < row_bytes)[None, :],
        other=0,
    )


@triton.jit
def _keep_words(bits0, bits1, bits2, SIBLINGS: tl.constexpr):
    """Packed keep bits of siblings in one: byte i of a word is sibling i's, of eight columns."""
    words = bits0.to(tl.int32)
    if SIBLINGS > 1:
        words |= bits1.to(tl.int32) << 8
    if SIBLINGS > 2:
        words |= bits2.to(tl.int32) << 16
    return words


@triton.jit
def _drop(x, words, SIBLING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile x where the sibling keeps it, else 0."""
    bit = tl.arange(0, 8)[None, None, :]
    if x.dtype.primitive_bitwidth != 16 or INTERPRETED:
        kept = tl.reshape(words[:, :, None] & (1 << bit + 8 * SIBLING), (BLOCK_M, BLOCK_N)) != 0
        return tl.where(kept, x, 0.0).to(x.dtype)
    # A shift that serves all siblings makes an element's bits the signs of the word's bytes; of two
    # elements' prmt makes the halves of a mask.
    signs = tl.reshape(words[:, :, None] << 7 - bit, (BLOCK_M, BLOCK_N))
    if SIBLING == 0:
        return _and_signs(x, signs, "prmt.b32 keep, $2, $3, 0xCC88;")
    if SIBLING == 1:
        return _and_signs(x, signs, "prmt.b32 keep, $2, $3, 0xDD99;")
    return _and_signs(x, signs, "prmt.b32 keep, $2, $3, 0xEEAA;")


@triton.jit
def _and_signs(x, signs, SELECT: tl.constexpr):
    code: tl.constexpr = "{ .reg .b32 keep; " + SELECT + " and.b32 $0, $1, keep; }"
    return tl.inline_asm_elementwise(
        code, "=r,r,r,r", [x, signs], dtype=x.dtype, is_pure=True, pack=2
    )
