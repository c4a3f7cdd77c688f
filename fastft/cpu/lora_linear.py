"""CPU launcher of ``lora_linear``: frozen products, and around them the thin ones of LoRA.

Where the processor's vectors multiply bfloat16, the terms that LoRA adds go along in the frozen
product's sums (``fastft.cpu.product``), and the other thin products are one pass of our own each
(``fastft.cpu.thin``), whatever the dropout: all of a call's in one native call, if every adapter
takes all rows (``fastft.cpu.lora_layers``); with matrix units the terms are such passes too, after
the library's product. Elsewhere, and at high ranks, all are the library's: with dropout x is then
dropped a slice of rows at a time into a buffer that stays in cache and feeds the product at once,
and the backward's two thin products read the mask as they go. No dropped copy of x is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import native
from fastft.cpu import lora_layers, thin
from fastft.cpu._lora_buffers import dropped, keep, narrow, row_slices, scatter, stacked, thin_side
from fastft.cpu._supports import refusal
from fastft.cpu.lora_layers import takes_scales as takes_scales
from fastft.cpu.product import Part, Term, product, serves, takes
from fastft.cpu.products import mm_nn, mm_nt, mm_tn, scratch

# Ranks up to which a pass of our own over dx or x beats a library product and a pass after it.
_FUSED_RANK = 32


def supports(
    *, device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int
) -> str | None:
    """float32, bfloat16 and float16 activations and adapters."""
    return refusal({"activations in ": dtype, "adapters in ": adapter_dtype})


def threshold16(p: float) -> int:
    """Dropout draws 16 bits an element: dropped where they are below this."""
    return round(p * 65536)


def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
    """Fills ``out`` (M, bytes) with kept bits, each 1 with probability 1 - round(2^16 p)/2^16."""
    native.module().dropout_mask(
        out.data_ptr(), out.numel(), int(seed.item()) & (2**64 - 1), threshold16(p)
    )


def _groups(masks: list[Tensor | None], spans: list[tuple[int, int]]) -> list[list[int]]:
    """Adapters that can share one read of x: those over the same rows without dropout."""
    groups: dict[object, list[int]] = {}
    for j, (mask, span) in enumerate(zip(masks, spans, strict=True)):
        groups.setdefault(span if mask is None else j, []).append(j)
    return list(groups.values())


def fwd(*call: Any, scales: Sequence[Tensor | None] | None = None) -> None:
    """Writes ys[i] (M, N_i), and for adapter j of layer owners[j] over the rows spans[j] of x:
    ss[j] = drop_j(x) A_j^T (rows, r_j); the arguments are those of both halves. Without weights the
    ys hold the frozen products already. scales: where ``takes_scales`` says so."""
    if not lora_layers.forward(*(*call, scales)):
        _refuse(scales)
        fwd_adapters(*call)
        fwd_values(*call)


def fwd_adapters(
    ys: list[Tensor],
    ss: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """The ss of ``fwd``, of which ``fwd_values`` makes the ys."""
    if x.shape[0] == 0:
        return
    for group in _groups(masks, spans):
        first = group[0]
        part = x[slice(*spans[first])]
        if part.shape[0] == 0:
            continue
        mask, p = masks[first], dropout_ps[first]
        if thin.serves(x.dtype, sum(lora_as[j].shape[0] for j in group), mask is not None):
            all_as = stacked([lora_as[j] for j in group], lora_as[first].dtype)
            s_all = thin_side([ss[j] for j in group])
            thin.shrink(s_all, part, all_as, mask, keep(mask, p))
            scatter([ss[j] for j in group], s_all, 1)
            continue
        all_as = stacked([lora_as[j] for j in group], x.dtype)
        if mask is not None:
            for rows in row_slices(part.shape[0], part.shape[1], part.element_size()):
                own = dropped(part[rows], mask[rows])
                mm_nt(ss[first][rows], own, all_as, alpha=keep(mask, p))
        else:
            s_all = thin_side([ss[j] for j in group])
            mm_nt(s_all, part, all_as)
            scatter([ss[j] for j in group], s_all, 1)


def fwd_values(
    ys: list[Tensor],
    ss: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """The ys of ``fwd``, from x and the ss."""
    if x.shape[0] == 0:
        return
    for i, y in enumerate(ys):
        own = [j for j, owner in enumerate(owners) if owner == i and ss[j].shape[0]]
        if weights:
            weight, bias = weights[i], biases[i]
            if serves(x.shape[0], [x], [weight], bias):
                terms: list[Term] = [
                    (ss[j], lora_bs[j].contiguous(), True, None, scalings[j]) for j in own
                ]
                whole = all(spans[j] == (0, x.shape[0]) for j in own) and takes(terms)
                product(y, [(x, weight, True)], terms if whole else [], bias)
                if whole:
                    continue
            else:
                mm_nt(y, x, weight)
                if bias is not None:
                    y.add_(bias)
        for j in own:
            if thin.serves(x.dtype, ss[j].shape[1]):
                thin.expand(y[slice(*spans[j])], ss[j], lora_bs[j].contiguous(), scalings[j])
            else:
                b = narrow("b", lora_bs[j], x.dtype)
                mm_nt(y[slice(*spans[j])], ss[j], b, alpha=scalings[j], accumulate=True)


def bwd(*call: Any, scaled: lora_layers.Scaled | None = None) -> None:
    """Writes dx (M, K), das[j] (r_j, K), dbs[j] (N, r_j), and the d_scales of a scaled call; None
    is not wanted. Without weights dx is that of the adapters' terms alone. The arguments are those
    of the passes apart."""
    if not lora_layers.backward(*(*call, scaled)):
        _refuse(scaled)
        _bwd_apart(*call)


def _refuse(scales: object) -> None:
    if scales is not None:
        raise RuntimeError("lora_linear: scales in a call that does not take them along")


def _bwd_apart(
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
) -> None:
    """Writes dx (M, K), das[j] (r_j, K), dbs[j] (N, r_j); None is not wanted."""
    for gradient, (start, stop) in zip((*das, *dbs), (*spans, *spans), strict=True):
        if gradient is not None and start == stop:
            gradient.zero_()
    if x.shape[0] == 0:
        return
    groups = [g for g in _groups(masks, spans) if spans[g[0]][0] < spans[g[0]][1]]
    d_ss = _room([(ss[g[0]].shape[0], sum(ss[j].shape[1] for j in g)) for g in groups], x.dtype)
    # dY is read twice in a row, and dx added to when it has just been written.
    for group, ds_all in zip(groups, d_ss, strict=True):
        rows = slice(*spans[group[0]])
        for j, ds in zip(group, _columns(ds_all, [ss[j].shape[1] for j in group]), strict=True):
            _d_s_and_d_b(ds, dbs[j], dys[owners[j]][rows], ss[j], lora_bs[j], scalings[j])
    if dx is not None:
        if not weights:
            dx.zero_()
        elif _frozen_dx(dx, dys, weights, groups, d_ss, lora_as, masks, dropout_ps, spans):
            dx = None  # the terms are in it
    for group, ds_all in zip(groups, d_ss, strict=True):
        rows = slice(*spans[group[0]])
        dx_rows = None if dx is None else dx[rows]
        group_as, group_das = [lora_as[j] for j in group], [das[j] for j in group]
        mask, p = masks[group[0]], dropout_ps[group[0]]
        if thin.serves(x.dtype, ds_all.shape[1], mask is not None):
            _bwd_thin(dx_rows, group_das, ds_all, x[rows], group_as, mask, keep(mask, p))
        elif mask is None:
            _bwd_stacked(dx_rows, group_das, ds_all, x[rows], group_as)
        else:
            _bwd_dropped(dx_rows, group_das[0], ds_all, x[rows], group_as[0], mask, p)


def _frozen_dx(
    dx: Tensor,
    dys: list[Tensor],
    weights: list[Tensor],
    groups: list[list[int]],
    d_ss: list[Tensor],
    lora_as: list[Tensor],
    masks: list[Tensor | None],
    dropout_ps: list[float],
    spans: list[tuple[int, int]],
) -> bool:
    """dx of all siblings' frozen products; whether the terms of their adapters are in it."""
    if not serves(dx.shape[0], dys, weights):
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            mm_nn(dx, dy, weight, accumulate=i > 0)
        return False
    parts: list[Part] = [(dy, weight, False) for dy, weight in zip(dys, weights, strict=True)]
    terms: list[Term] = []
    whole = all(spans[group[0]] == (0, dx.shape[0]) for group in groups)
    if whole:
        for group, ds_all in zip(groups, d_ss, strict=True):
            mask, p = masks[group[0]], dropout_ps[group[0]]
            own = [lora_as[j] for j in group]
            all_as = stacked(own, own[0].dtype, f"a_{len(terms)}")
            terms.append((ds_all, all_as, False, mask, keep(mask, p)))
    taken = whole and takes(terms)
    product(dx, parts, terms if taken else [])
    return taken


