"""What most CPU kernels take."""

from __future__ import annotations

import torch

from fastft import native

__all__ = ["refusal", "supports"]


def refusal(dtypes: dict[str, torch.dtype]) -> str | None:
    """Why no kernel runs: the module is missing, or one of these, named by what has it, is neither
    float32, bfloat16 nor float16."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    for what, dtype in dtypes.items():
        if dtype not in native.DTYPE_CODES:
            return f"{what}{dtype}; the CPU kernels take {', '.join(map(str, native.DTYPE_CODES))}"
    return None


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
    """float32, bfloat16 and float16."""
    return refusal({"": dtype})
