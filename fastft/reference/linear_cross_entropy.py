"""``linear_cross_entropy`` in plain torch, chunked so that it can serve as a backend."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """Sum over labels != ignore_index of logsumexp(z_t) - z_t[label]; z = hidden W^T + bias,
    the softmax in at least float32; differentiable."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(
        logits.to(wide), labels, ignore_index=ignore_index, reduction="sum"
    )


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
    wide = torch.promote_types(hidden.dtype, torch.float32)
    n_correct.zero_()
    if d_weight is not None:
        d_weight.zero_()
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        target = labels[part]
        kept = target != ignore_index
        logits = torch.nn.functional.linear(hidden[part], weight, bias).to(wide)
        safe = torch.where(kept, target, torch.zeros_like(target))
        log_probs = torch.log_softmax(logits, -1)
        losses[part] = torch.where(kept, -log_probs.gather(1, safe[:, None])[:, 0], 0.0)
        n_correct += ((logits.argmax(-1) == target) & kept).sum()
        if d_hidden is None and d_weight is None:
            continue
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, safe[:, None], -torch.ones_like(gradient[:, :1]))
        gradient *= kept[:, None]
        narrow = gradient.to(hidden.dtype)
        if d_hidden is not None:
            torch.mm(narrow, weight, out=d_hidden[part])
        if d_weight is not None:
            d_weight += (narrow.t() @ hidden[part]).to(d_weight.dtype)
