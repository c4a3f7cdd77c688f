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

__all__ = ["backward", "forward"]


def _takes(
    x: Tensor,
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    ss: list[Tensor],
    masks: list[Tensor | None],
    spans: list[tuple[int, int]],
) -> bool:
    """Whether the adapters are such as the call takes: all rows, dense, of ranks that pay."""
    rows = (0, x.shape[0])
    if (
        x.shape[1] % 2
        or len(ss) > native.module().PRODUCT_TERMS
        or any(span != rows for span in spans)
    ):
        return False
    together = sum(s.shape[1] for s, mask in zip(ss, masks, strict=True) if mask is None)
    alone = max(
        (s.shape[1] for s, mask in zip(ss, masks, strict=True) if mask is not None), default=0
    )
    if not thin.serves(x.dtype, together) or not thin.serves(x.dtype, alone, True):
        return False
    return _dense((x, *lora_as, *lora_bs, *ss))


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
) -> bool:
    """``lora_linear.fwd``; False: nothing done, the call is not such a one."""
    rows, depth = x.shape
    if len(weights) > native.module().PRODUCT_PARTS:
        return False
    if not all(serves(rows, [x], [w], bias) for w, bias in zip(weights, biases, strict=True)):
        return False
    if not _takes(x, lora_as, lora_bs, ss, masks, spans):
        return False
    layers = [
        (y.data_ptr(), y.stride(0), y.shape[1], w.data_ptr(), native.address(bias))
        for y, w, bias in zip(ys, weights, biases, strict=True)
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
) -> bool:
    """``lora_linear.bwd``; False: nothing done, the call is not such a one."""
    if not serves(x.shape[0], dys, weights) or not _takes(x, lora_as, lora_bs, ss, masks, spans):
        return False
    if not _dense((dx, *das, *dbs, *dys)):
        return False
    layers = [
        (dy.data_ptr(), dy.stride(0), dy.shape[1], weight.data_ptr(), 0)
        for dy, weight in zip(dys, weights, strict=True)
    ]
    adapters = _adapters(ss, lora_as, lora_bs, das, dbs, scalings, masks, dropout_ps, owners)
    native.module().lora_layers_backward(
        *x.shape, x.data_ptr(), native.address(dx), layers, adapters, torch.get_num_threads()
    )
    return True


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
