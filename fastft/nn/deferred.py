"""Logits that are computed only if somebody looks at them.

An accelerated language model's head returns :class:`DeferredLogits` when labels are given: a
tensor with the logits' shape, dtype and device, and no storage. The fused loss takes the hidden
states out of it; anything else that touches it gets the real logits, computed on the spot. So no
model's forward is rewritten, and ``outputs.logits`` stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["DeferredLogits"]

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


class DeferredLogits(Tensor):
    """The product ``head(hidden_states)``, not computed yet.

    Attributes:
        hidden_states: (..., hidden), connected to the graph.
        head: the language-model head.
    """

    hidden_states: Tensor
    head: nn.Linear
    _compute: Callable[[Tensor], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden_states: Tensor,
        head: nn.Linear,
        compute: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> DeferredLogits:
        shape = (*hidden_states.shape[:-1], head.weight.shape[0])
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=hidden_states.device, requires_grad=False
        )
        self.hidden_states, self.head, self._compute = hidden_states, head, compute
        self._value = None
        return self

    def value(self) -> Tensor:
        """The logits, computed at the first call, and once more when a graph is wanted and the
        first call had none."""
        wants_graph = torch.is_grad_enabled() and self.hidden_states.requires_grad
        if self._value is None or (wants_graph and not self._value.requires_grad):
            self._value = self._compute(self.hidden_states).to(self.dtype)
        return self._value

    def cast(self, dtype: torch.dtype) -> DeferredLogits:
        """The same logits in another dtype, still not computed."""
        return DeferredLogits(self.hidden_states, self.head, self._compute, dtype)

    def rows(self, rows: slice) -> DeferredLogits:
        """The logits of some samples of the batch, still not computed."""
        return DeferredLogits(self.hidden_states[rows], self.head, self._compute, self.dtype)

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
        first = args[0] if args else None
        if func == _REQUIRES_GRAD:  # a new wrapper object at each access
            # In no graph until somebody looks: FSDP would hang a hook on them, and so compute them.
            value = first._value  # type: ignore[union-attr]
            return value is not None and value.requires_grad
        if isinstance(first, DeferredLogits) and first._value is None:
            # Casts and copies that loops around the model make of every output.
            target = _cast_target(func, args, kwargs)
            if target is not None:
                return first if target == first.dtype else first.cast(target)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))


def _cast_target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that ``func`` would cast to when it does nothing else."""
    if func is Tensor.float and len(args) == 1:
        return torch.float32
    if func is Tensor.contiguous and len(args) == 1 and not kwargs:
        return args[0].dtype
    if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs:
        return args[1]
    return None


def _computed(tree: Any) -> Any:
    return pytree.tree_map_only(DeferredLogits, lambda t: t.value(), tree)
