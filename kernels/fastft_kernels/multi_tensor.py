"""Device tables that let one launch update any number of tensors; torch only, no Triton.

Each program takes one chunk: (tensor, part of the tensor). The list of chunks is made once for the
tensors of a step and kept with them; the table of addresses is copied again only when one has
changed, through pinned memory, so that the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Chunks", "Group", "chunks_for", "table_for", "to_device", "upload"]

# Columns of the table of a step that kernels here read; csrc/include/fastft/optimizer.h has all.
COLUMNS = {"param": 0, "grad": 1, "state1": 2, "state2": 3, "step": 7, "numel": 8}


@dataclass(frozen=True)
class Group:
    """Consecutive chunks whose tensors share parameter and gradient dtype."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    first_chunk: int
    n_chunks: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of the tensors of a step, and scratch for it."""

    groups: tuple[Group, ...]
    count: int
    tensor: Tensor  # int32 (chunks,): index of the tensor
    part: Tensor  # int32 (chunks,): the chunk starts at part * chunk elements
    partials: Tensor  # float32 (chunks,): of the norm
    tickets: Tensor  # int32 (2,): zero before a launch and after it
    scalars: Tensor  # float32 (n, n_scalars)


def chunks_for(tensors: Any, grads: Sequence[Tensor], chunk: int, n_scalars: int) -> Chunks:
    """The chunks of ``fastft.ops.StepTensors``, cached there."""
    dtypes = [g.dtype for g in grads]
    found = tensors.launcher_tables.get(("chunks", chunk, n_scalars))
    if found is None or found[0] != dtypes:
        found = (dtypes, _build(tensors, dtypes, chunk, n_scalars))
        tensors.launcher_tables["chunks", chunk, n_scalars] = found
    return found[1]


def _build(tensors: Any, dtypes: Sequence[torch.dtype], chunk: int, n_scalars: int) -> Chunks:
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, grad_dtype) in enumerate(zip(tensors.params, dtypes, strict=True)):
        by_dtype.setdefault((p.dtype, grad_dtype), []).append(i)
    groups: list[Group] = []
    tensor_of: list[int] = []
    part_of: list[int] = []
    for (param_dtype, grad_dtype), members in by_dtype.items():
        first = len(tensor_of)
        for i in members:
            parts = -(-tensors.params[i].numel() // chunk)
            tensor_of += [i] * parts
            part_of += range(parts)
        groups.append(Group(param_dtype, grad_dtype, first, len(tensor_of) - first))
    device, count = tensors.device, len(tensor_of)
    return Chunks(
        groups=tuple(g for g in groups if g.n_chunks),
        count=count,
        tensor=to_device(tensor_of, torch.int32, device),
        part=to_device(part_of, torch.int32, device),
        partials=torch.empty(max(count, 1), dtype=torch.float32, device=device),
        tickets=torch.zeros(2, dtype=torch.int32, device=device),
        scalars=torch.empty((len(dtypes), n_scalars), dtype=torch.float32, device=device),
    )


def table_for(tensors: Any, grads: Sequence[Tensor]) -> Tensor:
    """The table of addresses on the tensors' device, copied where anything has changed."""
    host, changed = tensors.table(grads)
    tables = tensors.launcher_tables
    captured = tensors.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured and "table" in tables:
        tables.setdefault("captured", []).append(tables["table"])
    if changed or "table" not in tables:
        if captured:
            # A graph copies from this memory, to that, whenever it is replayed: both stay.
            host = host.pin_memory()
            tables["table"] = host.to(tensors.device, non_blocking=True)
            tables.setdefault("captured", []).append((host, tables["table"]))
            tensors.forget()  # written when the graph runs, not yet
        else:
            tables["table"] = upload(host, tensors.device)
    return tables["table"]


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on ``device``; the host does not wait for the copy."""
    return upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``; the host does not wait for the copy."""
    # Pinned memory from torch's caching allocator is not reused before the copy has run.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
