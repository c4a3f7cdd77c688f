"""An input that is made again in the backward, from tensors that are kept anyway.

The product of a gated unit is read by one layer, whose LoRA needs it once more for dA; the unit
itself keeps gate and up. Whoever calls the two one after the other says so, and the layer keeps
gate and up in the product's place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

__all__ = ["Make", "keeping", "remaking"]

Make = Callable[..., Tensor]


class _Remaking(NamedTuple):
    result: Tensor
    inputs: tuple[Tensor, ...]
    make: Make


class _Thread(threading.local):
    current: _Remaking | None = None


_thread = _Thread()


@contextmanager
def remaking(result: Tensor, inputs: tuple[Tensor, ...], make: Make) -> Iterator[None]:
    """Inside, an operation of this thread that saves ``result`` for its backward keeps ``inputs``
    instead, of which ``make`` gives its bits again, with their graph."""
    outer, _thread.current = _thread.current, _Remaking(result, inputs, make)
    try:
        yield
    finally:
        _thread.current = outer


def keeping(tensor: Tensor) -> tuple[tuple[Tensor, ...], Make | None]:
    """What to keep for ``tensor``, which may be the result in another shape, and what makes it of
    that; None: it is kept itself."""
    current = _thread.current
    if current is None or tensor.numel() != current.result.numel():
        return (tensor,), None
    own, its = tensor.untyped_storage(), current.result.untyped_storage()
    same = own._cdata == its._cdata and tensor.dtype == current.result.dtype
    return (current.inputs, current.make) if same else ((tensor,), None)
