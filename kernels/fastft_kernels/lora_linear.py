"""``lora_linear`` in Triton: y = x W^T + bias + scaling * drop(x) A^T B^T, and its gradients.

What LoRA adds to the frozen products is passes over the wide tensors. There are as few as can be:

    fwd   s_j = drop_j(x) A_j^T           one read of x for all adapters of its rows
    bwd   dS_j = scaling_j dY_i B_j       one read of each dY_i for both
          dB_j = scaling_j dY_i^T s_j
          dA_j = dS_j^T drop_j(x)         one read of x for all adapters

and the two low-rank terms, y_i += scaling_j s_j B_j^T and dx += drop_j'(dS_j A_j), take one of
three ways (``fastft_kernels.ways`` chooses by the shape):

    expand   after the vendor library's product, one read and write of y, or of dx
    border   inside it: [x | S] [W | s B]^T and [dY | dS] [W ; A] (``fastft_kernels.border``); the
             pass that makes S and dS also leaves what it read beside them
    gemm     in the accumulator of a persistent Triton product

An adapter j belongs to a layer i and to a span of rows. The ways serve layers with one adapter each
over all rows; "one read" holds for up to three adapters of the same rows. A mixed batch's thin
products are one launch each, where each adapter reads its own rows; what is neither takes
``expand`` a span at a time.

Adapters may be float32 next to a 16-bit x: they are cast as they are loaded, accumulation is
float32, and no float32 copy of x exists. Sums over tokens are split by a rule that depends on the
shapes and the architecture only and are added in a fixed order: the same inputs, the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastft_kernels import _lora_gemm, border, config, ways
from fastft_kernels._common import device_guard, supports_device
from fastft_kernels._lora_linear_kernels import _dropout_mask_kernel
from fastft_kernels._lora_routed import Route, routes
from fastft_kernels._lora_skinny import Copy, expand_add, outer, pair, pairs_well, shrink

__all__ = ["bwd", "dropout_mask", "fwd", "lay_out", "supports"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int
) -> str | None:
    """None where this launcher can run the call, else the reason why not."""
    if dtype not in _DTYPES:
        return f"no Triton kernel for {dtype} inputs"
    if adapter_dtype not in (torch.float32, dtype):
        return f"adapters must be float32 or {dtype}, not {adapter_dtype}"
    if r < 1:
        return f"needs a rank of at least 1, not {r}"
    return supports_device(device_type)


def dropout_mask(out: Tensor, seed: Tensor, p: float) -> None:
    """Fills ``out``, uint8 (M, ceil(K / 8)), with keep bits of probability 1 - p.

    The bits are a function of ``seed`` (int64, one element, on the device: nothing waits for it),
    p and the position: Philox-4x32-10, 16 bits for each element, so p is rounded to a multiple of
    2^-16. Bits past column K of the last byte may be set; no reader looks at them.
    """
    if out.numel() == 0:
        return
    launch = config.for_device(out.device).mask
    with device_guard(out):
        _dropout_mask_kernel[(triton.cdiv(out.numel(), launch.block),)](
            out, seed, out.numel(), round(p * 65536),
            BLOCK=launch.block, **launch.launch.options(),
        )  # fmt: skip


def lay_out(weights: Sequence[Tensor], ranks: Sequence[int]) -> border.Border:
    """Copies the weights of layers that share their input into one bordered buffer; calls with its
    ``weights`` and adapters of these ranks may take that way as long as the result is held."""
    return border.make(weights, ranks)


def fwd(
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
    """Writes y_i (M, N_i) for every layer, and for adapter j of layer owners[j] over the rows
    spans[j] of x: s_j = drop_j(x) A_j^T (rows, r_j)."""
    lora_as, lora_bs = _dense(lora_as), _dense(lora_bs)
    whole = (0, x.shape[0])
    with device_guard(x):
        keep_scales = _keep_scales(masks, dropout_ps)
        if _plain(len(weights), owners, spans, whole) and x.numel():
            way, held = _way("fwd", x, ys, weights, lora_as, masks)
            thin = (ss, x, lora_as, keep_scales, masks)
            if way == "border" and held is not None:
                return _fwd_border(held, ys, biases, lora_bs, scalings, *thin)
            if way == "gemm":
                return _fwd_gemm(ys, weights, biases, lora_bs, scalings, *thin)
        for y, weight in zip(ys, weights, strict=True):
            torch.mm(x, weight.t(), out=y)
        fused: set[int] = set()
        if routes(owners, spans, x):
            Route([x] * len(owners), lora_as, ss, spans, keep_scales, masks).shrink(
                transposed=False
            )
            wides, none = [ys[i] for i in owners], [None] * len(owners)
            Route(wides, lora_bs, ss, spans, scalings, none).expand(
                [[j] for j in range(len(owners))], transposed=True
            )
        else:
            for span, members in _by(spans).items():
                shrink(
                    _at(ss, members), x[slice(*span)], _at(lora_as, members),
                    _at(keep_scales, members), _at(masks, members), transposed=False,
                )  # fmt: skip
            for (owner, span), members in _by(zip(owners, spans, strict=True)).items():
                bias = biases[owner] if span == whole else None
                expand_add(
                    ys[owner][slice(*span)], bias, _at(ss, members), _at(lora_bs, members),
                    _at(scalings, members), [None] * len(members), transposed=True,
                )  # fmt: skip
            fused = {o for o, span in zip(owners, spans, strict=True) if span == whole}
        for i, bias in enumerate(biases):
            if bias is not None and i not in fused:
                ys[i].add_(bias)
    return None


def _fwd_border(
    held: border.Border,
    ys: list[Tensor],
    biases: list[Tensor | None],
    lora_bs: list[Tensor],
    scalings: list[float],
    ss: list[Tensor],
    x: Tensor,
    lora_as: list[Tensor],
    keep_scales: list[float],
    masks: list[Tensor | None],
) -> None:
    """y_i = [x | S] [W_i | scaling_i B_i]^T + bias_i."""
    left = border.operand(x, x.shape[0], x.shape[1], held.border)
    thin = left[:, x.shape[1] :]
    copy = Copy(left[:, : x.shape[1]], [thin[:, place] for place in held.rank_slices()])
    _clear_padding(thin, held.ranks)
    shrink(ss, x, lora_as, keep_scales, masks, transposed=False, copy=copy)
    right = held.forward_operand(lora_bs, scalings)
    for y, bias, rows in zip(ys, biases, right.split(list(held.widths)), strict=True):
        if bias is None:
            torch.mm(left, rows.t(), out=y)
        else:
            torch.addmm(bias, left, rows.t(), out=y)


def _fwd_gemm(
    ys: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_bs: list[Tensor],
    scalings: list[float],
    ss: list[Tensor],
    x: Tensor,
    lora_as: list[Tensor],
    keep_scales: list[float],
    masks: list[Tensor | None],
) -> None:
    shrink(ss, x, lora_as, keep_scales, masks, transposed=False)
    layers = zip(ys, weights, biases, ss, lora_bs, scalings, strict=True)
    for y, weight, bias, s, b, scaling in layers:
        _lora_gemm.product(
            y, bias, [x], [weight], [s], [b], [scaling], [None], transposed=True
        )  # fmt: skip


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
) -> None:
    """Writes dx (M, K), dA_j (r_j, K) and dB_j (N, r_j), each where it is not None."""
    lora_as, lora_bs = _dense(lora_as), _dense(lora_bs)
    keep_scales = _keep_scales(masks, dropout_ps)
    with device_guard(x):
        d_ss: list[Tensor] = [torch.empty_like(s) for s in ss]
        thin = (ss, lora_as, lora_bs, scalings, keep_scales, masks, owners, spans)
        if routes(owners, spans, x):
            return _bwd_routed(dx, das, dbs, dys, d_ss, x, weights, *thin)
        way, held = "expand", None
        if dx is not None and dx.numel() and _plain(len(dys), owners, spans, (0, x.shape[0])):
            way, held = _way("bwd", dx, dys, weights, lora_as, masks)
        dropped = any(mask is not None for mask in masks)
        left, copies = None, None
        if way == "border" and held is not None:
            left, copies = _bordered_dys(held, dys)
        for (owner, span), members in _by(zip(owners, spans, strict=True)).items():
            _d_s_and_d_b(
                d_ss, dbs, dys[owner][slice(*span)], members, ss, lora_bs, scalings,
                dx is not None or any(das[j] is not None for j in members),
                None if copies is None else copies[owner],
            )  # fmt: skip
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
        elif dx is not None:
            _frozen_dx(dx, dys, weights)
        for span, members in _by(spans).items():
            rows = slice(*span)
            if dx is not None and not added:
                expand_add(
                    dx[rows], None, _at(d_ss, members), _at(lora_as, members),
                    _at(keep_scales, members), _at(masks, members), transposed=False,
                )  # fmt: skip
            wanted = [j for j in members if das[j] is not None]
            if wanted:
                outer(
                    _at(das, wanted), x[rows], _at(d_ss, wanted), _at(keep_scales, wanted),
                    _at(masks, wanted), transposed=False,
                )  # fmt: skip
    return None


def _frozen_dx(dx: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    torch.mm(dys[0], weights[0], out=dx)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)


def _bordered_dys(held: border.Border, dys: Sequence[Tensor]) -> tuple[Tensor, list[Copy]]:
    """Room for [dY_1 | dY_2 .. | dS_1 | dS_2 ..], and each layer's share of it."""
    left = border.operand(dys[0], dys[0].shape[0], held.width, held.border)
    thin = left[:, held.width :]
    _clear_padding(thin, held.ranks)
    wides = left[:, : held.width].split(list(held.widths), 1)
    places = held.rank_slices()
    return left, [Copy(w, [thin[:, p]]) for w, p in zip(wides, places, strict=True)]


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
) -> None:
    """dS_j and dB_j of one layer's adapters over the rows of dy."""
    first = members[0]
    db = dbs[first]
    both = len(members) == 1 and need_ds
    if both and db is not None and pairs_well(dy, lora_bs[first].shape[1]):
        pair(d_ss[first], db, dy, ss[first], lora_bs[first], float(scalings[first]), copy)
        return
    wanted = [j for j in members if dbs[j] is not None]
    none = [None] * len(members)
    if wanted:
        outer(
            _at(dbs, wanted), dy, _at(ss, wanted), _at(scalings, wanted), none[: len(wanted)],
            transposed=True,
        )  # fmt: skip
    if need_ds:
        shrink(
            _at(d_ss, members), dy, _at(lora_bs, members), _at(scalings, members), none,
            transposed=True, copy=copy,
        )  # fmt: skip


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
            list(_by(spans).values()), transposed=False
        )
    wanted = [j for j, db in enumerate(dbs) if db is not None]
    if wanted:
        chosen = (own_dys, lora_bs, ss, spans, scalings, none)
        Route(*(_at(values, wanted) for values in chosen)).outer(_at(dbs, wanted), transposed=True)
    wanted = [j for j, da in enumerate(das) if da is not None]
    if wanted:
        chosen = ([x] * len(owners), lora_as, d_ss, spans, keep_scales, masks)
        Route(*(_at(values, wanted) for values in chosen)).outer(_at(das, wanted), transposed=False)


