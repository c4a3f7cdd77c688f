"""Launcher of the persistent product that has the low-rank term in its accumulator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastft_kernels import config
from fastft_kernels._launch import cdiv
from fastft_kernels._lora_gemm_kernel import _lora_gemm_kernel
from fastft_kernels._lora_reduce import padded

__all__ = ["fits", "product"]

_ALIGNMENT = 16  # bytes, of what a tensor memory descriptor describes


def _describable(tensor: Tensor) -> bool:
    rows, columns = tensor.stride()
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return bool(tensor.numel()) and columns == 1 and aligned and rows * 2 % _ALIGNMENT == 0


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether a product of these wide tensors can take this way: an architecture with tensor
    memory descriptors, 16-bit elements, at most three layers, rows of whole 16 bytes."""
    arch = config.for_device(tensors[0].device)
    return (
        arch.gemm is not None
        and tensors[0].element_size() == 2
        and len(tensors) <= 2 * config.MAX_SIBLINGS + 1
        and all(_describable(t) for t in tensors)
    )


def product(
    y: Tensor,
    bias: Tensor | None,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    ss: Sequence[Tensor],
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
) -> None:
    """y (M, N) = bias + sum_i x_i w_i + keep_i * scale_i * s_i l_i; w_i is (K_i, N) and l_i
    (r_i, N), or, if transposed, (N, K_i) and (N, r_i). Masks for all or for none."""
    arch = config.for_device(y.device)
    masked = masks[0] is not None
    tile = arch.gemm[masked]  # type: ignore[index]
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    wide = [block_n, block_k] if transposed else [block_k, block_n]
    x_descs = [TensorDescriptor.from_tensor(x, [block_m, block_k]) for x in xs]
    w_descs = [TensorDescriptor.from_tensor(w, wide) for w in weights]
    tokens, features = y.shape
    tiles = cdiv(tokens, block_m) * cdiv(features, block_n)
    programs = min(tiles, config.processors(y.device))
    _lora_gemm_kernel[(programs,)](
        *padded(x_descs), *padded(w_descs), TensorDescriptor.from_tensor(y, [block_m, block_n]),
        *padded(ss), *padded(matrices), *padded(masks if masked else [y]),
        y if bias is None else bias, tokens, features, *padded([x.shape[1] for x in xs]),
        *padded([s.shape[1] for s in ss]), *padded([float(s) for s in scales]), programs,
        SIBLINGS=len(xs), TRANSPOSED=transposed, HAS_BIAS=bias is not None, MASKED=masked,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=tile.block_r,
        GROUP_M=tile.group_m, **tile.launch.options(),
    )  # fmt: skip