def _columns(whole: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [whole] if len(sizes) == 1 else whole.split(sizes, 1)


def _room(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of these shapes in one buffer of this thread."""
    if len(shapes) == 1:
        return [scratch("d_s", shapes[0], dtype)]
    sizes = [rows * columns for rows, columns in shapes]
    parts = scratch("d_s", (sum(sizes),), dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _d_s_and_d_b(
    ds: Tensor, db: Tensor | None, dy: Tensor, s: Tensor, lora_b: Tensor, scaling: float
) -> None:
    """dS = scaling dY B and dB = scaling dY^T S of one adapter."""
    if thin.serves(dy.dtype, s.shape[1]) and (db is None or db.is_contiguous()):
        thin.pair(ds, db, dy, s, lora_b.contiguous(), scaling)
        return
    mm_nn(ds, dy, narrow("b", lora_b, dy.dtype), alpha=scaling)
    if db is not None:
        mm_tn(db, dy, s, alpha=scaling)


def _bwd_thin(
    dx: Tensor | None,
    das: list[Tensor | None],
    ds_all: Tensor,
    x: Tensor,
    lora_as: list[Tensor],
    mask: Tensor | None,
    kept: float,
) -> None:
    """One pass over dx and x together for all adapters of a group."""
    wanted = [da for da in das if da is not None]
    if dx is None and not wanted:
        return
    all_as = stacked(lora_as, lora_as[0].dtype)
    if not wanted:
        thin.back(dx, None, ds_all, x, all_as, mask, kept)
    elif len(das) == 1 and wanted[0].is_contiguous():
        thin.back(dx, wanted[0], ds_all, x, all_as, mask, kept)
    else:
        da_all = scratch("da_all", (ds_all.shape[1], x.shape[1]), all_as.dtype)
        thin.back(dx, da_all, ds_all, x, all_as, mask, kept)
        scatter(das, da_all, 0, [a.shape[0] for a in lora_as])


def _bwd_stacked(
    dx: Tensor | None,
    das: list[Tensor | None],
    ds_all: Tensor,
    x: Tensor,
    lora_as: list[Tensor],
) -> None:
    """One pass over dx and one over x for all adapters of a group."""
    if dx is not None:
        mm_nn(dx, ds_all, stacked(lora_as, x.dtype), accumulate=True)
    wanted = [da for da in das if da is not None]
    if not wanted:
        return
    if len(das) == 1:
        mm_tn(wanted[0], ds_all, x)
        return
    da_all = scratch("da_all", (ds_all.shape[1], x.shape[1]), wanted[0].dtype)
    mm_tn(da_all, ds_all, x)
    scatter(das, da_all, 0, [a.shape[0] for a in lora_as])


def _bwd_dropped(
    dx: Tensor | None,
    da: Tensor | None,
    ds: Tensor,
    x: Tensor,
    lora_a: Tensor,
    mask: Tensor,
    p: float,
) -> None:
    """dx += mask/(1-p) * (dS A) and dA = dS^T drop(x), each in one pass."""
    if ds.shape[1] > _FUSED_RANK:
        _bwd_dropped_in_slices(dx, da, ds, x, lora_a, mask, p)
        return
    c = native.module()
    sizes = (x.shape[0], x.shape[1], ds.shape[1], keep(mask, p), native.DTYPE_CODES[x.dtype])
    wide_ds = narrow("ds32", ds, torch.float32)
    if dx is not None:
        wide_a = narrow("a32", lora_a, torch.float32).contiguous()
        c.lora_dx(dx.data_ptr(), wide_ds.data_ptr(), wide_a.data_ptr(), mask.data_ptr(), *sizes)
    if da is not None:
        total = scratch("da_total", tuple(da.shape), torch.float32)
        c.lora_da(total.data_ptr(), wide_ds.data_ptr(), x.data_ptr(), mask.data_ptr(), *sizes)
        da.copy_(total)


def _bwd_dropped_in_slices(
    dx: Tensor | None,
    da: Tensor | None,
    ds: Tensor,
    x: Tensor,
    lora_a: Tensor,
    mask: Tensor,
    p: float,
) -> None:
    """The same through library products, a slice of rows at a time."""
    c = native.module()
    columns, kept = x.shape[1], keep(mask, p)
    code = native.DTYPE_CODES[x.dtype]
    narrow_a = narrow("a_all", lora_a, x.dtype)
    total = part = None
    if da is not None:
        total = scratch("da_total", tuple(da.shape), torch.float32).zero_()
        part = scratch("da_part", tuple(da.shape), torch.float32)
    for rows in row_slices(x.shape[0], columns, x.element_size()):
        if dx is not None:
            added = scratch("ds_a", (rows.stop - rows.start, columns), x.dtype)
            mm_nn(added, ds[rows], narrow_a)
            c.dropout_add(
                dx[rows].data_ptr(),
                added.data_ptr(),
                mask[rows].data_ptr(),
                added.shape[0],
                columns,
                kept,
                code,
                code,
            )
        if total is not None and part is not None:
            mm_tn(part, ds[rows], dropped(x[rows], mask[rows]), alpha=kept)
            total += part
    if da is not None and total is not None:
        da.copy_(total)
