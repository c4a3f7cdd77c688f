"""The language-model head and the loss over it, fused: no logits in training."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastft import ops
from fastft.nn import trl_head
from fastft.nn.calls import count
from fastft.nn.deferred import CALLS, RULES, DeferredLogits
from fastft.nn.deferred_graph import deferred
from fastft.nn.deferred_rules import mean  # and what models do between head and loss
from fastft.nn.deferred_source import HeadAdapter, Logits
from fastft.nn.lora import FusedLoraLinear
from fastft.nn.plans import Parts
from fastft.nn.rules import hooked
from fastft.ops._checks import autocast_dtype
from fastft.ops._differentiable import transform

__all__ = [
    "FusedHead",
    "FusedLoraHead",
    "begin_forward",
    "deferred_logits",
    "deferring",
    "end_forward",
    "fleeting_logits",
    "head_losses",
    "heads_in",
    "refusal",
]


class _Forward(NamedTuple):
    """A forward of a language model: the head that defers in it, if any, whether it is TRL's with
    its fused head, and whether DDP looks for a graph in what it returns."""

    head: weakref.ref[nn.Module] | None
    trl: bool = False
    ddp_looks: bool = False


class _Thread(threading.local):
    """What this thread is inside of: forwards, innermost last, and deferred_logits(), of which some
    are of trainers that read logits before the step or never."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []
        self.wanted = self.fleeting = 0


_thread = _Thread()


def _defers(head: nn.Module, hidden_states: Tensor) -> bool:
    """Whether the head is to defer its product, and can."""
    if not any(f.head is not None and f.head() is head for f in _thread.forwards):
        return False
    reason = "hooks on the head" if hooked(head) else transform()
    if hidden_states.dtype == torch.float64 and autocast_dtype(hidden_states.device.type):
        reason = reason or "mixed dtypes"  # autocast leaves float64 as it is
    if reason is not None:
        count(head, reason)
    return reason is None


def _deferred(
    hidden_states: Tensor,
    head: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    adapter: HeadAdapter | None = None,
) -> DeferredLogits:
    """The head's logits, not computed."""
    autocast = autocast_dtype(hidden_states.device.type)
    source = Logits(
        hidden_states,
        head,
        weight,
        bias,
        adapter,
        autocast=autocast,
        graph=torch.is_grad_enabled(),
        fleeting=_thread.fleeting > 0,
        copied=any(f.ddp_looks for f in _thread.forwards),
    )
    return deferred(source, autocast or hidden_states.dtype)


class FusedHead(nn.Linear):
    """``nn.Linear`` that defers its product while its model computes a loss."""

    fastft_original = nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A head that FSDP shards by itself has another class, and no weight once this returns.
        if (
            type(self) is not FusedHead
            or torch.compiler.is_compiling()
            or not _defers(self, hidden_states)
        ):
            return super().forward(hidden_states)
        return _deferred(hidden_states, self, self.weight, self.bias)


FusedHead.__name__ = "Linear"


class FusedLoraHead(FusedLoraLinear):
    """A head with an adapter, deferred likewise: the adapter's gradient comes out of the loss."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self) is FusedLoraHead and not torch.compiler.is_compiling() and _defers(self, x):
            parts = self._one_adapter(x, args, kwargs)
            if parts is not None:
                return _deferred(x, self, parts.base.weight, parts.base.bias, _adapter(parts, x))
        return super().forward(x, *args, **kwargs)

    def _one_adapter(self, x: Any, args: Any, kwargs: Any) -> Parts | None:
        plan = self.plan(x, args, kwargs)
        if isinstance(plan, str) or len(plan.parts) != 1 or plan.spans is not None:
            return None
        (parts,) = plan.parts
        plain = parts.variant is None and parts.b.bias is None
        return parts if plain and isinstance(parts.base, nn.Linear) else None


def _adapter(parts: Parts, x: Tensor) -> HeadAdapter:
    """What the adapter does in this forward: its mask, too, is drawn now."""
    p = parts.dropout_p()
    dropped = nn.functional.dropout(x, p) if p else x
    dtype = autocast_dtype(x.device.type) or x.dtype
    a, b = parts.a.weight, parts.b.weight
    lora_s = nn.functional.linear(dropped.to(dtype), a.to(dtype)) * float(parts.scaling)
    return HeadAdapter(lora_s, b.clone())


FusedLoraHead.fastft_original = FusedLoraLinear.fastft_original
FusedLoraHead.__name__ = "Linear"


def heads_in(head: nn.Module) -> dict[str, nn.Module]:
    """The modules that may compute what the head computes, by their names in it: of a trained one
    (PEFT's ``modules_to_save``) the copy of each adapter and the original."""
    if not isinstance(head, ModulesToSaveWrapper):
        return {"": head}
    copies = {f".modules_to_save.{name}": m for name, m in head.modules_to_save.items()}
    return {".original_module": head.original_module, **copies}


def _head_now(head: Any) -> tuple[nn.Module, str | None]:
    """The module that computes what the head computes now, and why it may not be fused whatever it
    is itself."""
    if not isinstance(head, ModulesToSaveWrapper):
        return head, None
    reason = "hooks on the head" if hooked(head) else None
    if head.disable_adapters or not head.active_adapters:
        return head.original_module, reason
    return head.modules_to_save[head.active_adapters[0]], reason


def begin_forward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a language model: defer the logits when there are labels."""
    if torch.compiler.is_compiling():
        return
    head, reason = _head_now(model.get_output_embeddings())
    trl, labels = bool(kwargs.get("fused_lm_head")), kwargs.get("labels") is not None
    wanted = not trl and (labels or _thread.wanted > 0)
    ddp_looks = _ddp_looks_for_a_graph()
    if wanted and not labels and ddp_looks:
        # It would find none, and take every parameter to be unused.
        count(head, "DDP that finds unused parameters")
        wanted = False
    if wanted and reason is not None:
        count(head, reason)
        wanted = False
    _thread.forwards.append(_Forward(weakref.ref(head) if wanted else None, trl, ddp_looks))
    if trl:
        trl_head.begin(head)


def _ddp_looks_for_a_graph() -> bool:
    """Whether this is inside a DDP forward that walks the graph of what it returns."""
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return active is not None and (active.find_unused_parameters or active.static_graph)


def end_forward(model: Any, *_: Any) -> None:
    """Forward hook of a language model, called on errors too."""
    if torch.compiler.is_compiling() or not _thread.forwards:
        return
    if _thread.forwards.pop().trl:
        trl_head.end()


@contextmanager
def deferring(head: nn.Module) -> Iterator[None]:
    """Inside, this head defers its product in this thread."""
    _thread.forwards.append(_Forward(weakref.ref(head)))
    try:
        yield
    finally:
        _thread.forwards.pop()


@contextmanager
def deferred_logits() -> Iterator[None]:
    """Inside, accelerated language models of this thread defer their logits without labels, too.

    Use them before the step, and not across the end of FSDP, which frees the head's weight there.
    Under DDP that finds unused parameters (the Trainer's default: ``ddp_find_unused_parameters``)
    forwards without labels defer nothing: it looks for a graph in what they return.
    """
    _thread.wanted += 1
    try:
        yield
    finally:
        _thread.wanted -= 1


@contextmanager
def fleeting_logits() -> Iterator[None]:
    """:func:`deferred_logits` of a trainer that reads logits before the step or never: they stay
    deferred when detached."""
    _thread.fleeting += 1
    try:
        with deferred_logits():
            yield
    finally:
        _thread.fleeting -= 1


def refusal(source: Logits) -> str | None:
    """Why the loss over these logits cannot be fused; None when it can."""
    weight, hidden = source.weight, source.hidden_states
    if (followed := transform()) is not None:
        return followed
    if type(weight) not in (Tensor, nn.Parameter) or type(hidden) is not Tensor:
        return "tensor subclass"
    if weight.device != hidden.device:
        return "several devices"
    if weight.dtype != hidden.dtype and source.autocast is None:
        return "mixed dtypes"
    return None


def head_losses(logits: DeferredLogits, labels: Tensor, **options: Any) -> Any:
    """:func:`fastft.ops.linear_cross_entropy` of deferred logits, counted; NotImplemented where
    it cannot be fused, or the logits are to be read.

    Args:
        labels: of the shape of the logits without their last dimension, or of it.
        options: other arguments of the operation.
    """
    source = logits.source
    if not logits.deferrable():
        return NotImplemented
    source.check()
    reason = refusal(source)
    count(source.head, reason)
    if reason is not None:
        return NotImplemented
    adapter = source.adapter
    if adapter is not None:
        options |= adapter._asdict()
    with source.context(), logits.without_logits():
        return ops.linear_cross_entropy(
            source.hidden_states,
            source.weight,
            labels,
            bias=source.total_bias(),
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


def _mean(logits: DeferredLogits, *dims: Any) -> Any:
    """The mean of all elements; under a cap of each token, where it needs no gradient."""
    if dims or not logits.source.softcap or (logits.source.graph and torch.is_grad_enabled()):
        return mean(logits, *dims)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    found = head_losses(logits, labels, reduction="none", return_statistics=True)
    return found if found is NotImplemented else found[1].mean_logit.mean().to(logits.dtype)


CALLS[nn.functional.cross_entropy] = _cross_entropy
RULES.update({Tensor.mean: _mean, torch.mean: _mean})
