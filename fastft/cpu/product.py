"""A frozen product that takes LoRA's terms along in its sums: csrc/cpu/product.inc.

It serves bfloat16 on processors whose vectors multiply it (AVX512-BF16), where it is as fast as the
library's product; with matrix units (AMX) the library's is several times faster, and the terms are
passes of their own (``fastft.cpu.thin``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import scratch

__all__ = [
    "MIN_ROWS",
    "Part",
    "Term",
    "deep_product",
    "product",
    "serves",
    "serves_deep",
    "takes",
    "vectors_multiply",
]

# (left, right, right is (cols, depth)); left: (rows, depth).
Part = tuple[Tensor, Tensor, bool]
# (left, right, right is (cols, r), mask, scale); left: (rows, r).
Term = tuple[Tensor, Tensor, bool, Tensor | None, float]

# Fewer rows do not pay for packing the right sides again in every call.
MIN_ROWS = 512
# Of a term: lines of its right side are packed one by one.
_MAX_RANK = 64


@functools.cache
def vectors_multiply() -> bool:
    """Whether this processor multiplies bfloat16, in vectors only."""
    return bool(native.build_info()["native_bfloat16"]) and not has_matrix_units()


def has_matrix_units() -> bool:
    """Whether the library multiplies bfloat16 on AMX; a torch that cannot say is taken to."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is None or bool(ask())


def serves(
    rows: int, lefts: list[Tensor], rights: list[Tensor], bias: Tensor | None = None
) -> bool:
    """Whether a product of these parts is taken, and pays."""
    if rows < MIN_ROWS or not vectors_multiply() or len(lefts) > native.module().PRODUCT_PARTS:
        return False
    if lefts[0].dtype != torch.bfloat16:
        return False
    if bias is not None and not (bias.dtype == torch.bfloat16 and bias.is_contiguous()):
        return False
    for left, right in zip(lefts, rights, strict=True):
        depth = left.shape[1]
        if depth == 0 or depth % 2 or not dense(left) or not right.is_contiguous():
            return False
    return True


def takes(terms: list[Term]) -> bool:
    """Whether these terms go along in a product."""
    return len(terms) <= native.module().PRODUCT_TERMS and all(
        left.shape[1] <= _MAX_RANK and left.is_contiguous() for left, *_ in terms
    )


def dense(rows: Tensor) -> bool:
    """Whether the elements of a row are next to each other."""
    return rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]


def product(out: Tensor, parts: list[Part], terms: list[Term], bias: Tensor | None = None) -> None:
    """out = bias + sum over parts of left right + sum over terms of scale kept * (left right)."""
    c = native.module()
    rows, cols = out.shape
    of_parts = [
        (left.data_ptr(), left.stride(0), left.shape[1], right.data_ptr(), transposed)
        for left, right, transposed in parts
    ]
    of_terms = [
        (
            left.data_ptr(),
            left.shape[1],
            right.data_ptr(),
            right.dtype == torch.float32,
            transposed,
            native.address(mask),
            scale,
        )
        for left, right, transposed, mask, scale in terms
    ]
    work = (of_parts, of_terms, torch.get_num_threads())
    room = scratch("product", (c.product_scratch(rows, cols, *work),), torch.float32)
    at_bias = native.address(bias)
    c.product(out.data_ptr(), out.stride(0), rows, cols, at_bias, *work, room.data_ptr())


def serves_deep(out: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether ``deep_product`` takes these: it is faster than the library's whatever the rows."""
    same = out.dtype == left.dtype == right.dtype == torch.bfloat16
    return (
        same
        and vectors_multiply()
        and left.shape[1] > 0
        and all(dense(t) for t in (out, left))
        and right.is_contiguous()
    )


def deep_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left right, whose sums are far deeper than out is wide: csrc/cpu/deep_product.inc."""
    c, threads = native.module(), torch.get_num_threads()
    room = scratch("product", (c.deep_product_scratch(*out.shape, threads),), torch.float32)
    of_left = (left.data_ptr(), left.stride(0), left.shape[1])
    at_out = (out.data_ptr(), out.stride(0), *out.shape)
    c.deep_product(*at_out, *of_left, right.data_ptr(), threads, room.data_ptr())
