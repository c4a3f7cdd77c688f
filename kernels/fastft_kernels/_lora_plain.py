"""The plain call of ``lora_linear``: up to three layers with one adapter each over all rows. It is
what a model's layers call step after step, so all that depends on sizes alone is kept, and a call
is its launches. The three ways of a call are those of ``fastft_kernels.ways``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft_kernels import _lora_gemm, border, lora_config, ways
from fastft_kernels import _lora_pair as pairs
from fastft_kernels import _lora_reduce as sums
from fastft_kernels import _lora_skinny as thin
from fastft_kernels._common import device_guard
from fastft_kernels._launch import KEPT, Prepared
from fastft_kernels._lora_calls import POSSIBLE, GluPair, dense, scales_kept

__all__ = ["backward", "forward"]

_FLOAT32 = torch.float32
Shapes = list[tuple[int, int, int]]


class _Call(NamedTuple):
    """What tells one call from another but its tensors. dtypes: of x and of the adapters. sizes:
    tokens and features. kept: what is kept under dropout is scaled by. border: its columns, where
    the layers have one, else None."""

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    sizes: tuple[int, int]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    kept: tuple[float, ...]
    masked: bool
    border: int | None

    def way(self, direction: str, arch: lora_config.LoraArch) -> str | None:
        """The way it takes; None: it is not served here."""
        if 0 in self.sizes or 0 in self.widths or len(self.widths) > lora_config.MAX_SIBLINGS:
            return None
        possible = POSSIBLE[self.border is not None, arch.gemm is not None]
        tokens, features = self.sizes
        shape = ways.Shape(direction, tokens, features, self.widths, max(self.ranks), self.masked)
        way = ways.pick(arch.name, shape, possible)
        return None if way == "gemm" and self.dtypes[0].itemsize != 2 else way


def _call_of(
    x: Tensor,
    wides: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    scalings: Sequence[float],
    kept: Sequence[float],
    masks: Sequence[Tensor | None],
) -> tuple[_Call, border.Border | None, list[Tensor]] | None:
    """The call, its border and its masks; None where some layers drop and some do not, or where a
    way is forced."""
    drops = [mask for mask in masks if mask is not None]
    if len(drops) not in (0, len(masks)) or ways.forced():
        return None
    ranks = tuple([a.shape[0] for a in lora_as])
    held = border.find(weights, ranks)
    call = _Call(
        x.device, (x.dtype, lora_as[0].dtype), tuple(x.shape),  # type: ignore[arg-type]
        tuple([wide.shape[1] for wide in wides]), ranks, tuple(map(float, scalings)), tuple(kept),
        bool(drops), None if held is None else held.border,
    )  # fmt: skip
    return call, held, drops


class _Forward(NamedTuple):
    """unused: columns of a border that no adapter takes. terms: the launch of each layer after its
    product, or, ``gemm``, with it."""

    way: str
    casts: bool
    shrink: Prepared
    unused: int
    terms: list[Prepared]


@functools.lru_cache(maxsize=KEPT)
def _forward(call: _Call, biased: tuple[bool, ...]) -> _Forward | None:
    device, dtypes, sizes, widths, ranks, scalings, kept, masked, columns = call
    arch, size, tokens = lora_config.for_device(device), dtypes[0].itemsize, sizes[0]
    way = call.way("fwd", arch)
    if way is None:
        return None
    place, unused = None, 0
    if way == "border" and columns is not None:
        firsts = [sum(ranks[:i]) for i in range(len(ranks))]
        place = (border.pitch(sizes[1] + columns, size), *firsts)
        unused = columns - sum(ranks)
    shrink, parts = thin.shrink_launch(device, size, *sizes, ranks, kept, masked, False, place)
    if parts > 1:
        return None
    block_r = lora_config.block_r_for(max(ranks), size)
    casts = dtypes[1].itemsize > size and thin.casts(len(ranks), block_r, masked)
    terms = []
    for n, r, scaling, bias in zip(widths, ranks, scalings, biased, strict=True):
        if way == "gemm":
            made = (device, tokens, n, sizes[1:], (r,), (scaling,), False, True, bias)
            terms.append(_lora_gemm.product_launch(*made))
        elif way == "expand":
            alone = (device, size, tokens, n, (r,), (scaling,), False, True, bias, False)
            terms.append(thin.expand_launch(*alone))
    return _Forward(way, casts, shrink, unused, terms)


def forward(
    ys: Sequence[Tensor],
    ss: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    masks: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
) -> bool:
    """Writes the ys and ss; False, and nothing, where the call is not served here."""
    lora_as, lora_bs = dense(lora_as), dense(lora_bs)
    kept = scales_kept(masks, dropout_ps)
    found = _call_of(x, ys, weights, lora_as, scalings, kept, masks)
    if found is None:
        return False
    call, held, drops = found
    program = _forward(call, tuple([bias is not None for bias in biases]))
    if program is None:
        return False
    way = program.way
    if way == "gemm" and not _lora_gemm.fits([x, *ys, *weights]):
        return False
    with device_guard(x):
        read = sums.cast(lora_as, x.dtype) if program.casts else lora_as
        if way == "border" and held is not None:
            left = border.operand(x, *call.sizes, held.border)
            if program.unused:
                left[:, -program.unused :].zero_()
            program.shrink(x, *read, *ss, *drops, left)
            held.forward(ys, left, lora_bs, scalings, biases)
            return True
        program.shrink(x, *read, *ss, *drops)
        for i, term in enumerate(program.terms):
            y, bias = ys[i], biases[i]
            own = () if bias is None else (bias,)
            if way == "gemm":
                term(y, x, weights[i], ss[i], lora_bs[i], *own)
            else:
                torch.mm(x, weights[i].t(), out=y)
                term(y, *own, ss[i], lora_bs[i])
    return True


class _Backward(NamedTuple):
    """The launches, and the shapes of the parts that sums are made of. pairs: of each layer's dS
    and dB; term: the adapters' in dx, ``gemm``'s with all products."""

    way: str
    pairs: list[Prepared]
    strips: Shapes
    splits: Shapes
    add_up: Prepared
    reduce_db: Prepared
    term: Prepared | None
    outer: Prepared
    outer_splits: Shapes
    reduce_da: Prepared


@functools.lru_cache(maxsize=KEPT)
def _backward(call: _Call, way: str | None = None) -> _Backward | None:
    """way: that of a call after a gated unit's."""
    device, dtypes, (tokens, features), widths, ranks, scalings, kept, masked, columns = call
    arch, size = lora_config.for_device(device), dtypes[0].itemsize
    way = way or call.way("bwd", arch)
    layers = list(zip(widths, ranks, strict=True))
    if way is None or not all(pairs.pair_pays(arch.pair, size, n, r) for n, r in layers):
        return None
    stride = None
    if way == "border" and columns is not None:
        stride = border.pitch(sum(widths) + columns, size)
    made = [pairs.pair_launch(device, tokens, n, r, stride) for n, r in layers]
    strips = [(count, tokens, r) for (_, count, _), r in zip(made, ranks, strict=True)]
    splits = [(count, r, n) for (_, _, count), (n, r) in zip(made, layers, strict=True)]
    term = None
    if way == "gemm":
        ways_of = (device, tokens, features, widths, ranks, kept, masked, False, False)
        term = _lora_gemm.product_launch(*ways_of)
    elif way == "expand" or masked:
        alone = (device, size, tokens, features, ranks, kept, masked, False, False, False)
        term = thin.expand_launch(*alone)
    outer, count = thin.outer_launch(device, size, tokens, features, ranks, masked)
    outer_splits = [(count, r, features) for r in ranks]
    return _Backward(
        way, [launch for launch, _, _ in made], strips, splits,
        sums.add_up_launch(device, tuple(strips), scalings, stride),
        sums.outers_launch(device, tuple(splits), scalings, True),
        term, outer, outer_splits, sums.outers_launch(device, tuple(outer_splits), kept, False),
    )  # fmt: skip


