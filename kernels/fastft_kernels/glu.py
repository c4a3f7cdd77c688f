"""``glu`` in Triton: activation(gate) * up and its two gradients, one pass each.

A program takes a block of one row: gate and up may be halves of one tensor, so rows are strided.
Everything between load and store is float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._launch import KEPT, Prepared, cdiv

__all__ = ["CODES", "bwd", "fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """activation(x) and its slope; s and rest = 1 - s are made apart, so that neither cancels."""
    if ACTIVATION == 1:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))
        density = 0.39894228040143268 * tl.exp(-0.5 * x * x)
        value = x * cdf
        slope = cdf + x * density
    else:
        if ACTIVATION == 0:
            inner, inner_slope = x, 1.0
        else:
            inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        e = tl.exp(-tl.abs(inner))
        large = 1.0 / (1.0 + e)
        s = tl.where(inner < 0.0, e * large, large)
        rest = tl.where(inner < 0.0, large, e * large)
        value = x * s
        slope = s + x * s * rest * inner_slope
    return value, slope


@triton.jit
def _glu_forward_kernel(
    out_ptr,  # (rows, columns), contiguous
    gate_ptr,  # (rows, columns), rows gate_stride apart
    up_ptr,  # (rows, columns), rows up_stride apart
    columns,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    gate = tl.load(gate_ptr + row * gate_stride + lanes, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + lanes, mask=inside).to(tl.float32)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(out_ptr + row * columns + lanes, value * up, mask=inside)


@triton.jit
def _glu_backward_kernel(
    d_gate_ptr,  # (rows, columns), contiguous, as d_up and d_out
    d_up_ptr,
    d_out_ptr,
    gate_ptr,
    up_ptr,
    columns,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    gate = tl.load(gate_ptr + row * gate_stride + lanes, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + lanes, mask=inside).to(tl.float32)
    d_out = tl.load(d_out_ptr + row * columns + lanes, mask=inside).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    tl.store(d_gate_ptr + row * columns + lanes, d_out * up * slope, mask=inside)
    tl.store(d_up_ptr + row * columns + lanes, d_out * value, mask=inside)


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def _run(backward: bool, tensors: list[Tensor], activation: str) -> None:
    gate, up = tensors[-2:]
    launch = _launch(backward, gate.device, *gate.shape, gate.stride(0), up.stride(0), activation)
    with device_guard(gate):
        launch(*tensors)


@functools.lru_cache(maxsize=KEPT)
def _launch(
    backward: bool,
    device: torch.device,
    rows: int,
    columns: int,
    gate_stride: int,
    up_stride: int,
    activation: str,
) -> Prepared:
    kernel, tensors = (_glu_backward_kernel, 5) if backward else (_glu_forward_kernel, 3)
    block = config.for_device(device).elementwise
    return Prepared(
        kernel, (rows, cdiv(columns, block.block)), range(tensors),
        (columns, gate_stride, up_stride),
        ACTIVATION=CODES[activation], BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip


def fwd(out: Tensor, gate: Tensor, up: Tensor, *, activation: str) -> None:
    """Writes out (rows, columns); gate and up may have strided rows."""
    _run(False, [out, gate, up], activation)


def bwd(
    d_gate: Tensor, d_up: Tensor, d_out: Tensor, gate: Tensor, up: Tensor, *, activation: str
) -> None:
    """Writes the gradients, contiguous."""
    _run(True, [d_gate, d_up, d_out, gate, up], activation)
