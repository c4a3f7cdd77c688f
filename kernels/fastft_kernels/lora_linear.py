"""``lora_linear`` in Triton: y = x W^T + bias + scaling * drop(x) A^T B^T, and its gradients.

The frozen product is the vendor library's (``torch.mm``); what LoRA adds is done in as few passes
over the wide tensors as there can be without touching that product:

    fwd   s_j = drop_j(x) A_j^T           one read of x for all adapters of its rows
          y_i += bias_i + sum_j scaling_j s_j B_j^T
    bwd   dS_j = scaling_j dY_i B_j       one read of each dY_i
          dx += sum_j drop_j'(dS_j A_j)   one read and write of dx for all adapters
          dA_j = dS_j^T drop_j(x)         one read of x for all adapters
          dB_j = scaling_j dY_i^T s_j     one read of each dY_i

An adapter j belongs to a layer i and to a span of rows; "one read" holds for up to three adapters.

Adapters may be float32 next to a 16-bit x: they are cast as they are loaded, accumulation is
float32, and no float32 copy of x exists. Sums over tokens are split by a rule that depends on the
shapes and the architecture only and are added in a fixed order: the same inputs, the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._lora_linear_kernels import (
    _dropout_mask_kernel,
    _expand_add_kernel,
    _outer_partial_kernel,
    _outer_reduce_kernel,
    _shrink_kernel,
)

__all__ = ["bwd", "dropout_mask", "fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Grid axes 1 and 2 hold at most 65535 programs; rank blocks and splits stay far below.
_MAX_SPLITS = 1024


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
    p and the position: Philox-4x32-10, 16 bits for each element, so p is rounded to a multiple of
    2^-16. Bits past column K of the last byte may be set; no reader looks at them.
    """
    if out.numel() == 0:
        return
    launch = config.for_device(out.device).mask
    with device_guard(out):
        _dropout_mask_kernel[(triton.cdiv(out.numel(), launch.block),)](
            out, seed, out.numel(), round(p * 65536),
            BLOCK=launch.block, **launch.launch.options(),
        )  # fmt: skip


