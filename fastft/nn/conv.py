"""PEFT's LoRA over convolutions: the library's convolutions, without a float32 copy of the input.

    y = conv(x, W) + bias + scaling * B conv(drop(x), A)

PEFT casts x to the adapter's dtype (float32 by default) and convolves that. Here A is cast to x's
dtype as it is used, and the 1 x 1 product with B adds to y in one pass. A 1 x 1 convolution of a
channels-last input is :func:`fastft.ops.lora_linear` itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.mixed import adapter_names_of
from fastft.nn.rules import ADAPTER_STATE, LAYER_STATE, Rule, hooked, refusal
from fastft.nn.unmerged import KeepsUnmerged
from fastft.ops._checks import autocast_dtype
from fastft.ops._differentiable import transform

__all__ = ["FUSED_CONVS", "FusedLoraConv", "conv_refusal"]

_LAYER_RULES = (
    *LAYER_STATE,
    Rule("grouped convolution", lambda m: m.base_layer.groups != 1),
    Rule(
        "base layer is no plain convolution",
        lambda m: type(m.base_layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    ),
)


class _Adapter:
    """One adapter of a layer."""

    def __init__(self, layer: Any, name: str) -> None:
        self.a, self.b = layer.lora_A[name], layer.lora_B[name]
        self.dropout, self.scaling = layer.lora_dropout[name], layer.scaling[name]
        self.variant = type(layer.lora_variant[name]) if name in layer.lora_variant else None


_ADAPTER_RULES = (
    Rule("LoRA variant on a convolution", lambda p: p.variant is not None),
    Rule("adapter layers are no convolutions", lambda p: not hasattr(p.b, "kernel_size")),
    *ADAPTER_STATE,
    Rule("lora_bias on a convolution", lambda p: p.b.bias is not None),
)


def _adapters(layer: Any) -> list[_Adapter]:
    return [_Adapter(layer, name) for name in layer.active_adapters if name in layer.lora_A]


def conv_refusal(layer: Any) -> str | None:
    """Why the layer, as it stands, runs through PEFT; None when it can run fused."""
    return refusal(layer, _LAYER_RULES, _adapters, _ADAPTER_RULES)


class FusedLoraConv(KeepsUnmerged):
    """Mixin of the fused convolutions; a call that cannot be fused runs PEFT's own forward."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = adapter_names_of(self, kwargs)
        reason = conv_refusal(self)
        if reason is None and names is not None:
            reason = "mixed batch"
        if reason is None and (args or any(kwargs.values())):
            reason = "arguments passed to the layer"
        weight = self.base_layer.weight
        if reason is None and autocast_dtype(x.device.type) is None and x.dtype != weight.dtype:
            reason = "mixed dtypes"
        if reason is None and x.dim() != weight.dim():
            reason = "input without a batch"
        reason = reason or transform()
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            if names is not None:
                kwargs["adapter_names"] = names
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        adapters = _adapters(self)
        if len(adapters) == 1 and _is_product(self.base_layer, adapters[0], x):
            return _product(self.base_layer, adapters[0], x)
        y = self.base_layer(x)
        for adapter in adapters:
            y = _add_term(self, adapter, x, y)
        return y


def _add_term(layer: Any, adapter: _Adapter, x: Tensor, y: Tensor) -> Tensor:
    """y + scaling * B conv(drop(x), A)."""
    a = adapter.a
    s = layer.conv_fn(
        adapter.dropout(x), a.weight.to(x.dtype), None, a.stride, a.padding, a.dilation, a.groups
    ).to(y.dtype)
    b = (adapter.b.weight.flatten(1) * adapter.scaling).to(y.dtype)
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        wide, thin = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (y, s))
        rows = torch.addmm(wide, thin, b.t())
        return rows.view(y.shape[0], *y.shape[2:], y.shape[1]).permute(0, 3, 1, 2)
    return torch.baddbmm(y.flatten(2), b.expand(len(y), *b.shape), s.flatten(2)).view_as(y)


def _is_product(conv: nn.Module, adapter: _Adapter, x: Tensor) -> bool:
    """A 1 x 1 convolution of an input whose channels lie together, which lora_linear takes."""
    a, b = adapter.a.weight, adapter.b.weight
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and not hooked(conv)
        and a.shape[0] <= min(conv.in_channels, conv.out_channels)
        and a.dtype == b.dtype
        and (a.dtype in (x.dtype, torch.float32) or autocast_dtype(x.device.type) is not None)
        and x.dtype != torch.float64  # which autocast leaves as it is
        and (torch.compiler.is_compiling() or _plain(x, conv.weight, a, b))
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _plain(*tensors: Any) -> bool:
    """No tensor subclass, which autograd functions refuse."""
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def _product(conv: Any, adapter: _Adapter, x: Tensor) -> Tensor:
    p = adapter.dropout.p if isinstance(adapter.dropout, nn.Dropout) else 0.0
    y = ops.lora_linear(
        x.permute(0, 2, 3, 1),
        conv.weight.flatten(1),
        adapter.a.weight.flatten(1),
        adapter.b.weight.flatten(1),
        scaling=float(adapter.scaling),
        bias=conv.bias,
        dropout_p=p if adapter.dropout.training else 0.0,
    )
    return y.permute(0, 3, 1, 2)


class FusedLoraConv1d(FusedLoraConv, Conv1d):
    """``peft.tuners.lora.Conv1d``, fused."""

    fastft_original = Conv1d


class FusedLoraConv2d(FusedLoraConv, Conv2d):
    """``peft.tuners.lora.Conv2d``, fused."""

    fastft_original = Conv2d


class FusedLoraConv3d(FusedLoraConv, Conv3d):
    """``peft.tuners.lora.Conv3d``, fused."""

    fastft_original = Conv3d


# PEFT's class -> ours, under PEFT's name, which it parses.
FUSED_CONVS: dict[type, Any] = {
    fused.fastft_original: fused for fused in (FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d)
}
for _original, _class in FUSED_CONVS.items():
    _class.__name__ = _original.__name__
