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

__all__ = ["Border", "find", "make", "operand", "pitch"]

# Row pitch, in bytes: a line of the second-level cache, and enough for tensor memory descriptors.
_PITCH = 128
# Columns and rows of a border come in multiples of this many elements (16 bytes of 16-bit ones).
_UNIT = 8


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def pitch(columns: int, size: int) -> int:
    """Elements from one row to the next of a matrix of this many columns of so many bytes."""
    return _round_up(columns, _PITCH // size)


@dataclass(eq=False)
class Border:
    """A buffer (N + R, pitch) of the layers ``widths`` over ``features`` columns, and places for
    one adapter of ``ranks[i]`` a layer. R is a multiple of eight.

    border: R, the sum of the ranks rounded up. Its views are made once: at every call, each would
    take its host as long as a tenth of a launch.
    """

    buffer: Tensor
    features: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    border: int = field(init=False)
    weights: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n, k = sum(self.widths), self.features
        self.border = _round_up(sum(self.ranks), _UNIT)
        self._columns = self.buffer[:, :k]
        self._frozen = self._columns[:n]
        # As .data: to write adapters beside the weights is no change of these to autograd.
        self.weights = [w.data for w in self._frozen.split(list(self.widths))]
        self._held_at = [_place(weight) for weight in self.weights]
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        places = [slice(end - r, end) for end, r in zip(ends, self.ranks)]
        rows = self.buffer[:n, : k + self.border].split(list(self.widths))
        self._rows = [own.t() for own in rows]
        self._bs = [own[:, k:][:, place] for own, place in zip(rows, places)]
        self._as = [self._columns[n:][place] for place in places]

    def room(
        self, like: Tensor, rows: int, widths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Room for [x | S] or [dy_1 | dy_2 .. | dS], and in it the places of the wide ones, which
        have these widths, and of each thin one. The columns past the last rank are zero: they meet
        zeros, but NaN times zero is NaN."""
        left = operand(like, rows, sum(widths), self.border)
        unused = self.border - sum(self.ranks)
        *parts, padding = left.split_with_sizes([*widths, *self.ranks, unused], 1)
        if unused:
            padding.zero_()
        return left, parts[: len(widths)], parts[len(widths) :]

    def forward(
        self,
        ys: Sequence[Tensor],
        left: Tensor,
        lora_bs: Sequence[Tensor],
        scalings: Sequence[float],
        biases: Sequence[Tensor | None],
    ) -> None:
        """y_i = [x | S] [W_i | s B]^T + bias_i of each layer, these adapters written into the
        border first; left: [x | S]."""
        for place, b, scaling in zip(self._bs, lora_bs, scalings, strict=True):
            torch.mul(b, scaling, out=place)
        for y, right, bias in zip(ys, self._rows, biases, strict=True):
            if bias is None:
                torch.mm(left, right, out=y)
            else:
                torch.addmm(bias, left, right, out=y)

    def backward_operand(self, lora_as: Sequence[Tensor] | None) -> Tensor:
        """[W ; A], (N + R, K), with these adapters written into the border; W alone for None."""
        if lora_as is None:
            return self._frozen
        for place, a in zip(self._as, lora_as, strict=True):
            place.copy_(a)
        return self._columns

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these tensors are its views, all of them in order."""
        return [_place(weight) for weight in weights] == self._held_at


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


# By the address of the first weight. A border is held by who made it.
_known: weakref.WeakValueDictionary[int, Border] = weakref.WeakValueDictionary()


def make(weights: Sequence[Tensor], ranks: Sequence[int]) -> Border:
    """Copies the weights (N_i, K) of one dtype and device into a new buffer and registers it."""
    features, widths = weights[0].shape[1], tuple(w.shape[0] for w in weights)
    border = _round_up(sum(ranks), _UNIT)
    buffer = weights[0].new_zeros(
        sum(widths) + border, pitch(features + border, weights[0].element_size())
    )
    made = Border(buffer, features, widths, tuple(ranks))
    for view, weight in zip(made.weights, weights, strict=True):
        view.copy_(weight)
    _known[made.weights[0].data_ptr()] = made
    return made


def find(weights: Sequence[Tensor], ranks: Sequence[int]) -> Border | None:
    """The border whose views these weights are, if it has room for adapters of these ranks."""
    known = _known.get(weights[0].data_ptr()) if _known else None
    if known is None or known.ranks != tuple(ranks) or not known.holds(weights):
        return None
    return known


def operand(like: Tensor, rows: int, columns: int, border: int) -> Tensor:
    """Room for [x | S] or [dy | dS]: (rows, columns + border), rows padded as the buffer's are."""
    return like.new_empty(rows, pitch(columns + border, like.element_size()))[:, : columns + border]
