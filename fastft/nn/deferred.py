"""Logits that are computed only if somebody looks at them.

An accelerated language model's head returns :class:`DeferredLogits` when labels are given: a
tensor with the logits' shape, dtype and device, and no storage. What models do between head and
loss it remembers instead of doing it: scaling, Gemma's cap, a constant bias, other shapes, a choice
of positions. torch's ``cross_entropy`` of it is the fused loss, and its mean needs no logits
either; anything else that touches it gets the real logits, computed on the spot. So no model's
forward and no loss function is rewritten, and ``outputs.logits`` stays true.

To autograd they are a tensor like another: they have a node (``deferred_graph``) before anybody
looks, and every gradient of theirs passes it. The values, once computed, have no graph of their
own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastft.errors import ArgumentError
from fastft.nn.deferred_source import Logits
from fastft.ops._differentiable import transform

__all__ = ["CALLS", "RULES", "DeferredLogits", "like", "taking_views"]

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
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    Tensor.grad.__get__,  # type: ignore[union-attr]
    Tensor.retains_grad.__get__,  # type: ignore[attr-defined]
    Tensor.output_nr.__get__,  # type: ignore[attr-defined]
    Tensor._version.__get__,  # type: ignore[attr-defined]
    # Autograd itself asks for these, and holds a lock while it does.
    Tensor._backward_hooks.__get__,  # type: ignore[union-attr]
    Tensor._backward_hooks.__set__,  # type: ignore[union-attr]
    Tensor._is_view,
    Tensor.is_inference,
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
    Tensor.storage_offset,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
}

# What is asked of the tensor in the graph, not of its values. A new wrapper object at each access:
# compared by ==, as a set does.
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_OF_THE_TENSOR = {
    Tensor.grad.__set__,  # type: ignore[union-attr]
    Tensor.grad.__delete__,  # type: ignore[union-attr]
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.requires_grad_,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
    Tensor.detach_,
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_OF_THE_GRAPH = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


# Functions that take deferred logits as they are: function -> replacement, which may return
# NotImplemented to have the logits computed after all. RULES: those of calls without keyword
# arguments (``deferred_rules``).
CALLS: dict[Callable[..., Any], Callable[..., Any]] = {}
RULES: dict[Callable[..., Any], Callable[..., Any]] = {}


class _Thread(threading.local):
    """Whether this thread takes views of deferred logits, which are deferred, and whether it makes
    tensors for their shapes."""

    views = False
    shapes = False


_thread = _Thread()


@contextmanager
def taking_views() -> Iterator[None]:
    """Inside, torch's views of deferred logits are deferred, and views to autograd as well."""
    _thread.views = True
    try:
        with torch._C.DisableTorchFunctionSubclass():
            yield
    finally:
        _thread.views = False


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors are made for their shapes alone: no memory that anybody should count."""
    outer, _thread.shapes = _thread.shapes, True
    try:
        yield
    finally:
        _thread.shapes = outer


def only_shapes() -> bool:
    """Whether this thread is in :func:`shapes_only`."""
    return _thread.shapes


class DeferredLogits(Tensor):
    """A tensor of logits without storage.

    Attributes:
        source: what it is made of.
        done: the deferred logits that something was done to, what, and whether this is a view of
            them.
        fused: whether a result with a gradient was computed without them, before anybody looked.
    """

    fused = False
    source: Logits
    done: tuple[DeferredLogits, Callable[[Tensor], Tensor], bool] | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, source: Logits, dtype: torch.dtype, like: Tensor | None = None) -> Any:
        """``like``: a tensor of the meta device, for what is not contiguous."""
        if like is None:
            hidden = source.hidden_states
            with shapes_only():
                like = torch.empty(*hidden.shape[:-1], source.weight.shape[0], device="meta")
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=dtype,
            device=source.hidden_states.device,
            requires_grad=False,
        )
        self.source, self.done, self._value = source, None, None
        return self

    def value(self) -> Tensor:
        """The logits, computed at the first call and without a graph; a view is one of what it is a
        view of, which is computed for it: a change in place is seen in both."""
        if self._value is None:
            before, do, view = self.done or (None, None, False)
            if before is not None and do is not None and (view or before._as_computed()):
                with torch.inference_mode(False), torch.no_grad():
                    self._value = do(before.value())
            else:
                self._value = self.source.value(self.dtype)
        return self._value

    def read(self) -> Tensor:
        """The logits, a plain tensor that is a view of this one to autograd."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.aten.alias(self)  # type: ignore[no-any-return]

    def known(self) -> bool:
        """Whether somebody has looked, at these or at what they are a view of."""
        if self._value is not None:
            return True
        return self.done is not None and self.done[2] and self.done[0].known()

    def _as_computed(self) -> bool:
        """Whether somebody has looked and nobody has changed them in place."""
        return self.known() and not self.is_inference() and self._version == 0

    def deferrable(self) -> bool:
        """Whether results may be computed without these.

        Not if somebody has looked, since the values are there, and may have been changed. But a
        checkpoint makes its calls again, in a backward, of logits that are known by then, and must
        get what it got.
        """
        if self.source.uses.watched:
            return False
        if not self.known():
            return True
        again = torch._C._current_graph_task_id() != -1 and self._went_without()
        return again and self._as_computed() and self.source.changed() is None

    def without_logits(self) -> AbstractContextManager[object]:
        """For a result that is computed without them: gradients where they were enabled for the
        head, and are."""
        graph = self.source.graph and torch.is_grad_enabled()
        if graph:
            self.source.uses.fused = True
            tensor: DeferredLogits | None = self
            while tensor is not None and not tensor.known():
                tensor.fused = True
                tensor = tensor.done[0] if tensor.done is not None else None
        return torch.set_grad_enabled(graph)

    def _went_without(self) -> bool:
        return self.fused or (self.done is not None and self.done[0]._went_without())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    @torch.compiler.disable  # a compiled loss over deferred logits: this runs, and is not traced
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else kwargs.get("input")
        if func == _GRAD_FN and first.source.copied and not first.known():  # DDP asks
            return None
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.register_hook and not first.known() and _of_fsdp(args[1]):
            return None  # it waits for the backward of any output: the loss is one
        if func in _OF_THE_TENSOR or func in _OF_THE_GRAPH:
            for tensor in _watched(func, args, kwargs):
                if isinstance(tensor, DeferredLogits):
                    _watch(tensor, func)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _SET_DATA and isinstance(first, DeferredLogits):
            first.source.uses.watched = True  # a loss made without them would not see it
            return func(first.value(), *_of_values(tuple, (args[1:],), {}))
        if isinstance(first, DeferredLogits) and first.deferrable() and transform() is None:
            rule = CALLS.get(func) if kwargs else RULES.get(func) or CALLS.get(func)
            found = NotImplemented if rule is None else rule(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return _of_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _thread.views:
            return _view(func, *args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(DeferredLogits, _value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value(logits: DeferredLogits) -> Tensor:
    return logits.value()


def _of_values(func: Any, args: Any, kwargs: Any) -> Any:
    read: list[tuple[Tensor, DeferredLogits]] = []

    def plain(logits: DeferredLogits) -> Tensor:
        read.append((logits.read(), logits))
        return read[-1][0]

    args, kwargs = pytree.tree_map_only(DeferredLogits, plain, (args, kwargs))
    result = func(*args, **kwargs)
    # What returns its argument, having changed it or not, has returned the logits.
    return next((logits for view, logits in read if view is result), result)


def _view(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits:
    """A view of deferred logits, not computed."""
    with shapes_only():
        shaped = func(like(logits), *args, **kwargs)
    found: DeferredLogits = DeferredLogits(logits.source, logits.dtype, shaped)
    found.done = logits, lambda z: func(z, *args, **kwargs), True
    return found


def like(logits: Tensor) -> Tensor:
    """The logits' shape, strides and offset, without storage."""
    with torch._C.DisableTorchFunctionSubclass():
        shape, strides, offset = logits.shape, logits.stride(), logits.storage_offset()
    size = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return torch.empty(max(size, 0), device="meta").as_strided(shape, strides, offset)


def _watched(func: Any, args: Any, kwargs: Any) -> Sequence[Any]:
    """Tensors whose gradients the call asks for."""
    if func in _OF_THE_TENSOR:
        return args[:1]  # type: ignore[no-any-return]
    given: Any = kwargs.get("inputs")
    if func is torch.autograd.grad and given is None:
        given = args[1]
    return given if isinstance(given, Sequence) else [given]


def _of_fsdp(hook: Any) -> bool:
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed.fsdp")


def _watch(logits: DeferredLogits, func: Any) -> None:
    """Losses take the logits from here on; refused where one already went without them."""
    if not logits.source.uses.fused:
        logits.source.uses.watched = True
        return
    raise ArgumentError(
        "fastft (deferred logits)",
        "logits",
        expected="a loss computed from the logits, where their gradient is asked for",
        got=f"{func.__name__} after their loss was computed without them",
        remedy="Call the model without labels for that loss, or use accelerate(loss=False).",
    )
