"""One run of ``linear_cross_entropy`` over all slabs: losses, statistics, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError
from fastft.ops._head_loop import (
    ELSEWHERE,
    IGNORED,
    Gradients,
    Head,
    Needs,
    empty_gradients,
    kept_tokens,
    slabs,
)

__all__ = ["AUTO", "WHERE", "Again", "Given", "Shard", "Statistics", "choose", "run"]

WHERE = "fastft.ops.linear_cross_entropy"
AUTO = "auto"


class Shard(NamedTuple):
    """The part of the vocabulary that this process holds, of a head split over ``group``."""

    start: int
    total: int
    group: Any


class Statistics(NamedTuple):
    """Of each token (T,): float32 but for argmax (int64). The last three are empty unless asked
    for; 0 (argmax: -1) where the token does not count."""

    argmax: Tensor
    top: Tensor
    log_sum: Tensor
    entropy: Tensor
    log_sum_sq: Tensor
    mean_logit: Tensor


@dataclass(frozen=True)
class Given:
    """The arguments of one call, as the operation has them.

    hidden (T, H), weight (V, H), lora_s (T, r), lora_b (V, r), labels (T,); bias and class_weight
    (V,) in any dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    lora_s: Tensor | None
    lora_b: Tensor | None
    labels: Tensor
    ignore_index: int
    chunk: int
    scale: float
    softcap: float
    smoothing: float
    z_loss: float
    backend: str
    moments: bool
    shard: Shard | None = None

    def head(self) -> Head:
        """Its tensors in one dtype."""
        dtype = self.hidden.dtype
        cast = [None if t is None else t.to(dtype) for t in (self.weight, self.lora_s, self.lora_b)]
        return Head(self.hidden, *cast)  # type: ignore[arg-type]


def choose(backend: str, hidden: Tensor) -> tuple[str, Any]:
    """The backend for a call and its parts; a compiled graph asks when it runs."""
    return backends.select(
        "linear_cross_entropy",
        None if backend == AUTO else backend,
        device_type=hidden.device.type,
        dtype=hidden.dtype,
    )


def _check_labels(labels: Tensor, vocabulary: int, ignored: Tensor, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= vocabulary)) & ~ignored
    if bool(outside.any()):
        raise ArgumentError(
            WHERE,
            "labels",
            expected=f"0 to {vocabulary - 1}, or ignore_index = {ignore_index}",
            got=str(labels[outside][0].item()),
        )


class Again(NamedTuple):
    """What a run for gradients alone has of the run before: of each token (T,) the upstream
    gradient of its loss and, or None, of its entropy; top, log_sum and that entropy."""

    d_losses: Tensor
    d_entropy: Tensor | None
    top: Tensor
    log_sum: Tensor
    entropy: Tensor | None


