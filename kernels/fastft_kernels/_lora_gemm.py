"""Launcher of the persistent product that has the low-rank term in its accumulator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastft_kernels import config, lora_config
from fastft_kernels._launch import KEPT, Prepared, cdiv
from fastft_kernels._lora_gemm_kernel import _lora_gemm_kernel
from fastft_kernels._lora_reduce import padded, trio
from fastft_kernels._tiles import GEMM_RANKS

__all__ = ["fits", "product", "product_launch"]

_ALIGNMENT = 16  # bytes, of what a tensor memory descriptor describes


def _describable(tensor: Tensor) -> bool:
    rows, columns = tensor.stride()
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return bool(tensor.numel()) and columns == 1 and aligned and rows * 2 % _ALIGNMENT == 0


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether a product of these wide tensors can take this way: an architecture with tensor
    memory descriptors, 16-bit elements, at most three layers, rows of whole 16 bytes."""
    arch = lora_config.for_device(tensors[0].device)
    return (
        arch.gemm is not None
        and tensors[0].element_size() == 2
        and len(tensors) <= 2 * lora_config.MAX_SIBLINGS + 1
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
    launch = product_launch(
        y.device, *y.shape, tuple([x.shape[1] for x in xs]), tuple([s.shape[1] for s in ss]),
        tuple([float(s) for s in scales]), masks[0] is not None, transposed, bias is not None,
    )  # fmt: skip
    drops = [mask for mask in masks if mask is not None]
    launch(y, *xs, *weights, *ss, *matrices, *drops, *(() if bias is None else (bias,)))


@functools.lru_cache(maxsize=KEPT)
def product_launch(
    device: torch.device,
    tokens: int,
    features: int,
    depths: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    masked: bool,
    transposed: bool,
    has_bias: bool,
) -> Prepared:
    """Of y, the xs, weights, ss, matrices, masks if it is masked, and the bias if there is one."""
    tile = lora_config.for_device(device).gemm[masked]  # type: ignore[index]
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    wide = [block_n, block_k] if transposed else [block_k, block_n]
    few = max(ranks) <= GEMM_RANKS[True]
    programs = min(cdiv(tokens, block_m) * cdiv(features, block_n), config.processors(device))
    n, end = len(depths), 1 + (5 if masked else 4) * len(depths)
    # A descriptor is encoded anew at every launch: of tensors that are not there, there are none.
    missing = [None] * (lora_config.MAX_SIBLINGS - n)
    descriptors = (*range(1, 1 + n), *missing, *range(1 + n, 1 + 2 * n), *missing, 0)
    pointers = (*trio(1 + 2 * n, n), *trio(1 + 3 * n, n), *trio(1 + 4 * n, n if masked else 0))
    blocks = {at: [block_m, block_k] for at in range(3)} | dict.fromkeys(range(3, 6), wide)
    return Prepared(
        _lora_gemm_kernel, (programs,), (*descriptors, *pointers, end if has_bias else 0),
        (tokens, features, *padded(depths), *padded(ranks), *padded(scales), programs),
        blocks=blocks | {6: [block_m, tile.part]},
        SIBLINGS=n, TRANSPOSED=transposed, HAS_BIAS=has_bias, MASKED=masked,
        EARLY=few and tile.early, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=GEMM_RANKS[few], PART=tile.part, GROUP_M=tile.group_m, **tile.launch.options(),
    )  # fmt: skip
