"""PEFT's LoRA layers over weights that only another package multiplies with (bitsandbytes' 8 bits,
GPTQ, AWQ, HQQ, EETQ, AQLM, torchao, INC): its product, and one operation for all that LoRA adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft import ops
from fastft.nn.lora import ADAPTER_RULES, PLAN_RULES, FusedLora, adapters_of
from fastft.nn.plans import Parts, Plan, identity
from fastft.nn.rules import LAYER_STATE, Rule, first, hooked, parameter
from fastft.nn.swap import Swapped, swapped_class
from fastft.ops._checks import FLOATS, autocast_dtype
from fastft.ops._differentiable import transform

__all__ = ["FusedLoraProduct", "ProductPlan", "fused_over", "product_of"]


class _Facts(NamedTuple):
    """widens: the result is wider than the product where autocast on a GPU makes wider terms; else
    it is rounded to the product's dtype. fresh: the product lies in memory that nobody else holds,
    as was seen of the package, or PEFT itself adds to it in place."""

    widens: bool
    fresh: bool


# PEFT's classes.
_CLASSES = {
    ("peft.tuners.lora.bnb", "Linear8bitLt"): _Facts(True, True),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"): _Facts(True, True),
    ("peft.tuners.lora.awq", "AwqLoraLinear"): _Facts(True, False),
    ("peft.tuners.lora.eetq", "EetqLoraLinear"): _Facts(True, False),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"): _Facts(False, True),
    ("peft.tuners.lora.aqlm", "AqlmLoraLinear"): _Facts(False, True),
    ("peft.tuners.lora.gptq", "GPTQLoraLinear"): _Facts(False, False),
    ("peft.tuners.lora.inc", "IncLoraLinear"): _Facts(False, False),
}


def fused_over(original: type[nn.Module]) -> type[FusedLora] | None:
    """The fused class of a PEFT class over such a weight; None of another class."""
    found = _CLASSES.get((original.__module__, original.__name__))
    if found is None:
        return None
    facts = (("fastft_widens", found.widens), ("fastft_fresh", found.fresh))
    return swapped_class(FusedLoraProduct, original, facts)  # type: ignore[arg-type,return-value]


def product_of(layer: Any) -> nn.Module:
    """The module that PEFT's forward calls for the frozen product."""
    modules = layer._modules
    product: nn.Module = modules.get("quant_linear_module", modules["base_layer"])
    return product


class ProductPlan(Plan):
    """One call of a layer whose frozen product is another package's."""

    __slots__ = ("_fresh", "_product", "_widens")

    def __init__(self, layer: Any, adapter_names: Sequence[str] | None) -> None:
        super().__init__(layer, adapter_names)
        self._product = product_of(layer)
        self._widens = adapter_names is None and getattr(layer, "fastft_widens", False)
        self._fresh = getattr(layer, "fastft_fresh", False)

    def product(self, x: Tensor) -> Tensor:
        """What the package makes of x, and the adapters' biases."""
        y: Tensor = self._product(x)
        if self._widens and torch.is_autocast_enabled():  # on a GPU, as PEFT asks
            y = y.to(torch.promote_types(y.dtype, autocast_dtype(x.device.type) or x.dtype))
        bias = self.bias()
        return y if bias is None else y + bias.to(y.dtype)

    def frozen(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product, which has the biases already, in memory of its own."""
        return self.product(x).clone(memory_format=torch.contiguous_format)

    def alone(self) -> bool:
        """Whether nobody else has the product's result, maybe as that of a module in it."""
        return self._fresh and not any(map(hooked, self._product.modules()))

    def bias(self) -> Tensor | None:
        """scaling * adapter biases (``lora_bias=True``); the base layer adds its own."""
        return self.with_adapters(None)

    def facts(self) -> list[Any]:
        """What tells the call's result from another's with the same x."""
        held: list[Any] = [*self.names]
        for p in self.parts:
            held += [*p.adapter(), parameter(p.b, "bias"), p.scaling, p.dropout_p()]
        found = [identity(t) if isinstance(t, Tensor) else t for t in held]
        # A subclass may have no address.
        own = (*self._product._parameters.values(), *self._product._buffers.values())
        return found + [
            (id(t), 0 if t.is_inference() else t._version) for t in own if t is not None
        ]


def _layer_refusal(layer: Any) -> str | None:
    return first(LAYER_STATE, layer)


_ADAPTER_RULES: tuple[Rule, ...] = (
    Rule("LoRA variant over another package's product", lambda p: p.variant is not None),
    *ADAPTER_RULES,
)


def _plan_refusal(plan: Plan) -> str | None:
    reasons = (first(_ADAPTER_RULES, parts) for parts in plan.parts)
    return next((r for r in reasons if r), None) or first(PLAN_RULES, plan)


def _foreign_tensors(p: Parts, x: Any) -> bool:
    if torch.compiler.is_compiling():  # torch.compile shows its own tensors in their place
        return False
    return not all(type(t) in (Tensor, nn.Parameter) for t in (x, *p.adapter()))


def _mixed_dtypes(p: Parts, x: Tensor) -> bool:
    a, b = p.adapter()
    if x.dtype not in FLOATS or a.dtype != b.dtype:
        return True
    if autocast_dtype(x.device.type) is None:
        return a.dtype not in (x.dtype, torch.float32)
    return torch.float64 in (x.dtype, a.dtype)  # which autocast leaves as it is


_CALL_RULES: tuple[Rule, ...] = (
    Rule("torch.func, forward-mode AD or a trace", lambda p, x: transform() is not None),
    Rule("tensor subclass", _foreign_tensors),
    Rule("input has no dimension", lambda p, x: x.dim() == 0),
    Rule("several devices", lambda p, x: any(t.device != x.device for t in p.adapter())),
    Rule("mixed dtypes", _mixed_dtypes),
)


class FusedLoraProduct(Swapped, FusedLora):
    """Mixin over PEFT's class; merging, saving and what else it does stay PEFT's.

    The terms are computed in x's dtype from float32 adapters as in :func:`fastft.ops.lora_linear`:
    x is not copied to float32 as PEFT copies it.
    """

    plan_class = ProductPlan
    layer_refusal = staticmethod(_layer_refusal)
    plan_refusal = staticmethod(_plan_refusal)
    call_rules = _CALL_RULES

    def standing_plan(self) -> Plan | str:
        """There is no weight to lay out otherwise."""
        return "another package's product"

    @staticmethod
    def fused_call(plans: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that share x: a product each, and one operation."""
        ys = [plan.product(x) for plan in plans]
        lora_as, lora_bs, rest = adapters_of(plans)
        alone = all(plan.alone() for plan in plans)
        return ops.lora_add_siblings(ys, x, lora_as, lora_bs, overwrite=alone, **rest)
