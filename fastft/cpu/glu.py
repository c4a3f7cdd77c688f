"""CPU launcher of ``glu``."""

from __future__ import annotations

from torch import Tensor

from fastft import native
from fastft.cpu._supports import supports as supports

# The codes of csrc/include/fastft/glu.h.
CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
# Whoever needs the result in the backward keeps gate and up, and makes it again: a pass is a
# hundredth of the three products around it, and the result is as large as all else a layer of that
# width keeps.
MAKES_AGAIN = True


def _rows(gate: Tensor, up: Tensor, activation: str) -> tuple[int, ...]:
    strides = (gate.stride(0), up.stride(0))
    return (*gate.shape, *strides, CODES[activation], native.DTYPE_CODES[gate.dtype])


def fwd(out: Tensor, gate: Tensor, up: Tensor, *, activation: str) -> None:
    """Writes out (rows, columns); gate and up may have strided rows."""
    native.module().glu_forward(
        out.data_ptr(), gate.data_ptr(), up.data_ptr(), *_rows(gate, up, activation)
    )


def bwd(
    d_gate: Tensor, d_up: Tensor, d_out: Tensor, gate: Tensor, up: Tensor, *, activation: str
) -> None:
    """Writes the gradients, contiguous."""
    native.module().glu_backward(
        d_gate.data_ptr(),
        d_up.data_ptr(),
        d_out.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        *_rows(gate, up, activation),
    )
