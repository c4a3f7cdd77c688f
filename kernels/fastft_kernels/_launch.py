"""Launches that are prepared once and repeated: what the host does for a kernel, kept short.

Triton looks at every argument of every launch to find the kernel compiled for it, which takes a
host as long as several launches. Of a repeated launch only the tensors are new, and of these only
their types and whether they are aligned choose the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["KEPT", "Prepared", "cdiv"]

# Launches that each launcher keeps: those of a few dozen shapes of a model's batches.
KEPT = 4096
# Triton compiles for addresses that are multiples of this, or for any.
_ALIGNMENT = 16


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) of integers that are not negative; ``triton.cdiv`` takes ten times as long."""
    return -(-a // b)


class _Described:
    """Tensors as tensor memory descriptors of one block: the first as Triton makes it, the others
    as that one. Its checks, of addresses and strides, are the launchers' own."""

    def __init__(self, block: list[int]) -> None:
        self._block = block
        self._first: dict[str, Any] = {}

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        if not self._first:
            made = TensorDescriptor.from_tensor(tensor, self._block)
            self._first = {**vars(made), "base": None}
            return made
        made = object.__new__(TensorDescriptor)
        vars(made).update(self._first, base=tensor, shape=tensor.shape, strides=tensor.stride())
        return made


class Prepared:
    """One launch on one device, all of it known but its tensors.

    Args:
        kernel: a ``triton.jit`` function that takes tensors, then scalars, then constants.
        grid: up to three numbers of programs.
        places: for each of the kernel's tensors, which of a call's it is; several may be the same.
            None: none, and the kernel never asks for it.
        blocks: by the kernel's tensors, in order, the block of those that it takes as tensor memory
            descriptors; these tensors' rows must be whole multiples of 16 bytes.
        scalars: its integers and floats, in order.
        constants: its ``tl.constexpr`` arguments and compiler options.
    """

    __slots__ = (
        "_blocks",
        "_constants",
        "_grid",
        "_kernel",
        "_places",
        "_rest",
        "_runs",
        "_scalars",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        places: Sequence[int | None],
        scalars: Sequence[float],
        *,
        blocks: dict[int, list[int]] | None = None,
        **constants: Any,
    ) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._blocks = {at: _Described(block) for at, block in (blocks or {}).items()}
        self._places, self._scalars, self._constants = tuple(places), tuple(scalars), constants
        self._rest = (*scalars, *[constants[n] for n in kernel.arg_names if n in constants])
        self._runs: dict[tuple[torch.dtype, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launches on the current stream of the current device, where the tensors are."""
        dtypes, addresses = [], 0
        for tensor in tensors:
            dtypes.append(tensor.dtype)
            addresses |= tensor.data_ptr()
        arguments: list[Any] = [None if i is None else tensors[i] for i in self._places]
        for at, described in self._blocks.items():
            if arguments[at] is not None:
                arguments[at] = described(arguments[at])
        if addresses % _ALIGNMENT:
            self._kernel[self._grid](*arguments, *self._scalars, **self._constants)
            return
        key = tuple(dtypes)
        run = self._runs.get(key)
        if run is not None:
            run(*arguments, *self._rest)
            return
        compiled = self._kernel[self._grid](*arguments, *self._scalars, **self._constants)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._runs[key] = compiled[self._grid]
