"""``linear_cross_entropy``: the language-model head and its loss without the logits.

    z_t = W h_t + bias;   loss = sum_t (logsumexp(z_t) - z_t[label_t]) / normaliser

Logits exist for one slab of tokens at a time; softmax(z) - onehot replaces them there and gives
dh = slab W and dW = slab^T h on the spot, so the backward only scales what the forward left
(Wijmans et al. 2024, "Cut Your Losses"; Hsu et al. 2024, Liger).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from fastft.ops._library import register

__all__ = ["check", "default_chunk", "linear_cross_entropy"]

_WHERE = "fastft.ops.linear_cross_entropy"
_AUTO = "auto"

# The slab of logits: at most this many bytes and at most an eighth of all logits.
_SLAB_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
    return_accuracy: bool = False,
    backend: str | None = None,
    chunk: int | None = None,
) -> Any:
    """Cross-entropy of ``hidden_states @ weight.T + bias`` against ``labels``.

    Args:
        hidden_states: (..., hidden), float32, bfloat16, float16 or float64; cast to the autocast
            dtype under autocast.
        weight: (vocabulary, hidden), the lm_head, in the dtype of ``hidden_states`` (any under
            autocast). Where it requires a gradient, dW is accumulated in float32.
        labels: (...) int64, the shape of ``hidden_states`` without its last dimension. Tokens
            with ``ignore_index`` count nowhere, and cost nothing on the CPU.
        bias: (vocabulary,) or None; it gets no gradient.
        shift: position t predicts label t + 1 along the last dimension of ``labels``.
        reduction: "mean" over the tokens that count, "sum", or "none": a loss for each token, 0
            where it does not count (the log-probability of the label is its negative); the head
            must then be frozen.
        num_items_in_batch: divides the sum in place of the mean, as the Trainer does under
            gradient accumulation.
        return_accuracy: return (loss, accuracy), accuracy the share of tokens that count whose
            arg max is the label.
        chunk: tokens of one slab; None for :func:`default_chunk`.

    Returns:
        loss, float32: a scalar, or of the shape of ``labels``; with no token that counts the mean
        is NaN, as in torch.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``; on the CPU also for a
            label outside the vocabulary.
    """
    check(hidden_states, weight, labels, bias, reduction, chunk)
    if shift:
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    device_type = hidden_states.device.type
    dtype = autocast_dtype(device_type) or hidden_states.dtype
    flat = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype).contiguous()
    target = labels.reshape(-1).contiguous()
    if not torch.is_grad_enabled():  # an evaluation of a trained head makes no gradients
        flat, weight = flat.detach(), weight.detach()
    name = backend or _AUTO
    if not torch.compiler.is_compiling():
        name = _choose(name, flat, weight.requires_grad)[0]
    rows = chunk or default_chunk(
        flat.shape[0],
        weight.shape[0],
        flat.element_size(),
        device_type,
        trained=weight.requires_grad,
    )
    arguments = (flat, weight, bias, target, ignore_index, rows, name)
    if torch.compiler.is_compiling():
        losses, n_correct, *_ = torch.ops.fastft.linear_cross_entropy_fwd(
            *arguments, flat.requires_grad, weight.requires_grad
        )
    else:
        losses, n_correct = LinearCrossEntropy.apply(*arguments)
    n_valid = (target != ignore_index).sum()
    if reduction == "none":
        loss = losses.view(labels.shape)
        loss = loss if num_items_in_batch is None else loss / num_items_in_batch
    else:
        loss = losses.sum(dtype=torch.float64).to(losses.dtype)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        elif reduction == "mean":
            loss = loss / n_valid
    return (loss, (n_correct / n_valid).squeeze(0)) if return_accuracy else loss


def default_chunk(
    tokens: int, vocabulary: int, itemsize: int, device_type: str, *, trained: bool = False
) -> int:
    """Tokens a slab: an eighth of them, the slab within its limit of bytes, at least 16.

    A trained head's float32 gradient is read and written once a slab, and is larger than the slab:
    half of the tokens then.
    """
    limit = _SLAB_BYTES.get(device_type, _SLAB_BYTES["cpu"])
    within = limit // max(1, vocabulary * itemsize)
    return max(16, min(-(-tokens // (2 if trained else 8)), within))


def check(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    chunk: int | None,
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, labels that are not int64, or weight in another
            dtype than hidden_states outside autocast.
        ShapeError: shapes that do not fit.
        DeviceError: tensors on different devices.
        ArgumentError: an unknown reduction, chunk < 1, or a bias that requires a gradient.
    """
    check_tensor(_WHERE, "hidden_states", hidden_states)
    check_dtype(_WHERE, "hidden_states", hidden_states, FLOATS)
    if hidden_states.dim() < 1:
        raise ShapeError(_WHERE, "hidden_states", expected="(..., hidden)", got="a scalar")
    device = hidden_states.device
    autocast = autocast_dtype(device.type)
    allowed = FLOATS if autocast is not None else (hidden_states.dtype,)
    check_tensor(_WHERE, "weight", weight)
    check_device(_WHERE, "weight", weight, device)
    check_dtype(_WHERE, "weight", weight, allowed)
    hidden = hidden_states.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        raise ShapeError(
            _WHERE, "weight", expected=f"(vocabulary, {hidden})", got=str(tuple(weight.shape))
        )
    check_tensor(_WHERE, "labels", labels)
    check_device(_WHERE, "labels", labels, device)
    check_dtype(_WHERE, "labels", labels, (torch.int64,))
    check_shape(_WHERE, "labels", labels, tuple(hidden_states.shape[:-1]), "hidden_states[:-1]")
    if bias is not None:
        check_tensor(_WHERE, "bias", bias)
        check_device(_WHERE, "bias", bias, device)
        check_shape(_WHERE, "bias", bias, (weight.shape[0],), "(vocabulary,)")
        if bias.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                _WHERE,
                "bias",
                expected="a frozen bias",
                got="one that requires a gradient",
                remedy="Freeze it: bias.requires_grad_(False).",
            )
    if reduction not in ("mean", "sum", "none"):
        expected = "'mean', 'sum' or 'none'"
        raise ArgumentError(_WHERE, "reduction", expected=expected, got=repr(reduction))
    if reduction == "none" and weight.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            _WHERE,
            "reduction",
            expected="'mean' or 'sum' over a trained head",
            got="'none'",
            remedy="dW is summed over the tokens in the forward; call once for each group of them.",
        )
    if chunk is not None and chunk < 1:
        raise ArgumentError(_WHERE, "chunk", expected="at least 1 token", got=str(chunk))


