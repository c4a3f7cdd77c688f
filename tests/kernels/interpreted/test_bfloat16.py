"""The patched interpreter converts and multiplies bfloat16 exactly as torch does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tests.kernels.interpreter_bf16 import narrow, widen


@triton.jit
def _round_trip_kernel(out_ptr, in_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(in_ptr + lanes).to(tl.bfloat16))


@triton.jit
def _product_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + rows * N + columns), tl.load(b_ptr + rows * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.dot(a, b))


def test_rounding_is_to_nearest_even() -> None:
    torch.manual_seed(0)
    values = torch.randn(4096)
    ties = torch.tensor([1.00390625, 1.01171875, float("inf"), -float("inf"), 3.4e38, 0.0, -0.0])
    values[: ties.numel()] = ties
    out = torch.empty(4096, dtype=torch.bfloat16)
    _round_trip_kernel[(1,)](out, values, BLOCK=4096)
    assert torch.equal(out, values.bfloat16())


def test_nan_and_scalars() -> None:
    bits = torch.tensor([float("nan"), 1.5]).numpy()
    assert widen(narrow(bits))[1] == 1.5
    assert narrow(bits)[0] == 0x7FC0
    assert narrow(bits[1]).shape == ()


def test_product() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    _product_kernel[(1,)](out, a, b, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
