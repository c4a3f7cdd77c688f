"""PEFT's LoRA layers over ``nn.Linear``, GPT-2's ``Conv1D`` and bitsandbytes' ``Linear4bit``, their
forward one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastft import backends, ops
from fastft.nn import few, packing, siblings
from fastft.nn.calls import count
from fastft.nn.dora import dropped, forget_norms, scale_of
from fastft.nn.mixed import adapter_names_of
from fastft.nn.plans import Parts, Plan, plain_plan
from fastft.nn.quantized import Dense, dtype_of, is_4bit, state_refusal
from fastft.nn.rules import ADAPTER_STATE, LAYER_STATE, Rule, first, hooked, parameter
from fastft.nn.unmerged import KeepsUnmerged
from fastft.ops._checks import autocast_dtype
from fastft.ops._differentiable import transform
from fastft.ops.lora_linear import vouched_siblings

__all__ = [
    "ADAPTER_RULES",
    "CALL_RULES",
    "LAYER_RULES",
    "PLAN_RULES",
    "FusedLora",
    "FusedLoraLinear",
    "adapters_of",
]


# What the layer is, whatever its adapters.
LAYER_RULES: tuple[Rule, ...] = (
    *LAYER_STATE,
    Rule(
        "base layer is no nn.Linear",
        lambda m: type(m.base_layer) not in (nn.Linear, Conv1D) and not is_4bit(m.base_layer),
    ),
    Rule("hooks on the base layer", lambda m: hooked(m.base_layer)),
)


def _too_large(p: Parts) -> bool:
    a, b = p.adapter()
    return bool(a.shape[0] > min(a.shape[1], b.shape[0]))


# What each adapter that takes part is. The order matters: a rule may rely on those above it.
ADAPTER_RULES: tuple[Rule, ...] = (
    Rule("LoRA variant other than DoRA", lambda p: p.variant not in (None, DoraLinearVariant)),
    Rule(
        "DoRA with lora_bias",
        lambda p: p.magnitude is not None and getattr(p.b, "bias", None) is not None,
    ),
    Rule("hooks on the magnitude", lambda p: p.magnitude is not None and hooked(p.magnitude)),
    Rule(
        "adapter layers are not nn.Linear",
        lambda p: type(p.a) is not nn.Linear or type(p.b) is not nn.Linear,
    ),
    *ADAPTER_STATE,
    Rule("r larger than the layer's features", _too_large),
)


def _mixed_adapters(plan: Plan) -> bool:
    return len({p.adapter()[0].dtype for p in plan.parts}) > 1


# What they are together, and the rows they take.
PLAN_RULES: tuple[Rule, ...] = (
    Rule("no active adapter", lambda plan: not plan.parts),
    Rule(
        "DoRA beside another adapter",
        lambda plan: (
            (len(plan.parts) > 1 or plan.spans is not None)
            and any(p.variant is not None for p in plan.parts)
        ),
    ),
    Rule("adapters of different dtypes", _mixed_adapters),
    Rule(
        "lora_bias in a mixed batch",
        lambda plan: (
            plan.spans is not None
            and any(getattr(p.b, "bias", None) is not None for p in plan.parts)
        ),
    ),
)


def _foreign_tensors(p: Parts, x: Any) -> bool:
    if torch.compiler.is_compiling():  # torch.compile shows its own tensors in their place
        return False
    magnitude = () if p.magnitude is None else (p.magnitude.weight,)
    weight, *adapter = p.tensors()
    dense = () if is_4bit(p.base) else (weight,)
    return not all(type(t) in (Tensor, nn.Parameter) for t in (x, *dense, *adapter, *magnitude))


def _several_devices(p: Parts, x: Tensor) -> bool:
    weight, a, b = p.tensors()
    return not x.device == weight.device == a.device == b.device


def _mixed_dtypes(p: Parts, x: Tensor) -> bool:
    weight, a, b = p.tensors()
    dtype = dtype_of(p.base) if is_4bit(p.base) else weight.dtype
    if not dtype.is_floating_point or a.dtype != b.dtype:
        return True
    autocast = autocast_dtype(x.device.type)
    if autocast is None:
        return x.dtype != dtype or a.dtype not in (x.dtype, torch.float32)
    if is_4bit(p.base) and dtype != autocast:  # bitsandbytes' products have their own dtype
        return True
    return torch.float64 in (x.dtype, dtype, a.dtype)  # which autocast leaves as it is


# What the call is.
CALL_RULES: tuple[Rule, ...] = (
    Rule("torch.func, forward-mode AD or a trace", lambda p, x: transform() is not None),
    Rule("tensor subclass", _foreign_tensors),
    Rule("input has no dimension", lambda p, x: x.dim() == 0),
    Rule("several devices", _several_devices),
    Rule("mixed dtypes", _mixed_dtypes),
)

# And over a weight in 4 bits.
CALL_RULES_4BIT: tuple[Rule, ...] = (
    Rule(
        "DoRA with dropout over a 4-bit weight",  # whose product would keep the weight's values
        lambda p, x: p.magnitude is not None and p.dropout_p() > 0,
    ),
    *CALL_RULES,
)


def _layer_refusal(layer: PeftLinear) -> str | None:
    reason = first(LAYER_RULES, layer)
    if reason is None and is_4bit(layer.base_layer):
        return state_refusal(layer.base_layer)
    return reason


def _plan_refusal(plan: Plan) -> str | None:
    for parts in plan.parts:
        reason = first(ADAPTER_RULES, parts)
        if reason is not None:
            return reason
    return first(PLAN_RULES, plan)


class FusedLora(nn.Module):
    """Mixin of the fused classes of PEFT's LoRA layers over a linear one, whose forward is
    :func:`fastft.ops.lora_linear_siblings`.

    Their layers are made by swapping the class of an existing one, so parameters, state-dict keys,
    merging, saving and deep copies are PEFT's. A call that cannot be fused runs PEFT's own forward
    and is counted with its reason.
    """

    # What a layer over a product of another kind has in their place.
    plan_class: type[Plan] = Plan
    layer_refusal = staticmethod(_layer_refusal)
    plan_refusal = staticmethod(_plan_refusal)
    call_rules = CALL_RULES

    @classmethod
    def plan_of(cls, layer: Any) -> Plan | str:
        """What a layer of PEFT's, as it stands, computes, or why that cannot be fused."""
        reason = cls.layer_refusal(layer)
        if reason is not None:
            return reason
        plan = cls.plan_class(layer, None)
        return cls.plan_refusal(plan) or plan

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        """Why a layer of PEFT's, as it stands, runs through PEFT; None when it can run fused."""
        plan = cls.plan_of(layer)
        return plan if isinstance(plan, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs or torch.compiler.is_compiling()):
            made = siblings.fetch(self, x)
            if made is not None:
                count(self, None)
                return made
        plan = self.plan(x, args, kwargs)
        reason = plan if isinstance(plan, str) else None
        if not torch.compiler.is_compiling():
            count(self, reason)
        if isinstance(plan, str) or (plan.few and plan.dense is not None):
            names = adapter_names_of(self, kwargs)
            if names is not None:
                kwargs["adapter_names"] = names
            if not isinstance(plan, str):  # bitsandbytes has a product of its own for few rows
                siblings.see(self, x)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        if plan.few:
            siblings.see(self, x)
            return few.lora_linear(plan, x)
        if torch.compiler.is_compiling() or kwargs.get("adapter_names") is not None:
            return self.fused_call([plan], x)[0]
        return siblings.forward(self, x, plan)

    def plan(self, x: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Plan | str:
        """What a call with x computes, or why it cannot be fused."""
        compiling = torch.compiler.is_compiling()
        plain = not (args or kwargs or compiling) and adapter_names_of(self, {}) is None
        plan = (plain_plan(self, x) if plain else None) or self._ruled(x, args, kwargs or {})
        if isinstance(plan, str) or compiling:
            return plan  # compiled, the operation chooses when the graph runs
        packed = plan.dense is not None and plan.dense.packed()  # its own product is the fast one
        plan.few = packed or few.takes(self, plan, x)
        if plan.few:
            return plan  # the library runs it on any device
        plan.chosen = backends.select(
            "lora_linear",
            device_type=x.device.type,
            dtype=autocast_dtype(x.device.type) or x.dtype,
            adapter_dtype=plan.adapter_dtype(),
            r=plan.rank(),
        )
        refused = plan.chosen[0] == "reference"
        return "no fused backend for this device and dtype" if refused else plan

    def _ruled(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | str:
        """The plan of a call with x, or the reason of the first rule that applies to it."""
        names = adapter_names_of(self, kwargs)
        if args or any(v is not None and k != "adapter_names" for k, v in kwargs.items()):
            return "arguments passed to the layer"
        reason = self.layer_refusal(self)  # type: ignore[arg-type]
        if reason is not None:
            return reason
        plan = self.plan_class(self, names)  # type: ignore[arg-type]
        if is_4bit(plan.base):
            if torch.compiler.is_compiling():  # before anything of bitsandbytes' is traced
                return "4-bit weight under torch.compile"
            plan.dense = Dense(plan.base)
        if names is not None:
            if x.dim() < 2 or x.shape[0] != len(names):
                return "adapter_names that do not fit the batch"
            plan.route(names, x.numel() // x.shape[-1])
        reason = self.plan_refusal(plan)
        rules = self.call_rules if plan.dense is None else CALL_RULES_4BIT
        for parts in plan.parts:
            reason = reason or first(rules, parts, x)
        return reason or plan

    def standing_plan(self) -> Plan | str:
        """What the layer, whatever the call, computes, or why that cannot be fused."""
        return self.plan_of(self)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's: a new adapter, whose initialisation may alter the base weight in place."""
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        forget_norms([self])

    @staticmethod
    def fused_call(plans: Sequence[Plan], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that share x: in one operation, but for DoRA under dropout."""
        together = [plan for plan in plans if not plan.drops_all()]
        if len(together) == len(plans):
            return _in_one_operation(plans, x)
        ys = iter(_in_one_operation(together, x) if together else ())
        return tuple(dropped(plan, x) if plan.drops_all() else next(ys) for plan in plans)


class FusedLoraLinear(KeepsUnmerged, FusedLora, PeftLinear):
    """``peft.tuners.lora.Linear``, fused."""

    fastft_original = PeftLinear

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Another device or dtype: the weight leaves a packed buffer first, which is then freed."""
        packing.unpack([self])
        return super()._apply(fn, recurse)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """PEFT's merge, which also keeps the weights as they were, in host memory."""
        packing.unpack([self])
        forget_norms([self])
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """PEFT's unmerge, to the very bits from before the merge."""
        forget_norms([self])
        super().unmerge()


# PEFT parses the class's name, and its tests and users print it.
FusedLoraLinear.__name__ = "Linear"


def adapters_of(
    plans: Sequence[Plan],
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """A, B and what else the operations take for each adapter of layers that share x."""
    terms = []
    for owner, plan in enumerate(plans):
        for k, start, stop in plan.spans or [(k, 0, 0) for k in range(len(plan.parts))]:
            terms.append((owner, plan.parts[k], (start, stop)))
    adapters = [p for _, p, _ in terms]
    rest = {
        "scalings": [float(p.scaling) for p in adapters],
        "dropout_ps": [p.dropout_p() for p in adapters],
        "owners": [owner for owner, _, _ in terms],
        "spans": None if plans[0].spans is None else [span for _, _, span in terms],
    }
    return [p.adapter()[0] for p in adapters], [p.adapter()[1] for p in adapters], rest


def _in_one_operation(plans: Sequence[Plan], x: Tensor) -> tuple[Tensor, ...]:
    if all(plan.vouched for plan in plans):
        return _vouched(plans, x)
    lora_as, lora_bs, rest = adapters_of(plans)
    scaled = any(plan.magnitude() is not None for plan in plans)
    remade = any(plan.dense is not None for plan in plans)
    ys = ops.lora_linear_siblings(
        x,
        [plan.weight() for plan in plans],
        lora_as,
        lora_bs,
        biases=[plan.bias() for plan in plans],
        scales=[scale_of(plan) for plan in plans] if scaled else None,
        remake=[plan.dense for plan in plans] if remade else None,
        **rest,
    )
    return _of_inputs(plans, x, ys) if remade else ys


def _vouched(plans: Sequence[Plan], x: Tensor) -> tuple[Tensor, ...]:
    """Plain layers, which all were held against the operation's rules when they were planned."""
    parts = [plan.parts[0] for plan in plans]
    tensors = [p.tensors() for p in parts]
    remade = any(plan.dense is not None for plan in plans)
    ys = vouched_siblings(
        x,
        [plan.weight() for plan in plans] if remade else [weight for weight, _, _ in tensors],
        [a for _, a, _ in tensors],
        [b for _, _, b in tensors],
        scalings=[float(p.scaling) for p in parts],
        biases=[plan.bias() if remade else parameter(plan.base, "bias") for plan in plans],
        dropout_ps=[p.dropout_p() for p in parts],
        remake=[plan.dense for plan in plans] if remade else None,
        chosen=_chosen(plans, x),
    )
    return _of_inputs(plans, x, ys) if remade else ys


def _chosen(plans: Sequence[Plan], x: Tensor) -> tuple[str, Any] | None:
    """The backend that all have chosen, and for these very tensors."""
    chosen = plans[0].chosen
    same = all(plan.chosen == chosen for plan in plans)
    return chosen if same and autocast_dtype(x.device.type) is None else None


def _of_inputs(plans: Sequence[Plan], x: Tensor, ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """bitsandbytes gives the input's dtype back, under autocast too."""
    return tuple(y if plan.dense is None else y.to(x.dtype) for plan, y in zip(plans, ys))
