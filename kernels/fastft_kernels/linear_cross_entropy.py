"""``linear_cross_entropy`` in Triton: cross entropy of hidden W^T + bias, never holding all logits.

``chunk`` tokens at a time: the vendor library makes one slab of logits (chunk, V), one kernel
turns it into loss, accuracy and, in place, the gradient of the summed loss with respect to the
logits (softmax - one-hot; the online softmax of Milakov & Gimelshein 2018), and two products turn
that into d_hidden and d_weight. Softmax and sums are float32 whatever the slab's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_kernels import config
from fastft_kernels._common import device_guard, supports_device

__all__ = ["fwd", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _cross_entropy_kernel(
    slab_ptr,  # (rows, V): logits in, their gradient out where GRADIENT
    labels_ptr,  # int64 (rows,)
    bias_ptr,  # (V,)
    losses_ptr,  # float32 (rows,)
    correct_ptr,  # int32 (rows,)
    V,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """loss = logsumexp(z) - z[label]; correct = (argmax z == label); z' = softmax(z) - onehot."""
    row = tl.program_id(0)
    slab = slab_ptr + row.to(tl.int64) * V
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK_V,), slab_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK_V):
                tl.store(slab + start + lanes, zeros, mask=start + lanes < V)
    else:
        # Read before the gradient overwrites it. A label outside the vocabulary, which only a check
        # on the host could refuse, makes the loss NaN instead of a stray access.
        known = (label >= 0) & (label < V)
        z_label = tl.load(slab + label, mask=known, other=float("nan")).to(tl.float32)
        if HAS_BIAS:
            z_label += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        # Each lane keeps a running maximum and sum of its own: one reduction, at the end.
        top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        where_top = tl.zeros((BLOCK_V,), tl.int32)
        for start in range(0, V, BLOCK_V):
            columns = start + lanes
            z = tl.load(slab + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            if HAS_BIAS:
                z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
            # Strictly greater: the lowest index of equal logits stays.
            where_top = tl.where(z > top, columns, where_top)
            new_top = tl.maximum(top, z)
            # A lane that has only seen -inf must not compute -inf - -inf.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.exp(z - shift)
            top = new_top
        row_top = tl.max(top, 0)
        lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
        argmax = tl.min(tl.where(top == row_top, where_top, V), 0)
        tl.store(losses_ptr + row, lse - z_label)
        tl.store(correct_ptr + row, (argmax == label).to(tl.int32))
        if GRADIENT:
            for start in range(0, V, BLOCK_V):
                columns = start + lanes
                z = tl.load(slab + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
                if HAS_BIAS:
                    z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
                gradient = tl.exp(z - lse) - tl.where(columns == label, 1.0, 0.0)
                tl.store(slab + columns, gradient.to(slab_ptr.dtype.element_ty), mask=columns < V)


def supports(device_type: str, dtype: torch.dtype, weight_requires_grad: bool) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} logits"
    return supports_device(device_type)


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
    """Loss of each token (T,), correct count (1,) and the gradients of the summed loss.

    d_hidden is (T, H) in hidden's dtype, d_weight float32 (V, H); each is made where it is not
    None and fully overwritten. hidden is (T, H), weight (V, H), labels int64 (T,).
    """
    launch = config.for_device(hidden.device).cross_entropy
    bias = bias if bias is None else bias.contiguous()
    with device_guard(hidden):
        kept = _kept_tokens(hidden, weight, labels, ignore_index, launch)
        tokens = hidden.shape[0] if kept is None else kept.numel()
        if d_hidden is not None and kept is not None:
            d_hidden.zero_()
        if d_weight is not None and tokens == 0:
            d_weight.zero_()
        row_losses = losses if kept is None else losses.new_empty(tokens)
        correct = torch.empty(tokens, dtype=torch.int32, device=hidden.device)
        rows = min(chunk, tokens)
        slab_buffer = torch.empty((rows, weight.shape[0]), dtype=hidden.dtype, device=hidden.device)
        for begin in range(0, tokens, rows or 1):
            end = min(begin + rows, tokens)
            if kept is None:
                hidden_rows, label_rows = hidden[begin:end], labels[begin:end]
            else:
                index = kept[begin:end]
                hidden_rows, label_rows = hidden[index], labels[index]
            slab = slab_buffer[: end - begin]
            torch.mm(hidden_rows, weight.t(), out=slab)
            _cross_entropy_kernel[(end - begin,)](
                slab, label_rows, slab if bias is None else bias,
                row_losses[begin:end], correct[begin:end], weight.shape[0], ignore_index,
                HAS_BIAS=bias is not None,
                GRADIENT=d_hidden is not None or d_weight is not None,
                BLOCK_V=launch.block_v, **launch.launch.options(),
            )  # fmt: skip
            if d_hidden is not None:
                if kept is None:
                    torch.mm(slab, weight, out=d_hidden[begin:end])
                else:
                    d_hidden.index_copy_(0, kept[begin:end], torch.mm(slab, weight))
            if d_weight is not None:
                _add_d_weight(d_weight, slab, hidden_rows, begin == 0, launch.d_weight_rows)
        if kept is not None:
            losses.zero_().index_copy_(0, kept, row_losses)
        torch.sum(correct, dim=0, keepdim=True, dtype=torch.int64, out=n_correct)


def _kept_tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    launch: config.CrossEntropyConfig,
) -> Tensor | None:
    """Indices of the tokens that count, or None where looking for them does not pay.

    Their number is needed on the host, which waits for the device once; a captured CUDA graph
    cannot wait, and a small loss is cheaper with its ignored rows than with the wait.
    """
    flops = 4.0 * hidden.shape[0] * weight.shape[0] * weight.shape[1]
    if flops < launch.compact_flops:
        return None
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = torch.nonzero(labels != ignore_index).flatten()
    return None if kept.numel() == labels.numel() else kept


def _add_d_weight(
    d_weight: Tensor, slab: Tensor, hidden: Tensor, first: bool, block_rows: int
) -> None:
    """d_weight (V, H) = or += slab^T hidden, in float32 whatever the operands' dtype."""
    if slab.dtype == torch.float32:
        if first:
            torch.mm(slab.t(), hidden, out=d_weight)
        else:
            d_weight.addmm_(slab.t(), hidden)
        return
    # torch.addmm takes a float32 addend to 16-bit factors in its newest versions only, so a later
    # chunk adds a product made in blocks of the vocabulary: bounded scratch, float32 throughout.
    for begin in range(0, d_weight.shape[0], block_rows):
        target = d_weight[begin : begin + block_rows]
        factor = slab[:, begin : begin + block_rows].t()
        product = target if first else torch.empty_like(target)
        if slab.is_cuda:
            torch.mm(factor, hidden, out_dtype=torch.float32, out=product)
        else:
            torch.mm(factor.float(), hidden.float(), out=product)
        if not first:
            target.add_(product)
