"""The policy "auto": the cheapest mix of policies within a budget of bytes.

What each layer keeps under each policy is measured on its own inputs, in the first step: one
forward a policy and kind of layer, thrown away. The choice is a multiple-choice knapsack, solved
over the frontier of (bytes, cost), bytes to a 4096th of the budget.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastft.errors import ArgumentError
from fastft.memory._attention import Store, keep_attention
from fastft.memory._layers import hidden_of, state_of, tensors_in, without_cache
from fastft.memory._saved import saving
from fastft.nn.calls import uncounted
from fastft.nn.swap import original_of

__all__ = ["Choice", "Plan", "cheapest", "free_memory", "measure", "reserved_bytes"]

MIXED = ("none", "lora", "attention", "full")
# Share of free memory that is used where no budget is given.
_SHARE = 0.9
# Where a container's limits are (version 2; of version 1 those of memory are in a folder).
_CGROUP = Path("/sys/fs/cgroup")
# Two states in float32, of a parameter.
_STATE_BYTES = 8


@dataclass(frozen=True)
class Choice:
    """A layer under one policy: bytes it keeps, bytes it holds while it is recomputed, and the work
    of its recompute in floating-point operations."""

    policy: str
    kept: int
    held: int
    cost: float


def cheapest(layers: Sequence[Sequence[Choice]], budget: int) -> list[Choice] | None:
    """The choice for each layer with the least cost whose peak is within ``budget``; None where
    there is none. The peak: what all layers keep and the largest recomputed layer."""
    holds = sorted({choice.held for layer in layers for choice in layer})
    best: tuple[float, int, list[Choice]] | None = None
    # With the largest recomputed layer given, only the sum is left to be minded.
    for held in holds:
        allowed = [[c for c in layer if c.held <= held] for layer in layers]
        found = _knapsack(allowed, budget - held) if all(allowed) else None
        if found is not None:
            cost, kept = sum(c.cost for c in found), sum(c.kept for c in found)
            if best is None or (cost, kept) < best[:2]:
                best = (cost, kept, found)
    return None if best is None else best[2]


def _knapsack(layers: list[list[Choice]], room: int) -> list[Choice] | None:
    """The frontier of mixes that no other beats in both bytes and cost."""
    # Bytes in units of a 4096th of the room, rounded up: layers that all differ would make the
    # frontier grow without end.
    unit = max(1, room // 4096)
    front: list[tuple[int, float, Any]] = [(0, 0.0, None)]
    for choices in layers:
        grown = [
            (kept - (-c.kept // unit), cost + c.cost, (c, before))
            for kept, cost, before in front
            for c in choices
            if (kept - (-c.kept // unit)) * unit <= room
        ]
        grown.sort(key=lambda point: point[:2])
        front, least = [], float("inf")
        for point in grown:
            if point[1] < least:
                front.append(point)
                least = point[1]
    if not front:
        return None
    chain, found = min(front, key=lambda point: point[1])[2], []
    while chain is not None:
        found.append(chain[0])
        chain = chain[1]
    return found[::-1]


class Plan:
    """A model under "auto": measures in the first step, under ``full``, and decides before the
    second; and again when a batch has more tokens than any before."""

    def __init__(
        self, layers: list[nn.Module], budget: int | None, model: nn.Module | None = None
    ) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._model = None if model is None else weakref.ref(model)
        self._first: int | None = None
        self._stepped = _Stepped()
        self._kinds = [_kind(layer) for layer in layers]
        self._budget = budget
        self._tokens = 0
        self._measured: dict[Any, list[Choice]] = {}
        self._decided = False
        self._busy = False

    def __reduce__(self) -> Any:
        """A copied or pickled model keeps the policies it had then, without a plan."""
        return _no_plan, ()

    def see(self, layer: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Called by each layer before its forward."""
        hidden = hidden_of(args, kwargs)
        # In a backward this is a recompute, which must do what its forward did.
        if hidden is None or self._busy or torch._C._current_graph_task_id() != -1:
            return
        tokens = hidden.shape[:-1].numel()
        index = state_of(layer).index  # type: ignore[union-attr]
        if self._first is None:
            self._first = index
        begins = index == self._first
        if begins and tokens > self._tokens:
            self._tokens, self._measured, self._decided = tokens, {}, False
            self._set(["full"] * len(self._layers))
        elif begins and not self._decided and self._measured:
            self._decide(hidden.device)  # a whole forward has been seen
        if not self._decided and self._kinds[index] not in self._measured:
            self._busy = True
            try:
                choices = measure(layer, forward, args, kwargs, hidden)
            finally:
                self._busy = False
            self._measured[self._kinds[index]] = choices

    def _reserved(self) -> int:
        """What training will still allocate beside activations."""
        model = None if self._model is None else self._model()
        return 0 if model is None else reserved_bytes(model, self._stepped.seen)

    def _decide(self, device: torch.device) -> None:
        # Layers that no batch reaches (another tower's) cost nothing under "full".
        unseen = [Choice("full", 0, 0, 0.0)]
        choices = [self._measured.get(kind, unseen) for kind in self._kinds]
        reserved = self._reserved() if self._budget is None else 0
        budget = budget_or_free(self._budget, reserved, device)
        found = cheapest(choices, budget)
        if found is None:
            least = sum(c[-1].kept for c in choices) + max(c[-1].held for c in choices)
            raise ArgumentError(
                "fastft.memory.checkpoint (auto)",
                "budget",
                expected=f"at least {least} bytes: all layers under 'full', {self._tokens} tokens",
                got=f"{budget} bytes",
                remedy="Make the batch or the sequence shorter"
                + (", or use policy 'offload'." if device.type == "cuda" else "."),
            )
        # What keeps least goes first: its recompute comes when the others' memory is free again.
        order = {name: place for place, name in enumerate(reversed(MIXED))}
        policies = [choice.policy for choice in found]
        for kind in set(self._kinds):
            places = [i for i, k in enumerate(self._kinds) if k == kind]
            ranked = sorted((policies[i] for i in places), key=order.__getitem__)
            for i, policy in zip(places, ranked, strict=True):
                policies[i] = policy
        self._set(policies)
        self._decided = True
        kept = sum(c.kept for c in found) + max(c.held for c in found)
        counts = ", ".join(f"{policies.count(p)} x {p}" for p in MIXED if p in policies)
        print(
            f"fastft.memory: {counts}; {_say(kept)} of activations at {self._tokens} tokens, "
            f"budget {_say(budget)}",
            file=sys.stderr,
        )

    def _set(self, policies: list[str]) -> None:
        for ref, policy in zip(self._layers, policies, strict=True):
            state = None if (layer := ref()) is None else state_of(layer)
            if state is not None:
                state.policy = policy


