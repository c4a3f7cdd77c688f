"""PEFT's LoRA layer over ``nn.Linear`` (or GPT-2's ``Conv1D``), its forward one operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastft import backends, ops
from fastft.nn import siblings
from fastft.nn.calls import count
from fastft.ops._checks import autocast_dtype

__all__ = ["CALL_RULES", "MODULE_RULES", "FusedLoraLinear", "module_refusal"]


@dataclass(frozen=True)
class Rule:
    """A condition under which a layer runs through PEFT's own forward, and what to call it."""

    reason: str
    applies: Callable[..., bool]


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _adapter(layer: PeftLinear) -> str | None:
    """The one active adapter that has weights here; None unless it is exactly one."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 else None


def _variant(layer: PeftLinear) -> type | None:
    """The class of the active adapter's variant; None for plain LoRA."""
    variant = layer.lora_variant.get(_adapter(layer))
    return None if variant is None else type(variant)


def _is_dora(layer: PeftLinear) -> bool:
    return _variant(layer) is DoraLinearVariant


def _magnitude(layer: PeftLinear) -> Any:
    return layer.lora_magnitude_vector[_adapter(layer)]


def _dropout_p(layer: PeftLinear) -> float:
    return getattr(layer.lora_dropout[_adapter(layer)], "p", 0.0)


def _too_large(layer: PeftLinear) -> bool:
    a, b = layer.lora_A[_adapter(layer)].weight, layer.lora_B[_adapter(layer)].weight
    return a.shape[0] > min(a.shape[1], b.shape[0])


def _odd_dropout(layer: PeftLinear) -> bool:
    dropout = layer.lora_dropout[_adapter(layer)]
    if type(dropout) is nn.Dropout:
        return dropout.p >= 1.0 or _hooked(dropout)
    return type(dropout) is not nn.Identity


def _odd_scaling(layer: PeftLinear) -> bool:
    scaling = layer.scaling[_adapter(layer)]
    if isinstance(scaling, Tensor):
        return scaling.numel() != 1 or scaling.requires_grad
    return not isinstance(scaling, (int, float))


# What the layer is. The order matters: a rule may rely on the ones above it having not applied.
MODULE_RULES: tuple[Rule, ...] = (
    Rule("forward replaced on the layer itself", lambda m: "forward" in vars(m)),
    Rule("adapters disabled", lambda m: m.disable_adapters),
    Rule("adapter merged into the base", lambda m: m.merged),
    Rule("base layer is no nn.Linear", lambda m: type(m.base_layer) not in (nn.Linear, Conv1D)),
    Rule("hooks on the base layer", lambda m: _hooked(m.base_layer)),
    Rule("no active adapter", lambda m: not any(n in m.lora_A for n in m.active_adapters)),
    Rule("several active adapters", lambda m: _adapter(m) is None),
    Rule("LoRA variant other than DoRA", lambda m: _variant(m) not in (None, DoraLinearVariant)),
    Rule("DoRA with dropout", lambda m: _is_dora(m) and m.training and _dropout_p(m) > 0),
    Rule("DoRA with lora_bias", lambda m: _is_dora(m) and m.lora_B[_adapter(m)].bias is not None),
    Rule("hooks on the magnitude", lambda m: _is_dora(m) and _hooked(_magnitude(m))),
    Rule(
        "adapter layers are not nn.Linear",
        lambda m: (
            type(m.lora_A[_adapter(m)]) is not nn.Linear
            or type(m.lora_B[_adapter(m)]) is not nn.Linear
        ),
    ),
    Rule(
        "hooks on the adapter",
        lambda m: _hooked(m.lora_A[_adapter(m)]) or _hooked(m.lora_B[_adapter(m)]),
    ),
    Rule("r larger than the layer's features", _too_large),
    Rule("dropout of another kind", _odd_dropout),
    Rule("scaling is not a plain number", _odd_scaling),
)


def _plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _foreign_tensors(layer: PeftLinear, x: Any) -> bool:
    a, b = layer.lora_A[_adapter(layer)].weight, layer.lora_B[_adapter(layer)].weight
    if torch.compiler.is_compiling():  # torch.compile shows its own tensors in their place
        return False
    return not all(_plain(t) for t in (x, layer.base_layer.weight, a, b))


def _transformed(layer: PeftLinear, x: Any) -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def _several_devices(layer: PeftLinear, x: Tensor) -> bool:
    a, b = layer.lora_A[_adapter(layer)].weight, layer.lora_B[_adapter(layer)].weight
    return not x.device == layer.base_layer.weight.device == a.device == b.device