def _plain(
    layers: int,
    owners: Sequence[int],
    spans: Sequence[tuple[int, int]],
    whole: tuple[int, int],
) -> bool:
    """One adapter a layer, in order, over all rows."""
    return list(owners) == list(range(layers)) and all(span == whole for span in spans)


def _way(
    direction: str,
    narrow: Tensor,
    wides: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> tuple[str, border.Border | None]:
    """The way of a call, and the border that holds its weights; ``narrow`` is x or dx."""
    ranks = [a.shape[0] for a in lora_as]
    held = border.find(weights, ranks)
    possible = ["expand"]
    if held is not None:
        possible.append("border")
    masked = {mask is not None for mask in masks}
    # That kernel drops the terms of all siblings or of none; forward, the mask is in S already.
    uniform = direction == "fwd" or len(masked) == 1
    if uniform and _lora_gemm.fits([narrow, *wides, *weights]):
        possible.append("gemm")
    tokens, features = narrow.shape
    widths = tuple(w.shape[0] for w in weights)
    shape = ways.Shape(direction, tokens, features, widths, max(ranks), any(masked))
    return ways.pick(config.for_device(narrow.device).name, shape, possible), held


def _clear_padding(thin: Tensor, ranks: Sequence[int]) -> None:
    """The border's columns past the last rank meet zeros, but NaN times zero is NaN."""
    if sum(ranks) < thin.shape[1]:
        thin[:, sum(ranks) :].zero_()


def _by(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Positions of equal keys, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def _at(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def _dense(adapters: Sequence[Tensor]) -> list[Tensor]:
    """Adapters may be views (tied, sliced or transposed); the kernels read rows. Small to copy."""
    return [adapter.contiguous() for adapter in adapters]


def _keep_scales(masks: Sequence[Tensor | None], ps: Sequence[float]) -> list[float]:
    """1 / (1 - p) where there is a mask; with p = 1 everything is dropped, and 0 says so."""
    return [
        1.0 if mask is None else (1.0 / (1.0 - p) if p < 1.0 else 0.0)
        for mask, p in zip(masks, ps, strict=True)
    ]
