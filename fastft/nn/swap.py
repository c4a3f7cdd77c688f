"""Fused forwards for modules of any class: a subclass of the module's own class, swapped in.

The class is made once for each (mixin, original class, facts), so that ``isinstance``, hooks,
state-dict keys and everything the module holds stay what they were. Copies and pickles name the
mixin and the original class, since the subclass has no name to be found by.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from fastft import backends
from fastft.ops._differentiable import transform

__all__ = [
    "Swapped",
    "become",
    "call_refusal",
    "combined_class",
    "original_of",
    "site_refusal",
    "swapped_class",
]


class Swapped:
    """Base of the mixins; ``fastft_original`` is the class the module had."""

    fastft_original: type[nn.Module]
    fastft_facts: tuple[tuple[str, Hashable], ...] = ()
    # Attributes a mixin gives the module as it enters, which go when it leaves.
    fastft_own: tuple[str, ...] = ()

    def fastft_enter(self) -> None:
        """Runs when a module becomes of this class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(protocol)
        return (_revive, (_recipe(type(self)),), *state[2:])


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes the module one of this class, of what it is or what it was."""
    before: Any = type(module)
    for name in before.fastft_own if issubclass(before, Swapped) else ():
        module.__dict__.pop(name, None)
    module.__class__ = cls
    if isinstance(module, Swapped):
        module.fastft_enter()


@functools.cache
def swapped_class(
    mixin: type[Swapped], original: type[nn.Module], facts: tuple[tuple[str, Hashable], ...] = ()
) -> type[nn.Module]:
    """``original`` with the forward of ``mixin``; facts become attributes of the class."""
    held: dict[str, Any] = dict(facts)
    held.update(fastft_mixin=mixin, fastft_original=original, fastft_facts=facts)
    held.update(__module__=original.__module__, __qualname__=original.__qualname__)
    return type(original.__name__, (mixin, original), held)


@functools.cache
def combined_class(first: Any, second: Any) -> type[nn.Module]:
    """Two fused classes over one original as one: what the second overrides, it overrides."""
    original: type[nn.Module] = vars(first)["fastft_original"]
    held: dict[str, Any] = {"fastft_original": original, "fastft_parts": (first, second)}
    held.update(__module__=original.__module__, __qualname__=original.__qualname__)
    return type(original.__name__, (second, first), held)


def _recipe(cls: Any) -> tuple[Any, ...]:
    """What a class is made of, all of which can be pickled by name."""
    parts = vars(cls).get("fastft_parts")
    if parts is not None:
        return tuple(_recipe(part) for part in parts)
    return (cls.fastft_mixin, cls.fastft_original, cls.fastft_facts)


def _class_of(recipe: tuple[Any, ...]) -> Any:
    if len(recipe) == 2:
        return combined_class(*(_class_of(part) for part in recipe))
    return swapped_class(*recipe)


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class the module has, or had before it was fused.

    Only a fused class itself knows one: what FSDP made of it is left alone.
    """
    return vars(type(module)).get("fastft_original", type(module))


def _revive(recipe: tuple[Any, ...]) -> nn.Module:
    cls = _class_of(recipe)
    return cls.__new__(cls)  # type: ignore[no-any-return]


_PLAIN = frozenset({Tensor, nn.Parameter})


def call_refusal(op: str, *tensors: Any, dtype: torch.dtype | None = None) -> str | None:
    """Why ``op`` cannot run on these tensors; None when it can.

    dtype: what the operation casts them to (autocast); None: they must agree.
    """
    first = tensors[0]
    dtypes = [t.dtype for t in tensors]
    # Autocast leaves float64 as it is.
    mixed = dtypes.count(dtypes[0]) < len(dtypes) if dtype is None else torch.float64 in dtypes
    if torch.compiler.is_compiling():  # the operation chooses when the graph runs
        return "mixed dtypes" if mixed else None
    followed = transform()
    if followed is not None:
        return followed
    if not _PLAIN.issuperset(map(type, tensors)):
        return "tensor subclass"
    if len({t.device for t in tensors}) > 1:
        return "several devices"
    if mixed:
        return "mixed dtypes"
    return site_refusal(op, first, dtype)


def site_refusal(op: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why no backend but the reference runs ``op`` in this device and dtype; None when one does."""
    chosen, _ = backends.select(op, device_type=tensor.device.type, dtype=dtype or tensor.dtype)
    if chosen != "reference":
        return None
    return "no fused backend for this device and dtype"