def _mixed_dtypes(layer: PeftLinear, x: Tensor) -> bool:
    a, b = layer.lora_A[_adapter(layer)].weight, layer.lora_B[_adapter(layer)].weight
    weight = layer.base_layer.weight
    if not weight.is_floating_point() or a.dtype != b.dtype:
        return True
    if autocast_dtype(x.device.type) is not None:
        return False
    return x.dtype != weight.dtype or a.dtype not in (x.dtype, torch.float32)


# What the call is.
CALL_RULES: tuple[Rule, ...] = (
    Rule("torch.func transform", _transformed),
    Rule("tensor subclass", _foreign_tensors),
    Rule("input has no dimension", lambda m, x: x.dim() == 0),
    Rule("several devices", _several_devices),
    Rule("mixed dtypes", _mixed_dtypes),
)


def module_refusal(layer: PeftLinear) -> str | None:
    """Why the layer, as it stands, runs through PEFT; None when it can run fused."""
    return next((rule.reason for rule in MODULE_RULES if rule.applies(layer)), None)


class FusedLoraLinear(PeftLinear):
    """``peft.tuners.lora.Linear`` whose forward is :func:`fastft.ops.lora_linear`.

    Made by swapping the class of an existing layer, so parameters, state-dict keys, merging,
    saving and deep copies are PEFT's. A call that cannot be fused runs PEFT's own forward and is
    counted with its reason.
    """

    fastft_original = PeftLinear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self._refusal(x, args, kwargs)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self.fused_call([self], x)[0]
        return siblings.forward(self, x)

    def _refusal(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or any(value is not None for value in kwargs.values()):
            named = "adapter_names" if kwargs.get("adapter_names") is not None else "arguments"
            return f"{named} passed to the layer"
        reason = module_refusal(self)
        if reason is not None:
            return reason
        for rule in CALL_RULES:
            if rule.applies(self, x):
                return rule.reason
        if torch.compiler.is_compiling():  # the operation chooses when the graph runs
            return None
        adapter = self.lora_A[_adapter(self)].weight
        chosen, _ = backends.select(
            "lora_linear",
            device_type=x.device.type,
            dtype=autocast_dtype(x.device.type) or x.dtype,
            adapter_dtype=adapter.dtype,
            r=adapter.shape[0],
        )
        return "no fused backend for this device and dtype" if chosen == "reference" else None

    def fused_call(self, layers: list[FusedLoraLinear], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of ``layers``, which share x, in one operation; DoRA scales its own after."""
        ys = ops.lora_linear_siblings(x, **_arguments(layers))
        return tuple(
            _dora(layer, y) if _is_dora(layer) else y for layer, y in zip(layers, ys, strict=True)
        )


# PEFT parses the class's name, and its tests and users print it.
FusedLoraLinear.__name__ = "Linear"


def _weight(layer: PeftLinear) -> Tensor:
    """The frozen matrix (out_features, in_features); GPT-2's Conv1D holds its transpose."""
    weight = layer.base_layer.weight
    return weight.t() if type(layer.base_layer) is Conv1D else weight


def _bias(layer: PeftLinear, name: str | None) -> Tensor | None:
    """base bias + scaling * adapter bias (``lora_bias=True``), which gets its gradient; None under
    DoRA, which adds the bias after its scale."""
    if _is_dora(layer):
        return None
    base, own = layer.base_layer.bias, layer.lora_B[name].bias
    if own is None:
        return base
    own = own * float(layer.scaling[name])
    return (own if base is None else base + own).to(layer.base_layer.weight.dtype)


def _dora(layer: PeftLinear, z: Tensor) -> Tensor:
    """The magnitude over the product z, which has no bias yet."""
    name = _adapter(layer)
    norm = ops.dora_norm(
        _weight(layer),
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        float(layer.scaling[name]),
    )
    bias = layer.base_layer.bias
    scale = _magnitude(layer).weight.to(norm.dtype) / norm
    return ops.dora_scale(z, scale, None if bias is None else bias.to(z.dtype))


def _arguments(layers: list[FusedLoraLinear]) -> dict[str, Any]:
    names = [_adapter(layer) for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    dropouts = [layer.lora_dropout[name] for layer, name in pairs]
    return {
        "weights": [_weight(layer) for layer in layers],
        "biases": [_bias(layer, name) for layer, name in pairs],
        "lora_as": [layer.lora_A[name].weight for layer, name in pairs],
        "lora_bs": [layer.lora_B[name].weight for layer, name in pairs],
        "scalings": [float(layer.scaling[name]) for layer, name in pairs],
        "dropout_ps": [
            float(d.p) if isinstance(d, nn.Dropout) and d.training else 0.0 for d in dropouts
        ],
    }
