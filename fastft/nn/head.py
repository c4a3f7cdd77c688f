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
    "refusal",
]


class _Thread(threading.local):
    """What this thread is inside of: forwards of language models, innermost last, each with the
    head that defers in it (or None) and whether it is TRL's; deferred_logits()."""

    def __init__(self) -> None:
        self.forwards: list[tuple[weakref.ref[nn.Module] | None, bool]] = []
        self.wanted = 0


_thread = _Thread()


def _defers(head: nn.Module) -> bool:
    return any(ref is not None and ref() is head for ref, _ in _thread.forwards)


class FusedHead(nn.Linear):
    """``nn.Linear`` that defers its product while its model computes a loss."""

    fastft_original = nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A head that FSDP shards by itself has another class, and no weight once this returns.
        if type(self) is not FusedHead or torch.compiler.is_compiling() or not _defers(self):
            return super().forward(hidden_states)
        autocast = autocast_dtype(hidden_states.device.type)
        source = Logits(
            hidden_states,
            self,
            self._product,
            self.weight,
            self.bias,
            autocast=autocast,
            graph=torch.is_grad_enabled(),
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
        if type(self) is FusedLoraHead and not torch.compiler.is_compiling() and _defers(self):
            parts = self._one_adapter(x, args, kwargs)
            if parts is not None:
                autocast = autocast_dtype(x.device.type)
                scaling, dropout = float(parts.scaling), parts.dropout_p()
                adapter = HeadAdapter(parts.a.weight, parts.b.weight, scaling, dropout)
                base = parts.base
                tensors = (base.weight, base.bias, adapter)
                graph = torch.is_grad_enabled()
                source = Logits(x, self, self._product, *tensors, autocast=autocast, graph=graph)
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
    trl = bool(kwargs.get("fused_lm_head"))
    wanted = not trl and (kwargs.get("labels") is not None or _thread.wanted > 0)
    _thread.forwards.append((weakref.ref(head) if wanted else None, trl))
    if trl:
        trl_head.begin(head)


def end_forward(model: Any, *_: Any) -> None:
    """Forward hook of a language model, called on errors too."""
    if torch.compiler.is_compiling() or not _thread.forwards:
        return
    if _thread.forwards.pop()[1]:
        trl_head.end()


@contextmanager
def deferring(head: nn.Module) -> Iterator[None]:
    """Inside, this head defers its product in this thread."""
    _thread.forwards.append((weakref.ref(head), False))
    try:
        yield
    finally:
        _thread.forwards.pop()


@contextmanager
def deferred_logits() -> Iterator[None]:
    """Inside, accelerated language models of this thread defer their logits without labels, too.

    Use them before the step, and not across a wrapper's end: FSDP frees the head's weight there,
    and DDP looks for a graph in what it returns (call ``model.module``).
    """
    _thread.wanted += 1
    try:
        yield
    finally:
        _thread.wanted -= 1


def refusal(source: Logits) -> str | None:
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
    source.check()
    reason = refusal(source)
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
    if (weight is not None and weight.requires_grad) or target.requires_grad:
        return NotImplemented
    if soft and reduction == "none" and input.source.trained():
        return NotImplemented
    if soft and input.source.adapter is not None:
        return NotImplemented
    loss = head_losses(
        input,
        target,
        class_weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if loss is NotImplemented or autocast_dtype(input.device.type) is not None:
        return loss  # autocast runs cross_entropy in float32
    return loss.to(input.dtype)


CALLS[nn.functional.cross_entropy] = _cross_entropy
