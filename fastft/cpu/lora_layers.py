"""LoRA over layers that share an input as one native call: csrc/cpu/lora_layers.cpp.

The kernels and their order are those of ``fastft.cpu.lora_linear``; what is saved is the way there
and back, a fifth of a small layer's extra time in Python.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft import native
from fastft.cpu import thin
from fastft.cpu._lora_buffers import keep
from fastft.cpu.product import serves

__all__ = ["Scaled", "backward", "forward", "takes_scales"]


# What the backward of scaled results (DoRA) takes besides, one a layer or None: the scales, the
# results where they are still what they were, and room for those gradients of the scales that are
# wanted.
Scaled = tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]


def _takes(
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    spans: Sequence[tuple[int, int]],
) -> bool:
    """Whether the adapters are such as the call takes: all rows, dense, of ranks that pay."""
    rows = (0, x.shape[0])
    if (
        not lora_as  # of the layers that a gradient has reached
        or x.shape[1] % 2
        or len(lora_as) > native.module().PRODUCT_TERMS
        or any(span != rows for span in spans)
    ):
        return False
    ranks, dropped = [a.shape[0] for a in lora_as], [mask is not None for mask in masks]
    if not thin.serves_all(x.dtype, ranks, dropped):
        return False
    return _dense((x, *lora_as, *lora_bs))


def _multiplies(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the forward's products are such as the call takes."""
    if not weights or len(weights) > native.module().PRODUCT_PARTS:
        return False
    pairs = zip(weights, biases, strict=True)
    return all(serves(x.shape[0], [x], [w], bias) for w, bias in pairs)


def takes_scales(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    spans: Sequence[tuple[int, int]],
    scales: Sequence[Tensor | None],
) -> bool:
    """Whether this call and its backward take the scales along. A bias would cover what the
    backward reads of the scaled result."""
    scaled = [scale is not None for scale in scales]
    if any(s and bias is not None for s, bias in zip(scaled, biases, strict=True)):
        return False
    if any(w.requires_grad or w.shape[0] % 2 for w in weights) or not _dense(scales):
        return False
    return _multiplies(x, weights, biases) and _takes(x, lora_as, lora_bs, masks, spans)


def forward(
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
    scales: Sequence[Tensor | None] | None = None,
) -> bool:
    """``lora_linear.fwd``; False: nothing done, the call is not such a one."""
    rows, depth = x.shape
    if not _multiplies(x, weights, biases) or not _dense(ss):
        return False
    if not _takes(x, lora_as, lora_bs, masks, spans):
        return False
    each = zip(ys, weights, biases, scales or [None] * len(ys), strict=True)
    layers = [
        (y.data_ptr(), y.stride(0), y.shape[1], *map(native.address, (w, bias, scale)), 0, 0)
        for y, w, bias, scale in each
    ]
    none = [None] * len(ss)
    adapters = _adapters(ss, lora_as, lora_bs, none, none, scalings, masks, dropout_ps, owners)
    threads = torch.get_num_threads()
    native.module().lora_layers_forward(rows, depth, x.data_ptr(), layers, adapters, threads)
    return True


def backward(
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
    scaled: Scaled | None = None,
) -> bool:
    """``lora_linear.bwd``; False: nothing done, the call is not such a one."""
    if not weights or not serves(x.shape[0], dys, weights):
        return False
    if not _takes(x, lora_as, lora_bs, masks, spans):
        return False
    if not _dense((dx, *das, *dbs, *dys, *ss)):
        return False
    scales, results, d_scales = scaled or [[None] * len(dys)] * 3
    layers = [
        (
            dy.data_ptr(),
            dy.stride(0),
            dy.shape[1],
            w.data_ptr(),
            0,
            *map(native.address, (scale, y, None if y is None else d)),
        )
        for dy, w, scale, y, d in zip(dys, weights, scales, results, d_scales, strict=True)
    ]
    adapters = _adapters(ss, lora_as, lora_bs, das, dbs, scalings, masks, dropout_ps, owners)
    native.module().lora_layers_backward(
        *x.shape, x.data_ptr(), native.address(dx), layers, adapters, torch.get_num_threads()
    )
    for i, (scale, y, d_scale) in enumerate(zip(scales, results, d_scales, strict=True)):
        if scale is None or d_scale is None:
            continue
        lost = None if y is None else scale.abs() < _LEAST_SCALE
        if lost is None or bool(lost.any()):
            of_layer = [(ss[j], lora_bs[j], scalings[j]) for j, k in enumerate(owners) if k == i]
            _from_products(d_scale, dys[i], x, weights[i], of_layer, lost)
    return True


# A result scaled by less may have lost its digits to bfloat16's smallest number.
_LEAST_SCALE = 1e-30
# Columns whose gradients are taken of the products at a time.
_COLUMNS = 1024


def _from_products(
    d_scale: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    lost: Tensor | None,
) -> None:
    """d_scale of the columns whose result does not tell their product: (dy^T x . W) + scaling
    (dy^T s . B), row by row. lost: which; None: all."""
    every = torch.arange(len(d_scale), device=d_scale.device)
    columns = every if lost is None else every[lost]
    for some in columns.split(_COLUMNS):
        own = dy[:, some].t()
        total = ((own @ x).float() * weight[some]).sum(1)
        for s, b, scaling in adapters:
            total += scaling * ((own @ s).float() * b[some]).sum(1)
        d_scale[some] = total


def _adapters(
    ss: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    das: Sequence[Tensor | None],
    dbs: Sequence[Tensor | None],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
) -> list[tuple[int | float | bool, ...]]:
    """All adapters as the native call takes them."""
    return [
        (
            owners[j],
            s.shape[1],
            s.data_ptr(),
            lora_as[j].data_ptr(),
            lora_bs[j].data_ptr(),
            native.address(das[j]),
            native.address(dbs[j]),
            lora_as[j].dtype == torch.float32,
            native.address(masks[j]),
            keep(masks[j], dropout_ps[j]),
            scalings[j],
        )
        for j, s in enumerate(ss)
    ]


def _dense(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)