def backward(
    dx: Tensor,
    das: Sequence[Tensor],
    dbs: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    kept: Sequence[float],
    masks: Sequence[Tensor | None],
    made: GluPair | None = None,
) -> bool:
    """Writes dx, the dAs and, where nothing of them is made, the dBs; False, and nothing, where the
    call is not served here."""
    found = _call_of(x, dys, weights, lora_as, scalings, kept, masks)
    if found is None or not all(g is None or g.is_contiguous() for g in (*das, *dbs)):
        return False
    call, held, drops = found
    program = _backward(call)
    if program is not None and made is not None:
        # What the unit has left is the bordered operand; without it there is none.
        bordered = "expand" if program.way == "border" else program.way
        program = _backward(call, bordered if made.left is None else "border")
    if program is None:
        return False
    way = program.way
    if way == "gemm" and not _lora_gemm.fits([dx, *dys, *weights]):
        return False
    if made is None:
        d_ss = [torch.empty_like(s) for s in ss]
        left = _thin(program, call, held, d_ss, dbs, dys, x, ss, lora_bs)
    else:
        d_ss, left = made.d_ss, made.left
    if way == "gemm" and program.term is not None:
        program.term(dx, *dys, *weights, *d_ss, *lora_as, *drops)
    else:
        if left is not None and held is not None:
            right = held.backward_operand(None if drops else lora_as)
            torch.mm(left[:, : right.shape[0]], right, out=dx)
        else:
            torch.mm(dys[0], weights[0], out=dx)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
        if program.term is not None:
            program.term(dx, *d_ss, *lora_as, *drops)
    da_parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.outer_splits]
    program.outer(x, *d_ss, *da_parts, *drops)
    program.reduce_da(*das, *da_parts)
    return True


def _thin(
    program: _Backward,
    call: _Call,
    held: border.Border | None,
    d_ss: Sequence[Tensor],
    dbs: Sequence[Any],
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
) -> Tensor | None:
    """Writes the dSs and dBs, and returns the bordered operand of dx where it takes that way."""
    ds_parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.strips]
    db_parts = [x.new_empty(shape, dtype=_FLOAT32) for shape in program.splits]
    left: Tensor | None = None
    wides: Sequence[Tensor] = ()
    thins: Sequence[Tensor] = ()
    if program.way == "border" and held is not None:
        left, wides, thins = held.room(dys[0], call.sizes[0], call.widths)
    for i, pair in enumerate(program.pairs):
        pair(dys[i], lora_bs[i], ss[i], ds_parts[i], db_parts[i], *wides[i : i + 1])
    program.add_up(*d_ss, *ds_parts, *thins)
    program.reduce_db(*dbs, *db_parts)
    return left
