"""``linear_cross_entropy``: the language-model head and its loss without the logits.

    z_t = softcap(scale (W h_t + s B A h_t + bias)),   softcap(x) = c tanh(x / c)
    loss_t = w_y ((1 - eps) nll(y)) + eps / V sum_v w_v nll(v) + zeta lse_t^2,   y = label_t
    nll(v) = lse_t - z_tv,   lse_t = log sum_v exp z_tv

(cross-entropy with class weights w and label smoothing eps as torch has them; Gemma 2's cap of the
logits; the z-loss of Chowdhery et al. 2022, "PaLM".) Logits exist for one slab of tokens at a time;
their gradient replaces them there and gives dh and dW on the spot, so the backward only scales what
the forward left (Wijmans et al. 2024, "Cut Your Losses"; Hsu et al. 2024, Liger).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops import linear_divergence as divergence
from fastft.ops._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from fastft.ops._eager import dispatched, recording
from fastft.ops._head_loop import default_chunk, free_bytes, over
from fastft.ops._linear_cross_entropy_autograd import LinearCrossEntropy
from fastft.ops._linear_cross_entropy_run import AUTO, WHERE, Shard, choose

__all__ = ["Shard", "TokenStatistics", "check", "linear_cross_entropy"]


class TokenStatistics(NamedTuple):
    """Of each token, of the shape of labels; 0 where the token does not count.

    Only the entropy has a gradient; its backward makes the logits once more.

    Attributes:
        prediction: int64, the class of the largest logit (the lowest of equals), -1 where ignored.
        logsumexp: lse; the log-probability of class v is z_v - lse.
        entropy: -sum_v p_v log p_v.
        log_sum_squares: log sum_v p_v^2.
        mean_logit: sum_v z_v / V.
    """

    prediction: Tensor
    logsumexp: Tensor
    entropy: Tensor
    log_sum_squares: Tensor
    mean_logit: Tensor


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    lora_dropout: float = 0.0,
    lora_s: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
    return_accuracy: bool = False,
    return_statistics: bool = False,
    shard: Shard | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> Any:
    """Cross-entropy of ``hidden_states @ weight.T + bias`` against ``labels``.

    Args:
        hidden_states: (..., hidden), float32, bfloat16, float16 or float64; cast to the autocast
            dtype under autocast.
        weight: (vocabulary, hidden), the lm_head (it may be the tied embedding), in the dtype of
            ``hidden_states`` (any under autocast). Where it requires a gradient, dW is accumulated
            in float32.
        labels: (...) int64, the shape of ``hidden_states`` without its last dimension; tokens with
            ``ignore_index`` count nowhere, and cost next to nothing. Or (..., vocabulary) floating:
            the probabilities of every class, all tokens counting.
        bias: (vocabulary,) or None.
        class_weight: (vocabulary,) or None, without gradient; as ``weight`` of torch's
            cross_entropy, whose mean it also divides by the sum of its weights.
        label_smoothing: eps, 0 to 1.
        logit_scale: scale of the logits: Cohere's ``logit_scale``, 1 / Granite's
            ``logits_scaling``, 1 / temperature.
        softcap: c, Gemma 2's ``final_logit_softcapping``; None for none.
        z_loss: zeta.
        lora_a, lora_b: (r, hidden) and (vocabulary, r): an adapter of the head, in any floating
            dtype.
        scaling: s, its lora_alpha / r.
        lora_dropout: the probability with which elements of h are dropped before A.
        lora_s: (..., r), what these make of ``hidden_states``, s A h, in their place.
        shift: position t predicts label t + 1 along the last dimension of ``labels``.
        reduction: "mean" over the tokens that count, "sum", or "none": a loss for each token, 0
            where it does not count (the log-probability of the label is its negative). With "none"
            over a head or an adapter that is trained, the backward makes the logits once more; not
            with probabilities.
        num_items_in_batch: divides the sum in place of the mean, as the Trainer does under
            gradient accumulation.
        return_accuracy: return (loss, accuracy), accuracy the share of tokens that count whose
            arg max is the label.
        return_statistics: return (loss, :class:`TokenStatistics`) instead.
        shard: ``weight``, ``bias`` and ``lora_b`` are rows ``shard.start`` onwards of a head of
            ``shard.total`` classes, split over ``shard.group`` (vocabulary parallelism);
            everything else is the same on every process, and so are the results. dh is summed over
            the group. Three small all-reduces a slab, one of dh. Not under torch.compile, nor with
            ``return_statistics`` or probabilities.
        chunk: tokens of one slab; None for one eighth of them, on a GPU at least 2048 or half of
            them, within 512 MiB (CPU: 48) and an eighth of free memory.

    Returns:
        loss, float32: a scalar, or of the shape of ``labels``; with no token that counts the mean
        is NaN, as in torch.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``; on the CPU also for a
            label outside the vocabulary (on a GPU its loss is NaN).
    """
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    check(
        hidden_states, weight, labels, bias, class_weight, lora_a, lora_b, lora_s,
        label_smoothing=label_smoothing, softcap=softcap, reduction=reduction, chunk=chunk,
        shard=shard, whole=soft or return_statistics,
    )  # fmt: skip
    transform: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    if soft:
        if return_accuracy or return_statistics or shift or z_loss or lora_b is not None:
            raise ArgumentError(
                WHERE,
                "labels",
                expected="int64 labels with return_*, shift, z_loss or an adapter",
                got="probabilities",
            )
        shared = [t for t in (weight, bias) if t is not None and t.requires_grad]
        if reduction == "none" and shared and torch.is_grad_enabled():
            raise ArgumentError(
                WHERE,
                "reduction",
                expected="'mean' or 'sum' over a trained head with probabilities",
                got="'none'",
            )
        losses = divergence.soft_cross_entropy(
            hidden_states, weight, labels, class_weight, label_smoothing, chunk, backend,
            **transform,
        )  # fmt: skip
        return _reduced(losses, losses.numel(), reduction, num_items_in_batch)
    if shift:
        following = labels[..., 1:]
        labels = torch.full_like(labels, ignore_index)
        labels[..., :-1] = following
    device_type = hidden_states.device.type
    dtype = autocast_dtype(device_type) or hidden_states.dtype
    flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype).contiguous()
    target = labels.reshape(-1).contiguous()
    if lora_s is not None:
        lora_s = lora_s.reshape(-1, lora_s.shape[-1]).to(dtype).contiguous()
    elif lora_a is not None:
        dropped = torch.nn.functional.dropout(flat, lora_dropout) if lora_dropout else flat
        lora_s = torch.nn.functional.linear(dropped, lora_a.to(dtype)) * scaling
    tensors = [flat, weight, bias, class_weight, lora_s, lora_b]
    if not recording():  # an evaluation of a trained head makes no gradients
        tensors = [None if t is None else t.detach() for t in tensors]
    compiling = dispatched(*tensors, target)
    name = backend or AUTO
    if not compiling:
        name = choose(name, flat)[0]
    needs = [t is not None and t.requires_grad for t in tensors]
    trained = needs[1] or needs[2] or needs[5]
    rows = chunk or default_chunk(
        flat.shape[0],
        weight.shape[0],
        flat.element_size(),
        backends.device_type_of(flat),
        trained=needs[1],
        free_bytes=None if compiling else free_bytes(flat.device),
    )
    options = [float(logit_scale), float(softcap or 0.0), float(label_smoothing), float(z_loss)]
    del needs[3]  # class_weight has no gradient
    arguments = (
        *tensors, target, ignore_index, rows, options, name, return_statistics, needs,
        reduction == "none" and trained,
    )  # fmt: skip
    if compiling:
        found = torch.ops.fastft.linear_cross_entropy_fwd(*arguments)
    else:
        found = LinearCrossEntropy.apply(shard, *arguments)
    losses, prediction, top, log_sum, *moments = found[:7]
    kept = target != ignore_index
    count = kept.sum()
    divisor = count
    if class_weight is not None and reduction == "mean":
        weights = class_weight[target.clamp(0, class_weight.numel() - 1)]
        divisor = torch.where(kept, weights, 0.0).sum()
    loss = _reduced(losses.view(labels.shape), divisor, reduction, num_items_in_batch)
    if return_statistics:
        per_token = (prediction, top + log_sum, *moments)
        return loss, TokenStatistics(*(t.view(labels.shape) for t in per_token))
    if return_accuracy:
        return loss, ((prediction == target) & kept).sum() / count
    return loss


def _reduced(
    losses: Tensor,
    divisor: Tensor | int,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    loss = losses if reduction == "none" else losses.sum(dtype=torch.float64).to(losses.dtype)
    if num_items_in_batch is not None:
        return over(loss, num_items_in_batch)
    return over(loss, divisor) if reduction == "mean" else loss


def check(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_s: Tensor | None,
    *,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
    chunk: int | None,
    shard: Shard | None,
    whole: bool,
) -> None:
    """Refuses what the operation is not defined for; ``whole``: the call asks for what a shard of
    the vocabulary cannot give.

    Raises:
        DtypeError: no tensor, no floating dtype, labels that are neither int64 nor floating, or
            weight in another dtype than hidden_states outside autocast.
        ShapeError: shapes that do not fit.
        DeviceError: tensors on different devices.
        ArgumentError: an unknown reduction, chunk < 1, half an adapter, a smoothing outside 0 to 1,
            a softcap that is not above 0, a class_weight that requires a gradient, or a shard with
            what it cannot give.
    """
    check_tensor(WHERE, "hidden_states", hidden_states)
    check_dtype(WHERE, "hidden_states", hidden_states, FLOATS)
    if hidden_states.dim() < 1:
        raise ShapeError(WHERE, "hidden_states", expected="(..., hidden)", got="a scalar")
    device = hidden_states.device
    autocast = autocast_dtype(device.type)
    allowed = FLOATS if autocast is not None else (hidden_states.dtype,)
    check_tensor(WHERE, "weight", weight)
    check_device(WHERE, "weight", weight, device)
    check_dtype(WHERE, "weight", weight, allowed)
    hidden = hidden_states.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        raise ShapeError(
            WHERE, "weight", expected=f"(vocabulary, {hidden})", got=str(tuple(weight.shape))
        )
    vocabulary = weight.shape[0]
    leading = tuple(hidden_states.shape[:-1])
    check_tensor(WHERE, "labels", labels)
    check_device(WHERE, "labels", labels, device)
    if labels.is_floating_point():
        what = "hidden_states[:-1], vocabulary"
        check_shape(WHERE, "labels", labels, (*leading, vocabulary), what)
    else:
        check_dtype(WHERE, "labels", labels, (torch.int64,))
        check_shape(WHERE, "labels", labels, leading, "hidden_states[:-1]")
    total = vocabulary if shard is None else shard.total
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...], str]] = {
        "bias": (bias, (vocabulary,), "(vocabulary,)"),
        "class_weight": (class_weight, (total,), "(vocabulary,)"),
    }
    if lora_b is not None:
        rank = lora_b.shape[1] if isinstance(lora_b, Tensor) and lora_b.dim() == 2 else 0
        shapes["lora_a"] = (lora_a, (rank, hidden), "(r, hidden)")
        shapes["lora_s"] = (lora_s, (*leading, rank), "(hidden_states[:-1], r)")
        shapes["lora_b"] = (lora_b, (vocabulary, rank), "(vocabulary, r)")
    for name, (tensor, shape, what) in shapes.items():
        if tensor is not None:
            check_tensor(WHERE, name, tensor)
            check_device(WHERE, name, tensor, device)
            check_shape(WHERE, name, tensor, shape, what)
    through = dispatched(hidden_states, weight)
    refusals = (
        ("lora_b", (lora_a is None) + (lora_s is None) == 1 + (lora_b is None),
         "lora_b together with lora_a or lora_s", "one alone"),
        ("class_weight", class_weight is None or not class_weight.requires_grad,
         "constant class weights", "some that require a gradient"),
        ("label_smoothing", 0.0 <= label_smoothing <= 1.0, "0 to 1", label_smoothing),
        ("labels", not (labels.requires_grad and torch.is_grad_enabled()),
         "labels without a gradient", "probabilities that require one"),
        ("labels", not (labels.is_floating_point() and through),
         "int64 labels under torch.compile", "probabilities"),
        ("softcap", softcap is None or softcap > 0, "a number above 0, or None", softcap),
        ("reduction", reduction in ("mean", "sum", "none"), "'mean', 'sum' or 'none'",
         repr(reduction)),
        ("chunk", chunk is None or chunk >= 1, "at least 1 token", chunk),
        ("shard", shard is None or not (whole or through),
         "a whole vocabulary with probabilities, return_statistics or torch.compile",
         "a part of one"),
    )  # fmt: skip
    for name, fine, expected, got in refusals:
        if not fine:
            raise ArgumentError(WHERE, name, expected=expected, got=str(got))
