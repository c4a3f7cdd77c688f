"""Triton kernels of fastft, one module per operation; they import torch and triton only.

Importing this package imports neither: a kernel module is loaded when its operation first runs.
``config`` holds the launch configurations and ``python -m fastft_kernels.aot`` compiles every
kernel for every architecture on a machine without a GPU.
"""

from __future__ import annotations

__all__ = ["OPS"]

# Operations with a Triton launcher: ``fastft_kernels.<op>``.
OPS: tuple[str, ...] = (
    "lora_linear",
    "linear_cross_entropy",
    "glu",
    "optimizer_step",
    "rms_norm",
    "dora_scale",
    "layer_norm",
    "rope",
    "embedding",
)
