"""Launchers of the CUDA kernels of ``fastft._C``, one module per operation."""

from __future__ import annotations
