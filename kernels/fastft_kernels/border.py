"""Frozen weights laid out once so that a layer and its adapter are one library product.

The weights W_i (N_i, K) of layers that share their input stand on top of each other in one buffer
with a border to the right and below, which takes the adapters:

    [ W_1  s_1 B_1            ]     y  = [x | S] [W | s B]^T      one product, K + R deep
    [ W_2            s_2 B_2  ]     dx = [dy | dS] [W ; A]        one product, N + R deep
    [ A_1                     ]
    [ A_2                     ]     S = x A^T, dS = s dy B, R the sum of the ranks

One layer's product runs over the S of all, against zeros: an Inf or NaN in the adapter of one
makes its siblings NaN too. Rows are padded to 128 bytes. The layers' own weights become views of
it, so nothing is held twice. ``make`` registers a buffer; a launcher that is handed the very views
finds it again with ``find``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Border", "find", "make"]

# Row pitch, in bytes: a line of the second-level cache, and enough for tensor memory descriptors.
_PITCH = 128
# Columns and rows of a border come in multiples of this many elements (16 bytes of 16-bit ones).
_UNIT = 8


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _pitch(columns: int, like: Tensor) -> int:
    """Elements from one row to the next of a matrix of this many columns."""
    return _round_up(columns, _PITCH // like.element_size())


@dataclass(eq=False)
class Border:
    """A buffer (N + R, pitch) of the layers ``widths`` over ``features`` columns, and places for
    one adapter of ``ranks[i]`` a layer. R is a multiple of eight."""

    buffer: Tensor
    features: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    weights: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = self.buffer[:, : self.features]
        self.weights = list(columns[: sum(self.widths)].split(list(self.widths)))

    @property
    def width(self) -> int:
        """N: rows of all layers."""
        return sum(self.widths)

    @property
    def border(self) -> int:
        """R: the sum of the ranks, rounded up."""
        return _round_up(sum(self.ranks), _UNIT)

    def rank_slices(self) -> list[slice]:
        """The place of each adapter among the R."""
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return [slice(end - r, end) for end, r in zip(ends, self.ranks)]

    def forward_operand(self, lora_bs: Sequence[Tensor], scalings: Sequence[float]) -> Tensor:
        """[W | s B], (N, K + R), with these adapters written into the border."""
        right = self.buffer[: self.width, self.features : self.features + self.border]
        places = zip(right.split(list(self.widths)), self.rank_slices(), strict=True)
        for (rows, columns), b, scaling in zip(places, lora_bs, scalings, strict=True):
            torch.mul(b, scaling, out=rows[:, columns])
        return self.buffer[: self.width, : self.features + self.border]

    def backward_operand(self, lora_as: Sequence[Tensor] | None) -> Tensor:
        """[W ; A], (N + R, K), with these adapters written into the border; W alone for None."""
        columns = self.buffer[:, : self.features]
        if lora_as is None:
            return columns[: self.width]
        below = columns[self.width :]
        for rows, a in zip(self.rank_slices(), lora_as, strict=True):
            below[rows].copy_(a)
        return columns

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these tensors are its views, all of them in order."""
        return len(weights) == len(self.weights) and all(
            a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
            for a, b in zip(weights, self.weights)
        )


# By the address of the first weight. A border is held by who made it.
_known: weakref.WeakValueDictionary[int, Border] = weakref.WeakValueDictionary()


def make(weights: Sequence[Tensor], ranks: Sequence[int]) -> Border:
    """Copies the weights (N_i, K) of one dtype and device into a new buffer and registers it."""
    features, widths = weights[0].shape[1], tuple(w.shape[0] for w in weights)
    border = _round_up(sum(ranks), _UNIT)
    buffer = weights[0].new_zeros(sum(widths) + border, _pitch(features + border, weights[0]))
    made = Border(buffer, features, widths, tuple(ranks))
    for view, weight in zip(made.weights, weights, strict=True):
        view.copy_(weight)
    _known[made.weights[0].data_ptr()] = made
    return made


def find(weights: Sequence[Tensor], ranks: Sequence[int]) -> Border | None:
    """The border whose views these weights are, if it has room for adapters of these ranks."""
    known = _known.get(weights[0].data_ptr())
    if known is None or known.ranks != tuple(ranks) or not known.holds(weights):
        return None
    return known


def operand(like: Tensor, rows: int, columns: int, border: int) -> Tensor:
    """Room for [x | S] or [dy | dS]: (rows, columns + border), rows padded as the buffer's are."""
    return like.new_empty(rows, _pitch(columns + border, like))[:, : columns + border]
