"""The language-model head and the loss over it, fused: no logits in training."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.deferred import DeferredLogits
from fastft.ops._checks import autocast_dtype

__all__ = ["CausalLMLoss", "FusedHead", "begin_forward", "causal_lm_loss", "end_forward"]

# Heads whose model is inside a forward with labels.
_deferring: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class FusedHead(nn.Linear):
    """``nn.Linear`` that defers its product while its model computes a loss."""

    fastft_original = nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A head that FSDP shards by itself has another class, and no weight once this returns.
        if type(self) is not FusedHead or torch.compiler.is_compiling() or self not in _deferring:
            return super().forward(hidden_states)
        dtype = autocast_dtype(hidden_states.device.type) or hidden_states.dtype
        return DeferredLogits(hidden_states, self, self._product, dtype)

    def _product(self, hidden_states: Tensor) -> Tensor:
        """The logits, for whoever looks at them after all."""
        count(self, "logits were read")
        return nn.functional.linear(hidden_states, self.weight, self.bias)


FusedHead.__name__ = "Linear"


def begin_forward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a causal language model: defer the logits when there are labels."""
    if torch.compiler.is_compiling():
        return
    if kwargs.get("labels") is not None:
        _deferring.add(model.get_output_embeddings())


def end_forward(model: Any, *_: Any) -> None:
    """Forward hook of a causal language model, called on errors too."""
    if not torch.compiler.is_compiling():
        _deferring.discard(model.get_output_embeddings())


class CausalLMLoss:
    """Transformers' causal language-model loss, over deferred logits where it gets them.

    Args:
        original: the loss it stands in for.
        replaced_own: whether that was set on the model itself, not found through its class.
    """

    def __init__(self, original: Callable[..., Tensor], *, replaced_own: bool) -> None:
        self.original, self.replaced_own = original, replaced_own

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not isinstance(logits, DeferredLogits) or args or logits.shape[-1] != vocab_size:
            return self.original(logits, labels, vocab_size, *args, **kwargs)
        reason = _refusal(logits)
        count(logits.head, reason)
        if reason is not None:
            return self.original(logits.value(), labels, vocab_size, **kwargs)
        return causal_lm_loss(logits.hidden_states, logits.head, labels, **kwargs)

    def of_tokens(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """The loss of each token (batch, sequence) at the position that predicts it; None where
        only sums can be had: logits that were read, a head that is trained."""
        if not isinstance(logits, DeferredLogits) or logits.head.weight.requires_grad:
            return None
        if _refusal(logits) is not None:
            return None
        count(logits.head, None)
        return causal_lm_loss(logits.hidden_states, logits.head, labels, reduction="none")


def _refusal(logits: DeferredLogits) -> str | None:
    """Why the loss over these logits cannot be fused; None when it can."""
    weight, bias, hidden = logits.head.weight, logits.head.bias, logits.hidden_states
    if type(weight) not in (Tensor, nn.Parameter) or type(hidden) is not Tensor:
        return "tensor subclass"
    if weight.device != hidden.device:
        return "several devices"
    if bias is not None and bias.requires_grad:
        return "the head's bias is trained"
    if weight.dtype != hidden.dtype and autocast_dtype(hidden.device.type) is None:
        return "mixed dtypes"
    return None


def causal_lm_loss(
    hidden_states: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    reduction: str = "mean",
    **_: Any,
) -> Tensor:
    """What Transformers' ``ForCausalLMLoss`` computes, from the hidden states.

    Args:
        hidden_states: (batch, sequence, hidden).
        labels: (batch, sequence), shifted here by one unless ``shift_labels`` gives them shifted.
        num_items_in_batch: divides the sum of losses; None for the mean over counted tokens.
        reduction: "none" for a loss a token, at the position that predicts it.

    Returns:
        float32 scalar, or (batch, sequence).
    """
    target = labels if shift_labels is None else shift_labels
    target = target.to(hidden_states.device).view(hidden_states.shape[:-1])
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden_states.device)
    return ops.linear_cross_entropy(
        hidden_states,
        head.weight,
        target,
        bias=head.bias,
        ignore_index=ignore_index,
        shift=shift_labels is None,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
    )
