"""``rope`` in Triton: queries and keys in one launch, a program a token and a few of its heads."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._launch import KEPT, Prepared, cdiv

__all__ = ["fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _turned(out_ptr, x_ptr, from_pair, to_pair, ca, cb, of_a, of_b, next, inside):
    """Loads pairs (a, b), b ``next`` features behind a, and stores them turned."""
    a = tl.load(x_ptr + from_pair, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + from_pair + next, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + to_pair, a * ca + b * of_a, mask=inside)
    tl.store(out_ptr + to_pair + next, b * cb + a * of_b, mask=inside)


@triton.jit
def _rope_kernel(
    q_out_ptr,  # (batch, heads, tokens, width), as q and k; features next to each other
    k_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,  # (batch or 1, tokens, rotary or half of it)
    sin_ptr,
    q_heads,
    k_heads,
    tokens,
    width,
    half,  # pairs
    table_batch,
    table_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token,  # strides in elements
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    INTERLEAVED: tl.constexpr,
    HALF_TABLES: tl.constexpr,
    BACKWARD: tl.constexpr,
    REST: tl.constexpr,  # features that stay
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(a cos - b sin, b cos + a sin); backward its transpose. Heads of q, then of k."""
    row = tl.program_id(0).to(tl.int64)
    b, m = row // tokens, row % tokens
    lanes = tl.arange(0, BLOCK)
    if INTERLEAVED:
        pair, next = 2 * lanes, 1
    else:
        pair, next = lanes, half
    if HALF_TABLES:
        table, table_next = lanes, 0
    else:
        table, table_next = pair, next
    at = b * table_batch + m * table_token
    known = lanes < half
    ca = tl.load(cos_ptr + at + table, mask=known, other=0.0).to(tl.float32)[None, :]
    cb = tl.load(cos_ptr + at + table + table_next, mask=known, other=0.0).to(tl.float32)[None, :]
    sa = tl.load(sin_ptr + at + table, mask=known, other=0.0).to(tl.float32)[None, :]
    sb = tl.load(sin_ptr + at + table + table_next, mask=known, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        of_a, of_b = sb, -sa
    else:
        of_a, of_b = -sa, sb
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    of_k = head - q_heads
    is_q = head < q_heads
    is_k = (of_k >= 0) & (of_k < k_heads)
    head, of_k = head.to(tl.int64), of_k.to(tl.int64)
    q_from = b * q_batch + m * q_token + head * q_head
    k_from = b * k_batch + m * k_token + of_k * k_head
    q_to = b * q_out_batch + m * q_out_token + head * q_out_head
    k_to = b * k_out_batch + m * k_out_token + of_k * k_out_head
    known = known[None, :]
    pair = pair[None, :]
    # Few programs have heads of both; the others pass one half over.
    first = tl.program_id(1) * HEADS
    if first < q_heads:
        _turned(
            q_out_ptr, q_ptr, q_from + pair, q_to + pair, ca, cb, of_a, of_b, next, is_q & known
        )
    if first + HEADS > q_heads:
        _turned(
            k_out_ptr, k_ptr, k_from + pair, k_to + pair, ca, cb, of_a, of_b, next, is_k & known
        )
    if REST:
        for start in range(0, width - 2 * half, BLOCK):
            column = 2 * half + start + lanes
            inside = (column < width)[None, :]
            column = column[None, :]
            q = tl.load(q_ptr + q_from + column, mask=is_q & inside, other=0.0)
            tl.store(q_out_ptr + q_to + column, q, mask=is_q & inside)
            k = tl.load(k_ptr + k_from + column, mask=is_k & inside, other=0.0)
            tl.store(k_out_ptr + k_to + column, k, mask=is_k & inside)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def fwd(
    outs: list[Tensor],
    xs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    half_tables: bool,
    backward: bool,
) -> None:
    """Writes the turned heads of one or two tensors that share batch, tokens and width."""
    q, q_out = xs[0], outs[0]
    k, k_out = xs[-1], outs[-1]
    batch, heads, tokens, width = q.shape
    strides = (*q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3])
    launch = _launch(
        cos.device, (batch, tokens, width), (heads, k.shape[1] if len(xs) == 2 else 0),
        cos.shape[-1], (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)), strides,
        interleaved, half_tables, backward,
    )  # fmt: skip
    with device_guard(cos):
        launch(q_out, k_out, q, k, cos, sin)


@functools.lru_cache(maxsize=KEPT)
def _launch(
    device: torch.device,
    shape: tuple[int, int, int],
    heads: tuple[int, int],
    rotary: int,
    table: tuple[int, int],
    strides: tuple[int, ...],
    interleaved: bool,
    half_tables: bool,
    backward: bool,
) -> Prepared:
    """shape: batch, tokens, width. heads: of q and of k. rotary: the tables' columns; table: their
    strides. strides: of q, k and their results."""
    rope, (batch, tokens, width) = config.for_device(device).rope, shape
    half = rotary if half_tables else rotary // 2
    return Prepared(
        _rope_kernel, (batch * tokens, cdiv(sum(heads), rope.heads)), range(6),
        (*heads, tokens, width, half, *table, *strides),
        INTERLEAVED=interleaved, HALF_TABLES=half_tables, BACKWARD=backward,
        REST=width > 2 * half, HEADS=rope.heads, BLOCK=max(16, triton.next_power_of_2(half)),
        **rope.launch.options(),
    )  # fmt: skip
