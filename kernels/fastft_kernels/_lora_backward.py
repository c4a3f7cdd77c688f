"""The backward of ``fastft_kernels.lora_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft_kernels import _lora_gemm, _lora_plain
from fastft_kernels._common import device_guard
from fastft_kernels._lora_calls import (
    GluPair,
    at,
    by,
    choose_way,
    dense,
    plain,
    scales_kept,
)
from fastft_kernels._lora_pair import PairParts, pair, pairs_well, reduce_pairs
from fastft_kernels._lora_routed import Route, routes
from fastft_kernels._lora_skinny import Copy, expand_add, outer, shrink

__all__ = ["bwd"]


def bwd(
    dx: Tensor | None,
    das: list[Tensor | None],
    dbs: list[Tensor | None],
    dys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
    made: GluPair | None = None,
) -> None:
    """Writes dx (M, K), dA_j (r_j, K) and dB_j (N, r_j), each where it is not None; without weights
    dx is that of the adapters' terms alone. made: what ``glu_bwd`` has made already, whose dys
    these are; then no dB is wanted."""
    lora_as, lora_bs = dense(lora_as), dense(lora_bs)
    keep_scales = scales_kept(masks, dropout_ps)
    whole = (0, x.shape[0])
    every = (dx, *das, *(dbs if made is None else ()))
    with device_guard(x):
        one_each = plain(len(dys), owners, spans, whole)
        if one_each and weights and all(g is not None for g in every):
            gradients: Any = (dx, das, dbs)
            tensors = (dys, x, ss, weights, lora_as, lora_bs)
            if _lora_plain.backward(*gradients, *tensors, scalings, keep_scales, masks, made):
                return None
        d_ss: list[Tensor] = [torch.empty_like(s) for s in ss] if made is None else made.d_ss
        if not one_each and routes(owners, spans, x):
            thin = (ss, lora_as, lora_bs, scalings, keep_scales, masks, owners, spans)
            return _bwd_routed(dx, das, dbs, dys, d_ss, x, weights, *thin)
        way, held = "expand", None
        if dx is not None and weights and one_each and 0 not in dx.shape:
            way, held = choose_way("bwd", dx, dys, weights, lora_as, masks)
        dropped = any(mask is not None for mask in masks)
        left, copies = None, None
        if made is not None:
            left, way = made.left, "expand" if way == "border" else way
        elif way == "border" and held is not None:
            left, wides, thins = held.room(dys[0], x.shape[0], held.widths)
            copies = [Copy(wide, [thin]) for wide, thin in zip(wides, thins, strict=True)]
        parts: dict[tuple[int, int], list[PairParts]] = {}
        adapters = {} if made is not None else by(zip(owners, spans, strict=True))
        for (owner, span), members in adapters.items():
            dy = dys[owner] if span == whole else dys[owner][slice(*span)]
            parts.setdefault(span, []).extend(_d_s_and_d_b(
                d_ss, dbs, dy, members, ss, lora_bs, scalings,
                dx is not None or any(das[j] is not None for j in members),
                None if copies is None else copies[owner],
            ))  # fmt: skip
        for pairs in parts.values():
            reduce_pairs(pairs)
        # Nothing comes before the terms: the first pass writes all of dx.
        fresh = not weights and spans.count(whole) == len(spans)
        added = False
        if dx is not None and left is not None and held is not None:
            right = held.backward_operand(None if dropped else lora_as)
            torch.mm(left[:, : right.shape[0]], right, out=dx)
            added = not dropped
        elif dx is not None and way == "gemm":
            _lora_gemm.product(
                dx, None, dys, weights, d_ss, lora_as, keep_scales, masks, transposed=False
            )  # fmt: skip
            added = True
        elif dx is not None and not fresh:
            _frozen_dx(dx, dys, weights)
        for span, members in by(spans).items():
            rows = slice(*span)
            if dx is not None and not added:
                expand_add(
                    dx if span == whole else dx[rows], None, at(d_ss, members),
                    at(lora_as, members), at(keep_scales, members), at(masks, members),
                    transposed=False, fresh=fresh,
                )  # fmt: skip
            wanted = [j for j in members if das[j] is not None]
            if wanted:
                outer(
                    at(das, wanted), x if span == whole else x[rows], at(d_ss, wanted),
                    at(keep_scales, wanted), at(masks, wanted), transposed=False,
                )  # fmt: skip
    return None


def _frozen_dx(dx: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if not weights:
        dx.zero_()
        return
    torch.mm(dys[0], weights[0], out=dx)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)


def _d_s_and_d_b(
    d_ss: list[Tensor],
    dbs: Sequence[Tensor | None],
    dy: Tensor,
    members: Sequence[int],
    ss: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    need_ds: bool,
    copy: Copy | None,
) -> list[PairParts]:
    """dS_j and dB_j of one layer's adapters over the rows of dy, or what is left to add up."""
    first = members[0]
    db = dbs[first]
    both = len(members) == 1 and need_ds
    if both and db is not None and pairs_well(dy, lora_bs[first].shape[1]):
        scale = float(scalings[first])
        return [pair(d_ss[first], db, dy, ss[first], lora_bs[first], scale, copy)]
    wanted = [j for j in members if dbs[j] is not None]
    none = [None] * len(members)
    if wanted:
        outer(
            at(dbs, wanted), dy, at(ss, wanted), at(scalings, wanted), none[: len(wanted)],
            transposed=True,
        )  # fmt: skip
    if need_ds:
        shrink(
            at(d_ss, members), dy, at(lora_bs, members), at(scalings, members), none,
            transposed=True, copy=copy,
        )  # fmt: skip
    return []


def _bwd_routed(
    dx: Tensor | None,
    das: list[Tensor | None],
    dbs: list[Tensor | None],
    dys: list[Tensor],
    d_ss: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    ss: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    keep_scales: list[float],
    masks: list[Tensor | None],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """The backward of a mixed batch: four launches beside the frozen products."""
    own_dys, none = [dys[i] for i in owners], [None] * len(owners)
    if dx is not None or any(da is not None for da in das):
        Route(own_dys, lora_bs, d_ss, spans, scalings, none).shrink(transposed=True)
    if dx is not None:
        _frozen_dx(dx, dys, weights)
        Route([dx] * len(owners), lora_as, d_ss, spans, keep_scales, masks).expand(
            list(by(spans).values()), transposed=False
        )
    wanted = [j for j, db in enumerate(dbs) if db is not None]
    if wanted:
        chosen = (own_dys, lora_bs, ss, spans, scalings, none)
        Route(*(at(values, wanted) for values in chosen)).outer(at(dbs, wanted), transposed=True)
    wanted = [j for j, da in enumerate(das) if da is not None]
    if wanted:
        chosen = ([x] * len(owners), lora_as, d_ss, spans, keep_scales, masks)
        Route(*(at(values, wanted) for values in chosen)).outer(at(das, wanted), transposed=False)
