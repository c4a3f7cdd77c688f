"""CPU parts of ``linear_cross_entropy`` and ``linear_divergence``: library products around a slab
of logits, the rows of the slab in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import native
from fastft.cpu._supports import refusal
from fastft.cpu.product import deep_product, serves_deep
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, native_bfloat16, scratch

__all__ = [
    "add_d_weight",
    "d_hidden",
    "divergence_rows",
    "new_slab",
    "project",
    "rows",
    "supports",
]


def supports(*, device_type: str, dtype: torch.dtype, **_: object) -> str | None:
    """float32, bfloat16 and float16."""
    return refusal({"hidden states in ": dtype})


def new_slab(name: str, tokens: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """(tokens, vocabulary): bfloat16 where the processor multiplies it, else float32."""
    narrow = hidden.dtype == torch.bfloat16 and native_bfloat16()
    dtype = hidden.dtype if narrow else torch.float32
    return scratch(name, (tokens, vocabulary), dtype)


def project(slab: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """slab = hidden weight^T, where the slab may be wider than the operands."""
    if slab.dtype == hidden.dtype:
        return mm_nt(slab, hidden, weight)
    hidden32 = scratch("h32", tuple(hidden.shape), slab.dtype).copy_(hidden)
    for panel in _vocabulary_panels(weight):
        weight32 = scratch("w32", tuple(weight[panel].shape), slab.dtype).copy_(weight[panel])
        torch.mm(hidden32, weight32.t(), out=slab[:, panel])
    return None


def d_hidden(out: Tensor, slab: Tensor, weight: Tensor) -> None:
    """out = slab weight."""
    if serves_deep(out, slab, weight):
        return deep_product(out, slab, weight)
    if slab.dtype == out.dtype:
        return mm_nn(out, slab, weight)
    out32 = scratch("h32", tuple(out.shape), slab.dtype).zero_()
    for panel in _vocabulary_panels(weight):
        weight32 = scratch("w32", tuple(weight[panel].shape), slab.dtype).copy_(weight[panel])
        out32.addmm_(slab[:, panel], weight32)
    out.copy_(out32)
    return None


def add_d_weight(d_weight: Tensor, slab: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight = or += slab^T hidden, accumulated in float32, a panel of the vocabulary at once."""
    wide = slab.dtype == torch.float32
    if wide:
        hidden = scratch("h32", tuple(hidden.shape), slab.dtype).copy_(hidden)
    for panel in _vocabulary_panels(d_weight):
        if wide:
            d_weight[panel].addmm_(slab[:, panel].t(), hidden, beta=0.0 if first else 1.0)
            continue
        product = scratch("w16", tuple(d_weight[panel].shape), slab.dtype)
        mm_tn(product, slab[:, panel], hidden)
        if first:
            d_weight[panel].copy_(product)
        else:  # widened here: torch would ask for new memory each time
            d_weight[panel].add_(
                scratch("wide", tuple(product.shape), d_weight.dtype).copy_(product)
            )


def _vocabulary_panels(weight: Tensor) -> list[slice]:
    size = max(256, (1 << 21) // max(1, weight.shape[1]))
    return [slice(i, min(weight.shape[0], i + size)) for i in range(0, weight.shape[0], size)]


_ROW_TENSORS = (
    "bias", "class_weight", "label_weight", "row_scale", "entropy_scale", "labels", "top",
    "log_sum", "z_label", "weighted_sum", "entropy", "log_sum_sq", "mean_logit", "argmax",
)  # fmt: skip
_ROW_NUMBERS = ("scale", "softcap", "smoothing", "z_loss", "weight_sum", "classes")


def rows(slab: Tensor, *, statistics: bool, gradient: bool, **given: Any) -> None:
    """The statistics of the slab's rows, and with ``gradient`` that of the loss in their place."""
    native.module().cross_entropy(
        slab.data_ptr(),
        [native.address(given[name]) for name in _ROW_TENSORS],
        *slab.shape,
        [given[name] for name in _ROW_NUMBERS],
        statistics,
        gradient,
        native.DTYPE_CODES[slab.dtype],
    )


_DIVERGENCE_NUMBERS = (
    "scale", "softcap", "teacher_scale", "teacher_softcap", "temperature", "beta",
)  # fmt: skip


def divergence_rows(
    slab: Tensor, teacher: Tensor, losses: Tensor, *, kind: int, gradient: bool, **given: Any
) -> None:
    """The divergence of each row from the teacher's, and with ``gradient`` that in its place."""
    native.module().divergence(
        slab.data_ptr(),
        teacher.data_ptr(),
        native.address(given["bias"]),
        native.address(given["teacher_bias"]),
        native.address(given["row_scale"]),
        losses.data_ptr(),
        *slab.shape,
        kind,
        [given[name] for name in _DIVERGENCE_NUMBERS],
        gradient,
        native.DTYPE_CODES[slab.dtype],
        native.DTYPE_CODES[teacher.dtype],
    )
