"""LoRA on the expert weights of a mixture of experts (PEFT's ``target_parameters``), fused.

PEFT adds the product of A and B to the whole stack of expert weights at each forward. Here the
tokens are sorted by expert and each group of them passes through its frozen matrix and its low-rank
pair (:func:`fastft.ops.lora_grouped_linear`). Whatever the model: Transformers marks its expert
modules with what they have (a gate, biases, transposed weights), and that is all this reads.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from fastft import backends, ops
from fastft.nn.calls import count
from fastft.nn.mixed import adapter_names_of
from fastft.nn.unmerged import KeepsUnmerged
from fastft.ops._checks import autocast_dtype

__all__ = ["FusedLoraExperts", "InnerLoraExperts", "experts_of", "experts_refusal"]

# What Transformers' decorator for expert modules leaves on each of them.
_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts")
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


def experts_of(wrapper: Any) -> tuple[Any, dict[str, Any]]:
    """The expert module under a chain of wrappers, and each wrapper by its parameter's name."""
    wrappers: dict[str, Any] = {}
    module: Any = wrapper
    while isinstance(module, ParamWrapper):
        wrappers[module.parameter_name] = module
        module = module.base_layer
    return module, wrappers


def _weights(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def experts_refusal(outer: Any) -> str | None:
    """Why the wrapped experts, as they stand, run through PEFT; None when they can run fused."""
    experts, wrappers = experts_of(outer)
    if not all(hasattr(experts, mark) for mark in _MARKS) or not hasattr(experts, "_apply_gate"):
        return "the parameter is not one of Transformers' stacked expert weights"
    if any(name not in _weights(experts) for name in wrappers):
        return f"no expert weight has the name {', '.join(wrappers)}"
    implementation = getattr(experts.config, "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS or _is_parallel(experts):
        return f"experts implementation is {implementation}, or they are sharded over devices"
    for wrapper in wrappers.values():
        reason = _wrapper_refusal(wrapper)
        if reason is not None:
            return reason
    if "forward" in vars(experts) or experts._forward_hooks or experts._forward_pre_hooks:
        return "hooks on the experts"
    for name in _weights(experts):
        weight = getattr(experts, name)
        if type(weight) is not nn.Parameter or weight.dim() != 3 or weight.requires_grad:
            return "the expert weights are trained, sharded or no stack of matrices"
    return None


def _is_parallel(experts: Any) -> bool:
    """Whether the experts are shared out over devices. Older Transformers do not say, and
    experts in one of several processes may be."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    default = several and torch.distributed.get_world_size() > 1
    return bool(getattr(experts, "_is_expert_parallel", default))


def _wrapper_refusal(wrapper: Any) -> str | None:
    if wrapper.disable_adapters:
        return "adapters disabled"
    if wrapper.merged:
        return "adapter merged into the base"
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if len(active) != 1:
        return "no active adapter" if not active else "several active adapters"
    for part in (wrapper.lora_A[active[0]], wrapper.lora_B[active[0]]):
        if type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks:
            return "hooks on the adapter"
    return None


class InnerLoraExperts(KeepsUnmerged, ParamWrapper):
    """A ``peft.tuners.lora.ParamWrapper`` inside the outermost one, PEFT's but for its merge."""

    fastft_original = ParamWrapper

    def _merged_into(self) -> list[Tensor]:
        return [self.get_param().data]


class FusedLoraExperts(InnerLoraExperts):
    """The outermost ``peft.tuners.lora.ParamWrapper`` around expert weights, computing all of them.

    A call that cannot be fused runs PEFT's own forward and is counted with its reason.
    """

    fastft_original = ParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = adapter_names_of(self, kwargs)
        # PEFT refuses it, too, in its own words: one adapter for all would be a wrong answer.
        reason = "mixed batch" if names is not None else self._call_refusal(x, args, kwargs)
        if not torch.compiler.is_compiling():
            count(self, reason)
        if reason is not None:
            if names is not None:
                kwargs["adapter_names"] = names
            return super().forward(x, *args, **kwargs)
        return _experts_forward(self, x, *args)

    def _call_refusal(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        reason = experts_refusal(self)
        if reason is not None:
            return reason
        if len(args) != 2 or kwargs or not all(isinstance(a, Tensor) for a in args):
            return "arguments passed to the layer"
        index, weights = args
        experts, wrappers = experts_of(self)
        if x.dim() != 2 or index.dim() != 2 or weights.shape != index.shape:
            return "arguments passed to the layer"
        dtypes = {getattr(experts, name).dtype for name in _weights(experts)}
        if autocast_dtype(x.device.type) is not None or dtypes != {x.dtype}:
            return "mixed dtypes"
        if torch.compiler.is_compiling():
            # torch.compile traces torch's grouped product in bfloat16 only.
            bare = any(name not in wrappers for name in _weights(experts))
            return "compiled in another dtype" if bare and x.dtype != torch.bfloat16 else None
        if not all(type(t) in (Tensor, nn.Parameter) for t in (x, index, weights)):
            return "tensor subclass"
        for a, b, _ in _adapters(wrappers, experts).values():
            if a.dtype != b.dtype or a.dtype not in (x.dtype, torch.float32):
                return "mixed dtypes"
            facts = {"device_type": x.device.type, "dtype": x.dtype}
            facts |= {"adapter_dtype": a.dtype, "r": a.shape[1]}
            if backends.select("lora_grouped_linear", **facts)[0] == "reference":
                return "no fused backend for this device, dtype and rank"
        return None


InnerLoraExperts.__name__ = FusedLoraExperts.__name__ = "ParamWrapper"


def _adapters(wrappers: dict[str, Any], experts: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (experts, r, in), B (experts, out, r) and scaling of each adapted weight, as PEFT lays
    them out: A a block of r rows for each expert, B with the experts innermost."""
    found = {}
    for name, wrapper in wrappers.items():
        (adapter,) = (n for n in wrapper.active_adapters if n in wrapper.lora_A)
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        a = a.view(experts.num_experts, -1, a.shape[-1])
        b = b.view(b.shape[0], -1, experts.num_experts).permute(2, 0, 1)
        found[name] = (a, b, float(wrapper.scaling[adapter]))
    return found


def _experts_forward(outer: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum over a token's experts e of weight_e * down_e(activation(up_e(x)))."""
    experts, wrappers = experts_of(outer)
    adapters = _adapters(wrappers, experts)
    top_k = index.shape[-1]
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    # A comparison with each expert counts without atomics and without waiting for the device.
    every = torch.arange(experts.num_experts, device=x.device)
    sizes = (chosen[:, None] == every).sum(0)
    ends = sizes.cumsum(0).to(torch.int32)

    def project(rows: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        if name in adapters:
            a, b, scaling = adapters[name]
            y = ops.lora_grouped_linear(rows, weight, a, b, ends, scaling=scaling)
        else:
            y = torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        if experts.has_bias:
            y = y + getattr(experts, f"{name}_bias")[chosen]
        return y

    up, down = _weights(experts)
    hidden = project(x[order // top_k], up)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    y = project(hidden, down)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=x.device)
    return y[back].view(x.shape[0], top_k, y.shape[-1]).sum(1).to(x.dtype)
