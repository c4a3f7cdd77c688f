"""Siblings: layers called one after another with the very same tensor (q/k/v, gate/up).

They are found by watching, not by name. During one forward of the accelerated model, runs of
fused calls on the same tensor object are noted; from a later forward on, the first of such a run
computes the outputs of all, and the others only fetch theirs. Learnt groups come into force
between forwards, and only once a fused backward has run or the watched forward needed none: a
recompute under activation checkpointing then always sees what its forward saw.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.nn import packing
from fastft.nn.mixed import adapter_names_of
from fastft.nn.plans import plain_facts
from fastft.nn.quantized import unpack_all
from fastft.ops import _room
from fastft.ops._checks import autocast_dtype

if TYPE_CHECKING:
    from fastft.nn.lora import FusedLora
    from fastft.nn.plans import Plan

__all__ = ["begin_forward", "end_forward", "fetch", "forget", "forward", "group_of", "see"]


class Group:
    """Layers that share an input, in the order they are called, and the outputs not yet fetched."""

    def __init__(self, layers: list[FusedLora]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._held = threading.local()  # two threads may run one model

    def clear(self) -> None:
        """Drops outputs that were never fetched."""
        self._held.__dict__.clear()
        _holding().pop(id(self), None)

    def layers(self) -> list[FusedLora]:
        """The layers; empty when one is gone."""
        found = [ref() for ref in self._layers]
        return [] if None in found else found  # type: ignore[return-value]

    def fetch(self, layer: FusedLora, x: Tensor) -> Tensor | None:
        """The layer's output, where a sibling has computed it from this x and all that it depends
        on is as it was then; only of plain layers, which need no plan to tell."""
        held = self._held.__dict__
        if not held or held["x"] is not x or id(layer) not in held["outputs"]:
            return None
        if held["key"] != (*_call_key(x), None) or adapter_names_of(layer, {}) is not None:
            return None
        output, facts = held["outputs"][id(layer)]
        if plain_facts(layer) != facts:  # type: ignore[arg-type]
            return None
        self._take(layer)
        return output  # type: ignore[no-any-return]

    def _take(self, layer: FusedLora) -> Any:
        outputs = self._held.__dict__["outputs"]
        found = outputs.pop(id(layer))
        if not outputs:
            self.clear()
        return found

    def forward(self, layer: FusedLora, x: Tensor, plan: Plan) -> Tensor:
        """The layer's output, computed with its siblings' when it is the first of them."""
        if x.is_inference():  # such a tensor has no version: a change in place would go unseen
            return layer.fused_call([plan], x)[0]
        key = (*_call_key(x), plan.adapter_names)
        held = self._held.__dict__
        if held and held["x"] is x and held["key"] == key and id(layer) in held["outputs"]:
            output, facts = self._take(layer)
            if facts == plan.facts():
                return output  # type: ignore[no-any-return]
            return layer.fused_call([plan], x)[0]
        if held:
            self.clear()
        layers = self.layers()
        if not layers or layers[0] is not layer:
            return layer.fused_call([plan], x)[0]
        plans = [plan]
        for other in layers[1:]:
            its = other.plan(x)
            # The operation takes products of one kind and adapters of one dtype;
            # a weight that is packed has a product of its own.
            if isinstance(its, str) or its.few or its.kind() != plan.kind():
                return layer.fused_call([plan], x)[0]
            plans.append(its)
        first, *others = layer.fused_call(plans, x)
        outputs = {
            id(other): (y, its.facts())
            for other, its, y in zip(layers[1:], plans[1:], others, strict=True)
        }
        held.update(x=x, key=key, outputs=outputs)
        _holding()[id(self)] = self
        return first


def _call_key(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the first sibling's call and the others'."""
    device = x.device.type
    return (
        x._version,
        torch.is_grad_enabled(),
        autocast_dtype(device),
    )


