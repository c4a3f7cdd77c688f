"""Matrix products on the CPU, by torch's own BLAS, into outputs that are given.

float32, and bfloat16 and float16 where the processor has them, go to ``torch.mm(out=)`` as they
are. On a processor without their arithmetic torch's 16-bit products run at a hundredth of its
float32 ones; there the operands pass through float32 panels that stay in cache, with float32
accumulation.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

__all__ = ["mm_nn", "mm_nt", "mm_tn", "native_bfloat16", "scratch"]

# Elements of one float32 panel: 4 MiB, a share of any last-level cache.
_PANEL = 1 << 20


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer of this thread, kept between calls: nothing is allocated in the steady state.

    Its content is undefined, and the next call with the same name overwrites it.
    """
    numel = 1
    for size in shape:
        numel *= size
    key = (name, dtype)
    buffer = _scratch.buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        # detach from inference mode: such a tensor could not be written in a later training step
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype, device="cpu")  # whatever the default is
        _scratch.buffers[key] = buffer
    return buffer[:numel].view(shape)


@functools.cache
def native_bfloat16() -> bool:
    """Whether torch's bfloat16 products run on this processor's own instructions."""
    # Builds of torch without oneDNN (Apple silicon) do not even register the question.
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def native_float16() -> bool:
    """Whether torch's float16 products run on this processor's own instructions."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )


def _direct(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return native_bfloat16()
    return dtype != torch.float16 or native_float16()


def _panels(rows: int, columns: int) -> list[slice]:
    size = max(1, _PANEL // max(1, columns))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def _wide(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32:
        return tensor
    return scratch(name, tuple(tensor.shape), torch.float32).copy_(tensor)


def _gemm(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    """out (+)= alpha * a @ b in one library call."""
    if accumulate or alpha != 1.0:
        torch.addmm(out, a, b, beta=1.0 if accumulate else 0.0, alpha=alpha, out=out)
    else:
        torch.mm(a, b, out=out)


def mm_nt(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> None:
    """out (+)= alpha * a @ b^T; a: (M, K), b: (N, K), out: (M, N)."""
    if _direct(out.dtype):
        return _gemm(out, a, b.t(), alpha, accumulate)
    for rows in _panels(a.shape[0], a.shape[1]):
        a32 = _wide("a", a[rows])
        for columns in _panels(b.shape[0], max(b.shape[1], a32.shape[0])):
            part = out[rows, columns]
            out32 = scratch("out", tuple(part.shape), torch.float32)
            if accumulate:
                out32.copy_(part)
            _gemm(out32, a32, _wide("b", b[columns]).t(), alpha, accumulate)
            part.copy_(out32)
    return None


def mm_nn(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> None:
    """out (+)= alpha * a @ b; a: (M, N), b: (N, K), out: (M, K)."""
    if _direct(out.dtype):
        return _gemm(out, a, b, alpha, accumulate)
    for rows in _panels(a.shape[0], max(a.shape[1], out.shape[1])):
        a32 = _wide("a", a[rows])
        part = out[rows]
        out32 = scratch("out", tuple(part.shape), torch.float32)
        if accumulate:
            out32.copy_(part)
        else:
            out32.zero_()
        for inner in _panels(b.shape[0], b.shape[1]):
            _gemm(out32, a32[:, inner], _wide("b", b[inner]), alpha, True)
        part.copy_(out32)
    return None


def mm_tn(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> None:
    """out = alpha * a^T @ b; a: (M, R), b: (M, K), out: (R, K). ``out`` may be float32 over
    16-bit operands."""
    if _direct(a.dtype) and 4 * out.shape[1] <= out.shape[0]:
        # A tall, thin result (dB) costs the library twice the time of its transpose.
        product = scratch("out", (out.shape[1], out.shape[0]), a.dtype)
        _gemm(product, b.t(), a, alpha, False)
        out.copy_(product.t())
        return None
    if a.dtype == out.dtype and _direct(out.dtype):
        return _gemm(out, a.t(), b, alpha, False)
    if _direct(a.dtype):
        product = scratch("out", tuple(out.shape), a.dtype)
        _gemm(product, a.t(), b, alpha, False)
        out.copy_(product)
        return None
    out32 = scratch("out", tuple(out.shape), torch.float32)
    out32.zero_()
    for rows in _panels(a.shape[0], b.shape[1]):
        _gemm(out32, _wide("a", a[rows]).t(), _wide("b", b[rows]), alpha, True)
    out.copy_(out32)
    return None
