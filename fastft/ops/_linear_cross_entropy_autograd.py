"""Autograd of ``linear_cross_entropy``, eager and registered.

Two ways to the gradients. Where every token's loss has the same gradient (a sum, a mean), or where
only per-token gradients are wanted (a frozen head), the forward makes those of the summed loss
while it has the logits, and the backward scales them. Else (weighted tokens over a trained head)
the forward keeps two numbers a token and the backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError
from fastft.ops._head_loop import (
    ELSEWHERE,
    IGNORED,
    NO_GRADIENTS,
    Gradients,
    Head,
    Needs,
    empty_gradients,
    kept_tokens,
    slabs,
)
from fastft.ops._library import register

__all__ = ["AUTO", "WHERE", "Given", "LinearCrossEntropy", "Shard", "Statistics", "choose"]

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


def _given(arguments: Sequence[Any], shard: Shard | None = None) -> Given:
    *first, options, backend, moments = arguments
    return Given(*first, *options, backend, moments, shard)  # type: ignore[call-arg]


def _fwd_kernel(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, ...]:
    *call, needs, recompute = arguments
    wanted = NO_GRADIENTS if recompute else Needs(*needs)
    with torch.autocast(call[0].device.type, enabled=False):
        losses, statistics, gradients = run(_given(call, shard), wanted, None)
    return losses, *statistics, *gradients


def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *call, needs, recompute = arguments
    given = _given(call)
    head, n = given.head(), given.hidden.shape[0]
    wanted = NO_GRADIENTS if recompute else Needs(*needs)
    wide = [given.hidden.new_empty(n, dtype=head.wide) for _ in range(3)]
    size = n if given.moments else 0
    moments = [given.hidden.new_empty(size, dtype=head.wide) for _ in range(3)]
    argmax = given.labels.new_empty(n)
    gradients = empty_gradients(head, wanted, given.weight.shape[0])
    return wide[0], argmax, *wide[1:], *moments, *gradients


def _bwd_kernel(
    d_losses: Tensor,
    d_entropy: Tensor | None,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    *arguments: Any,
    shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    *call, needs = arguments
    d_losses = d_losses.to(top.dtype).contiguous()
    if d_entropy is not None:
        d_entropy = d_entropy.to(top.dtype).contiguous()
    again = Again(d_losses, d_entropy, top, log_sum, entropy)
    with torch.autocast(call[0].device.type, enabled=False):
        return run(_given(call, shard), Needs(*needs), again)[2]


def _bwd_fake(
    d_losses: Tensor, d_entropy: Any, top: Tensor, log_sum: Tensor, entropy: Any, *arguments: Any
) -> Any:
    *call, needs = arguments
    given = _given(call)
    return tuple(empty_gradients(given.head(), Needs(*needs), given.weight.shape[0]))


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # The float32 scale, of as many dimensions, keeps the product in float32: 1/n has too few bits
    # else. Rounded as it is written: a float32 product of a head's size is memory for nothing.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


Like = tuple[torch.Size, torch.dtype] | None


def _likes(inputs: Sequence[Any]) -> list[Like]:
    """What gradients of hidden, weight, bias, class_weight, lora_s and lora_b must be like."""
    return [None if t is None else (t.shape, t.dtype) for t in inputs[:6]]


def _to_inputs(gradients: Sequence[Tensor], likes: list[Like], d_losses: Tensor | None) -> Any:
    """Gradients in the order and the dtypes of the inputs; None where none was wanted.

    d_losses: where they are of the summed loss: a token's are scaled by its own, what the tokens
    share by that of all, which is one.
    """
    hidden, weight, bias, lora_s, lora_b = gradients
    found: list[Tensor | None] = []
    for like, gradient in zip(likes, (hidden, weight, bias, None, lora_s, lora_b), strict=True):
        if like is None or gradient is None or gradient.shape != like[0]:
            found.append(None)
        elif d_losses is None:
            found.append(gradient.to(like[1]))
        elif gradient is hidden or gradient is lora_s:
            found.append(_scaled(gradient, d_losses[:, None], like[1]))
        else:
            one = d_losses[:1] if d_losses.numel() else d_losses.new_zeros(1)
            found.append(_scaled(gradient, one, like[1]))
    return found


class LinearCrossEntropy(torch.autograd.Function):
    """Eager autograd; arguments: the shard, and those of the registered operation."""

    @staticmethod
    def forward(ctx: Any, shard: Shard | None, *arguments: Any) -> Any:
        found = _fwd_kernel(*arguments, shard=shard)
        ctx.shard = shard
        _setup_context(ctx, arguments, found)
        ctx.mark_non_differentiable(*found[1:4], *found[5:7])
        ctx.set_materialize_grads(False)
        return found[:7]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        def again(*arguments: Any) -> Any:
            return _bwd_kernel(*arguments, shard=ctx.shard)

        return None, *_backward(ctx, upstream[0], upstream[4], again), *[None] * 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *call, ctx.recompute = inputs
    ctx.likes, ctx.rest = _likes(call), call[7:]
    ctx.moments = call[11]
    kept = () if ctx.recompute else output[7:]
    # The entropy's gradient, too, takes the logits again.
    inputs_again = (*output[2:5], *call[:7]) if ctx.recompute or ctx.moments else ()
    ctx.save_for_backward(*kept, *inputs_again)
    ctx.n_kept = len(kept)


def _backward(ctx: Any, d_losses: Any, d_entropy: Any, again: Any) -> list[Tensor | None]:
    kept, rest = ctx.saved_tensors[: ctx.n_kept], ctx.saved_tensors[ctx.n_kept :]
    none: list[Tensor | None] = [None] * 6
    if not ctx.moments:
        d_entropy = None
    made = none
    if not ctx.recompute and d_losses is not None:
        made = _to_inputs(kept, ctx.likes, d_losses)
    if d_entropy is None and (d_losses is None or not ctx.recompute):
        return made
    top, log_sum, entropy, *inputs = rest
    if not ctx.recompute or d_losses is None:
        d_losses = torch.zeros_like(top)  # theirs is made
    entropy = entropy if ctx.moments else None
    more = again(d_losses, d_entropy, top, log_sum, entropy, *inputs, *ctx.rest)
    found = zip(made, _to_inputs(more, ctx.likes, None), strict=True)
    return [b if a is None else a if b is None else a + b for a, b in found]


def _registered_backward(ctx: Any, *upstream: Any) -> Any:
    again = torch.ops.fastft.linear_cross_entropy_bwd
    return *_backward(ctx, upstream[0], upstream[4], again), *[None] * 8


_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? class_weight, Tensor? lora_s, "
    "Tensor? lora_b, Tensor labels, int ignore_index, int chunk, float[] options, str backend, "
    "bool moments, bool[] needs"
)
register(
    f"linear_cross_entropy_fwd({_CALL}, bool recompute) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "linear_cross_entropy_bwd(Tensor d_losses, Tensor? d_entropy, Tensor top, Tensor log_sum, "
    f"Tensor? entropy, {_CALL}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::linear_cross_entropy_fwd", _registered_backward, setup_context=_setup_context
)
