"""The repeated layers of a model, and how each is run under its policy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fastft import backends
from fastft.memory._activations import Narrowing
from fastft.memory._attention import Site, Store, full_contexts, keep_attention
from fastft.memory._host import HostRing, MetaRing, Parked
from fastft.memory._saved import saving
from fastft.nn.swap import Swapped, combined_class, original_of, swapped_class
from fastft.streams import CudaEngine

__all__ = [
    "POLICIES",
    "Layer",
    "LayerState",
    "find_layers",
    "forget_state",
    "hidden_of",
    "ring_of",
    "set_state",
    "state_of",
    "tensors_in",
    "without_cache",
]

# From the one that keeps most to the one that keeps least.
POLICIES = ("none", "lora", "attention", "full", "offload")

# Where a layer holds its state.
STATE = "fastft_memory"
# Arguments that make a layer write into a cache, which a recompute would do twice: by their names
# where they are tuples, whatever their names (and places) where they are caches.
_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class LayerState:
    """How one layer is run.

    Attributes:
        index: its place among the layers.
        on_device: offload leaves its tensors where they are.
        plan: what chooses the policy, under "auto".
        compressed: forwards so far whose activations were compressed.
        attention: what is known of the layer's.
    """

    index: int
    policy: str
    on_device: bool = False
    compression: str | None = None
    plan: Any = None
    compressed: int = 0
    attention: Site = field(default_factory=Site)

    def seed(self) -> int:
        """Of the rounding in the next forward: by torch's seed, the layer, and the forwards so far,
        so that one run is as another."""
        self.compressed += 1
        return hash((torch.initial_seed(), self.index, self.compressed)) % 2**63


def state_of(layer: nn.Module) -> LayerState | None:
    """The layer's state, where a policy is in force."""
    return layer.__dict__.get(STATE)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A layer's hidden states: its first tensor, or what is passed by that name."""
    found = next((a for a in args if isinstance(a, Tensor)), kwargs.get("hidden_states"))
    return found if isinstance(found, Tensor) else None


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _own_flag(layer: Any) -> bool:
    """Transformers' flag: off under a policy."""
    return STATE not in layer.__dict__ and bool(layer.__dict__.get("gradient_checkpointing", False))


def _set_own_flag(layer: Any, value: bool) -> None:
    if STATE not in layer.__dict__:
        layer.__dict__["gradient_checkpointing"] = value


class Layer(Swapped):
    """A layer whose forward runs under its policy; Transformers' own flag for checkpointing, which
    a Trainer sets, has no further effect on it."""

    gradient_checkpointing = property(_own_flag, _set_own_flag)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's, under the policy while gradients are recorded in training."""
        forward = super().forward  # type: ignore[misc]
        state = state_of(self)
        if state is None or not self.training or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if any(_holds(value, self) for value in _caches(args, kwargs)):
            return forward(*args, **kwargs)  # of a prefix: read and written once, so run once
        if state.plan is not None and not torch.compiler.is_compiling():
            state.plan.see(self, forward, args, kwargs)
        if state.policy in ("none", "lora"):
            keeps = state.policy == "none" and state.compression is None
            if keeps or torch.compiler.is_compiling():  # a compiler chooses what it recomputes
                return forward(*args, **kwargs)
            return _with_recipes(self, state, forward, args, kwargs)
        if _caches(args, kwargs) and not torch.compiler.is_compiling():
            warnings.warn(_NO_CACHE, stacklevel=2)
        return _recomputed(state, forward, *without_cache(args, kwargs))


# Transformers says the same of its own checkpointing. Keys and values of all layers, held to the
# end of the forward, are what a policy is there to avoid.
_NO_CACHE = (
    "fastft.memory: layers that are computed again write no cache in training: the one that is "
    "returned is empty. use_cache=False says that none is wanted"
)


def without_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer that is run twice."""
    args = tuple(None if _is_cache(value) else value for value in args)
    off = {name: None for name, v in kwargs.items() if name in _CACHES or _is_cache(v)}
    return args, kwargs | off | ({"use_cache": False} if kwargs.get("use_cache") else {})


def _caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The caches among a layer's arguments."""
    named = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
    others = [v for k, v in kwargs.items() if k not in _CACHES and _is_cache(v)]
    return [*(value for value in args if _is_cache(value)), *named, *others]


