"""CPU launcher of ``linear_cross_entropy``: one slab of logits at a time, the row-wise softmax and
its gradient in C++ over the logits, library products around it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, native_bfloat16, scratch


def supports(*, device_type: str, dtype: torch.dtype, weight_requires_grad: bool) -> str | None:
    """float32 and bfloat16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"hidden states in {dtype}; the CPU kernels take float32 and bfloat16"
    return None


def fwd(
    losses: Tensor,
    n_correct: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int,
    chunk: int,
) -> None:
    """Writes the loss of each token (T,), the count of correct top-1 and the gradients of the sum
    of losses."""
    if d_weight is not None:
        d_weight.zero_()
    kept = (labels != ignore_index).nonzero().flatten()
    whole = kept.numel() == labels.numel()
    if not whole:
        # Ignored tokens cost nothing: only the others are multiplied, and scattered back.
        if d_hidden is not None:
            d_hidden.zero_()
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    row_losses = losses if whole else torch.empty(labels.numel(), dtype=torch.float32)
    correct = torch.empty(labels.numel(), dtype=torch.uint8)
    gradient = d_hidden is not None or d_weight is not None
    vocab = weight.shape[0]
    # A 16-bit slab where the processor multiplies 16 bits; float32 panels otherwise.
    slab_dtype = hidden.dtype if native_bfloat16() else torch.float32
    wide_bias = None if bias is None else bias.float().contiguous()
    for start in range(0, labels.numel(), chunk):
        part = slice(start, min(labels.numel(), start + chunk))
        rows = part.stop - part.start
        slab = scratch("logits", (rows, vocab), slab_dtype)
        _logits(slab, hidden[part], weight)
        native.module().cross_entropy(
            slab.data_ptr(),
            0 if wide_bias is None else wide_bias.data_ptr(),
            labels[part].data_ptr(),
            row_losses[part].data_ptr(),
            correct[part].data_ptr(),
            rows,
            vocab,
            native.DTYPE_CODES[slab_dtype],
            gradient,
        )
        if d_hidden is not None:
            target = (
                d_hidden[part] if whole else scratch("dh", (rows, hidden.shape[1]), hidden.dtype)
            )
            _d_hidden(target, slab, weight)
            if not whole:
                d_hidden.index_copy_(0, kept[part], target)
        if d_weight is not None:
            _add_d_weight(d_weight, slab, hidden[part])
    if not whole:
        losses.zero_().index_copy_(0, kept, row_losses)
    n_correct.copy_(correct.sum(dtype=torch.int64))


def _logits(slab: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """slab = hidden weight^T, where the slab may be wider than the operands."""
    if slab.dtype == hidden.dtype:
        return mm_nt(slab, hidden, weight)
    hidden32 = scratch("h32", tuple(hidden.shape), slab.dtype).copy_(hidden)
    for panel in _vocabulary_panels(weight):
        weight32 = scratch("w32", tuple(weight[panel].shape), slab.dtype).copy_(weight[panel])
        torch.mm(hidden32, weight32.t(), out=slab[:, panel])
    return None


def _d_hidden(out: Tensor, slab: Tensor, weight: Tensor) -> None:
    """out = slab weight."""
    if slab.dtype == out.dtype:
        return mm_nn(out, slab, weight)
    out32 = scratch("h32", tuple(out.shape), slab.dtype).zero_()
    for panel in _vocabulary_panels(weight):
        weight32 = scratch("w32", tuple(weight[panel].shape), slab.dtype).copy_(weight[panel])
        out32.addmm_(slab[:, panel], weight32)
    out.copy_(out32)
    return None


def _add_d_weight(d_weight: Tensor, slab: Tensor, hidden: Tensor) -> None:
    """d_weight += slab^T hidden, accumulated in float32, a panel of the vocabulary at a time."""
    wide = slab.dtype == torch.float32
    if wide:
        hidden = scratch("h32", tuple(hidden.shape), slab.dtype).copy_(hidden)
    for panel in _vocabulary_panels(d_weight):
        if wide:
            d_weight[panel].addmm_(slab[:, panel].t(), hidden)
        else:
            product = scratch("w16", tuple(d_weight[panel].shape), slab.dtype)
            mm_tn(product, slab[:, panel], hidden)
            d_weight[panel].add_(product)


def _vocabulary_panels(weight: Tensor) -> list[slice]:
    size = max(256, (1 << 21) // max(1, weight.shape[1]))
    return [slice(i, min(weight.shape[0], i + size)) for i in range(0, weight.shape[0], size)]
