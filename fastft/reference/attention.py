"""``attention`` in plain torch, right in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(**facts: object) -> str | None:
    """Runs everywhere."""
    return None


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """scale q k^T, -inf where a query does not look; in at least float32."""
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask
    return (scores * scale).masked_fill(~seen, float("-inf"))


def _spread(tensor: Tensor, heads: int) -> Tensor:
    """Each key head once for every query head of its group."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the logsumexp of the scores (+inf for a query that sees nothing,
    whose output is 0); differentiable."""
    key, value = (_spread(t, query.shape[1]) for t in (key, value))
    scores = _scores(query, key, mask, scale, is_causal)
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    probabilities = scores.softmax(-1).masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], float("inf"))
    return probabilities.to(value.dtype) @ value, lse


def fwd(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Writes out and lse."""
    found, logsumexp = attention(query, key, value, mask, scale, is_causal)
    out.copy_(found)
    lse.copy_(logsumexp)


def bwd(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Writes the gradients."""
    k, v = (_spread(t, query.shape[1]) for t in (key, value))
    p = (_scores(query, k, mask, scale, is_causal) - lse[..., None]).exp()
    dp = (d_out @ v.transpose(-1, -2)).to(p.dtype)
    ds = (scale * p * (dp - (p * dp).sum(-1, keepdim=True))).to(query.dtype)
    d_query.copy_(ds @ k)
    group = query.shape[1] // key.shape[1]
    for to, left, right in ((d_key, ds, query), (d_value, p.to(query.dtype), d_out)):
        product = left.transpose(-1, -2) @ right
        to.copy_(product.unflatten(1, (key.shape[1], group)).sum(2))
