"""CUDA launcher of ``optimizer_step``: one launch for all tensors, one more for their norm and one
for those whose codes the kernel knows beforehand."""

from __future__ import annotations

from typing import Any

import torch
from fastft_kernels.multi_tensor import Chunks, chunks_for, table_for
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
        tensor, part, usual = _ordered(tensors, chunks)
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


def _ordered(tensors: Any, chunks: Chunks) -> tuple[Tensor, Tensor, int]:
    """The tensor of each chunk, its part of that, and how many chunks, which come first, belong to
    tensors of usual codes."""
    if tensors.state_bits != 8 or tensors.rule not in _WITH_USUAL:
        return chunks.tensor, chunks.part, 0
    tables, codes = tensors.launcher_tables, tensors.codes.tolist()
    known = tables.get("usual")
    capturing = torch.cuda.is_current_stream_capturing()
    if known is None or known[0] is not chunks or known[1] != codes:
        order, first = usual_first(tensors, _CHUNK)
        host = order.pin_memory()
        placed = host.to(tensors.device, non_blocking=True)
        known = (chunks, codes, placed, first, host)
        if not capturing:  # else copied when the graph runs, not yet
            tables["usual"] = known
    if capturing:  # the graph reads all of it at each replay
        tables.setdefault("captured", []).append(known)
    return known[2][0], known[2][1], known[3]


def usual_first(tensors: Any, chunk: int) -> tuple[Tensor, int]:
    """int32 (2, chunks), on the CPU: the tensor of each chunk and its part of that, those of usual
    codes first; and how many these are."""
    usual = tensors.codes == _USUAL_CODES
    sizes = [-(-p.numel() // chunk) for p in tensors.params]
    parts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    order = torch.cat([usual.nonzero(), (~usual).nonzero()]).flatten()
    parts = parts[order]
    begins = parts.cumsum(0) - parts
    part = torch.arange(int(parts.sum()), device="cpu") - begins.repeat_interleave(parts)
    found = torch.stack([order.repeat_interleave(parts), part]).to(torch.int32)
    return found, int(parts[: int(usual.sum())].sum())


_held: dict[torch.device, Tensor] = {}


def _codes(tensors: Any) -> Tensor:
    """The codes of 8-bit states as the kernel reads them, once for each device."""
    device = tensors.device
    if device not in _held:
        words = torch.tensor(native.module().dynamic8_words(), dtype=torch.int64, device="cpu")
        host = words.to(torch.int32)  # wraps
        if torch.cuda.is_current_stream_capturing():
            # The copy is made when the graph runs: it is no one's but the graph's.
            host = host.pin_memory()
            own = host.to(device, non_blocking=True)
            tensors.launcher_tables.setdefault("captured", []).append((host, own))
            return own
        _held[device] = host.to(device)  # waits: another stream may read it next
    return _held[device]
