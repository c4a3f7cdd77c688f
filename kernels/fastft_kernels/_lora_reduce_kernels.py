"""Second stage of the sums that are split over programs: parts added in a fixed order, for up to
three siblings in one launch; and their adapters cast in one."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["_cast_kernel", "_outer_reduce_kernel", "_pair_reduce_kernel"]


@triton.jit
def _total(p_ptr, parts, size, index, inside, BLOCK: tl.constexpr):
    """The sum of parts that lie ``size`` apart, always in the same order."""
    acc = tl.zeros((BLOCK,), tl.float32)
    fours = parts // 4 * 4
    for first in range(0, fours, 4):
        for step in tl.static_range(4):  # all on their way at a time
            at = p_ptr + tl.cast(first + step, tl.int64) * size + index
            acc += tl.load(at, mask=inside, other=0.0)
    for part in range(fours, parts):
        acc += tl.load(p_ptr + tl.cast(part, tl.int64) * size + index, mask=inside, other=0.0)
    return acc


@triton.jit
def _outer_reduce(
    out_ptr, p_ptr, splits, K, r, scale, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(r, tl.int64) * K
    inside = index < size
    acc = _total(p_ptr, splits, size, index, inside, BLOCK)
    target = (index % K) * r + index // K if TRANSPOSED else index
    tl.store(out_ptr + target, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits0", "splits1", "splits2"])
def _outer_reduce_kernel(
    out0_ptr, out1_ptr, out2_ptr,  # (r_i, K_i), or (K_i, r_i) where TRANSPOSED
    p0_ptr, p1_ptr, p2_ptr,  # float32 (splits_i, r_i, K_i)
    splits0, splits1, splits2, K0, K1, K2, r0, r1, r2, scale0, scale1, scale2,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = scale_i * sum over the splits; the siblings are the grid's second axis."""
    sibling = tl.program_id(1)
    if sibling == 0:
        _outer_reduce(out0_ptr, p0_ptr, splits0, K0, r0, scale0, TRANSPOSED, BLOCK)
    elif sibling == 1:
        _outer_reduce(out1_ptr, p1_ptr, splits1, K1, r1, scale1, TRANSPOSED, BLOCK)
    else:
        _outer_reduce(out2_ptr, p2_ptr, splits2, K2, r2, scale2, TRANSPOSED, BLOCK)


@triton.jit
def _pair_reduce(
    ds_ptr, copy_ptr, p_ptr, M, strips, r, copy_stride, scale,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(M, tl.int64) * r
    inside = index < size
    ds = _total(p_ptr, strips, size, index, inside, BLOCK) * scale
    ds = ds.to(ds_ptr.dtype.element_ty)
    tl.store(ds_ptr + index, ds, mask=inside)
    if COPY:
        tl.store(copy_ptr + (index // r) * copy_stride + index % r, ds, mask=inside)


@triton.jit(do_not_specialize=["strips0", "strips1", "strips2"])
def _pair_reduce_kernel(
    ds0_ptr, ds1_ptr, ds2_ptr,  # (M, r_i)
    copy0_ptr, copy1_ptr, copy2_ptr,  # the first column of each in a bordered operand
    p0_ptr, p1_ptr, p2_ptr,  # float32 (strips_i, M, r_i)
    M, strips0, strips1, strips2, r0, r1, r2, copy_stride, scale0, scale1, scale2,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dS_i = scale_i * sum over the strips; the siblings are the grid's second axis."""
    sibling = tl.program_id(1)
    if sibling == 0:
        _pair_reduce(ds0_ptr, copy0_ptr, p0_ptr, M, strips0, r0, copy_stride, scale0, COPY, BLOCK)
    elif sibling == 1:
        _pair_reduce(ds1_ptr, copy1_ptr, p1_ptr, M, strips1, r1, copy_stride, scale1, COPY, BLOCK)
    else:
        _pair_reduce(ds2_ptr, copy2_ptr, p2_ptr, M, strips2, r2, copy_stride, scale2, COPY, BLOCK)


@triton.jit
def _cast(out_ptr, in_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(in_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _cast_kernel(
    out0_ptr, out1_ptr, out2_ptr,
    in0_ptr, in1_ptr, in2_ptr,
    size0, size1, size2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = in_i in out_i's type; the siblings are the grid's second axis."""
    sibling = tl.program_id(1)
    if sibling == 0:
        _cast(out0_ptr, in0_ptr, size0, BLOCK)
    elif sibling == 1:
        _cast(out1_ptr, in1_ptr, size1, BLOCK)
    else:
        _cast(out2_ptr, in2_ptr, size2, BLOCK)