def _holds(cache: Any, layer: nn.Module) -> bool:
    """Whether a cache has something of this layer already."""
    if not _is_cache(cache):
        return any(tensor.numel() for tensor in tensors_in(cache))
    places = (getattr(module, "layer_idx", None) for module in layer.modules())
    place = next((found for found in places if found is not None), 0)
    for name in ("get_seq_length", "has_previous_state"):
        with suppress(ValueError, AttributeError):  # not what this kind of layer is asked
            return bool(getattr(cache, name)(place))
    return False  # it keeps nothing there: its keys and values are another layer's


def _is_cache(value: Any) -> bool:
    """Whether this is a cache of Transformers, which this package does not import."""
    return not isinstance(value, Tensor) and hasattr(value, "get_seq_length")


def _with_recipes(
    layer: nn.Module, state: LayerState, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    narrow = None
    if state.compression is not None:
        weights = (*layer.parameters(), *layer.buffers())
        hidden, inputs = hidden_of(args, kwargs), tensors_in((args, kwargs))
        narrow = Narrowing(state.compression, state.seed(), hidden, weights, inputs)
    with saving(recipes=state.policy == "lora", narrow=narrow):
        return forward(*args, **kwargs)


def _recomputed(state: LayerState, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    run = functools.partial(torch_checkpoint, forward, *args, use_reentrant=False, **kwargs)
    compiling = torch.compiler.is_compiling()
    if state.policy == "full":
        return run() if compiling else run(context_fn=full_contexts)
    first = hidden_of(args, {})  # torch saves what is passed by position
    parks = state.policy == "offload" and not state.on_device and not compiling
    if not parks or first is None or backends.device_type_of(first) != "cuda":
        if compiling:
            return run(context_fn=keep_attention)
        return run(context_fn=lambda: keep_attention(site=state.attention))
    ring = ring_of(first.device)
    store = Store(functools.partial(_park, ring), functools.partial(_fetch, ring))
    with saved_tensors_hooks(store.put, store.get):  # for the layer's inputs
        return run(context_fn=lambda: keep_attention(store, state.attention))


# Below this many bytes a copy to the host costs more than it frees.
_LEAST = 1 << 16


def _park(ring: Any, tensor: Tensor) -> Any:
    if tensor.nbytes < _LEAST or tensor.device.type == "cpu":
        return tensor.detach()
    return ring.park(tensor)


def _fetch(ring: Any, held: Any) -> Tensor:
    return ring.fetch(held) if isinstance(held, Parked) else held


@functools.cache
def ring_of(device: torch.device) -> Any:
    """The device's ring."""
    return MetaRing() if device.type == "meta" else HostRing(CudaEngine(device))


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: members of its outermost lists of two or more modules, each
    with two or more matrices in it."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _repeats(module):
            found.extend(module.children())
            return
        for child in module.children():
            walk(child)

    walk(model)
    return found


def _repeats(modules: nn.Module) -> bool:
    children = list(modules.children())
    return len(children) > 1 and all(_is_layer(child) for child in children)


def _is_layer(module: nn.Module) -> bool:
    matrices = sum(1 for m in module.modules() for p in m._parameters.values()
                   if p is not None and p.dim() > 1)  # fmt: skip
    return matrices > 1


def set_state(layer: nn.Module, state: LayerState) -> None:
    """Puts a layer under a policy."""
    if not isinstance(layer, Layer):
        present: Any = type(layer)
        original: Any = original_of(layer)
        own: Any = swapped_class(Layer, original)
        layer.__class__ = own if present is original else combined_class(present, own)
    layer.__dict__[STATE] = state


def forget_state(layer: nn.Module) -> None:
    """The layer is what it was."""
    layer.__dict__.pop(STATE, None)
    parts = vars(type(layer)).get("fastft_parts")
    if parts is not None and issubclass(parts[1], Layer):
        layer.__class__ = parts[0]
    elif vars(type(layer)).get("fastft_mixin") is Layer:
        layer.__class__ = original_of(layer)