def _no_plan() -> None:
    """What a plan is to a copy."""


def _kind(layer: nn.Module) -> Any:
    """Layers of one kind keep the same number of bytes."""
    shapes = tuple(
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()
    )
    return (original_of(layer), shapes)


def measure(
    layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, hidden: Tensor
) -> list[Choice]:
    """What the layer keeps under each policy of ``MIXED`` for these inputs; its random numbers and
    its counts are as if it had not run."""
    args, kwargs = without_cache(args, kwargs)
    # The first layer's input may need no gradient; the others' do.
    fresh = hidden.detach().requires_grad_()
    args = tuple(fresh if a is hidden else a for a in args)
    kwargs = {name: fresh if a is hidden else a for name, a in kwargs.items()}
    others = [t for t in tensors_in(kwargs) if t is not fresh]
    shared = [*layer.parameters(), *layer.buffers(), *others]
    known = {t.untyped_storage()._cdata for t in shared}
    base = hidden.nbytes
    devices = [hidden.device] if hidden.is_cuda else []

    def run(context: Callable[[Callable[[Tensor], None]], Any]) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                seen[storage._cdata] = storage.nbytes()

        held: list[Any] = []
        # Own hooks: what is saved here is nobody's who runs the model in a checkpoint of his own.
        own = saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
        with torch.random.fork_rng(devices), uncounted(), own, context(note):
            held.append(forward(*args, **kwargs))
        return sum(seen.values())

    everything = run(_counted)
    moved: list[int] = []
    recipe = run(lambda note: saving(recipes=True, sink=note, remade=moved.append))
    attention = base + run(lambda note: keep_attention(Store(put=_noted(note)))[0])
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    tokens = hidden.shape[:-1].numel()
    length = hidden.shape[-2] if hidden.dim() > 1 else 1
    products = 2.0 * tokens * matrices
    passes = float(sum(moved)) * _INTENSITY.get(hidden.device.type, _INTENSITY["cpu"])
    scores = 2.0 * tokens * length * hidden.shape[-1]
    return [
        Choice("none", everything, 0, 0.0),
        Choice("lora", recipe, 0, passes),
        Choice("attention", attention, everything, products),
        Choice("full", base, everything, products + scores),
    ]


# Floating-point operations in the time of moving a byte: what a pass over memory costs.
_INTENSITY = {"cuda": 250.0, "cpu": 40.0}


def _counted(note: Callable[[Tensor], None]) -> Any:
    return saved_tensors_hooks(_noted(note), lambda tensor: tensor)


def _noted(note: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor.detach()

    return put


def _say(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


def reserved_bytes(model: nn.Module, stepped: bool = False) -> int:
    """What training will allocate beside activations: gradients of trained weights that are not
    there, and states, unless an optimizer has made a step and with it its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained if p.grad is None)
    return gradients + (0 if stepped else sum(_STATE_BYTES * p.numel() for p in trained))


class _Stepped:
    """Whether any optimizer has made a step since; torch tells whoever asked."""

    _all: ClassVar[weakref.WeakSet[_Stepped]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.seen = False
        _listen()
        self._all.add(self)

    @classmethod
    def tell(cls, *_: Any) -> None:
        for stepped in list(cls._all):
            stepped.seen = True


@functools.cache
def _listen() -> None:
    register_optimizer_step_post_hook(_Stepped.tell)


def budget_or_free(budget: int | None, reserved: int, device: torch.device) -> int:
    """The budget, or most of what is free beside the bytes that are reserved."""
    return max(0, int(_SHARE * free_memory(device)) - reserved) if budget is None else budget


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    # Processes of one run on this machine share it.
    return min([_available(), *_container_room()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _container_room() -> list[int]:
    """Bytes left below a container's limit, where there is one."""
    found = []
    for folder, limit, used, prefix in (
        (_CGROUP, "memory.max", "memory.current", ""),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            text = {n: (folder / n).read_text(encoding="ascii") for n in (limit, used)}
            room = int(text[limit]) - int(text[used]) + _file_cache(folder, prefix)
            found.append(max(0, room))
        except (OSError, ValueError):
            continue
    return found


def _file_cache(folder: Path, prefix: str) -> int:
    """Bytes of files that a container is charged for, and that give way to allocations."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
