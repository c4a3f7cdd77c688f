"""The backward of ``lora_linear``, from a launcher or as torch operations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.ops._checks import without_autocast
from fastft.ops._differentiable import plain_gradients
from fastft.ops._lora_linear_call import Constants, cast, choose, pairs_of
from fastft.ops._room import empty_like
from fastft.reference.lora_linear import lora_term

__all__ = [
    "backward_of",
    "differentiable_backward",
    "gradients",
    "gradients_of",
    "plain_products",
    "with_terms",
]


def backward_of(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
    spans: Sequence[int],
    backend: str,
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    made: Any = None,
    scaled: Any = None,
    launcher: Any = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, dAs and dBs, from the launcher; of these ``made`` has the dBs already (``_glu_pair``).
    scaled: the scales, results and room for the d_scales of a scaled call."""
    dx = empty_like(x) if need_dx else None
    das = [torch.empty_like(a) if need else None for a, need in zip(lora_as, need_da, strict=True)]
    needed = zip(lora_bs, need_db, strict=True)
    dbs = [torch.empty_like(b) if need and made is None else None for b, need in needed]
    with without_autocast(x.device.type):
        (launcher or choose(backend, x, lora_as)[1]).bwd(
            dx,
            das,
            dbs,
            [dy.contiguous() for dy in dys] if made is None else list(dys),
            x,
            list(ss),
            cast(weights, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
            list(owners),
            pairs_of(spans),
            **({} if made is None else {"made": made}),
            **({} if scaled is None else {"scaled": scaled}),
        )
    return dx, das, dbs if made is None else list(made.dbs)


# Whether what ``Constants.split`` gives is one a layer, or one an adapter.
_BY_LAYER = (True, True, False, False, False, True, False, True)


def gradients(
    constants: Constants,
    x: Tensor,
    saved: list[Sequence[Any]],
    dys: Sequence[Any],
    need_dx: bool,
    asked: list[Sequence[bool]],
    made: Any = None,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx, and the gradients of weights, biases, lora_as, lora_bs, masks and scales."""
    weights, biases, lora_as, lora_bs, masks, scales, ss, results = saved
    need_w, need_bias, need_a, need_b, _, need_scale, *_ = asked
    room = zip(scales, need_scale, strict=True)
    d_scales = [torch.empty_like(s) if need else None for s, need in room]
    dx, das, dbs = backward_of(
        dys,
        x,
        ss,
        weights,
        lora_as,
        lora_bs,
        masks,
        *constants.rest(),
        need_dx,
        need_a,
        need_b,
        made,
        (scales, results, d_scales) if constants.scaled else None,
        constants.launcher,
    )
    dws = [(dy.t() @ x).to(w.dtype) if k else None for dy, w, k in zip(dys, weights, need_w)]
    dbiases = [dy.sum(0).to(b.dtype) if k else None for dy, b, k in zip(dys, biases, need_bias)]
    return dx, [dws, dbiases, das, dbs, [None] * len(masks), d_scales]


def gradients_of(
    layers: list[int],
    constants: Constants,
    x: Tensor,
    saved: list[Sequence[Any]],
    dys: Sequence[Any],
    need_dx: bool,
    asked: list[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """``gradients`` where only these layers have been reached by one: the others have none."""
    own, members = constants.part(layers)

    def chosen(values: list[Sequence[Any]]) -> list[Sequence[Any]]:
        places = [layers if by_layer else members for by_layer in _BY_LAYER]
        # Of a call without scales there are none, of one without results neither.
        return [[v[i] for i in at] if v else v for v, at in zip(values, places)]

    dx, parts = gradients(own, x, chosen(saved), [dys[i] for i in layers], need_dx, chosen(asked))
    every = []
    for part, whole, by_layer in zip(parts, saved, _BY_LAYER):
        found = dict(zip(layers if by_layer else members, part))
        every.append([found.get(i) for i in range(len(whole))])
    return dx, every


def differentiable_backward(
    constants: Constants,
    x: Tensor,
    tensors: Sequence[Any],
    dys: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward as torch operations: of x and the first of the saved tensors, as ``needs`` has
    them."""
    inputs = [x, *tensors][: len(needs)]
    return plain_gradients(functools.partial(_again, constants), inputs, needs, dys)


def _again(constants: Constants, x: Tensor, *tensors: Any) -> list[Tensor]:
    """The results as torch operations."""
    *operands, scales, _, _ = constants.split(tensors)
    ys = plain_products(constants, x, *operands)
    for i, scale in enumerate(scales):
        if scale is not None:
            ys[i] = (ys[i] * scale).to(x.dtype)
    return ys


def plain_products(
    constants: Constants,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """The results without scales, as torch operations."""
    ys = [
        torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for w, bias in zip(weights, biases, strict=True)
    ]
    return with_terms(constants, ys, x, lora_as, lora_bs, masks)


def with_terms(
    constants: Constants,
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """ys and the terms of their adapters, as torch operations."""
    sums = list(ys)
    for j, owner in enumerate(constants.owners):
        rows, p = constants.rows(j), constants.dropout_ps[j]
        term = lora_term(x[rows], lora_as[j], lora_bs[j], constants.scalings[j], masks[j], p)
        around = (0, 0, rows.start, x.shape[0] - rows.stop)
        sums[owner] = sums[owner] + torch.nn.functional.pad(term, around)
    return sums
