"""What one call of a LoRA layer computes: its adapters and their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastft import native
from fastft.nn.quantized import Dense, is_4bit, state_refusal
from fastft.nn.rules import hooked, hooked_everywhere, parameter
from fastft.ops._checks import FLOATS, autocast_dtype
from fastft.ops._differentiable import transform

__all__ = ["Parts", "Plan", "fits", "identity", "plain_facts", "plain_parts", "plain_plan", "suits"]


class Parts:
    """What one adapter of a layer computes with, looked up once a call: a look-up through
    ``nn.Module`` takes as long as half a product's launch."""

    __slots__ = (
        "_adapter",
        "_tensors",
        "a",
        "b",
        "base",
        "dropout",
        "magnitude",
        "scaling",
        "variant",
    )

    def __init__(self, base: Any, a: Any, b: Any, dropout: Any, scaling: Any) -> None:
        self.base, self.a, self.b, self.dropout, self.scaling = base, a, b, dropout, scaling
        self.variant: type | None = None
        self.magnitude: Any = None
        self._tensors: tuple[Any, Any, Any] | None = None
        self._adapter: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, layer: PeftLinear, name: str) -> Parts:
        """Those of the layer's adapter of this name."""
        modules = layer._modules
        parts = cls(
            modules["base_layer"],
            modules["lora_A"]._modules[name],
            modules["lora_B"]._modules[name],
            modules["lora_dropout"]._modules[name],
            layer.scaling[name],
        )
        if name in layer.lora_variant:
            parts.variant = type(layer.lora_variant[name])
        if parts.variant is DoraLinearVariant:
            parts.magnitude = layer.lora_magnitude_vector[name]
        return parts

    def hold(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        """What the modules would be asked for."""
        self._tensors, self._adapter = (weight, lora_a, lora_b), (lora_a, lora_b)

    def tensors(self) -> tuple[Any, Any, Any]:
        """The frozen weight as its layer holds it, A and B; asked of the modules once a call."""
        if self._tensors is None:
            self._tensors = parameter(self.base, "weight"), *self.adapter()
        return self._tensors

    def adapter(self) -> tuple[Any, Any]:
        """A and B; asked of the modules once a call."""
        if self._adapter is None:
            self._adapter = parameter(self.a, "weight"), parameter(self.b, "weight")
        return self._adapter

    def dropout_p(self) -> float:
        """The probability in force: 0 outside training."""
        dropout = self.dropout
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def identity(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Plan:
    """One call of a layer: its adapters and, in a mixed batch, the rows of each.

    parts: the adapters that take part. names: theirs. spans: None where each takes all rows, else
    (adapter, first row, past the last row) for each run of samples with one adapter.
    adapter_names: that of each sample, in a mixed batch. few: whether ``few.lora_linear`` runs it.
    dense: of a weight in 4 bits, what makes its values. vouched: whether the call's tensors were
    held against the rules of the operation. chosen: the backend that is to run it, and its
    launcher.
    """

    __slots__ = (
        "_values",
        "adapter_names",
        "base",
        "chosen",
        "dense",
        "few",
        "names",
        "parts",
        "spans",
        "vouched",
    )

    def __init__(
        self,
        layer: PeftLinear,
        adapter_names: Sequence[str] | None,
        only: tuple[str, Parts] | None = None,
    ) -> None:
        """only: the name and the parts of the one adapter, where they are at hand."""
        self.adapter_names, self.few, self.vouched = adapter_names, False, False
        self.dense: Dense | None = None
        self.chosen: tuple[str, Any] | None = None
        self._values: Tensor | None = None
        self.spans: list[tuple[int, int, int]] | None = None
        self.base = layer._modules["base_layer"]
        if only is not None:
            self.names, self.parts = [only[0]], [only[1]]
            return
        held = layer._modules["lora_A"]._modules
        wanted = layer.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        self.names = [name for name in wanted if name in held]
        self.parts = [Parts.of(layer, name) for name in self.names]

    def route(self, adapter_names: Sequence[str], rows: int) -> None:
        """Gives each run of samples with one adapter its share of ``rows``."""
        size = rows // len(adapter_names)
        self.spans, stop = [], 0
        for name, run in itertools.groupby(adapter_names):
            start, stop = stop, stop + size * len(list(run))
            if name in self.names:
                self.spans.append((self.names.index(name), start, stop))

    def weight(self) -> Tensor:
        """The frozen matrix (out_features, in_features); GPT-2's Conv1D holds its transpose."""
        if self.dense is not None:
            if self._values is None:
                self._values = self.dense.forward()
            return self._values
        weight: Tensor = self.parts[0].tensors()[0]
        return weight.t() if type(self.base) is Conv1D else weight

    def adapter_dtype(self) -> torch.dtype:
        """Of A and B, which all have."""
        dtype: torch.dtype = self.parts[0].adapter()[0].dtype
        return dtype

    def kind(self) -> tuple[Any, ...]:
        """What plans of one operation have in common."""
        return type(self), self.adapter_dtype()

    def rank(self) -> int:
        """The largest of its adapters'."""
        return max([p.adapter()[0].shape[0] for p in self.parts])

    def frozen(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, which may be changed in place."""
        return nn.functional.linear(x, self.weight(), bias)

    def magnitude(self) -> nn.Module | None:
        """DoRA's, whose layer has this one adapter."""
        return self.parts[0].magnitude

    def facts(self) -> list[Any]:
        """What tells the call's result from another's with the same x: between two siblings' calls
        hooks may alter it."""
        return _facts(self.names, self.parts)

    def drops_all(self) -> bool:
        """Whether the adapter's dropout is also the frozen product's (DoRA)."""
        return self.magnitude() is not None and self.parts[0].dropout_p() > 0

    def bias(self) -> Tensor | None:
        """base bias + scaling * adapter biases (``lora_bias=True``), which get their gradient."""
        frozen = bias = parameter(self.base, "bias")
        if self.dense is not None and bias is not None:
            frozen = bias = bias.to(self.dense.dtype)
        bias = self.with_adapters(bias)
        if bias is frozen:
            return bias
        dtype = self.base.weight.dtype if self.dense is None else self.dense.dtype
        return bias.to(dtype)  # type: ignore[union-attr]

    def with_adapters(self, bias: Tensor | None) -> Tensor | None:
        """This bias + scaling * adapter biases, in their dtype; None where there is none."""
        for p in self.parts:
            trained = parameter(p.b, "bias")
            if trained is not None:
                own = trained * float(p.scaling)
                bias = own if bias is None else bias + own
        return bias


def _facts(names: Sequence[str], parts: Sequence[Parts]) -> list[Any]:
    found: list[Any] = [*names]
    for p in parts:
        magnitude = None if p.magnitude is None else p.magnitude.weight
        biases = parameter(p.base, "bias"), parameter(p.b, "bias")
        held = (*p.tensors(), *biases, magnitude, p.scaling)
        found += [identity(t) if isinstance(t, Tensor) else t for t in held]
        found.append(p.dropout_p())
        if type(p.base) not in _BASES:  # the values that 4 bits stand for
            found += [id(getattr(held[0], "quant_state", None)), p.base.compute_dtype]
    return found


_TENSORS = (Tensor, nn.Parameter)
_BASES = (nn.Linear, Conv1D)


def plain_parts(layer: PeftLinear) -> tuple[str, Parts] | None:
    """The one active adapter, of plain LoRA, of a layer that no rule of ``fastft.nn.lora`` applies
    to, and its name. None where one of them might; they say which.

    All is read anew at each call, in one piece. The rules, asked one by one, take a host as long as
    a layer's launches, and a call of siblings asks five times.
    """
    if hooked_everywhere(layer):
        return None
    found = _plain_layer(layer)
    if found is None:
        return None
    name, base, a, b, dropout, scaling, *tensors = found
    if (
        (type(base) not in _BASES and not is_4bit(base))
        or type(a) is not nn.Linear
        or type(b) is not nn.Linear
        or type(dropout) not in (nn.Identity, nn.Dropout)
        or (type(dropout) is nn.Dropout and not 0.0 <= dropout.p < 1.0)
        or type(scaling) not in (float, int)
    ):
        return None
    parts = Parts(base, a, b, dropout, scaling)
    parts.hold(*tensors)
    return name, parts


def _read_plain_layer(layer: PeftLinear) -> tuple[Any, ...] | None:
    """(name, base layer, A, B, dropout, scaling, weight, A's, B's) of the one active adapter of a
    layer that computes what its class does, or None: what the compiled module reads."""
    active = layer.active_adapters
    held = layer._modules["lora_A"]._modules
    if (
        "forward" in layer.__dict__
        or len(active) != 1
        or active[0] not in held
        or layer.disable_adapters
        or layer.merged
        or active[0] in layer.lora_variant
    ):
        return None
    parts = Parts.of(layer, active[0])
    modules = (parts.base, parts.a, parts.b, parts.dropout)
    if any(hooked(module) for module in modules):
        return None
    tensors = [m.__dict__.get("weight", m._parameters.get("weight")) for m in modules[:3]]
    if any(tensor is None for tensor in tensors):
        return None
    return (active[0], *modules, parts.scaling, *tensors)


_plain_layer = native.module().plain_layer if native.available() else _read_plain_layer


def plain_plan(layer: PeftLinear, x: Any) -> Plan | None:
    """The plan of a call of such a layer, over all rows of an x that suits it."""
    if type(x) not in _TENSORS or transform() is not None:
        return None
    found = plain_parts(layer)
    if found is None:
        return None
    parts, dense = found[1], None
    if type(parts.base) not in _BASES:  # in 4 bits, whose values must be such as can be made
        if state_refusal(parts.base) is not None:
            return None
        dense = Dense(parts.base)
    if not suits(x, parts, dense):
        return None
    plan = Plan(layer, None, found)
    plan.dense, plan.vouched = dense, fits(x, parts, dense, x.shape[-1])
    return plan


def plain_facts(layer: PeftLinear) -> list[Any] | None:
    """The facts of a plan of such a layer, without one."""
    found = plain_parts(layer)
    return None if found is None else _facts([found[0]], [found[1]])


def suits(x: Tensor, parts: Parts, dense: Dense | None) -> bool:
    """Whether the tensors are what the operation takes. dense: of a weight in 4 bits."""
    weight, a, b = parts.tensors()
    kinds = type(a) in _TENSORS and type(b) in _TENSORS
    if dense is None:
        kinds = kinds and type(weight) in _TENSORS and weight.is_floating_point()
    if not kinds or a.dim() != 2 or b.dim() != 2 or x.dim() == 0:
        return False
    device, dtype = x.device, a.dtype
    wide = weight.dtype if dense is None else dense.dtype
    r, features = a.shape
    if (
        r > features
        or r > b.shape[0]
        or weight.device != device
        or a.device != device
        or b.device != device
        or b.dtype != dtype
    ):
        return False
    autocast = autocast_dtype(device.type)
    if autocast is not None:
        # bitsandbytes' products have their own dtype.
        own = dense is None or wide == autocast
        return own and torch.float64 not in (x.dtype, wide, dtype)
    return x.dtype == wide and dtype in (x.dtype, torch.float32)


def fits(x: Tensor, parts: Parts, dense: Dense | None, features: int) -> bool:
    """Whether what suits has the shapes and values that the operation asks for, too, of inputs with
    this many features."""
    (weight, a, b), base = parts.tensors(), parts.base
    bias = parameter(base, "bias")
    r, out_features = a.shape[0], b.shape[0]
    shape, dtype = weight.shape, weight.dtype
    if dense is not None:
        shape, dtype = dense.state.shape, dense.dtype
    return (
        type(base) is not Conv1D
        and r > 0
        and a.shape[1] == features
        and b.shape[1] == r
        and shape == (out_features, features)
        and all(kind in FLOATS for kind in (x.dtype, dtype, a.dtype))
        and parameter(parts.b, "bias") is None
        and abs(parts.scaling) < math.inf
        and (
            bias is None
            or (
                type(bias) in _TENSORS
                and bias.device == weight.device
                and (bias.dtype == dtype or dense is not None)  # it is cast for that product
                and bias.shape == (out_features,)
                and bias.is_contiguous()
            )
        )
    )
