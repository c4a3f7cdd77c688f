"""The backward of a gated unit and, in the same pass, dS and dB of the adapters of the two layers
that gate and up come from.

The gradients of gate and up are the widest tensors of a LoRA backward. A tile of each is still in
registers here, where it gives its part of dS = dY B and of dB = dY^T S, as in
``_lora_pair_kernels``; the products of the frozen weights read them later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastft_kernels.glu import _activate

__all__ = ["_glu_pair_kernel"]


@triton.jit
def _settled(x, SETTLE: tl.constexpr):
    """x of 16 bits, which the compiler may not make again: for each product that takes it in a
    layout of its own it would make the whole activation again in that, and spill."""
    if SETTLE:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    return x


@triton.jit
def _thin_parts(
    dy, b, db, s_ptr, ds_ptr, strip, row, in_rows, M, r,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores the tile's part of dS; db with its part of dB added."""
    rows, rank = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    s = tl.load(
        s_ptr + row * r + (rows[None, :] * r + rank[:, None]),
        mask=in_rows[None, :] & (rank < r)[:, None],
        other=0.0,
    )
    tl.store(
        ds_ptr + (strip.to(tl.int64) * M + row) * r + (rows[:, None] * r + rank[None, :]),
        tl.dot(dy, b, input_precision="ieee"),
        mask=in_rows[:, None] & (rank < r)[None, :],
    )
    return tl.dot(s, dy, db, input_precision="ieee")


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _glu_pair_kernel(
    d_gate_ptr, d_up_ptr,  # (M, N), rows d_stride apart
    d_out_ptr,  # (M, N)
    gate_ptr, up_ptr,  # (M, N), rows gate_stride and up_stride apart
    b0_ptr, b1_ptr,  # (N, r): of gate's layer, and of up's
    s0_ptr, s1_ptr,  # (M, r)
    ds0_ptr, ds1_ptr,  # float32 (strips, M, r)
    db0_ptr, db1_ptr,  # float32 (splits, r, N)
    M, N, r, rows_per_split, gate_stride, up_stride, d_stride,
    ACTIVATION: tl.constexpr,
    SETTLE: tl.constexpr,  # False where interpreted: there is no assembly
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One strip of BLOCK_N columns over one split of the rows; r <= BLOCK_R."""
    strip, split = tl.program_id(0), tl.program_id(1)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    rank, rows = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    b_at = columns[:, None] * r + rank[None, :]
    b_inside = (columns < N)[:, None] & (rank < r)[None, :]
    b0 = tl.load(b0_ptr + b_at, mask=b_inside, other=0.0).to(d_out_ptr.dtype.element_ty)
    b1 = tl.load(b1_ptr + b_at, mask=b_inside, other=0.0).to(d_out_ptr.dtype.element_ty)
    db0 = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    db1 = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for step in range(0, rows_per_split, BLOCK_M):
        row = (begin + step).to(tl.int64)
        in_rows = row + rows < end
        inside = in_rows[:, None] & (columns < N)[None, :]
        # Zeros outside: there the gradients are zero, and so are their parts. One address a tile,
        # 32-bit offsets in it: 64-bit ones would take two registers an element.
        gate_row = gate_ptr + row * gate_stride
        gate = tl.load(
            gate_row + (rows[:, None] * gate_stride + columns[None, :]), mask=inside, other=0.0
        ).to(tl.float32)
        up_row = up_ptr + row * up_stride
        up = tl.load(
            up_row + (rows[:, None] * up_stride + columns[None, :]), mask=inside, other=0.0
        ).to(tl.float32)
        d_row = d_out_ptr + row * N
        d_out = tl.load(d_row + (rows[:, None] * N + columns[None, :]), mask=inside, other=0.0).to(
            tl.float32
        )
        value, slope = _activate(gate, ACTIVATION)
        to = rows[:, None] * d_stride + columns[None, :]
        d_gate = _settled((d_out * up * slope).to(d_out_ptr.dtype.element_ty), SETTLE)
        tl.store(d_gate_ptr + row * d_stride + to, d_gate, mask=inside)
        db0 = _thin_parts(
            d_gate, b0, db0, s0_ptr, ds0_ptr, strip, row, in_rows, M, r, BLOCK_M, BLOCK_R
        )
        d_up = _settled((d_out * value).to(d_out_ptr.dtype.element_ty), SETTLE)
        tl.store(d_up_ptr + row * d_stride + to, d_up, mask=inside)
        db1 = _thin_parts(
            d_up, b1, db1, s1_ptr, ds1_ptr, strip, row, in_rows, M, r, BLOCK_M, BLOCK_R
        )
    db_at = (split.to(tl.int64) * r + rank[:, None]) * N + columns[None, :]
    db_inside = (rank < r)[:, None] & (columns < N)[None, :]
    tl.store(db0_ptr + db_at, db0, mask=db_inside)
    tl.store(db1_ptr + db_at, db1, mask=db_inside)
