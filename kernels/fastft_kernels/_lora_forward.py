"""The forward of ``fastft_kernels.lora_linear``: the thin products, then the layers' values.

In a recompute the two are parted: what the backward needs is there before the wide products run,
and the last of them need not run at all (``fastft.ops._saving``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft_kernels import _lora_gemm, _lora_plain, border
from fastft_kernels._common import device_guard
from fastft_kernels._lora_calls import at, by, choose_way, dense, plain, scales_kept
from fastft_kernels._lora_routed import Route, routes
from fastft_kernels._lora_skinny import Copy, expand_add, shrink

__all__ = ["fwd", "fwd_adapters", "fwd_values"]


_NO_MASK = (None,)


class _Call(NamedTuple):
    """What comes after ys and ss."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scalings: list[float]
    masks: list[Tensor | None]
    dropout_ps: list[float]
    owners: list[int]
    spans: list[tuple[int, int]]

    @property
    def whole(self) -> tuple[int, int]:
        return 0, self.x.shape[0]

    def one_each(self, layers: int) -> bool:
        """One adapter a layer, in order, over all rows."""
        return plain(layers, self.owners, self.spans, self.whole)

    def way(self, ys: list[Tensor], one_each: bool) -> tuple[str, border.Border | None]:
        if not one_each or not self.weights or 0 in self.x.shape:
            return "expand", None
        return choose_way("fwd", self.x, ys, self.weights, self.lora_as, self.masks)


def fwd(ys: list[Tensor], ss: list[Tensor], *call: Any) -> None:
    """Writes y_i (M, N_i) for every layer, and for adapter j of layer owners[j] over the rows
    spans[j] of x: s_j = drop_j(x) A_j^T (rows, r_j). The arguments are those of both halves.
    Without weights the ys hold the frozen products already, and what they take is added."""
    c = _Call(*call)
    one_each = c.one_each(len(ys))
    if one_each and c.weights and _lora_plain.forward(
        ys, ss, c.x, c.weights, c.biases, c.lora_as, c.lora_bs, c.scalings, c.masks, c.dropout_ps
    ):  # fmt: skip
        return
    with device_guard(c.x):
        way, held = c.way(ys, one_each)
        left = copy = None
        if way == "border" and held is not None:
            # The pass over x that makes S leaves [x | S] behind.
            left, (wide,), thin = held.room(c.x, c.x.shape[0], c.x.shape[1:])
            copy = Copy(wide, thin)
        _adapters(ss, c, copy)
        _values(ys, ss, c, way, held, left, one_each)


def fwd_adapters(ys: list[Tensor], ss: list[Tensor], *call: Any) -> None:
    """The ss of ``fwd``, of which ``fwd_values`` makes the ys."""
    c = _Call(*call)
    with device_guard(c.x):
        _adapters(ss, c, None)


def fwd_values(ys: list[Tensor], ss: list[Tensor], *call: Any) -> None:
    """The ys of ``fwd``, from x and the ss."""
    c = _Call(*call)
    with device_guard(c.x):
        one_each = c.one_each(len(ys))
        way, held = c.way(ys, one_each)
        left = None
        if way == "border" and held is not None:
            left, (wide,), thin = held.room(c.x, c.x.shape[0], c.x.shape[1:])
            wide.copy_(c.x)
            for s, place in zip(ss, thin, strict=True):
                place.copy_(s)
        _values(ys, ss, c, way, held, left, one_each)


def _adapters(ss: list[Tensor], c: _Call, copy: Copy | None) -> None:
    lora_as, kept = dense(c.lora_as), scales_kept(c.masks, c.dropout_ps)
    if c.spans.count(c.whole) == len(c.spans):
        shrink(ss, c.x, lora_as, kept, c.masks, transposed=False, copy=copy)
        return
    if routes(c.owners, c.spans, c.x):
        xs = [c.x] * len(c.owners)
        Route(xs, lora_as, ss, c.spans, kept, c.masks).shrink(transposed=False)
        return
    for span, members in by(c.spans).items():
        shrink(
            at(ss, members), c.x[slice(*span)], at(lora_as, members), at(kept, members),
            at(c.masks, members), transposed=False, copy=copy,
        )  # fmt: skip


def _values(
    ys: list[Tensor],
    ss: list[Tensor],
    c: _Call,
    way: str,
    held: border.Border | None,
    left: Tensor | None,
    one_each: bool,
) -> None:
    lora_bs = dense(c.lora_bs)
    if left is not None and held is not None:
        held.forward(ys, left, lora_bs, c.scalings, c.biases)
    elif way == "gemm":
        layers = zip(ys, c.weights, c.biases, ss, lora_bs, c.scalings, strict=True)
        for y, weight, bias, s, b, scaling in layers:
            _lora_gemm.product(
                y, bias, [c.x], [weight], [s], [b], [scaling], [None], transposed=True
            )  # fmt: skip
    else:
        for y, weight in zip(ys, c.weights, strict=True) if c.weights else ():
            torch.mm(c.x, weight.t(), out=y)
        if one_each:
            for y, bias, s, b, scaling in zip(ys, c.biases, ss, lora_bs, c.scalings, strict=True):
                expand_add(y, bias, [s], [b], [scaling], _NO_MASK, transposed=True)
        else:
            _expand(ys, ss, c, lora_bs)


def _expand(ys: list[Tensor], ss: list[Tensor], c: _Call, lora_bs: list[Tensor]) -> None:
    """y_i += scaling_j s_j B_j^T over the rows of each adapter j, and the biases."""
    with_bias: set[int] = set()
    if routes(c.owners, c.spans, c.x):
        wides, none = [ys[i] for i in c.owners], [None] * len(c.owners)
        Route(wides, lora_bs, ss, c.spans, c.scalings, none).expand(
            [[j] for j in range(len(c.owners))], transposed=True
        )
    else:
        for (owner, span), members in by(zip(c.owners, c.spans, strict=True)).items():
            whole = span == c.whole
            rows = ys[owner] if whole else ys[owner][slice(*span)]
            expand_add(
                rows, c.biases[owner] if whole else None, at(ss, members), at(lora_bs, members),
                at(c.scalings, members), [None] * len(members), transposed=True,
            )  # fmt: skip
        with_bias = {o for o, span in zip(c.owners, c.spans, strict=True) if span == c.whole}
    for i, bias in enumerate(c.biases):
        if bias is not None and i not in with_bias:
            ys[i].add_(bias)
