"""``linear_cross_entropy`` and ``linear_divergence`` in Triton: what is made of one slab of logits.

The vendor library makes a slab of logits (rows, V) for some of the tokens; one kernel turns it into
statistics and, in place, the gradient with respect to the logits (online softmax, Milakov &
Gimelshein 2018); two products turn that into the gradients of hidden states and weight. Softmax and
sums are float32 whatever the slab's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._cross_entropy_kernels import (
    _cross_entropy_kernel,
    _divergence_kernel,
    _scaled_kernel,
)

__all__ = [
    "add_d_weight",
    "d_hidden",
    "divergence_rows",
    "new_slab",
    "project",
    "rows",
    "scaled",
    "supports",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(device_type: str, dtype: torch.dtype, **_: object) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} logits"
    return supports_device(device_type)


def new_slab(name: str, tokens: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """(tokens, vocabulary) in the dtype of hidden."""
    return hidden.new_empty(tokens, vocabulary)


def project(slab: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """slab = hidden weight^T."""
    torch.mm(hidden, weight.t(), out=slab)


def d_hidden(out: Tensor, slab: Tensor, weight: Tensor) -> None:
    """out = slab weight."""
    torch.mm(slab, weight, out=out)


def add_d_weight(d_weight: Tensor, slab: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight (V, H) = or += slab^T hidden, in float32 whatever the operands' dtype."""
    factor = slab.t()
    if slab.dtype == torch.float32 or not slab.is_cuda:
        factor, hidden = factor.float(), hidden.float()
        if first:
            torch.mm(factor, hidden, out=d_weight)
        else:
            d_weight.addmm_(factor, hidden)
    elif first:
        torch.mm(factor, hidden, out_dtype=torch.float32, out=d_weight)
    else:
        torch.addmm(d_weight, factor, hidden, out_dtype=torch.float32, out=d_weight)


def scaled(out: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """out = gradient scale, both (rows, columns) and contiguous, rounded once; scale: (rows,) or
    (1,)."""
    rows, columns = gradient.shape
    block = config.for_device(out.device).scaled
    with device_guard(out):
        _scaled_kernel[(rows, triton.cdiv(columns, block.block))](
            out, gradient, scale, columns, EACH=scale.numel() > 1, BLOCK=block.block,
            **block.launch.options(),
        )  # fmt: skip


def rows(
    slab: Tensor,
    *,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_weight: Tensor | None,
    row_scale: Tensor | None,
    entropy_scale: Tensor | None,
    top: Tensor,
    log_sum: Tensor,
    z_label: Tensor,
    argmax: Tensor,
    weighted_sum: Tensor | None,
    entropy: Tensor | None,
    log_sum_sq: Tensor | None,
    mean_logit: Tensor | None,
    scale: float,
    softcap: float,
    smoothing: float,
    z_loss: float,
    weight_sum: float,
    classes: float,
    statistics: bool,
    gradient: bool,
) -> None:
    """The statistics of the slab's rows, and with ``gradient`` that of the loss in their place.

    labels: int64 (rows,), -1 where the label is in no column, -2 where the token is ignored. All
    vectors over rows or columns are float32 and contiguous, argmax is int64. entropy_scale: what
    the gradient has of the entropy, which is then read.
    """
    launch = config.for_device(slab.device).cross_entropy

    def given(tensor: Tensor | None) -> Tensor:
        return top if tensor is None else tensor

    with device_guard(slab):
        _cross_entropy_kernel[(slab.shape[0],)](
            slab, labels, given(bias), given(class_weight), given(label_weight), given(row_scale),
            given(entropy_scale), top, log_sum, z_label, argmax, given(weighted_sum),
            given(entropy), given(log_sum_sq), given(mean_logit), slab.shape[1], scale, softcap,
            smoothing, z_loss, weight_sum, classes, STATISTICS=statistics, GRADIENT=gradient,
            MOMENTS=statistics and entropy is not None, SMOOTH=smoothing > 0, SOFTCAP=softcap > 0,
            HAS_BIAS=bias is not None, HAS_CLASS_WEIGHT=class_weight is not None,
            HAS_LABEL_WEIGHT=label_weight is not None, HAS_ROW_SCALE=row_scale is not None,
            HAS_ENTROPY_SCALE=entropy_scale is not None, BLOCK_V=launch.block_v,
            **launch.launch.options(),
        )  # fmt: skip


def divergence_rows(
    slab: Tensor, teacher: Tensor, losses: Tensor, *, kind: int, gradient: bool, **given: Any
) -> None:
    """The divergence of each row from the teacher's, and with ``gradient`` that in its place."""
    launch = config.for_device(slab.device).divergence
    tensors = [given[name] for name in ("bias", "teacher_bias", "row_scale")]
    with device_guard(slab):
        _divergence_kernel[(slab.shape[0],)](
            slab, teacher, *(losses if t is None else t for t in tensors), losses, slab.shape[1],
            given["scale"], given["softcap"], given["teacher_scale"], given["teacher_softcap"],
            given["temperature"], given["beta"], KIND=kind, GRADIENT=gradient,
            SOFTCAP=given["softcap"] > 0, TEACHER_SOFTCAP=given["teacher_softcap"] > 0,
            HAS_BIAS=tensors[0] is not None, HAS_TEACHER_BIAS=tensors[1] is not None,
            HAS_ROW_SCALE=tensors[2] is not None, BLOCK_V=launch.block_v,
            **launch.launch.options(),
        )  # fmt: skip
