"""CUDA launcher of ``adamw``: three launches for all tensors of a step, whatever their dtypes."""

from __future__ import annotations

import torch
from fastft_kernels.multi_tensor import plan_for
from torch import Tensor

from fastft import native

__all__ = ["step", "supports"]

# Elements of one thread block.
_CHUNK = 8192


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
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
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float,
    maximize: bool,
) -> None:
    """One step over all tensors, in place; see :func:`fastft.ops.adamw` for the formula.

    Nothing waits for the GPU: addresses go up through pinned memory, and only when they change.
    """
    if not params:
        stats[:2] = torch.tensor([0.0, 1.0])
        return
    device = params[0].device
    with torch.cuda.device(device):
        plan = plan_for(params, grads, exp_avgs, exp_avg_sqs, _CHUNK)
        native.module().adamw_cuda(
            torch.cuda.current_device(),
            plan.addresses.data_ptr(),
            plan.sizes.data_ptr(),
            plan.dtypes.data_ptr(),
            plan.chunk_tensor.data_ptr(),
            plan.chunk_part.data_ptr(),
            len(params),
            plan.n_chunks,
            _CHUNK,
            plan.partials.data_ptr(),
            plan.scalars.data_ptr(),
            steps.data_ptr(),
            hyper.data_ptr(),
            stats.data_ptr(),
            max_norm,
            maximize,
            torch.cuda.current_stream().cuda_stream,
        )
