"""The language-model head and the loss over it, fused: no logits in training."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.nn import trl_head
from fastft.nn.calls import count
from fastft.nn.deferred import CALLS, DeferredLogits, HeadAdapter, Logits
from fastft.nn.lora import FusedLoraLinear, Parts
from fastft.ops._checks import autocast_dtype

__all__ = [
    "FusedHead",
    "FusedLoraHead",
    "begin_forward",
    "deferred_logits",
    "deferring",
    "end_forward",
    "head_losses",
]

# Heads whose model is inside a forward with labels.
_deferring: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_thread = threading.local()  # .wanted: how many deferred_logits() are open


class FusedHead(nn.Linear):
    """``nn.Linear`` that defers its product while its model computes a loss."""

    fastft_original = nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A head that FSDP shards by itself has another class, and no weight once this returns.
        if type(self) is not FusedHead or torch.compiler.is_compiling() or self not in _deferring:
            return super().forward(hidden_states)
        autocast = autocast_dtype(hidden_states.device.type)
        source = Logits(
            hidden_states, self, self._product, self.weight, self.bias, autocast=autocast
        )
        return DeferredLogits(source, autocast or hidden_states.dtype)

    def _product(self, hidden_states: Tensor) -> Tensor:
        """The logits, for whoever looks at them after all."""
        count(self, "logits were read")
        return nn.functional.linear(hidden_states, self.weight, self.bias)


FusedHead.__name__ = "Linear"


class FusedLoraHead(FusedLoraLinear):
    """A head with an adapter, deferred likewise: the adapter's gradient comes out of the loss."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self) is FusedLoraHead and not torch.compiler.is_compiling() and self in _deferring:
            parts = self._one_adapter(x, args, kwargs)
            if parts is not None:
                autocast = autocast_dtype(x.device.type)
                scaling, dropout = float(parts.scaling), parts.dropout_p()
                adapter = HeadAdapter(parts.a.weight, parts.b.weight, scaling, dropout)
                base = parts.base
                tensors = (base.weight, base.bias, adapter)
                source = Logits(x, self, self._product, *tensors, autocast=autocast)
                return DeferredLogits(source, autocast or x.dtype)
        return super().forward(x, *args, **kwargs)

    def _one_adapter(self, x: Any, args: Any, kwargs: Any) -> Parts | None:
        plan = self.plan(x, args, kwargs)
        if isinstance(plan, str) or len(plan.parts) != 1 or plan.spans is not None:
            return None
        (parts,) = plan.parts
        plain = parts.variant is None and parts.b.bias is None
        return parts if plain and isinstance(parts.base, nn.Linear) else None

    def _product(self, x: Tensor) -> Tensor:
        count(self, "logits were read")
        return super().forward(x)


FusedLoraHead.fastft_original = FusedLoraLinear.fastft_original
FusedLoraHead.__name__ = "Linear"


def begin_forward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a language model: defer the logits when there are labels."""
    if torch.compiler.is_compiling():
        return
    head = model.get_output_embeddings()
    if kwargs.get("fused_lm_head"):
        trl_head.begin(head)
    elif kwargs.get("labels") is not None or getattr(_thread, "wanted", 0) > 0:
        _deferring.add(head)


def end_forward(model: Any, *_: Any) -> None:
    """Forward hook of a language model, called on errors too."""
    if not torch.compiler.is_compiling():
        _deferring.discard(model.get_output_embeddings())
        trl_head.end()


@contextmanager
def deferring(head: nn.Module) -> Iterator[None]:
    """Inside, this head defers its product."""
    _deferring.add(head)
    try:
        yield
    finally:
        _deferring.discard(head)


@contextmanager
def deferred_logits() -> Iterator[None]:
    """Inside, accelerated language models of this thread defer their logits without labels, too."""
    _thread.wanted = getattr(_thread, "wanted", 0) + 1
    try:
        yield
    finally:
        _thread.wanted -= 1


def _refusal(source: Logits) -> str | None:
    """Why the loss over these logits cannot be fused; None when it can."""
    weight, hidden = source.weight, source.hidden_states
    if type(weight) not in (Tensor, nn.Parameter) or type(hidden) is not Tensor:
        return "tensor subclass"
    if weight.device != hidden.device:
        return "several devices"
    if weight.dtype != hidden.dtype and source.autocast is None:
        return "mixed dtypes"
    return None


def head_losses(logits: DeferredLogits, labels: Tensor, **options: Any) -> Any:
    """:func:`fastft.ops.linear_cross_entropy` of deferred logits, counted; NotImplemented where
    it cannot be fused.

    Args:
        labels: of the shape of the logits without their last dimension, or of it.
        options: other arguments of the operation.
    """
    source = logits.source
    reason = _refusal(source)
    count(source.head, reason)
    if reason is not None:
        return NotImplemented
    adapter = source.adapter
    if adapter is not None:
        options |= {"lora_a": adapter.lora_a, "lora_b": adapter.lora_b}
        options |= {"scaling": adapter.scaling, "lora_dropout": adapter.dropout}
    with source.context():
        return ops.linear_cross_entropy(
            source.hidden_states,
            source.weight,
            labels,
            bias=source.bias,
            logit_scale=source.scale,
            softcap=source.softcap or None,
            **options,
        )


def _cross_entropy(
    input: DeferredLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``torch.nn.functional.cross_entropy`` of deferred logits (tokens, vocabulary)."""
    if input.dim() != 2 or not isinstance(target, Tensor) or type(target) is not Tensor:
        return NotImplemented
    if size_average is not None or reduce is not None or target.device != input.device:
        return NotImplemented
    soft = target.is_floating_point()
    fits = target.shape == (input.shape if soft else input.shape[:1])
    if not fits or (not soft and target.dtype != torch.int64):
        return NotImplemented  # torch's own error, or what only torch takes
    if weight is not None and weight.requires_grad:
        return NotImplemented
    loss = head_losses(
        input,
        target,
        class_weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss if loss is NotImplemented else loss.to(input.dtype)


CALLS[nn.functional.cross_entropy] = _cross_entropy
