"""Sharded parameters (DTensor, as FSDP2 makes them): the part here, its place, a norm over all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "aligned",
    "any_sharded",
    "global_norm",
    "is_sharded",
    "like_param",
    "local",
    "shard_offset",
]


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any is a DTensor."""
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient sharded as its parameter is: tensor parallelism leaves sums yet to be made."""
    if not is_sharded(param) or grad.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined,no-any-return]


def like_param(part: Tensor, param: Tensor) -> Tensor:
    """``part``, made for the local part of ``param``, as a DTensor where that is one: so that
    torch.distributed.checkpoint saves and re-shards it with the parameter."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False,  # type: ignore[attr-defined]
        shape=param.shape, stride=param.stride(),
    )  # fmt: skip


def shard_offset(param: Tensor) -> int:
    """Where the first element of the part here lies in the whole parameter; exact for parameters
    sharded along their first dimension, as FSDP2 does, else distinct for each shard."""
    if not is_sharded(param):
        return 0
    offset, rows = 0, param.shape[0] if param.dim() else 1
    row = math.prod(param.shape[1:])
    for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if not _splits(placement):
            continue
        rank = param.device_mesh.get_local_rank(dim)  # type: ignore[attr-defined]
        if placement.dim != 0 or type(placement).__name__ != "Shard":
            offset += rank * param.numel()
            continue
        # torch.chunk's rule: all parts but the last are of ceil(rows / parts).
        part = -(-rows // param.device_mesh.size(dim))  # type: ignore[attr-defined]
        first = min(rank * part, rows)
        offset, rows = offset + first * row, min(part, rows - first)
    return offset


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, 0-dim, over devices and shards; nothing waits for it."""
    norms = [
        torch.linalg.vector_norm(local(g), dtype=torch.promote_types(g.dtype, torch.float32))
        for g in grads
    ]
    sums: dict[tuple[object, ...], tuple[Tensor, list[object]]] = {}
    for g, norm in zip(grads, norms, strict=True):
        groups = _sharding_groups(g)
        key = (norm.device, *map(id, groups))
        square = norm.square()
        sums[key] = (sums[key][0] + square if key in sums else square, groups)
    total: Tensor | None = None
    for square, groups in sums.values():
        for group in groups:
            torch.distributed.all_reduce(square, group=group)  # type: ignore[arg-type]
        total = square if total is None else total + square.to(total.device, total.dtype)
    nothing = torch.zeros((), dtype=torch.float32, device="cpu")
    return nothing if total is None else total.sqrt()


def _sharding_groups(grad: Tensor) -> list[object]:
    if not is_sharded(grad):
        return []
    return [
        grad.device_mesh.get_group(dim)  # type: ignore[attr-defined]
        for dim, placement in enumerate(grad.placements)  # type: ignore[attr-defined]
        if _splits(placement)
    ]


def _splits(placement: Any) -> bool:
    """Whether a placement cuts a tensor up: Shard, and FSDP2's own kind over tensor parallelism."""
    return not placement.is_replicate() and not placement.is_partial()
