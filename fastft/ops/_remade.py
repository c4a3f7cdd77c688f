"""An input that is made again in the backward, from tensors that are kept anyway.

The product of a gated unit is read by one layer, whose LoRA needs it once more for dA; the unit
itself keeps gate and up. Where the unit's backend says that a pass costs less than the memory, the
layer keeps those two in the product's place. The unit's node says how; the product leads to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Make", "Remaking", "keeping"]

Make = Callable[..., Tensor]


class Remaking:
    """How the result of a node is made again: what it leaves there as ``remaking``, and which holds
    no tensor."""

    __slots__ = ("_inputs", "_version", "_versions", "make")

    def __init__(self, result: Tensor, inputs: tuple[Tensor, ...], make: Make) -> None:
        self._version = result._version
        self._inputs = [weakref.ref(tensor) for tensor in inputs]
        self._versions = [tensor._version for tensor in inputs]
        self.make = make

    def inputs(self, version: int) -> tuple[Tensor, ...] | None:
        """What ``make`` takes; None where one is gone or changed, or the result did."""
        found = tuple(tensor for ref in self._inputs if (tensor := ref()) is not None)
        same = [tensor._version for tensor in found] == self._versions
        return found if same and version == self._version else None


def keeping(tensor: Tensor) -> tuple[tuple[Tensor, ...], Make | None]:
    """What to keep for ``tensor``, which may be a node's result in another shape, and what makes it
    of that; None: it is kept itself."""
    node: Any = tensor.grad_fn
    if node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    found: Remaking | None = getattr(node, "remaking", None)
    inputs = None if found is None else found.inputs(tensor._version)
    if found is None or inputs is None:
        return (tensor,), None
    return inputs, found.make
