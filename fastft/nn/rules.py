"""Conditions under which a LoRA layer runs through PEFT's own forward, as data: those that every
kind of layer shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ADAPTER_STATE",
    "LAYER_STATE",
    "Rule",
    "first",
    "hooked",
    "hooked_everywhere",
    "odd_scaling",
    "parameter",
    "refusal",
    "unhooked",
]


@dataclass(frozen=True)
class Rule:
    """A condition under which a layer runs through PEFT's own forward, and what to call it."""

    reason: str
    applies: Callable[..., bool]


def first(rules: tuple[Rule, ...], *facts: Any) -> str | None:
    """The reason of the first rule that applies; None where none does."""
    for rule in rules:
        if rule.applies(*facts):
            return rule.reason
    return None


def refusal(
    layer: Any,
    layer_rules: tuple[Rule, ...],
    adapters: Callable[[Any], Sequence[Any]],
    adapter_rules: tuple[Rule, ...],
) -> str | None:
    """Why the layer, as it stands, runs through PEFT: a rule of its own, no active adapter, or a
    rule of one of them; None when it can run fused."""
    reason = first(layer_rules, layer)
    if reason is not None:
        return reason
    active = adapters(layer)
    reasons = (first(adapter_rules, adapter) for adapter in active)
    return next((r for r in reasons if r), None if active else "no active adapter")


def parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a parameter, without the walk through ``nn.Module``, which takes
    as long as half a product's launch. What has taken the parameter's place is asked as usual."""
    held = module._parameters
    if name in held and name not in module.__dict__:
        return held[name]
    return getattr(module, name)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Inside, calls of the module and of those in it run no hooks: what is tried is no training."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    held = [(m, name, m.__dict__[name]) for m in module.modules() for name in names]
    for m, name, hooks in held:
        m.__dict__[name] = type(hooks)()
    try:
        yield
    finally:
        for m, name, hooks in held:
            m.__dict__[name] = hooks


def hooked_everywhere(_: Any) -> bool:
    """Whether hooks of all modules are registered: they look at modules that a fused call skips."""
    return bool(torch.nn.modules.module._has_any_global_hook())


# Of the layer, whatever its adapters.
LAYER_STATE: tuple[Rule, ...] = (
    Rule("forward replaced on the layer itself", lambda m: "forward" in vars(m)),
    Rule("hooks of all modules", hooked_everywhere),
    Rule("adapters disabled", lambda m: m.disable_adapters),
    Rule("adapter merged into the base", lambda m: m.merged),
)


def _odd_dropout(p: Any) -> bool:
    if type(p.dropout) is nn.Dropout:
        return p.dropout.p >= 1.0
    return type(p.dropout) is not nn.Identity


def odd_scaling(p: Any) -> bool:
    """Whether an adapter's scaling is anything but one number that is not trained. PEFT's hot swap
    makes it a tensor, which a compiled graph must go on reading."""
    if isinstance(p.scaling, Tensor):
        trained = p.scaling.numel() != 1 or p.scaling.requires_grad
        return trained or torch.compiler.is_compiling()
    return not isinstance(p.scaling, (int, float))


# Of an adapter with modules a and b and a dropout between.
ADAPTER_STATE: tuple[Rule, ...] = (
    Rule("hooks on the adapter", lambda p: hooked(p.a) or hooked(p.b) or hooked(p.dropout)),
    Rule("dropout of another kind", _odd_dropout),
    Rule("scaling is not a plain number", odd_scaling),
)
