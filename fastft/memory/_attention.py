"""Recompute all but attention: its results are kept, in the order they were made.

Attention is the one part of a block whose recompute grows with the square of the sequence and whose
result is no larger than a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastft.ops._saving import attending, saving_first

__all__ = ["ATTENTION_OPS", "Site", "Store", "compiling", "full_contexts", "keep_attention"]

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# Resolved where they exist: fastft's attention, torch's own, and flash-attn's.
ATTENTION_OPS = (
    "fastft::attention_fwd",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)


def _is_attention(func: Any) -> bool:
    return func.name().partition(".")[0] in ATTENTION_OPS


@dataclass(frozen=True)
class Store:
    """Where results of attention are between forward and recompute: ``put(tensor)`` gives what is
    held in its place, ``get`` of that the tensor."""

    put: Callable[[Tensor], Any] = Tensor.detach
    get: Callable[[Any], Tensor] = lambda held: held


def _random_state(device: torch.device) -> Any:
    """Where the device's random numbers stand; a host value, without a wait."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0].get_offset()
    return torch.get_rng_state() if device.type == "cpu" else None


def _set_random_state(device: torch.device, state: Any) -> None:
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].set_offset(state)
    elif device.type == "cpu":
        torch.set_rng_state(state)


@dataclass
class Site:
    """What is known of a layer: whether all its attention is fastft's (None: not yet), which says
    when it begins. A mode then looks at that alone, not at each of a layer's hundreds of
    operations, which takes longer on the host than many of them on a GPU."""

    apart: bool | None = None


@dataclass(frozen=True)
class _Held:
    payload: Any
    version: int


class _Keep(TorchDispatchMode):
    """Of the forward: notes what attention returned."""

    def __init__(self, store: Store, results: list[Any], site: Site) -> None:
        super().__init__()
        self._store, self._results, self._site = store, results, site
        self._apart = bool(site.apart)
        self.inside = self._apart

    def around(self) -> Iterator[AbstractContextManager[Any]]:
        """What the layer runs within."""
        if self._apart:
            yield self._expecting()
            yield attending(self)
        else:
            yield attending(_Inside(self))
            yield self

    @contextmanager
    def _expecting(self) -> Iterator[None]:
        yield
        if not self._results:  # it is somebody else's by now
            self._site.apart = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if _is_attention(func):
            items = found if isinstance(found, (tuple, list)) else (found,)
            device = next(item.device for item in items if isinstance(item, Tensor))
            if not self.inside:
                self._site.apart = False
            elif self._site.apart is None:
                self._site.apart = True
            held = [self._held(item) for item in items]
            self._results.append((held, device, _random_state(device)))
        return found

    def _held(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return _Held(self._store.put(item), item._version)


class _Inside:
    """Around attention in a layer that is watched as a whole: it says when it begins."""

    def __init__(self, mode: _Keep) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode.inside = True

    def __exit__(self, *error: Any) -> None:
        self._mode.inside = False


class _Replay(TorchDispatchMode):
    """Of the recompute: returns what was noted, in order."""

    def __init__(self, store: Store, results: list[Any], site: Site) -> None:
        super().__init__()
        self._store, self._results, self._next = store, results, 0
        self._apart = bool(site.apart)

    def around(self) -> Iterator[AbstractContextManager[Any]]:
        """What the layer runs within, from the first result on."""
        self._next = 0
        yield saving_first()
        yield attending(self) if self._apart else self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _is_attention(func):
            return func(*args, **(kwargs or {}))
        if self._next == len(self._results):
            raise RuntimeError(
                "fastft.memory: the recompute called attention more often than the forward"
            )
        items, device, state = self._results[self._next]
        self._next += 1
        # Attention with dropout drew numbers: what comes after draws the same as it did.
        _set_random_state(device, state)
        found = [self._given(item) for item in items]
        return found[0] if len(found) == 1 else tuple(found)

    def _given(self, item: Any) -> Any:
        if not isinstance(item, _Held):
            return item
        tensor = self._store.get(item.payload)
        # A copy brought back from elsewhere begins at version 0.
        if tensor._version > item.version:
            raise RuntimeError("fastft.memory: the result of attention was changed in place")
        # Without the graph of this recompute, which would live as long as the result.
        return tensor.detach()


class _Within:
    """Contexts one in another, made anew as often as there are forward or backward passes."""

    def __init__(self, around: Callable[[], Iterable[AbstractContextManager[Any]]]) -> None:
        self._around = around

    def __enter__(self) -> None:
        self._open = ExitStack()
        for context in self._around():
            self._open.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def compiling() -> bool:
    """torch 2.11 asks for contexts while it compiles, and says that it does not."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def full_contexts() -> Contexts:
    """``context_fn`` of a checkpoint that keeps nothing: the last product of a recompute, whose
    value nobody needs, is left out."""
    return nullcontext(), _Within(lambda: [saving_first()])


def keep_attention(store: Store | None = None, site: Site | None = None) -> Contexts:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint(use_reentrant=False)`` that recomputes
    all but attention. site: of a layer whose forwards come through here one after another.

    Through a Trainer: see :func:`fastft.memory.context_fn`.
    """
    if compiling():
        return create_selective_checkpoint_contexts(_selective_policy)
    store, site = store or Store(), site or Site()
    results: list[Any] = []
    replay = _Replay(store, results, site)
    return _Within(_Keep(store, results, site).around), _Within(replay.around)


def _selective_policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = _is_attention(func)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
