"""bfloat16 for Triton's interpreter, as the hardware does it.

The interpreter of Triton 3.9 keeps bfloat16 as uint16 and (a) multiplies those integers in
``tl.dot``, (b) truncates where a GPU rounds to nearest even. Both would hide, or invent, errors of
a kernel. ``install()`` replaces the two conversions and the product; nothing else is touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["install", "narrow", "widen"]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), to nearest even, NaN to the quiet NaN."""
    # Through the flat bytes: a 0-d array cannot be viewed as another dtype in place.
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def install() -> None:
    """Patches ``InterpreterBuilder`` of this process; needs TRITON_INTERPRET=1."""
    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            wide = interpreter.TensorHandle(widen(source.data), tl.float32)
            return wide if after == tl.float32 else plain_cast(self, wide, target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        return cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        left, right = (widen(h.data) if h.dtype.scalar == tl.bfloat16 else h.data for h in (a, b))
        product = np.matmul(left, right, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = dot
