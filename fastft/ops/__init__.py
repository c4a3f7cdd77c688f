"""Fused operations: one file each, checked once, differentiable, usable under torch.compile."""

from __future__ import annotations

from fastft.ops.adafactor_step import FactoredTensors, adafactor_step
from fastft.ops.attention import scaled_dot_product_attention
from fastft.ops.dora_scale import dora_norm, dora_scale, squared_row_norms
from fastft.ops.embedding import embedding
from fastft.ops.glu import glu
from fastft.ops.layer_norm import layer_norm
from fastft.ops.linear_cross_entropy import Shard, TokenStatistics, linear_cross_entropy
from fastft.ops.linear_divergence import Teacher, divergence, linear_divergence
from fastft.ops.lora_add import lora_add, lora_add_siblings
from fastft.ops.lora_grouped_linear import lora_grouped_linear
from fastft.ops.lora_linear import lay_out_weights, lora_linear, lora_linear_siblings
from fastft.ops.optimizer_step import StepTensors, new_stats, optimizer_step
from fastft.ops.rms_norm import rms_norm
from fastft.ops.rope import rope

__all__ = [
    "FactoredTensors",
    "Shard",
    "StepTensors",
    "Teacher",
    "TokenStatistics",
    "adafactor_step",
    "divergence",
    "dora_norm",
    "dora_scale",
    "embedding",
    "glu",
    "lay_out_weights",
    "layer_norm",
    "linear_cross_entropy",
    "linear_divergence",
    "lora_add",
    "lora_add_siblings",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_siblings",
    "new_stats",
    "optimizer_step",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "squared_row_norms",
]