def _choose(backend: str, hidden: Tensor, weight_requires_grad: bool) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "linear_cross_entropy",
        None if backend == _AUTO else backend,
        device_type=hidden.device.type,
        dtype=hidden.dtype,
        weight_requires_grad=weight_requires_grad,
    )


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(outside.any()):
        raise ArgumentError(
            _WHERE,
            "labels",
            expected=f"0 to {vocabulary - 1}, or ignore_index = {ignore_index}",
            got=str(labels[outside][0].item()),
        )


def _fwd_kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    backend: str,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each token, n_correct, d_hidden and d_weight (empty where not needed)."""
    outputs = _fwd_fake(
        hidden, weight, bias, labels, ignore_index, chunk, backend, need_d_hidden, need_d_weight
    )
    losses, n_correct, d_hidden, d_weight = outputs
    if hidden.device.type == "cpu":
        _check_labels(labels, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        _choose(backend, hidden, need_d_weight)[1].fwd(
            losses,
            n_correct,
            d_hidden if need_d_hidden else None,
            d_weight if need_d_weight else None,
            hidden,
            weight if weight.dtype == hidden.dtype else weight.to(hidden.dtype),
            None if bias is None else bias.to(hidden.dtype),
            labels,
            ignore_index=ignore_index,
            chunk=chunk,
        )
    return outputs


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    backend: str,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(1, dtype=torch.int64),
        hidden.new_empty(hidden.shape if need_d_hidden else (0,)),
        hidden.new_empty(weight.shape if need_d_weight else (0,), dtype=wide),
    )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # The float32 scale, of as many dimensions, keeps the product in float32: 1/n has too few bits
    # else. Rounded as it is written: a float32 product of a head's size is memory for nothing.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _gradients(
    d_losses: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, weight_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the summed loss, times what came back. A trained head's are a sum over the tokens
    already: its losses are only ever summed, so that all tokens get the same."""
    dh = None if d_hidden is None else _scaled(d_hidden, d_losses[:, None], d_hidden.dtype)
    if d_weight is None:
        return dh, None
    scale = d_losses[:1] if d_losses.numel() else d_losses.new_zeros(1)
    return dh, _scaled(d_weight, scale, weight_dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Eager autograd of the losses; the gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        needs = ctx.needs_input_grad
        losses, n_correct, d_hidden, d_weight = _fwd_kernel(  # type: ignore[call-arg]
            *arguments, needs[0], needs[1]
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = arguments[1].dtype
        ctx.mark_non_differentiable(n_correct)
        return losses, n_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_losses: Tensor, _: Any) -> Any:
        needs = ctx.needs_input_grad
        dh, dw = (t if need else None for t, need in zip(ctx.saved_tensors, needs))
        return *_gradients(d_losses, dh, dw, ctx.weight_dtype), *[None] * 5


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3])
    ctx.weight_dtype, ctx.needs = inputs[1].dtype, (inputs[7], inputs[8])


def _registered_backward(ctx: Any, d_losses: Tensor, *_: Any) -> Any:
    dh, dw = (t if need else None for t, need in zip(ctx.saved_tensors, ctx.needs))
    return *_gradients(d_losses, dh, dw, ctx.weight_dtype), *[None] * 7


register(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "int ignore_index, int chunk, str backend, bool need_d_hidden, bool need_d_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
torch.library.register_autograd(
    "fastft::linear_cross_entropy_fwd", _registered_backward, setup_context=_setup_context
)