def run(given: Given, needs: Needs, again: Again | None) -> tuple[Tensor, Statistics, Gradients]:
    """The loss of each token, its statistics and the gradients of the sum of the losses; or these
    alone, of a weighted sum of losses and entropies."""
    head = given.head()
    hidden, wide, vocabulary = head.hidden, head.wide, given.weight.shape[0]
    shard = given.shard or Shard(0, vocabulary, None)
    labels, ignored = given.labels, given.labels == given.ignore_index
    outside = ((labels < 0) | (labels >= shard.total)) & ~ignored
    if hidden.device.type == "cpu":  # elsewhere the loss of such a token is NaN
        _check_labels(labels, shard.total, ignored, given.ignore_index)
    local = labels - shard.start
    local = torch.where((local >= 0) & (local < vocabulary), local, ELSEWHERE)
    target = torch.where(ignored, IGNORED, local)
    label_weight, weight_sum = None, float(shard.total)
    class_weight = _wide(given.class_weight, wide)
    if class_weight is not None:
        label_weight = class_weight[labels.clamp(0, shard.total - 1)]
        # On the host: a number of the graph of its gradient; one small wait, with class weights.
        weight_sum = float(class_weight.sum()) if given.smoothing else 0.0
        class_weight = class_weight[shard.start : shard.start + vocabulary]
    constants = {
        "bias": _wide(given.bias, wide),
        "class_weight": class_weight if given.smoothing else None,
        "scale": given.scale,
        "softcap": given.softcap,
        "smoothing": given.smoothing,
        "z_loss": given.z_loss,
        "weight_sum": weight_sum,
        "classes": float(shard.total),
    }
    n = hidden.shape[0]
    launcher = choose(given.backend, hidden)[1]
    out = empty_gradients(head, needs, vocabulary)
    flops = 2.0 * n * vocabulary * hidden.shape[1] * (1 + bool(needs.hidden) + bool(needs.weight))
    tokens = kept_tokens(ignored, flops)
    # In the order of the slabs; put where they belong at the end.
    found = {
        name: hidden.new_empty(n, dtype=wide)
        for name in ("top", "log_sum", "z_label", *(["weighted_sum"] if given.smoothing else []))
    }
    if given.moments:
        found |= {name: hidden.new_empty(n, dtype=wide) for name in _MOMENTS}
    found["argmax"] = labels.new_empty(n)

    def rows(slab: Tensor, places: Tensor | slice, order: slice) -> None:
        part = {name: found[name][order] if name in found else None for name in _PER_TOKEN}
        per_row = {"labels": target, "label_weight": label_weight, "row_scale": None}
        per_row["entropy_scale"] = None
        if again is not None:
            per_row |= {"row_scale": again.d_losses, "entropy_scale": again.d_entropy}
            per_row |= {"top": again.top, "log_sum": again.log_sum, "entropy": again.entropy}
        part |= {name: None if t is None else t[places] for name, t in per_row.items()}
        passes = [(again is None, any(needs))]
        if shard.group is not None and again is None:
            passes = [(True, False), (False, any(needs))]
        for statistics, gradient in passes:
            if statistics or gradient:
                launcher.rows(slab, **part, **constants, statistics=statistics, gradient=gradient)
            if statistics and shard.group is not None:
                _combine(part, shard)

    done = slabs(launcher, head, tokens, given.chunk, needs, out, rows)
    if shard.group is not None:
        for gradient, wanted in ((out.hidden, needs.hidden), (out.lora_s, needs.lora_s)):
            if wanted:
                torch.distributed.all_reduce(gradient, group=shard.group)
    if again is not None:
        return hidden.new_empty(0), Statistics(*[hidden.new_empty(0)] * 6), out
    if tokens.order is not None:
        found = {k: _scatter(v[:done], tokens.order[:done], n) for k, v in found.items()}
    losses = _losses(given, found, label_weight, weight_sum, shard.total)
    losses = torch.where(ignored, 0.0, torch.where(outside, float("nan"), losses))
    statistics = [
        torch.where(ignored, -1 if name == "argmax" else 0, found[name])
        if name in found
        else hidden.new_empty(0, dtype=wide)
        for name in Statistics._fields
    ]
    return losses, Statistics(*statistics), out


_MOMENTS = ("entropy", "log_sum_sq", "mean_logit")
_PER_TOKEN = ("top", "log_sum", "z_label", "argmax", "weighted_sum", *_MOMENTS)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def _scatter(values: Tensor, places: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_copy_(0, places, values)


def _losses(
    given: Given,
    found: dict[str, Tensor],
    label_weight: Tensor | None,
    weight_sum: float,
    classes: int,
) -> Tensor:
    top, log_sum = found["top"], found["log_sum"]
    losses = log_sum + (top - found["z_label"])
    if label_weight is not None:
        losses = losses * label_weight
    if given.smoothing:
        smooth = weight_sum * (top + log_sum) - found["weighted_sum"]
        losses = (1 - given.smoothing) * losses + given.smoothing / classes * smooth
    return losses + given.z_loss * (top + log_sum).square() if given.z_loss else losses


def _combine(part: dict[str, Any], shard: Shard) -> None:
    """Statistics of rows over the whole vocabulary from those over each process's part of it."""
    reduce, op, group = torch.distributed.all_reduce, torch.distributed.ReduceOp, shard.group
    own_top = part["top"].clone()
    reduce(part["top"], op.MAX, group=group)
    # Lowest index of the largest: those who do not have it name one past the last.
    argmax = torch.where(own_top == part["top"], part["argmax"] + shard.start, shard.total)
    reduce(argmax, op.MIN, group=group)
    part["argmax"].copy_(argmax)
    names = ["z_label", *(["weighted_sum"] if part["weighted_sum"] is not None else [])]
    sums = torch.stack([torch.exp(part["log_sum"] + (own_top - part["top"]))]
                       + [part[name] for name in names])  # fmt: skip
    reduce(sums, op.SUM, group=group)
    part["log_sum"].copy_(sums[0].log())
    for name, summed in zip(names, sums[1:], strict=True):
        part[name].copy_(summed)
