"""Logits that are computed only if somebody looks at them.

An accelerated language model's head returns :class:`DeferredLogits` when labels are given: a
tensor with the logits' shape, dtype and device, and no storage. What models do between head and
loss it remembers instead of doing it: scaling, Gemma's cap, a constant bias, other shapes, a choice
of positions. torch's ``cross_entropy`` of it is the fused loss, and its mean needs no logits
either; anything else that touches it gets the real logits, computed on the spot. So no model's
forward and no loss function is rewritten, and ``outputs.logits`` stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastft.errors import ArgumentError
from fastft.ops._checks import autocast_as

__all__ = ["CALLS", "RULES", "DeferredLogits", "HeadAdapter", "Logits"]

# Reading these needs no logits.
_METADATA = {
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
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


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]


# Functions that take deferred logits as they are: function -> replacement, which may return
# NotImplemented to have the logits computed after all. RULES: those of calls without keyword
# arguments (``deferred_rules``).
CALLS: dict[Callable[..., Any], Callable[..., Any]] = {}
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}


class HeadAdapter(NamedTuple):
    """A and B of a head's adapter, and what its layer would do with them now."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Logits:
    """softcap(scale (head(x) + bias)), not computed yet; softcap(z) = c tanh(z / c).

    Attributes:
        hidden_states: (..., hidden), connected to the graph.
        head: the language-model head.
        compute: head(hidden_states), for whoever looks.
        weight, bias: (vocabulary, hidden) and (vocabulary,) or None.
        adapter: the head's.
        autocast, graph: whether the head ran under autocast (its dtype) and with gradients; whoever
            looks may be elsewhere.
        steps: what the model did to the logits, one function after the other: ``scale``,
            ``softcap`` (0: none) and ``bias`` say the same to the fused loss.
        fleeting: read before the step, or never: ``detach`` then defers, too.
        copied: by a wrapper that throws the copy away: DDP where it finds unused parameters.
        state: which adapters the head had.
    """

    hidden_states: Tensor
    head: nn.Module
    compute: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None
    adapter: HeadAdapter | None = None
    scale: float = 1.0
    softcap: float = 0.0
    autocast: torch.dtype | None = None
    graph: bool = True
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    fleeting: bool = False
    copied: bool = False
    versions: tuple[int, ...] = ()
    state: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._versions())
        if not self.state:
            object.__setattr__(self, "state", self._state())

    def _state(self) -> tuple[Any, ...]:
        head: Any = self.head
        names = tuple(getattr(head, "active_adapters", ()))
        return names, getattr(head, "disable_adapters", False), getattr(head, "merged", False)

    def _versions(self) -> tuple[int, ...]:
        adapter = () if self.adapter is None else (self.adapter.lora_a, self.adapter.lora_b)
        tensors = (self.hidden_states, self.weight, *adapter)
        return tuple(-1 if t.is_inference() else t._version for t in tensors)

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
        elif self._state() != self.state:
            changed = "other adapters are active since"
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
            logits = self.compute(self.hidden_states)
            for step in self.steps:
                logits = step(logits)
            return logits.to(dtype)

    def context(self) -> AbstractContextManager[object]:
        """Autocast as it was for the head."""
        return autocast_as(self.hidden_states.device.type, self.autocast)

    def grad_mode(self) -> AbstractContextManager[object]:
        """Gradients where they were enabled for the head, and are."""
        return torch.set_grad_enabled(self.graph and torch.is_grad_enabled())

    def trained(self) -> bool:
        """Whether the loss of each token apart would take the logits twice: the head, its bias or
        its adapter is trained."""
        trained = [t.requires_grad for t in (self.weight, self.bias) if t is not None]
        return self.adapter is not None or any(trained)

    def times(self, factor: float) -> Logits:
        """factor times these: the cap grows with them."""
        steps = (*self.steps, lambda z: z * factor)
        return replace(self, scale=self.scale * factor, softcap=self.softcap * factor, steps=steps)


class DeferredLogits(Tensor):
    """A tensor of logits without storage.

    Attributes:
        source: what it is made of, where and if it is.
        view_of: the deferred logits that these are a view of, and which.
    """

    source: Logits
    view_of: tuple[DeferredLogits, Callable[[Tensor], Tensor]] | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, source: Logits, dtype: torch.dtype) -> DeferredLogits:
        hidden = source.hidden_states
        shape = (*hidden.shape[:-1], source.weight.shape[0])
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=hidden.device, requires_grad=False
        )
        self.source, self.view_of, self._value = source, None, None
        return self

    def value(self) -> Tensor:
        """The logits, computed at the first call; a view of what has been computed is a view."""
        if self._value is None:
            if self.view_of is not None and self.view_of[0].known():
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
        if func == _REQUIRES_GRAD:  # a new wrapper object at each access
            # In no graph until somebody looks: FSDP would hang a hook on them, and so compute them.
            return first.known() and first.value().requires_grad  # type: ignore[union-attr]
        if func == _GRAD_FN:  # DDP asks
            return first.value().grad_fn if first.known() else None  # type: ignore[union-attr]
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


def _computed(tree: Any) -> Any:
    return pytree.tree_map_only(DeferredLogits, lambda t: t.value(), tree)
