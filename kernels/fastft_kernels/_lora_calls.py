"""What both directions of ``fastft_kernels.lora_linear`` ask of a call: its way, its adapters by
their rows, its scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastft_kernels import _lora_gemm, border, lora_config, ways

__all__ = ["POSSIBLE", "GluPair", "at", "by", "choose_way", "dense", "plain", "scales_kept"]


@dataclass(frozen=True)
class GluPair:
    """What a gated unit's backward has made of the two layers before it, in their order.

    dys: (M, N) each, columns of ``left`` where there is one: [dY_0 | dY_1 | dS_0 | dS_1], the
    bordered operand of dx. d_ss: (M, r) each. dbs: (N, r) each.
    """

    dys: list[Tensor]
    d_ss: list[Tensor]
    dbs: list[Tensor]
    left: Tensor | None


def plain(
    layers: int,
    owners: Sequence[int],
    spans: Sequence[tuple[int, int]],
    whole: tuple[int, int],
) -> bool:
    """One adapter a layer, in order, over all rows."""
    return spans.count(whole) == len(spans) and list(owners) == list(range(layers))


def choose_way(
    direction: str,
    narrow: Tensor,
    wides: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> tuple[str, border.Border | None]:
    """The way of a call, and the border that holds its weights; ``narrow`` is x or dx. direction:
    see ``ways.Shape``."""
    ranks = tuple([a.shape[0] for a in lora_as])
    held = border.find(weights, ranks)
    tokens, features = narrow.shape
    dropout = [mask for mask in masks if mask is not None]
    # That kernel drops the terms of all siblings or of none; forward, the mask is in S already.
    uniform = direction == "fwd" or len(dropout) in (0, len(masks))
    shape = ways.Shape(
        direction, tokens, features, tuple([w.shape[0] for w in weights]), max(ranks), bool(dropout)
    )
    arch = lora_config.for_device(narrow.device)
    possible = POSSIBLE[held is not None, uniform and arch.gemm is not None]
    way = ways.pick(arch.name, shape, possible)
    # What that kernel's tensors must be is asked where it is wanted: of each, it takes a while.
    if way == "gemm" and not _lora_gemm.fits([narrow, *wides, *weights]):
        way = ways.pick(arch.name, shape, POSSIBLE[held is not None, False])
    return way, held


# By whether there is a border, and whether the persistent product may serve.
POSSIBLE = {
    (False, False): ("expand",),
    (True, False): ("expand", "border"),
    (False, True): ("expand", "gemm"),
    (True, True): ("expand", "border", "gemm"),
}


def by(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Positions of equal keys, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def at(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def dense(adapters: Sequence[Tensor]) -> list[Tensor]:
    """Adapters may be views (tied, sliced or transposed); the kernels read rows. Small to copy."""
    return [adapter.contiguous() for adapter in adapters]


def scales_kept(masks: Sequence[Tensor | None], ps: Sequence[float]) -> list[float]:
    """1 / (1 - p) where there is a mask; with p = 1 everything is dropped, and 0 says so."""
    return [
        1.0 if mask is None else (1.0 / (1.0 - p) if p < 1.0 else 0.0)
        for mask, p in zip(masks, ps, strict=True)
    ]
