"""CUDA launcher of ``optimizer_step``: one launch for all tensors, one more for their norm and one
for those whose codes the kernel knows beforehand."""

from __future__ import annotations

from typing import Any

import torch
from fastft_kernels.multi_tensor import Chunks, chunks_for, table_for, to_device
from torch import Tensor

from fastft import native

__all__ = ["step", "supports", "usual_first"]

# Elements of one thread block; a multiple of 256.
_CHUNK = 8192
# kUsualCodes of csrc/cuda/optimizer_step.cu, and the rules that have a kernel for them.
_USUAL_CODES, _WITH_USUAL = 1 + 4 * 1 + 16 * 1 + 64 * 1, ("adamw", "lion")


def supports(*, device_type: str, dtype: torch.dtype, **facts: object) -> str | None:
    """None where the compiled CUDA kernels can run the call, else the reason why not."""
    if device_type != "cuda":
        return f"runs on CUDA devices, not on {device_type!r}"
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if not native.build_info().get("cuda"):
        return "the compiled module was built without CUDA (no nvcc was found)"
    if dtype not in native.DTYPE_CODES:
        return f"no CUDA kernel for {dtype} parameters"
    return None


def step(
    tensors: Any,
    grads: list[Tensor],
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    needs_norm: bool,
    seed: int,
) -> None:
    """One step over all tensors, in place; see :func:`fastft.ops.optimizer_step`.

    Nothing waits for the GPU: addresses go up through pinned memory, and only when they change.
    """
    with torch.cuda.device(tensors.device):
        chunks = chunks_for(tensors, grads, _CHUNK, 0)
        table = table_for(tensors, grads)
        tensor, part, usual = _ordered(tensors, chunks, table)
        native.module().optimizer_step_cuda(
            torch.cuda.current_device(),
            tensors.rule_code,
            table.data_ptr(),
            len(grads),
            tensor.data_ptr(),
            part.data_ptr(),
            chunks.count,
            usual,
            _CHUNK,
            _codes(tensors).data_ptr() if tensors.state_bits == 8 else 0,
            chunks.partials.data_ptr(),
            tickets=chunks.tickets.data_ptr(),
            hyper=hyper.data_ptr(),
            stats=stats.data_ptr(),
            max_norm=max_norm,
            needs_norm=needs_norm,
            seed=seed,
            stream=torch.cuda.current_stream().cuda_stream,
        )


def _ordered(tensors: Any, chunks: Chunks, table: Tensor) -> tuple[Tensor, Tensor, int]:
    """``usual_first``, once for as long as chunks and codes are the same."""
    known = tensors.launcher_tables.get("usual")
    if known is None or known[0] is not chunks or known[1] is not table:
        known = (chunks, table, usual_first(tensors, chunks, _CHUNK))
        tensors.launcher_tables["usual"] = known
    if torch.cuda.is_current_stream_capturing():  # the graph reads all of it at each replay
        tensors.launcher_tables.setdefault("captured", []).append(known)
    return known[2]  # type: ignore[no-any-return]


def usual_first(tensors: Any, chunks: Chunks, chunk: int) -> tuple[Tensor, Tensor, int]:
    """The tensor of each chunk and its part of that, and how many of them, which come first, belong
    to tensors of usual codes."""
    codes: list[int] = tensors.codes.tolist() if tensors.rule in _WITH_USUAL else []
    usual = [i for i, code in enumerate(codes) if code == _USUAL_CODES]
    parts = [-(-p.numel() // chunk) for p in tensors.params]
    first = sum(parts[i] for i in usual)
    if first in (0, chunks.count):
        return chunks.tensor, chunks.part, first
    others = [i for i, code in enumerate(codes) if code != _USUAL_CODES]
    order = [(i, part) for i in (*usual, *others) for part in range(parts[i])]
    tensor, part = zip(*order, strict=True)
    device = tensors.device
    return to_device(tensor, torch.int32, device), to_device(part, torch.int32, device), first


_held: dict[torch.device, Tensor] = {}


def _codes(tensors: Any) -> Tensor:
    """The codes of 8-bit states as the kernel reads them, once for each device."""
    device = tensors.device
    if device not in _held:
        words = torch.tensor(native.module().dynamic8_words(), dtype=torch.int64)
        host = words.to(torch.int32)  # wraps
        if torch.cuda.is_current_stream_capturing():
            # The copy is made when the graph runs: it is no one's but the graph's.
            host = host.pin_memory()
            own = host.to(device, non_blocking=True)
            tensors.launcher_tables.setdefault("captured", []).append((host, own))
            return own
        _held[device] = host.to(device)  # waits: another stream may read it next
    return _held[device]
