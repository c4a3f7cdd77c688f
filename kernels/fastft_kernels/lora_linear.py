"""``lora_linear`` in Triton: y = x W^T + bias + scaling * drop(x) A^T B^T, and its gradients.

What LoRA adds to the frozen products is passes over the wide tensors. There are as few as can be:

    fwd   s_j = drop_j(x) A_j^T           one read of x for all adapters of its rows
    bwd   dS_j = scaling_j dY_i B_j       one read of each dY_i for both
          dB_j = scaling_j dY_i^T s_j
          dA_j = dS_j^T drop_j(x)         one read of x for all adapters

and the two low-rank terms, y_i += scaling_j s_j B_j^T and dx += drop_j'(dS_j A_j), take one of
three ways (``fastft_kernels.ways`` chooses by the shape):

    expand   after the vendor library's product, one read and write of y, or of dx
    border   inside it: [x | S] [W | s B]^T and [dY | dS] [W ; A] (``fastft_kernels.border``); the
             pass that makes S and dS also leaves what it read beside them
    gemm     in the accumulator of a persistent Triton product

An adapter j belongs to a layer i and to a span of rows. The ways serve layers with one adapter each
over all rows; "one read" holds for up to three adapters of the same rows. A mixed batch's thin
products are one launch each, where each adapter reads its own rows; what is neither takes
``expand`` a span at a time.

Adapters may be float32 next to a 16-bit x: they are cast as they are loaded, accumulation is
float32, and no float32 copy of x exists. Sums over tokens are split by a rule that depends on the
shapes and the architecture only and are added in a fixed order: the same inputs, the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastft_kernels import border, lora_config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_backward import bwd
from fastft_kernels._lora_dropout_kernels import _dropout_mask_kernel
from fastft_kernels._lora_forward import fwd, fwd_adapters, fwd_values
from fastft_kernels._lora_glu import glu_bwd
from fastft_kernels._lora_plain import forward as fwd_plain

__all__ = [
    "bwd",
    "dropout_mask",
    "fwd",
    "fwd_adapters",
    "fwd_plain",
    "fwd_values",
    "glu_bwd",
    "lay_out",
    "supports",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int
) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} inputs"
    if adapter_dtype not in (torch.float32, dtype):
        return f"adapters must be float32 or {dtype}, not {adapter_dtype}"
    if r < 1:
        return f"needs a rank of at least 1, not {r}"
    return supports_device(device_type)


def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
    """Fills ``out``, uint8 (M, ceil(K / 8)), with keep bits of probability 1 - p.

    The bits are a function of ``seed`` (int64, one element, on the device: nothing waits for it),
    p and the position: Philox-4x32-7, 16 bits for each element, so p is rounded to a multiple of
    2^-16. Bits past column K of the last byte may be set; no reader looks at them.
    """
    if out.numel() == 0:
        return
    launch = _mask_launch(out.device, out.numel(), p)
    with device_guard(out):
        launch(out, seed)


@functools.lru_cache(maxsize=KEPT)
def _mask_launch(device: torch.device, size: int, p: float) -> Prepared:
    block = lora_config.for_device(device).mask
    return Prepared(
        _dropout_mask_kernel, (cdiv(size, block.block),), (0, 1), (size, round(p * 65536)),
        BLOCK=block.block, **block.launch.options(),
    )  # fmt: skip


def lay_out(weights: Sequence[Tensor], ranks: Sequence[int]) -> border.Border:
    """Copies the weights of layers that share their input into one bordered buffer; calls with its
    ``weights`` and adapters of these ranks may take that way as long as the result is held."""
    return border.make(weights, ranks)