class _Watch:
    """What one forward of an accelerated model shows."""

    def __init__(self) -> None:
        self.last: weakref.ref[Tensor] | None = None
        self.version = 0
        self.order: list[weakref.ref[Any]] = []
        self.run: list[weakref.ref[Any]] = []
        self.runs: list[list[weakref.ref[Any]]] = []
        self.needed_grad = False
        self.backward_ran = False

    def see(self, layer: FusedLora, x: Tensor) -> None:
        if x.is_inference():
            return
        same = self.last is not None and self.last() is x and self.version == x._version
        if not same:
            self.close_run()
            self.last, self.version = weakref.ref(x), x._version
        self.order.append(weakref.ref(layer))
        self.run.append(weakref.ref(layer))
        if torch.is_grad_enabled():
            self.needed_grad = True

    def called(self) -> list[FusedLora]:
        """Every layer that was called, once, in order."""
        found = (ref() for ref in self.order)
        return list(dict.fromkeys(layer for layer in found if layer is not None))

    def close_run(self) -> None:
        if len(self.run) > 1:
            self.runs.append(self.run)
        self.run, self.last = [], None

    def mature(self) -> bool:
        """Not where no layer ran fused: adapters disabled, or in 4 bits at their first call."""
        return bool(self.order) and (self.backward_ran or not self.needed_grad)


_groups: weakref.WeakKeyDictionary[nn.Module, Group] = weakref.WeakKeyDictionary()
_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
# .watch: the forward that is being watched, if any; .holding: groups with outputs not yet fetched.
_thread = threading.local()
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # roots whose groups are learnt


def _holding() -> weakref.WeakValueDictionary[int, Group]:
    # Weakly: after a forward that raised nobody comes to drop them.
    found: weakref.WeakValueDictionary[int, Group] | None = _thread.__dict__.get("holding")
    if found is None:
        found = _thread.holding = weakref.WeakValueDictionary()
    return found


def group_of(layer: nn.Module) -> Group | None:
    """The layer's group once it is in force."""
    return _groups.get(layer)


def fetch(layer: FusedLora, x: Tensor) -> Tensor | None:
    """The output that a sibling has computed already, if that is what the layer would compute."""
    group = _groups.get(layer)
    return None if group is None else group.fetch(layer, x)


def forward(layer: FusedLora, x: Tensor, plan: Plan) -> Tensor:
    """The fused forward of a layer, with its siblings where it has any."""
    group = _groups.get(layer)
    if group is not None:
        return group.forward(layer, x, plan)
    watch: _Watch | None = getattr(_thread, "watch", None)
    if watch is None:
        return layer.fused_call([plan], x)[0]
    watch.see(layer, x)
    y = layer.fused_call([plan], x)[0]
    if y.requires_grad:
        y.register_hook(lambda _: _note_backward(watch))
    return y


def see(layer: FusedLora, x: Tensor) -> None:
    """Notes a call that computes its output alone, where the forward is watched."""
    watch: _Watch | None = getattr(_thread, "watch", None)
    if watch is not None:
        watch.see(layer, x)


def _note_backward(watch: _Watch) -> None:
    watch.backward_ran = True


def begin_forward(root: nn.Module, *_: Any) -> None:
    """Forward pre-hook of an accelerated model: groups learnt earlier come into force."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        unpack_all(root)
    _thread.watch = None
    # Tensors of inference mode have no version: nothing is learnt from them.
    if root in _seen or torch.is_inference_mode_enabled():
        return
    if torch._C._current_graph_task_id() != -1:  # a recompute, of a forward without the groups
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
        _room.trim()  # from here on a step asks for other sizes
        if root in packing.wanted:
            _pack(watch.called(), packing.shared_storages(root))
        return
    if watch is None or not watch.order:
        _thread.watch = _watches[root] = _Watch()


def _pack(layers: list[FusedLora], shared: set[int]) -> None:
    """Packs each group once, and each layer without siblings by itself."""
    for layer in layers:
        group = _groups.get(layer)
        members = [layer] if group is None else group.layers()
        if members and members[0] is layer:
            packing.pack(members, [member.standing_plan() for member in members], shared)


def end_forward(root: nn.Module, *_: Any) -> None:
    """Forward hook of an accelerated model: nothing unfetched is kept in this thread."""
    if torch.compiler.is_compiling():
        return
    watch: _Watch | None = getattr(_thread, "watch", None)
    if watch is not None:
        watch.close_run()
        _thread.watch = None
    for group in list(_holding().values()):
        group.clear()


def forget(root: nn.Module) -> None:
    """Undoes all that was learnt about a model."""
    _watches.pop(root, None)
    _seen.discard(root)
    packing.wanted.discard(root)
    packing.unpack(root.modules())
    for module in root.modules():
        _groups.pop(module, None)
