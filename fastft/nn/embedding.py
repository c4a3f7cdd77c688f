"""Embeddings: PEFT's LoRA over one, y = scale W[ids] + scale * scaling * A^T[ids] B^T in one
product, and one that is trained itself, whose gradient is summed in float32.

PEFT gathers rows of A^T in float32, multiplies, scales and adds in float32, a pass over a tensor as
wide as the embedding each. Here the gathered rows (r numbers a token) are cast and one library
product adds to the frozen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from torch import Tensor, nn

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.mixed import adapter_names_of
from fastft.nn.rules import LAYER_STATE, Rule, first, odd_scaling, refusal
from fastft.nn.swap import Swapped, call_refusal
from fastft.nn.unmerged import KeepsUnmerged
from fastft.ops._checks import without_autocast

__all__ = ["FusedEmbedding", "FusedLoraEmbedding", "embedding_refusal", "table_refusal"]

_LAYER_RULES = (
    *LAYER_STATE,
    Rule("base layer is no nn.Embedding", lambda m: not isinstance(m.base_layer, nn.Embedding)),
    Rule("tensor parallel embedding", lambda m: bool(m.input_fns or m.output_fns)),
)


class _Adapter:
    def __init__(self, layer: Any, name: str) -> None:
        self.a, self.b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        self.scaling = layer.scaling[name]
        self.variant = type(layer.lora_variant[name]) if name in layer.lora_variant else None


_ADAPTER_RULES = (
    Rule("LoRA variant on an embedding", lambda p: p.variant is not None),
    Rule("scaling is not a plain number", odd_scaling),
)


def _adapters(layer: Any) -> list[_Adapter]:
    return [
        _Adapter(layer, name) for name in layer.active_adapters if name in layer.lora_embedding_A
    ]


def embedding_refusal(layer: Any) -> str | None:
    """Why the layer, as it stands, runs through PEFT; None when it can run fused."""
    return refusal(layer, _LAYER_RULES, _adapters, _ADAPTER_RULES)


class FusedLoraEmbedding(KeepsUnmerged, PeftEmbedding):
    """``peft.tuners.lora.Embedding``, fused; a call that cannot be runs PEFT's own forward."""

    fastft_original = PeftEmbedding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = adapter_names_of(self, kwargs)
        reason = embedding_refusal(self)
        if reason is None and names is not None:
            reason = "mixed batch"
        if reason is None and (args or any(kwargs.values())):
            reason = "arguments passed to the layer"
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            if names is not None:
                kwargs["adapter_names"] = names
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x)
        shape, scale = y.shape, self._get_embed_scale()
        flat = y.reshape(-1, shape[-1])
        # An embedding is no autocast operation: its result stays in the weight's dtype.
        with without_autocast(y.device.type):
            for adapter in _adapters(self):
                thin = self._embed(x, adapter.a.T).reshape(-1, len(adapter.a))
                b = adapter.b.T * float(adapter.scaling)
                if scale is not None:
                    b = b * scale.to(b.dtype)
                flat = torch.addmm(flat, thin.to(y.dtype), b.to(y.dtype))
        return flat.view(shape)


# What the table is.
_TABLE_RULES = (
    Rule("forward replaced on the module itself", lambda m: "forward" in vars(m)),
    Rule("sparse gradients", lambda m: m.sparse),
    Rule("rows renormalised in place (max_norm)", lambda m: m.max_norm is not None),
    Rule("gradients scaled by frequency", lambda m: m.scale_grad_by_freq),
)


def table_refusal(module: nn.Embedding) -> str | None:
    """Why an embedding, as it stands, runs torch's own forward; None when it can run fused."""
    return first(_TABLE_RULES, module)


class FusedEmbedding(Swapped):
    """``torch.nn.Embedding`` by :func:`fastft.ops.embedding`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The operation, or torch's own forward, counted with its reason."""
        reason = table_refusal(self)
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            reason = "arguments passed to the layer"
        reason = reason or call_refusal("embedding", self.weight)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            y: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return y
        return ops.embedding(args[0], self.weight, padding_idx=self.padding_idx)


# PEFT parses the class's name, and its tests and users print it.
FusedLoraEmbedding.__name__ = "Embedding"