def fwd(
    ys: list[Tensor],
    ss: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """Writes y_i (M, N_i) for every layer, and for adapter j of layer owners[j] over the rows
    spans[j] of x: s_j = drop_j(x) A_j^T (rows, r_j)."""
    lora_as, lora_bs = _dense(lora_as), _dense(lora_bs)
    whole = (0, x.shape[0])
    with device_guard(x):
        for y, weight in zip(ys, weights, strict=True):
            torch.mm(x, weight.t(), out=y)
        keep_scales = _keep_scales(masks, dropout_ps)
        for span, members in _by(spans).items():
            _shrink(
                _at(ss, members), x[slice(*span)], _at(lora_as, members),
                _at(keep_scales, members), _at(masks, members), transposed=False,
            )  # fmt: skip
        for (owner, span), members in _by(zip(owners, spans, strict=True)).items():
            bias = biases[owner] if span == whole else None
            _expand_add(
                ys[owner][slice(*span)], bias, _at(ss, members), _at(lora_bs, members),
                _at(scalings, members), [None] * len(members), transposed=True,
            )  # fmt: skip
        fused = {o for o, span in zip(owners, spans, strict=True) if span == whole}
        for i, bias in enumerate(biases):
            if bias is not None and i not in fused:
                ys[i].add_(bias)


def bwd(
    dx: Tensor | None,
    das: list[Tensor | None],
    dbs: list[Tensor | None],
    dys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """Writes dx (M, K), dA_j (r_j, K) and dB_j (N, r_j), each where it is not None."""
    lora_as, lora_bs = _dense(lora_as), _dense(lora_bs)
    with device_guard(x):
        d_ss: list[Tensor] = [torch.empty_like(s) for s in ss]
        for (owner, span), members in _by(zip(owners, spans, strict=True)).items():
            dy = dys[owner][slice(*span)]
            wanted = [j for j in members if dbs[j] is not None]
            if wanted:
                _outer(
                    _at(dbs, wanted), dy, _at(ss, wanted), _at(scalings, wanted),
                    [None] * len(wanted), transposed=True,
                )  # fmt: skip
            needed = [j for j in members if dx is not None or das[j] is not None]
            if needed:
                _shrink(
                    _at(d_ss, needed), dy, _at(lora_bs, needed), _at(scalings, needed),
                    [None] * len(needed), transposed=True,
                )  # fmt: skip
        keep_scales = _keep_scales(masks, dropout_ps)
        if dx is not None:
            torch.mm(dys[0], weights[0], out=dx)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
        for span, members in _by(spans).items():
            rows = slice(*span)
            if dx is not None:
                _expand_add(
                    dx[rows], None, _at(d_ss, members), _at(lora_as, members),
                    _at(keep_scales, members), _at(masks, members), transposed=False,
                )  # fmt: skip
            wanted = [j for j in members if das[j] is not None]
            if wanted:
                _outer(
                    _at(das, wanted), x[rows], _at(d_ss, wanted), _at(keep_scales, wanted),
                    _at(masks, wanted), transposed=False,
                )  # fmt: skip


def _by(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Positions of equal keys, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def _at(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def _dense(adapters: Sequence[Tensor]) -> list[Tensor]:
    """Adapters may be views (tied, sliced or transposed); the kernels read rows. Small to copy."""
    return [adapter.contiguous() for adapter in adapters]


def _keep_scales(masks: Sequence[Tensor | None], ps: Sequence[float]) -> list[float]:
    """1 / (1 - p) where there is a mask; with p = 1 everything is dropped, and 0 says so."""
    return [
        1.0 if mask is None else (1.0 / (1.0 - p) if p < 1.0 else 0.0)
        for mask, p in zip(masks, ps, strict=True)
    ]


def _groups(masks: Sequence[Tensor | None]) -> list[list[int]]:
    """Siblings that share a launch: at most three, all with a mask or all without."""
    groups = []
    for masked in (False, True):
        members = [i for i, mask in enumerate(masks) if (mask is not None) == masked]
        step = config.MAX_SIBLINGS
        groups += [members[i : i + step] for i in range(0, len(members), step)]
    return groups


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fills the kernel's three places; the kernel never touches the repeated ones."""
    return [*tensors, *[tensors[0]] * (config.MAX_SIBLINGS - len(tensors))]


def _ranks(tensors: Sequence[Tensor]) -> list[int]:
    return [t.shape[1] for t in _padded(tensors)]


def _pick(tensors: Sequence[Tensor], group: Sequence[int]) -> list[Tensor]:
    return _padded([tensors[i] for i in group])


def _pick_masks(masks: Sequence[Tensor | None], group: Sequence[int], stand_in: Tensor) -> list:
    """The group's masks, or (never read) stand-ins where it has none."""
    chosen = [m for i in group if (m := masks[i]) is not None]
    return _padded(chosen or [stand_in])


def _scales(scales: Sequence[float], group: Sequence[int]) -> list[float]:
    chosen = [float(scales[i]) for i in group]
    return chosen + [0.0] * (config.MAX_SIBLINGS - len(chosen))


def _shrink(
    outs: Sequence[Tensor],
    x: Tensor,
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
) -> None:
    """out_i (M, r_i) = scale_i * drop_i(x) a_i^T; a_i is (r_i, K), or (K, r_i) if transposed."""
    tokens, features = x.shape
    if tokens == 0:
        return
    arch = config.for_device(x.device)
    for group in _groups(masks):
        group_outs = _pick(outs, group)
        ranks = _ranks(group_outs)
        masked = masks[group[0]] is not None
        stacked = masked or len(group) > 1
        block_r, tile = config.tile_for(arch.shrink, x.element_size(), max(ranks), stacked)
        grid = (triton.cdiv(tokens, tile.block_m), triton.cdiv(max(ranks), block_r))
        _shrink_kernel[grid](
            x, *_pick(matrices, group), *group_outs, *_pick_masks(masks, group, x),
            tokens, features, *ranks, *_scales(scales, group),
            SIBLINGS=len(group), MASKED=masked, TRANSPOSED=transposed,
            BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_n,
            **tile.launch.options(),
        )  # fmt: skip


def _expand_add(
    y: Tensor,
    bias: Tensor | None,
    ss: Sequence[Tensor],
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
) -> None:
    """y (M, N) += bias + sum_i keep_i * scale_i * s_i w_i; w_i is (r_i, N), or (N, r_i)."""
    tokens, features = y.shape
    if y.numel() == 0:
        return
    arch = config.for_device(y.device)
    for group in _groups(masks):
        group_ss = _pick(ss, group)
        ranks = _ranks(group_ss)
        masked = masks[group[0]] is not None
        stacked = masked or len(group) > 1
        block_r, tile = config.tile_for(arch.expand, y.element_size(), max(ranks), stacked)
        grid = (triton.cdiv(tokens, tile.block_m) * triton.cdiv(features, tile.block_n),)
        _expand_add_kernel[grid](
            y, y if bias is None else bias, *group_ss, *_pick(matrices, group),
            *_pick_masks(masks, group, y), tokens, features, *ranks, *_scales(scales, group),
            SIBLINGS=len(group), HAS_BIAS=bias is not None, MASKED=masked,
            TRANSPOSED=transposed, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r,
            **tile.launch.options(),
        )  # fmt: skip
        bias = None


def _outer(
    outs: Sequence[Tensor],
    x: Tensor,
    ds: Sequence[Tensor],
    scales: Sequence[float],
    masks: Sequence[Tensor | None],
    *,
    transposed: bool,
) -> None:
    """out_i (r_i, K), or (K, r_i) if transposed, = scale_i * d_i^T drop_i(x), in two stages."""
    tokens, features = x.shape
    if tokens == 0 or features == 0:
        for out in outs:
            out.zero_()
        return
    arch = config.for_device(x.device)
    for group in _groups(masks):
        ranks = _ranks(_pick(ds, group))
        masked = masks[group[0]] is not None
        stacked = masked or len(group) > 1
        block_r, tile = config.tile_for(arch.outer, x.element_size(), max(ranks), stacked)
        blocks = (triton.cdiv(features, tile.block_n), triton.cdiv(max(ranks), block_r))
        splits, rows_per_split = _split(tokens, tile.block_m, blocks, arch.target_programs)
        partials = [
            torch.empty((splits, r, features), dtype=torch.float32, device=x.device)
            for r in ranks[: len(group)]
        ]
        _outer_partial_kernel[(*blocks, splits)](
            x, *_pick(ds, group), *_padded(partials), *_pick_masks(masks, group, x),
            tokens, features, *ranks, rows_per_split,
            SIBLINGS=len(group), MASKED=masked,
            BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_n,
            **tile.launch.options(),
        )  # fmt: skip
        for i, partial in zip(group, partials, strict=True):
            out = outs[i] if outs[i].is_contiguous() else outs[i].new_empty(outs[i].shape)
            _outer_reduce_kernel[(triton.cdiv(out.numel(), arch.reduce.block),)](
                out, partial, splits, features, ds[i].shape[1], float(scales[i]),
                TRANSPOSED=transposed, BLOCK=arch.reduce.block, **arch.reduce.launch.options(),
            )  # fmt: skip
            if out is not outs[i]:
                outs[i].copy_(out)


def _split(tokens: int, block_m: int, blocks: tuple[int, int], target: int) -> tuple[int, int]:
    """(splits, rows in each): enough programs to fill the GPU, each with at least four blocks."""
    steps = triton.cdiv(tokens, block_m)
    splits = min(triton.cdiv(target, blocks[0] * blocks[1]), triton.cdiv(steps, 4), _MAX_SPLITS)
    rows = triton.cdiv(steps, max(splits, 1)) * block_m
    return triton.cdiv(tokens, rows), rows
