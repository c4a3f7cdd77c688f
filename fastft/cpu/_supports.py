"""What most CPU kernels take."""

from __future__ import annotations

import torch

from fastft import native

__all__ = ["supports"]


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
    """float32, bfloat16 and float16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype not in native.DTYPE_CODES:
        return f"{dtype}; the CPU kernels take {', '.join(map(str, native.DTYPE_CODES))}"
    return None
