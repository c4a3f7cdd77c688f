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

__all__ = ["ADAPTER_RULES", "CALL_RULES", "LAYER_RULES", "FusedLoraLinear", "module_refusal"]


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


def _active(layer: PeftLinear) -> list[str]:
    """The active adapters that have weights here."""
    weights = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in weights]


class Parts:
    """What a layer computes with, looked up once: a look-up through ``nn.Module`` takes as long as
    half a product's launch. Only for a layer with one active adapter."""

    __slots__ = ("a", "b", "base", "dropout", "layer", "magnitude", "scaling", "variant")

    def __init__(self, layer: PeftLinear) -> None:
        (name,) = _active(layer)
        modules = layer._modules
        self.layer, self.base = layer, modules["base_layer"]
        self.a, self.b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        self.dropout = modules["lora_dropout"]._modules[name]
        self.scaling = layer.scaling[name]
        self.variant = type(layer.lora_variant[name]) if name in layer.lora_variant else None
        self.magnitude = None
        if self.variant is DoraLinearVariant:
            self.magnitude = layer.lora_magnitude_vector[name]

    def tensors(self) -> tuple[Any, Any, Any]:
        """The frozen weight as its layer holds it, A and B."""
        return self.base.weight, self.a.weight, self.b.weight

    def weight(self) -> Tensor:
        """The frozen matrix (out_features, in_features); GPT-2's Conv1D holds its transpose."""
        weight: Tensor = self.base.weight
        return weight.t() if type(self.base) is Conv1D else weight

    def bias(self) -> Tensor | None:
        """base bias + scaling * adapter bias (``lora_bias=True``), which gets its gradient; None
        under DoRA, which adds the bias after its scale."""
        base, own = self.base.bias, self.b.bias
        if self.magnitude is not None:
            return None
        if own is None:
            return base
        own = own * float(self.scaling)
        return (own if base is None else base + own).to(self.base.weight.dtype)

    def dropout_p(self) -> float:
        """The probability in force: 0 outside training."""
        dropout = self.dropout
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


# What the layer is, whatever its adapters.
LAYER_RULES: tuple[Rule, ...] = (
    Rule("forward replaced on the layer itself", lambda m: "forward" in vars(m)),
    Rule("adapters disabled", lambda m: m.disable_adapters),
    Rule("adapter merged into the base", lambda m: m.merged),
    Rule("base layer is no nn.Linear", lambda m: type(m.base_layer) not in (nn.Linear, Conv1D)),
    Rule("hooks on the base layer", lambda m: _hooked(m.base_layer)),
    Rule("no active adapter", lambda m: not _active(m)),
    Rule("several active adapters", lambda m: len(_active(m)) > 1),
)


def _odd_dropout(p: Parts) -> bool:
    if type(p.dropout) is nn.Dropout:
        return p.dropout.p >= 1.0 or _hooked(p.dropout)
    return type(p.dropout) is not nn.Identity


def _odd_scaling(p: Parts) -> bool:
    if isinstance(p.scaling, Tensor):
        return p.scaling.numel() != 1 or p.scaling.requires_grad
    return not isinstance(p.scaling, (int, float))


def _too_large(p: Parts) -> bool:
    return p.a.weight.shape[0] > min(p.a.weight.shape[1], p.b.weight.shape[0])


# What its one active adapter is. The order matters: a rule may rely on those above it.
ADAPTER_RULES: tuple[Rule, ...] = (
    Rule("LoRA variant other than DoRA", lambda p: p.variant not in (None, DoraLinearVariant)),
    Rule("DoRA with dropout", lambda p: p.magnitude is not None and p.dropout_p() > 0),
    Rule(
        "DoRA with lora_bias",
        lambda p: p.magnitude is not None and getattr(p.b, "bias", None) is not None,
    ),
    Rule("hooks on the magnitude", lambda p: p.magnitude is not None and _hooked(p.magnitude)),
    Rule(
        "adapter layers are not nn.Linear",
        lambda p: type(p.a) is not nn.Linear or type(p.b) is not nn.Linear,
    ),
    Rule("hooks on the adapter", lambda p: _hooked(p.a) or _hooked(p.b)),
    Rule("r larger than the layer's features", _too_large),
    Rule("dropout of another kind", _odd_dropout),
    Rule("scaling is not a plain number", _odd_scaling),
)


def _foreign_tensors(p: Parts, x: Any) -> bool:
    if torch.compiler.is_compiling():  # torch.compile shows its own tensors in their place
        return False
    magnitude = () if p.magnitude is None else (p.magnitude.weight,)
    return not all(type(t) in (Tensor, nn.Parameter) for t in (x, *p.tensors(), *magnitude))


def _transformed(p: Parts, x: Any) -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def _several_devices(p: Parts, x: Tensor) -> bool:
    weight, a, b = p.tensors()
    return not x.device == weight.device == a.device == b.device


def _mixed_dtypes(p: Parts, x: Tensor) -> bool:
    weight, a, b = p.tensors()
    if not weight.is_floating_point() or a.dtype != b.dtype:
        return True
    if autocast_dtype(x.device.type) is not None:
        return False
    return x.dtype != weight.dtype or a.dtype not in (x.dtype, torch.float32)


# What the call is.
CALL_RULES: tuple[Rule, ...] = (
    Rule("torch.func transform", _transformed),
    Rule("tensor subclass", _foreign_tensors),
    Rule("input has no dimension", lambda p, x: x.dim() == 0),
    Rule("several devices", _several_devices),
    Rule("mixed dtypes", _mixed_dtypes),
)


def _first(rules: tuple[Rule, ...], *facts: Any) -> str | None:
    for rule in rules:
        if rule.applies(*facts):
            return rule.reason
    return None


def module_refusal(layer: PeftLinear) -> str | None:
    """Why the layer, as it stands, runs through PEFT; None when it can run fused."""
    return _first(LAYER_RULES, layer) or _first(ADAPTER_RULES, Parts(layer))


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
        parts = Parts(self)
        reason = _first(CALL_RULES, parts, x)
        if reason is not None or torch.compiler.is_compiling():
            return reason  # compiled, the operation chooses when the graph runs
        adapter = parts.a.weight
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
        parts = [Parts(layer) for layer in layers]
        ys = ops.lora_linear_siblings(
            x,
            [p.weight() for p in parts],
            [p.a.weight for p in parts],
            [p.b.weight for p in parts],
            scalings=[float(p.scaling) for p in parts],
            biases=[p.bias() for p in parts],
            dropout_ps=[p.dropout_p() for p in parts],
        )
        return tuple(
            y if p.magnitude is None else _dora(p, y) for p, y in zip(parts, ys, strict=True)
        )


# PEFT parses the class's name, and its tests and users print it.
FusedLoraLinear.__name__ = "Linear"


def _dora(parts: Parts, z: Tensor) -> Tensor:
    """The magnitude over the product z, which has no bias yet."""
    a, b = parts.a.weight, parts.b.weight
    norm = ops.dora_norm(parts.weight(), a, b, float(parts.scaling))
    scale = parts.magnitude.weight.to(norm.dtype) / norm  # type: ignore[union-attr]
    bias = parts.base.bias
    return ops.dora_scale(z, scale, None if bias is None else bias.to(z.dtype))
