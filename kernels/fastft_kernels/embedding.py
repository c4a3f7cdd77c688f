"""``embedding`` in Triton: the gradient of a table's rows, each summed in float32 by one program a
stretch of columns, in the order of its tokens and without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device

__all__ = ["bwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _embedding_backward_kernel(
    d_weight_ptr,  # (rows, columns), as dy
    dy_ptr,  # (count, columns)
    order_ptr,  # int64 (count,): where each of the ids was
    ids_ptr,  # int64 (count,), sorted
    count,
    columns,
    padding,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of the id at ``program_id(0)``, where it is the first of its kind."""
    first = tl.program_id(0)
    own = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    if (own != before) & (own != padding):
        lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = lanes < columns
        total = tl.zeros((BLOCK,), tl.float32)
        places = first + tl.arange(0, TOKENS)
        same = tl.load(ids_ptr + places, mask=places < count, other=-1) == own
        more = 1
        while more > 0:
            tokens = tl.load(order_ptr + places, mask=same, other=0)
            at = tokens[:, None] * columns + lanes[None, :]
            dy = tl.load(dy_ptr + at, mask=same[:, None] & inside[None, :], other=0.0)
            total += tl.sum(dy.to(tl.float32), 0)
            places += TOKENS
            same = tl.load(ids_ptr + places, mask=places < count, other=-1) == own
            more = tl.max(same.to(tl.int32), 0)
        tl.store(d_weight_ptr + own * columns + lanes, total, mask=inside)


# Tokens of a row that are read together.
_TOKENS = 4


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype}"
    return supports_device(device_type)


def bwd(d_weight: Tensor, dy: Tensor, order: Tensor, ids: Tensor, *, padding: int) -> None:
    """Writes the sums of dy's rows into those of d_weight that have a token."""
    count, columns = dy.shape
    block = config.for_device(dy.device).elementwise
    with device_guard(dy):
        _embedding_backward_kernel[(count, triton.cdiv(columns, block.block))](
            d_weight, dy, order, ids, count, columns, padding, TOKENS=_TOKENS, BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip
