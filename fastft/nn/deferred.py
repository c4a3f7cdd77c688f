"""Logits that are computed only if somebody looks at them.

An accelerated language model's head returns :class:`DeferredLogits` when labels are given: a
tensor with the logits' shape, dtype and device, and no storage. What models do between head and
loss it remembers instead of doing it: scaling, Gemma's cap, a constant bias, other shapes, a choice
of positions. torch's ``cross_entropy`` of it is the fused loss, and its mean needs no logits
either; anything else that touches it gets the real logits, computed on the spot. So no model's
forward and no loss function is rewritten, and ``outputs.logits`` stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastft.errors import ArgumentError
from fastft.nn.calls import count
from fastft.ops._checks import autocast_as

__all__ = ["CALLS", "RULES", "DeferredLogits", "HeadAdapter", "Logits"]

# Reading these needs no logits.
_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor._base.__get__,  # type: ignore[union-attr]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.get_device,
    Tensor.element_size,
    Tensor.stride,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
}


# A new wrapper object at each access: compared by ==, as a dictionary does.
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]


# Functions that take deferred logits as they are: function -> replacement, which may return
# NotImplemented to have the logits computed after all. RULES: those of calls without keyword
# arguments (``deferred_rules``).
CALLS: dict[Callable[..., Any], Callable[..., Any]] = {}
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}


class HeadAdapter(NamedTuple):
    """A head's adapter in its forward: lora_s (..., r), the scaled A of the hidden states with
    their dropout, and a copy of B, both connected to the graph. Neither changes when A, B, the
    scaling or the mode of the head does."""

    lora_s: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Logits:
    """softcap(scale (head(x) + bias)), not computed yet; softcap(z) = c tanh(z / c).

    Attributes:
        hidden_states: (..., hidden), connected to the graph.
        head: the language-model head.
        weight, bias: (vocabulary, hidden) and (vocabulary,) or None.
        adapter: the head's.
        added: what the model has added to the bias, (vocabulary,) or None.
        autocast, graph: whether the head ran under autocast (its dtype) and with gradients; whoever
            looks may be elsewhere.
        steps: what the model did to the logits, one function after the other: ``scale``,
            ``softcap`` (0: none) and ``added`` say the same to the fused loss.
        fleeting: read before the step, or never: ``detach`` then defers, too.
        copied: by a wrapper that throws the copy away: DDP where it finds unused parameters.
        fused: one entry for each result with a gradient that was computed without them; one list
            for all that is made of one forward's.
    """

    hidden_states: Tensor
    head: nn.Module
    weight: Tensor
    bias: Tensor | None = None
    adapter: HeadAdapter | None = None
    added: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    autocast: torch.dtype | None = None
    graph: bool = True
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    fleeting: bool = False
    copied: bool = False
    fused: list[bool] = field(default_factory=list)
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, ...]:
        tensors = (self.hidden_states, self.weight, self.bias, self.added)
        given = [t for t in tensors if t is not None]
        return tuple(-1 if t.is_inference() else t._version for t in given)

    def check(self) -> None:
        """Refuses logits that can no longer be what they were.

        Raises:
            ArgumentError: what they are made of was changed in place, or freed.
        """
        freed = self.weight.numel() and not self.weight.untyped_storage().size()
        changed = None
        if freed:
            changed = "the head's weight is freed (FSDP)"
        elif self._versions() != self.versions:
            changed = "an in-place change since"
        elif getattr(self.head, "merged", False):  # into weight.data, which has another version
            changed = "a merge of the head's adapter since"
        if changed is None:
            return
        raise ArgumentError(
            "fastft (deferred logits)",
            "logits",
            expected="logits used before what they are made of is changed or freed",
            got=changed,
            remedy="Use them inside the forward or before the step, or accelerate(loss=False).",
        )

    def value(self, dtype: torch.dtype) -> Tensor:
        """The logits, with the graph they would have had."""
        self.check()
        with self.context(), torch.set_grad_enabled(self.graph):
            count(self.head, "logits were read")
            logits = nn.functional.linear(self.hidden_states, self.weight, self.bias)
            if self.adapter is not None:
                lora_s, lora_b = self.adapter
                logits = logits + nn.functional.linear(lora_s, lora_b.to(lora_s.dtype))
            for step in self.steps:
                logits = step(logits)
            return logits.to(dtype)

    def context(self) -> AbstractContextManager[object]:
        """Autocast as it was for the head."""
        return autocast_as(self.hidden_states.device.type, self.autocast)

    def without_logits(self) -> AbstractContextManager[object]:
        """For a result that is computed without the logits: gradients where they were enabled for
        the head, and are."""
        graph = self.graph and torch.is_grad_enabled()
        if graph:
            self.fused.append(True)
        return torch.set_grad_enabled(graph)

    def total_bias(self) -> Tensor | None:
        """The head's bias and what the model has added."""
        if self.bias is None or self.added is None:
            return self.added if self.bias is None else self.bias
        return self.bias + self.added

    def trained(self) -> bool:
        """Whether the loss of each token apart would take the logits twice: the head, its bias or
        its adapter is trained."""
        trained = [t.requires_grad for t in (self.weight, self.bias) if t is not None]
        return self.adapter is not None or any(trained)

    def requires_grad(self) -> bool:
        """What the logits' would be."""
        tensors = (self.hidden_states, self.weight, self.bias, *(self.adapter or ()))
        return self.graph and any(t is not None and t.requires_grad for t in tensors)

    def at(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What changes where other positions, or the same in another shape, are taken."""
        adapter = self.adapter
        if adapter is not None:
            adapter = adapter._replace(lora_s=pick(adapter.lora_s))
        return {"hidden_states": pick(self.hidden_states), "adapter": adapter}

    def times(self, factor: float) -> Logits:
        """factor times these: the cap grows with them."""
        steps = (*self.steps, lambda z: z * factor)
        return replace(self, scale=self.scale * factor, softcap=self.softcap * factor, steps=steps)


class DeferredLogits(Tensor):
    """A tensor of logits without storage.

    Attributes:
        source: what it is made of, where and if it is.
        view_of: the deferred logits that torch's would be a view of, and which.
    """

    source: Logits
    view_of: tuple[DeferredLogits, Callable[[Tensor], Tensor]] | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls, source: Logits, dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> DeferredLogits:
        hidden = source.hidden_states
        shape = (*hidden.shape[:-1], source.weight.shape[0])
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=dtype, device=hidden.device, requires_grad=False
        )
        self.source, self.view_of, self._value = source, None, None
        return self

    def value(self) -> Tensor:
        """The logits, computed at the first call; a view is one of what it is a view of, which is
        computed for it: a change in place is seen in both."""
        if self._value is None:
            if self.view_of is not None:
                base, view = self.view_of
                self._value = view(base.value())
            else:
                self._value = self.source.value(self.dtype)
        return self._value

    def known(self) -> bool:
        """Whether somebody has looked, at these or at what they are a view of."""
        if self._value is not None:
            return True
        return self.view_of is not None and self.view_of[0].known()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if func in (_REQUIRES_GRAD, _IS_LEAF) and not first.known():  # type: ignore[union-attr]
            requires_grad = first.source.requires_grad()  # type: ignore[union-attr]
            return requires_grad if func == _REQUIRES_GRAD else not requires_grad
        if func == _GRAD_FN:  # DDP asks
            return first.value().grad_fn if first.known() else None  # type: ignore[union-attr]
        if func == Tensor.register_hook and not first.known() and _of_fsdp(args[1]):  # type: ignore[union-attr]
            return None  # it waits for the backward of any output: the loss is one
        for tensor in _watched(func, args, kwargs):
            if isinstance(tensor, DeferredLogits):
                _refuse_to_watch(tensor, func)
        if isinstance(first, DeferredLogits) and not first.known():
            rule = CALLS.get(func) if kwargs else RULES.get(func) or CALLS.get(func)
            found = NotImplemented if rule is None else rule(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))


def _watched(func: Any, args: Any, kwargs: Any) -> Sequence[Any]:
    """Tensors whose gradients the call asks for."""
    if func in (Tensor.register_hook, Tensor.retain_grad):
        return args[:1]  # type: ignore[no-any-return]
    if func is torch.autograd.grad:
        return args[1]  # type: ignore[no-any-return]
    return kwargs.get("inputs") or () if func is torch.autograd.backward else ()


def _of_fsdp(hook: Any) -> bool:
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed.fsdp")


def _refuse_to_watch(logits: DeferredLogits, func: Any) -> None:
    if not logits.source.fused:
        return
    raise ArgumentError(
        "fastft (deferred logits)",
        "logits",
        expected="a loss computed from the logits, where their gradient is asked for",
        got=f"{func.__name__} after their loss was computed without them",
        remedy="Call the model without labels for that loss, or use accelerate(loss=False).",
    )


def _computed(tree: Any) -> Any:
    return pytree.tree_map_only(DeferredLogits, lambda t: t.value(), tree)
