"""Siblings: layers called one after another with the very same tensor (q/k/v, gate/up).

They are found by watching, not by name. During one forward of the accelerated model, runs of
fused calls on the same tensor object are noted; from a later forward on, the first of such a run
computes the outputs of all, and the others only fetch theirs. Learnt groups come into force
between forwards, and only once a fused backward has run or the watched forward needed none: a
recompute under activation checkpointing then always sees what its forward saw.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastft.nn.lora import FusedLoraLinear

__all__ = ["begin_forward", "end_forward", "forget", "forward", "group_of"]


class Group:
    """Layers that share an input, in the order they are called, and the outputs not yet fetched."""

    def __init__(self, layers: list[FusedLoraLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self.clear()

    def clear(self) -> None:
        """Drops outputs that were never fetched."""
        self._x: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def layers(self) -> list[FusedLoraLinear]:
        """The layers; empty when one is gone."""
        found = [ref() for ref in self._layers]
        return [] if any(layer is None for layer in found) else found  # type: ignore[return-value]

    def forward(self, layer: FusedLoraLinear, x: Tensor) -> Tensor:
        """The layer's output, computed with its siblings' when it is the first of them."""
        key = _call_key(x)
        if self._x is x and self._key == key and id(layer) in self._outputs:
            output = self._outputs.pop(id(layer))
            if not self._outputs:
                self.clear()
            return output
        self.clear()
        layers = self.layers()
        ready = layers and layers[0] is layer
        if not ready or any(other._refusal(x, (), {}) for other in layers[1:]):
            return layer.fused_call([layer], x)[0]
        first, *others = layer.fused_call(layers, x)
        self._x, self._key = x, key
        self._outputs = {id(other): y for other, y in zip(layers[1:], others, strict=True)}
        return first


def _call_key(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the first sibling's call and the others'."""
    device = x.device.type
    return (
        x._version if not x.is_inference() else 0,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )


class _Watch:
    """What one forward of an accelerated model shows."""

    def __init__(self) -> None:
        self.last: weakref.ref[Tensor] | None = None
        self.run: list[weakref.ref[Any]] = []
        self.runs: list[list[weakref.ref[Any]]] = []
        self.needed_grad = False
        self.backward_ran = False

    def see(self, layer: FusedLoraLinear, x: Tensor) -> None:
        same = self.last is not None and self.last() is x
        if not same:
            self.close_run()
            self.last = weakref.ref(x)
        self.run.append(weakref.ref(layer))
        if torch.is_grad_enabled():
            self.needed_grad = True

    def close_run(self) -> None:
        if len(self.run) > 1:
            self.runs.append(self.run)
        self.run, self.last = [], None

    def mature(self) -> bool:
        return self.backward_ran or not self.needed_grad


_groups: weakref.WeakKeyDictionary[nn.Module, Group] = weakref.WeakKeyDictionary()
_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
_current: list[_Watch] = []  # the forward that is being watched, if any
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # roots whose groups are learnt


def group_of(layer: nn.Module) -> Group | None:
    """The layer's group once it is in force."""
    return _groups.get(layer)


def forward(layer: FusedLoraLinear, x: Tensor) -> Tensor:
    """The fused forward of a layer, with its siblings where it has any."""
    group = _groups.get(layer)
    if group is not None:
        return group.forward(layer, x)
    if not _current:
        return layer.fused_call([layer], x)[0]
    watch = _current[-1]
    watch.see(layer, x)
    y = layer.fused_call([layer], x)[0]
    if y.requires_grad:
        y.register_hook(lambda _: _note_backward(watch))
    return y


def _note_backward(watch: _Watch) -> None:
    watch.backward_ran = True


def begin_forward(root: nn.Module, *_: Any) -> None:
    """Forward pre-hook of an accelerated model: groups learnt earlier come into force."""
    if torch.compiler.is_compiling():
        return
    _current.clear()
    if root in _seen:
        return
    watch = _watches.get(root)
    if watch is not None and watch.mature():
        for run in watch.runs:
            layers = [ref() for ref in run]
            distinct = len({id(layer) for layer in layers}) == len(layers)
            if distinct and not any(layer is None or layer in _groups for layer in layers):
                group = Group(layers)  # type: ignore[arg-type]
                for layer in layers:
                    _groups[layer] = group  # type: ignore[index]
        _seen.add(root)
        return
    if watch is None:
        watch = _watches[root] = _Watch()
        _current.append(watch)


def end_forward(root: nn.Module, *_: Any) -> None:
    """Forward hook of an accelerated model: nothing unfetched is kept."""
    if torch.compiler.is_compiling():
        return
    if _current:
        _current.pop().close_run()
    for module in root.modules():
        group = _groups.get(module)
        if group is not None:
            group.clear()


def forget(root: nn.Module) -> None:
    """Undoes all that was learnt about a model."""
    _watches.pop(root, None)
    _seen.discard(root)
    for module in root.modules():
        _groups.pop(module, None)
