"""What models and trainers do to deferred logits, done to their description instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastft.nn.deferred import RULES, DeferredLogits, like, shapes_only
from fastft.nn.deferred_graph import done, made_of, viewed
from fastft.nn.deferred_source import HeadAdapter, Uses

__all__ = ["mean"]


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _taken(
    logits: DeferredLogits, shape_of: Callable[[Tensor], Tensor], pick: Callable[[Tensor], Tensor]
) -> DeferredLogits:
    """Other positions, or the same in another shape, and a view where torch's would be one.

    shape_of: does to the logits what ``pick`` does to tensors with another last dimension.
    """
    change = logits.source.at(pick)
    with shapes_only():
        of = like(logits)
        is_view = shape_of(of).untyped_storage()._cdata == of.untyped_storage()._cdata
    if is_view:
        return viewed(logits, shape_of, **change)
    shape = logits.shape
    return done(logits, shape_of, lambda d: d.reshape(shape), **change)


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits:
    before = logits.dtype
    if dtype == before:
        return logits
    return done(logits, lambda z: z.to(dtype), lambda d: d.to(before), dtype)


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
    source = logits.source

    def times(z: Tensor) -> Tensor:
        return z * factor

    return done(
        logits,
        times,
        times,
        scale=source.scale * factor,
        softcap=source.softcap * factor,  # the cap grows with them
        steps=(*source.steps, times),
    )


def _divided(logits: Any, divisor: Any) -> Any:
    if not isinstance(divisor, (int, float)) or isinstance(divisor, bool) or not divisor > 0:
        return NotImplemented
    return _multiplied(logits, 1.0 / divisor)


def _tanh(logits: DeferredLogits) -> Any:
    source = logits.source
    if source.softcap:
        return NotImplemented
    change: dict[str, Any] = {"softcap": 1.0, "steps": (*source.steps, torch.tanh)}
    capped, dtype = made_of(logits, **change), logits.dtype

    def back(gradient: Tensor) -> Tensor:
        capped.check()
        return gradient * (1 - capped.computed(dtype).square())

    return done(logits, torch.tanh, back, **change)


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
    bias = other.reshape(-1).clone()  # it may be changed before they are read
    added = bias if source.added is None else source.added + bias

    def plus(z: Tensor) -> Tensor:
        return z + bias

    return done(logits, plus, _same, added=added, steps=(*source.steps, plus))


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
    leading = shape[:-1]
    return _taken(logits, lambda z: z.reshape(shape), lambda t: t.reshape(*leading, t.shape[-1]))


def _chosen(logits: DeferredLogits, index: Any) -> Any:
    """Positions, whole: ``logits[:, :-1]``, ``logits[..., :-1, :]``, ``logits[mask]``."""
    items = index if isinstance(index, tuple) else (index,)
    dims = logits.dim()
    if any(i is Ellipsis for i in items):
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items = (*items[:at], *[slice(None)] * (dims - len(items) + 1), *items[at + 1 :])
    if len(items) == 1 and isinstance(items[0], Tensor):
        whole = items[0].dtype == torch.bool and 0 < items[0].dim() < dims
    else:
        whole = all(isinstance(i, slice) for i in items) and len(items) <= dims
        whole = whole and (len(items) < dims or items[-1] == slice(None))
    if not whole:
        return NotImplemented
    if isinstance(items[0], Tensor):  # a copy, of a mask that may be changed before they are read
        shape, items = logits.shape, (items[0].clone(),)
        return done(
            logits,
            lambda z: z[items],
            lambda d: d.new_zeros(shape).index_put(items, d),
            **logits.source.at(lambda t: t[items]),
        )
    return _taken(logits, lambda z: z[items], lambda t: t[items])


def _contiguous(logits: DeferredLogits) -> DeferredLogits:
    return logits if logits.is_contiguous() else done(logits, torch.Tensor.contiguous, _same)


def _cloned(logits: DeferredLogits) -> Any:
    if torch.is_grad_enabled() or not logits.source.copied:
        return NotImplemented
    return done(logits, torch.clone, _same)


def _detached(logits: DeferredLogits) -> Any:
    source = logits.source
    if not source.fleeting:  # a picture of what they are now, without the graph
        return NotImplemented
    bias, adapter = source.bias, source.adapter
    if adapter is not None:
        adapter = HeadAdapter(*(t.detach() for t in adapter))
    detached = made_of(
        logits,
        hidden_states=source.hidden_states.detach(),
        weight=source.weight.detach(),
        bias=None if bias is None else bias.detach(),
        adapter=adapter,
        graph=False,
        uses=Uses(),
    )
    return DeferredLogits(detached, logits.dtype)


def mean(logits: DeferredLogits, *dims: Any) -> Any:
    """Of all elements: the mean hidden state by the mean row of the head."""
    source = logits.source
    # Of none it is NaN, which no gradient has.
    if dims or source.softcap or not logits.numel():
        return NotImplemented
    source.check()
    wide = torch.promote_types(logits.dtype, torch.float32)
    pairs = [(source.hidden_states, source.weight), *([source.adapter] if source.adapter else [])]
    with logits.without_logits():
        mean = torch.zeros((), dtype=wide, device=logits.device)
        for rows, of_classes in pairs:
            row = of_classes.mean(0, dtype=wide)
            mean = mean + rows.reshape(-1, row.numel()).mean(0, dtype=wide).dot(row)
        bias = source.total_bias()
        if bias is not None:
            mean = mean + bias.mean(dtype=wide)
        return (source.scale * mean).to(logits.dtype)


RULES.update(
    {
        Tensor.float: lambda logits: _cast(logits, torch.float32),
        Tensor.to: _to,
        Tensor.contiguous: _contiguous,
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
        Tensor.clone: _cloned,
        Tensor.detach: _detached,
        torch.detach: _detached,
    }
)
