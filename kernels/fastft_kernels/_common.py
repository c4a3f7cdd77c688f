"""What every Triton launcher needs: the device guard and the shared support predicate."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton

__all__ = ["INTERPRETED", "device_guard", "supports_device"]

# Triton decides at decoration time, so this cannot change while the process lives.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_OLDEST_CAPABILITY = (8, 0)
_AS_IT_IS = contextlib.nullcontext()


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, so that Triton launches on its current stream.
    Mostly it is already: torch's own context costs more than to ask."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


@functools.cache
def supports_device(device_type: str) -> str | None:
    """None where the kernels of this package can run, else the reason why not."""
    if INTERPRETED:
        known = device_type in ("cpu", "cuda")
        return None if known else f"Triton's interpreter does not run {device_type!r} tensors"
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type!r}"
    if torch.version.hip is not None:
        return "the launch configurations are for NVIDIA GPUs; this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST_CAPABILITY:
        return "needs compute capability 8.0 or newer, this GPU has {}.{}".format(*capability)
    return None
