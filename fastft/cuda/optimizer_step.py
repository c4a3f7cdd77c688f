"""CUDA launcher of ``optimizer_step``: one launch for all tensors, one more for their norm."""

from __future__ import annotations

from typing import Any

import torch
from fastft_kernels.multi_tensor import chunks_for, table_for
from torch import Tensor

from fastft import native

__all__ = ["step", "supports"]

# Elements of one thread block; a multiple of 256.
_CHUNK = 8192


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
        native.module().optimizer_step_cuda(
            torch.cuda.current_device(),
            tensors.rule_code,
            table_for(tensors, grads).data_ptr(),
            len(grads),
            chunks.tensor.data_ptr(),
            chunks.part.data_ptr(),
            chunks.count,
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
