"""Device tables that let one launch update any number of tensors; torch only, no Triton.

A plan holds, for a list of parameters: their addresses and those of gradients and states, their
sizes, and a list of chunks (tensor, part of the tensor) of which each program takes one. It is
cached: shapes make the chunk list, and the addresses are copied again only when one has changed.
The copy goes through pinned memory, so the host never waits for the device.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["N_SCALARS", "Group", "Plan", "plan_for", "to_device"]

# Numbers kept for each tensor between the kernels of one step; the order is AdamWScalars' in
# csrc/include/fastft/adamw.h, less the gradient scale.
N_SCALARS = 8

# Plans kept: one for each optimizer and device that is in use at the same time.
_MAX_PLANS = 8
_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Consecutive chunks whose tensors share parameter and gradient dtype."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    first_chunk: int
    n_chunks: int


@dataclass
class Plan:
    """Tables of one list of tensors; ``addresses`` changes with the tensors, the rest does not."""

    device: torch.device
    groups: tuple[Group, ...]
    n_chunks: int
    sizes: Tensor  # int64 (n,): elements
    dtypes: Tensor  # int32 (n,): 4 * code of the parameter's dtype + code of the gradient's
    chunk_tensor: Tensor  # int32 (chunks,): index of the tensor
    chunk_part: Tensor  # int32 (chunks,): the chunk starts at part * chunk elements
    partials: Tensor  # float32 (chunks,): scratch of the norm
    scalars: Tensor  # float32 (n, N_SCALARS): scratch
    addresses: Tensor | None = None  # int64 (4, n): params, grads, exp_avgs, exp_avg_sqs
    aligned: bool = False
    host_addresses: tuple[int, ...] = field(default=(), repr=False)


_plans: collections.OrderedDict[tuple[object, ...], Plan] = collections.OrderedDict()

# The codes of csrc/include/fastft/numeric.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def plan_for(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    chunk: int,
) -> Plan:
    """The plan of these tensors (at least one, all on one device), cached."""
    device = params[0].device
    key = (
        device,
        chunk,
        tuple((p.numel(), p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)),
    )
    plan = _plans.pop(key, None)
    if plan is None:
        plan = _build(device, params, grads, chunk)
    _plans[key] = plan
    if len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    addresses = tuple(
        t.data_ptr() for tensors in (params, grads, exp_avgs, exp_avg_sqs) for t in tensors
    )
    if addresses != plan.host_addresses:
        table = to_device(addresses, torch.int64, device)
        plan.addresses = table.view(4, len(params))
        plan.aligned = all(address % _ALIGNMENT == 0 for address in addresses)
        plan.host_addresses = addresses
    return plan


def _build(
    device: torch.device, params: Sequence[Tensor], grads: Sequence[Tensor], chunk: int
) -> Plan:
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        by_dtype.setdefault((p.dtype, g.dtype), []).append(i)
    groups, tensor_of, part_of = [], [], []
    for (param_dtype, grad_dtype), members in by_dtype.items():
        first = len(tensor_of)
        for i in members:
            parts = -(-params[i].numel() // chunk)
            tensor_of += [i] * parts
            part_of += range(parts)
        groups.append(Group(param_dtype, grad_dtype, first, len(tensor_of) - first))
    n, n_chunks = len(params), len(tensor_of)
    codes = [
        4 * _DTYPE_CODES[p.dtype] + _DTYPE_CODES[g.dtype]
        for p, g in zip(params, grads, strict=True)
    ]
    return Plan(
        device=device,
        groups=tuple(groups),
        n_chunks=n_chunks,
        sizes=to_device([p.numel() for p in params], torch.int64, device),
        dtypes=to_device(codes, torch.int32, device),
        chunk_tensor=to_device(tensor_of, torch.int32, device),
        chunk_part=to_device(part_of, torch.int32, device),
        partials=torch.empty(max(n_chunks, 1), dtype=torch.float32, device=device),
        scalars=torch.empty((n, N_SCALARS), dtype=torch.float32, device=device),
    )


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on ``device``; the host does not wait for the copy."""
    host = torch.tensor(values, dtype=dtype)
    # Pinned memory from torch's caching allocator is not reused before the copy has run.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
