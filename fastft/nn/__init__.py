"""Modules with fused forwards: subclasses of PEFT's own layers, swapped in by class."""

from __future__ import annotations

from fastft.nn.calls import CallCounts, call_counts, reset_call_counts
from fastft.nn.conv import FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d
from fastft.nn.deferred import DeferredLogits
from fastft.nn.embedding import FusedLoraEmbedding
from fastft.nn.head import FusedHead, FusedLoraHead
from fastft.nn.kernel_mapping import kernel_mapping
from fastft.nn.lora import FusedLoraLinear

__all__ = [
    "CallCounts",
    "DeferredLogits",
    "FusedHead",
    "FusedLoraConv1d",
    "FusedLoraConv2d",
    "FusedLoraConv3d",
    "FusedLoraEmbedding",
    "FusedLoraHead",
    "FusedLoraLinear",
    "call_counts",
    "kernel_mapping",
    "reset_call_counts",
]
