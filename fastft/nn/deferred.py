"""Logits that are computed only if somebody looks at them.

An accelerated language model's head returns :class:`DeferredLogits` when labels are given: a
tensor with the logits' shape, dtype and device, and no storage. What models do between head and
loss it remembers instead of doing it: scaling, Gemma's cap, a constant bias, other shapes, a choice
of positions. torch's ``cross_entropy`` of it is the fused loss, and its mean needs no logits
either; anything else that touches it gets the real logits, computed on the spot. So no model's
forward and no loss function is rewritten, and ``outputs.logits`` stays true.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastft.errors import ArgumentError
from fastft.ops._checks import autocast_as

__all__ = ["CALLS", "DeferredLogits", "HeadAdapter", "Logits"]

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


# Functions that take deferred logits as they are: function -> replacement, which may return
# NotImplemented to have the logits computed after all.
CALLS: dict[Callable[..., Any], Callable[..., Any]] = {}


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
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._versions())

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
        if self._versions() == self.versions and not freed:
            return
        raise ArgumentError(
            "fastft (deferred logits)",
            "logits",
            expected="logits used before what they are made of is changed or freed",
            got="the head's weight is freed (FSDP)" if freed else "an in-place change since",
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
        if isinstance(first, DeferredLogits) and not first.known():
            rule = CALLS.get(func) if kwargs else _DEFERRED.get(func) or CALLS.get(func)
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


def _with(logits: DeferredLogits, **change: Any) -> DeferredLogits:
    # A choice of the hidden states has its own version: nothing was changed by it.
    change.setdefault("versions", () if "hidden_states" in change else logits.source.versions)
    logits.source.check()
    return DeferredLogits(replace(logits.source, **change), logits.dtype)


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits:
    return logits if dtype == logits.dtype else DeferredLogits(logits.source, dtype)


def _to(logits: DeferredLogits, *args: Any) -> Any:
    (target,) = args if len(args) == 1 else (None,)
    if isinstance(target, torch.dtype):
        return _cast(logits, target)
    # Models move logits to where their labels are.
    here = isinstance(target, (str, torch.device)) and torch.device(target) == logits.device
    return logits if here else NotImplemented


def _multiplied(logits: Any, factor: Any) -> Any:
    # A product that torch would give another dtype, or whose factor needs a gradient, is torch's.
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 0:
        return NotImplemented
    return DeferredLogits(logits.source.times(factor), logits.dtype)


def _divided(logits: Any, divisor: Any) -> Any:
    if not isinstance(divisor, (int, float)) or isinstance(divisor, bool) or not divisor > 0:
        return NotImplemented
    return _multiplied(logits, 1.0 / divisor)


def _tanh(logits: DeferredLogits) -> Any:
    source = logits.source
    if source.softcap:
        return NotImplemented
    return _with(logits, softcap=1.0, steps=(*source.steps, torch.tanh))


def _added(logits: Any, other: Any) -> Any:
    source = logits.source if isinstance(logits, DeferredLogits) else None
    plain = isinstance(other, Tensor) and type(other) in (Tensor, nn.Parameter)
    if source is None or not plain or other.requires_grad:
        return NotImplemented
    if source.scale != 1.0 or source.softcap or other.numel() != logits.shape[-1]:
        return NotImplemented
    if other.shape[-1] != logits.shape[-1] or other.dtype != logits.dtype:
        return NotImplemented
    if other.dim() > logits.dim():
        return NotImplemented
    bias = other.reshape(-1)
    total = bias if source.bias is None else source.bias + bias
    return _with(logits, bias=total, steps=(*source.steps, lambda z: z + bias))


def _reshaped(logits: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or not all(isinstance(n, int) for n in shape):
        return NotImplemented
    if -1 in shape and logits.numel():
        rest = -math.prod(shape)
        shape = tuple(logits.numel() // rest if n == -1 else n for n in shape)
    if shape[-1] != logits.shape[-1]:
        return NotImplemented
    hidden = logits.source.hidden_states
    found = _with(logits, hidden_states=hidden.reshape(*shape[:-1], hidden.shape[-1]))
    found.view_of = (logits, lambda z: z.reshape(shape))
    return found


def _chosen(logits: DeferredLogits, index: Any) -> Any:
    """Positions, whole: ``logits[:, :-1]``, ``logits[..., :-1, :]``, ``logits[mask]``."""
    items = index if isinstance(index, tuple) else (index,)
    dims = logits.dim()
    if any(i is Ellipsis for i in items):
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items = (*items[:at], *[slice(None)] * (dims - len(items) + 1), *items[at + 1 :])
    if len(items) == 1 and isinstance(items[0], Tensor):
        whole = items[0].dtype == torch.bool and items[0].dim() < dims
    else:
        whole = all(isinstance(i, slice) for i in items) and len(items) <= dims
        whole = whole and (len(items) < dims or items[-1] == slice(None))
    if not whole:
        return NotImplemented
    found = _with(logits, hidden_states=logits.source.hidden_states[items])
    found.view_of = (logits, lambda z: z[items])
    return found


def _detached(logits: DeferredLogits) -> DeferredLogits:
    source = logits.source
    bias, adapter = source.bias, source.adapter
    if adapter is not None:
        adapter = adapter._replace(lora_a=adapter.lora_a.detach(), lora_b=adapter.lora_b.detach())
    found = _with(
        logits,
        hidden_states=source.hidden_states.detach(),
        weight=source.weight.detach(),
        bias=None if bias is None else bias.detach(),
        adapter=adapter,
        graph=False,
    )
    found.view_of = (logits, torch.detach)
    return found


def _mean(logits: DeferredLogits, *dims: Any) -> Any:
    """Of all elements: the mean hidden state by the mean row of the head."""
    source = logits.source
    adapter = source.adapter
    if dims or source.softcap or (adapter is not None and adapter.dropout):
        return NotImplemented
    source.check()
    wide = torch.promote_types(logits.dtype, torch.float32)
    row = source.weight.mean(0, dtype=wide)
    if adapter is not None:
        row = row + adapter.scaling * adapter.lora_b.mean(0, dtype=wide) @ adapter.lora_a.to(wide)
    mean = source.hidden_states.reshape(-1, row.numel()).mean(0, dtype=wide).dot(row)
    if source.bias is not None:
        mean = mean + source.bias.mean(dtype=wide)
    return (source.scale * mean).to(logits.dtype)


# Without keyword arguments: what models do between head and loss, done to the description instead
# of the logits.
_DEFERRED: dict[Any, Callable[..., Any]] = {
    Tensor.float: lambda logits: _cast(logits, torch.float32),
    Tensor.to: _to,
    Tensor.contiguous: lambda logits: logits,
    Tensor.mul: _multiplied,
    Tensor.__mul__: _multiplied,
    Tensor.__rmul__: _multiplied,
    torch.mul: _multiplied,
    Tensor.div: _divided,
    Tensor.__truediv__: _divided,
    torch.div: _divided,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.add: _added,
    Tensor.__add__: _added,
    Tensor.__radd__: _added,
    torch.add: _added,
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    Tensor.__getitem__: _chosen,
    Tensor.detach: _detached,
    torch.detach: _detached,
    Tensor.mean: _mean,
    torch.mean: _mean,
}
