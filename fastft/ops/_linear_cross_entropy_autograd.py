"""Autograd of ``linear_cross_entropy``, eager and registered.

Two ways to the gradients. Where every token's loss has the same gradient (a sum, a mean), or where
only per-token gradients are wanted (a frozen head), the forward makes those of the summed loss
while it has the logits, and the backward scales them. Else (weighted tokens over a trained head)
the forward keeps two numbers a token and the backward makes the logits again. Second derivatives,
and gradients of a batch of upstream ones, go through the reference, over all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.ops._checks import without_autocast
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._head_loop import NO_GRADIENTS, Needs, empty_gradients
from fastft.ops._library import register
from fastft.ops._linear_cross_entropy_run import WHERE, Again, Given, Shard, choose, run
from fastft.reference import linear_cross_entropy as reference

__all__ = ["LinearCrossEntropy"]


def _given(arguments: Sequence[Any], shard: Shard | None = None) -> Given:
    *first, options, backend, moments = arguments
    return Given(*first, *options, backend, moments, shard)  # type: ignore[call-arg]


def _fwd_kernel(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, ...]:
    *call, needs, recompute = arguments
    wanted = NO_GRADIENTS if recompute else Needs(*needs)
    with without_autocast(call[0].device.type):
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
    with without_autocast(call[0].device.type):
        return run(_given(call, shard), Needs(*needs), again)[2]


def _bwd_fake(
    d_losses: Tensor, d_entropy: Any, top: Tensor, log_sum: Tensor, entropy: Any, *arguments: Any
) -> Any:
    *call, needs = arguments
    given = _given(call)
    return tuple(empty_gradients(given.head(), Needs(*needs), given.weight.shape[0]))


# Elements that are scaled at a time on a CPU: 2 MiB of float32.
_PANEL = 1 << 19


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    # The float32 scale, of as many dimensions, keeps the product in float32: 1/n has too few bits
    # else. Rounded as it is written: a float32 product of a head's size is memory for nothing, and
    # on a CPU, where torch makes one all the same, time.
    out = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    # A compiler's tensors, too, are scaled at once: it fuses the cast itself.
    plain = type(gradient) is Tensor and gradient.device.type in ("cpu", "cuda")
    if not plain or not gradient.numel() or dtype == torch.result_type(gradient, scale):
        return torch.mul(gradient, scale, out=out)
    launcher = choose(backend, gradient)[1]
    if hasattr(launcher, "scaled") and gradient.dim() == 2:
        # An upstream gradient may be one number that is seen as many.
        launcher.scaled(out, gradient.contiguous(), scale.flatten().contiguous())
        return out
    if gradient.is_cuda:
        return torch.mul(gradient, scale, out=out)
    rows = min(gradient.shape[0], max(1, _PANEL // gradient[:1].numel()))
    room = scale.new_empty(rows, *gradient.shape[1:])
    for first in range(0, gradient.shape[0], rows):
        panel = slice(first, first + rows)
        own = gradient[panel]
        wide = room[: own.shape[0]]
        torch.mul(own, scale if scale.shape[0] == 1 else scale[panel], out=wide)
        out[panel].copy_(wide)
    return out


Like = tuple[torch.Size, torch.dtype] | None


def _likes(inputs: Sequence[Any]) -> list[Like]:
    """What gradients of hidden, weight, bias, class_weight, lora_s and lora_b must be like."""
    return [None if t is None else (t.shape, t.dtype) for t in inputs[:6]]


def _to_inputs(
    gradients: Sequence[Tensor], likes: list[Like], d_losses: Tensor | None, backend: str
) -> Any:
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
            found.append(_scaled(gradient, d_losses[:, None], like[1], backend))
        else:
            one = d_losses[:1] if d_losses.numel() else d_losses.new_zeros(1)
            found.append(_scaled(gradient, one, like[1], backend))
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
    def backward(ctx: Any, *upstream: Any) -> Any:
        if wanted(upstream[0], upstream[4]):
            return None, *_plain_backward(ctx, upstream[0], upstream[4]), *[None] * 8

        def again(*arguments: Any) -> Any:
            return _bwd_kernel(*arguments, shard=ctx.shard)

        return None, *_backward(ctx, upstream[0], upstream[4], again), *[None] * 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *call, ctx.recompute = inputs
    ctx.likes, ctx.rest = _likes(call), call[7:]
    ctx.moments = call[11]
    kept = () if ctx.recompute else output[7:]
    # The inputs are for whoever makes the logits again: the backward of token losses apart and of
    # the entropy, and second derivatives.
    ctx.save_for_backward(*kept, *output[2:5], *call[:7])
    ctx.n_kept = len(kept)


def _backward(ctx: Any, d_losses: Any, d_entropy: Any, again: Any) -> list[Tensor | None]:
    saved = ctx.saved_tensors  # once: a checkpoint gives them a single time
    kept, rest = saved[: ctx.n_kept], saved[ctx.n_kept :]
    none: list[Tensor | None] = [None] * 6
    if not ctx.moments:
        d_entropy = None
    made = none
    if not ctx.recompute and d_losses is not None:
        made = _to_inputs(kept, ctx.likes, d_losses, ctx.rest[3])
    if d_entropy is None and (d_losses is None or not ctx.recompute):
        return made
    top, log_sum, entropy, *inputs = rest
    if not ctx.recompute or d_losses is None:
        d_losses = torch.zeros_like(top)  # theirs is made
    entropy = entropy if ctx.moments else None
    more = again(d_losses, d_entropy, top, log_sum, entropy, *inputs, *ctx.rest)
    found = zip(made, _to_inputs(more, ctx.likes, None, ctx.rest[3]), strict=True)
    return [b if a is None else a if b is None else a + b for a, b in found]


def _plain_backward(ctx: Any, d_losses: Any, d_entropy: Any) -> list[Tensor | None]:
    if ctx.shard is not None:
        raise ArgumentError(
            WHERE,
            "shard",
            expected="first derivatives, of one upstream gradient at a time, of a part of a head",
            got="create_graph=True or is_grads_batched=True",
            remedy="Take them of the whole head.",
        )
    d_entropy = d_entropy if ctx.moments else None
    if d_losses is None and d_entropy is None:
        return [None] * 6
    *inputs, labels = ctx.saved_tensors[-7:]

    def function(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        given = _given((*tensors, labels, *ctx.rest[:-1]))
        head = given.head()
        logits = torch.nn.functional.linear(head.hidden, head.weight)
        if head.lora_s is not None and head.lora_b is not None:
            logits = logits + torch.nn.functional.linear(head.lora_s, head.lora_b)
        z = reference.transform(logits, given.bias, given.scale, given.softcap)
        ignored = labels == given.ignore_index
        options = given.class_weight, given.smoothing, given.z_loss
        losses = reference.cross_entropy(z, labels, given.ignore_index, *options)
        return losses, reference.entropy(z, ignored)

    with without_autocast(labels.device.type):
        needs = ctx.needs_input_grad[1:7]
        return plain_gradients(function, inputs, needs, (d_losses, d_entropy))


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
