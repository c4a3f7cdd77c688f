"""A training step on meta tensors: every allocation and every piece of work of the code that will
run, without running it.

The model's own forward and backward run on meta tensors, fused operations and memory policies
included; launchers only look. What is alive at each moment is counted by storage, as an allocator
would; work is counted as floating-point operations of products and bytes of everything else.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft import backends
from fastft.nn.calls import uncounted
from fastft.nn.deferred import DeferredLogits, only_shapes
from fastft.ops._room import looked_at

__all__ = ["Meter", "Work", "metered"]


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations of its products, bytes it reads and writes, rows,
    columns and depth of its largest product (0: none), and bytes of one of its elements."""

    name: str
    flops: float
    bytes: float
    product: tuple[int, int, int] = (0, 0, 0)
    itemsize: int = 4


@dataclass
class _Held:
    """A storage; place: 0 the heap, 1 the pool."""

    storage: weakref.ref[Any]
    size: int
    place: int = 0


@dataclass
class Meter:
    """What a simulated stretch of work allocated and did.

    Attributes:
        live, peak: bytes above what was there before, now and at most.
        taken: bytes of all allocations but those of a CPU's pool, which is mapped once
            (``fastft.ops._room``).
        work: its operations, in order.
    """

    live: int = 0
    peak: int = 0
    taken: int = 0
    work: list[Work] = field(default_factory=list)
    _known: dict[int, _Held] = field(default_factory=dict)
    # Of each place.
    _now: list[int] = field(default_factory=lambda: [0, 0])
    _most: list[int] = field(default_factory=lambda: [0, 0])
    _follows: bool = False

    def start(self) -> None:
        """Peak and work from here on."""
        self.peak, self.taken = self.live, 0
        self._most = list(self._now)
        self.work.clear()

    @property
    def resident(self) -> int:
        """The most that a process on a CPU holds: heap and pool do not give to each other."""
        return sum(self._highest())

    def _highest(self) -> list[int]:
        return [max(pair) for pair in zip(self._most, self._now, strict=True)]

    def ignore(self, tensors: Any) -> None:
        """These were there before."""
        for tensor in tensors:
            self._track(tensor, counts=False)

    def allocated(self, tensor: Tensor, *, follows: bool = False) -> None:
        """Counts the tensor's storage until it is freed; once. follows: into the place of another,
        which is freed now if ever; if not, the next allocation finds both."""
        self._track(tensor, counts=True)
        self._follows = follows
        if not follows:
            self.peak = max(self.peak, self.live)

    def pooled(self, tensor: Tensor) -> None:
        """What was made last is the pool's."""
        held = self._track(tensor, counts=True)
        self._now[held.place] -= held.size
        self.taken -= held.size
        held.place = 1
        self._now[1] += held.size

    def _track(self, tensor: Tensor, counts: bool) -> _Held:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key]
        # Of those before: by now it is known whose they are, and what they follow is freed.
        self._most, self._follows = self._highest(), False
        size = storage.nbytes() if counts else 0

        def freed(_: Any) -> None:
            held = self._known.pop(key)
            if not self._follows:
                self._most = self._highest()
            self._follows = False
            self.live -= size
            self._now[held.place] -= size

        held = self._known[key] = _Held(weakref.ref(storage, freed), size)
        self.live += size
        self.taken += size
        self._now[0] += size
        return held


class _Watch(TorchDispatchMode):
    """Sees every operation of torch."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter
        self._any = 0

    def _guess(self, tensor: Tensor) -> Any:
        """What a model that looks at its data would most likely see: masks without holes, no token
        out of range."""
        if tensor.dtype == torch.bool:
            return tensor.untyped_storage()._cdata != self._any
        return 1.0 if tensor.is_floating_point() else 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            return self._guess(args[0])
        result = func(*args, **(kwargs or {}))
        if only_shapes() or isinstance(result, DeferredLogits):  # without storage
            return result
        if func.name().startswith("aten::any"):
            self._any = result.untyped_storage()._cdata
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Autograd adds up gradients of one tensor in place, but not before a mode's eyes.
        follows = func.name() == "aten::add.Tensor" and torch._C._current_graph_task_id() != -1
        for tensor in outputs:
            self._meter.allocated(tensor, follows=follows)
        if outputs and not _is_view(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            work = _work_of(func, inputs, outputs)
            count = _REGISTERED.get(work.name)
            if count is not None:
                work = replace(work, name=count[0], flops=count[1](*args), itemsize=2)
            self._meter.work.append(work)
        return result


def _is_view(func: Any) -> bool:
    return func.is_view or func.name() in _NO_WORK


_NO_WORK = frozenset(
    ("aten::empty.memory_format", "aten::empty_like", "aten::new_empty", "aten::empty_strided",
     "aten::detach", "aten::_unsafe_view", "aten::new_empty_strided", "aten::lift_fresh")
)  # fmt: skip
_PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"))


def _work_of(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Work:
    name = func.name().partition(".")[0]
    moved = float(sum(t.nbytes for t in (*inputs, *outputs)))
    if name not in _PRODUCTS:
        return Work(name, 0.0, moved)
    left, right = inputs[-2:] if len(inputs) < 4 else inputs[1:3]
    batch = left.shape[0] if left.dim() == 3 else 1
    rows, depth, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    product = (rows, columns, depth)
    return Work(name, 2.0 * batch * rows * depth * columns, moved, product, left.element_size())


class Launchers:
    """In the place of every launcher: notes the call and touches nothing.

    Args:
        meter: what is told.
        device_type: of the device that is planned for.
    """

    def __init__(self, meter: Meter, device_type: str) -> None:
        self.device_type = device_type
        self._meter = meter
        # The CPU's launchers keep their buffers between calls.
        self._kept: dict[str, Tensor] = {}

    def select(self, op: str) -> tuple[str, Any]:
        """Of ``fastft.backends.Planned``: as if every backend of the device were installed."""
        # torch's own kernel keeps what fastft's does.
        torch_has_it = op == "attention" and self.device_type == "cuda"
        served = (name for name in backends.ORDER if self._serves(op, name))
        name = "torch" if torch_has_it else next(served)
        return name, _Launcher(op, name, self._meter, self._kept)

    def _serves(self, op: str, name: str) -> bool:
        if name == "reference":
            return True
        backend = backends.BACKENDS[name]
        here = backend.device_types is None or self.device_type in backend.device_types
        return here and importlib.util.find_spec(f"{backend.package}.{op}") is not None


# Functions that only some launchers of an operation have.
_OPTIONAL = {
    "fwd_values": ("cpu", "triton"),
    "fwd_adapters": ("cpu", "triton"),
    "fwd_plain": (),  # the same work, sooner on its way
    "lay_out": (),
    "glu_bwd": (),
    "takes_scales": (),
    "norm": (),
}


class _Launcher:
    def __init__(self, op: str, backend: str, meter: Meter, kept: dict[str, Tensor]) -> None:
        self._op, self._backend, self._meter, self._kept = op, backend, meter, kept

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._backend not in _OPTIONAL.get(name, (self._backend,)):
            raise AttributeError(name)
        if name == "new_slab":
            return self._new_slab

        def look(*args: Any, **kwargs: Any) -> None:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            count = _FLOPS.get((self._op, name))
            flops, product = (0.0, (0, 0, 0)) if count is None else count(*args, **kwargs)
            moved = float(sum(t.nbytes for t in tensors))
            floats = [t.element_size() for t in tensors if t.is_floating_point()]
            work = Work(f"{self._op}.{name}", flops, moved, product, min(floats, default=4))
            self._meter.work.append(work)

        return look

    def _new_slab(self, name: str, tokens: int, vocabulary: int, hidden: Tensor) -> Tensor:
        slab = hidden.new_empty(tokens, vocabulary)
        if self._backend == "cpu":
            self._kept[name] = slab
        return slab


Counted = tuple[float, tuple[int, int, int]]


def _lora_adapters(ys: Any, ss: Any, x: Tensor, *_: Any) -> Counted:
    """Of lora_linear's forward: the products of x and the As."""
    return 2.0 * x.numel() * sum(s.shape[1] for s in ss), (0, 0, 0)


def _lora_values(ys: Any, ss: Any, x: Tensor, weights: Any, *_: Any) -> Counted:
    """Of lora_linear's forward: the frozen products, and those of the ss and the Bs."""
    rows, depth = x.shape
    out = sum(w.shape[0] for w in weights)
    thin = 2.0 * rows * sum(s.shape[1] for s in ss) * out / max(1, len(weights))
    return 2.0 * rows * depth * out + thin, (rows, out, depth)


def _lora(*call: Any) -> Counted:
    flops, product = _lora_values(*call)
    return flops + _lora_adapters(*call)[0], product


def _lora_bwd(
    dx: Any, das: Any, dbs: Any, dys: Any, x: Tensor, ss: Any, weights: Any, *_: Any
) -> Counted:
    rows, depth = x.shape
    out = sum(w.shape[0] for w in weights)
    ranks = sum(s.shape[1] for s in ss)
    thin = 4.0 * rows * ranks * (depth + out / max(1, len(weights)))
    whole = 2.0 * rows * depth * out if dx is not None else 0.0
    return whole + thin, (rows, depth, out) if dx is not None else (0, 0, 0)


def _scores(query: Tensor, key: Tensor, value: Tensor, products: float, causal: bool) -> float:
    batch, heads, queries, width = query.shape
    total = products * batch * heads * queries * key.shape[2] * (width + value.shape[-1])
    return total / 2 if causal else total


def _attention(
    out: Any, lse: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **facts: Any
) -> Counted:
    return _scores(query, key, value, 2.0, facts["is_causal"]), (0, 0, 0)


def _attention_bwd(
    dq: Any, dk: Any, dv: Any, d_out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any,
    **facts: Any,
) -> Counted:  # fmt: skip
    return _scores(query, key, value, 5.0, facts["is_causal"]), (0, 0, 0)


def _project(slab: Tensor, hidden: Tensor, weight: Tensor) -> Counted:
    rows, depth = hidden.shape
    return 2.0 * rows * depth * weight.shape[0], (rows, weight.shape[0], depth)


def _d_hidden(out: Tensor, slab: Tensor, weight: Tensor) -> Counted:
    rows, columns = slab.shape
    return 2.0 * rows * columns * weight.shape[1], (rows, weight.shape[1], columns)


def _d_weight(out: Tensor, slab: Tensor, hidden: Tensor, first: bool) -> Counted:
    return 2.0 * slab.shape[0] * slab.shape[1] * hidden.shape[1], (*out.shape, slab.shape[0])


_FLOPS: dict[tuple[str, str], Callable[..., Counted]] = {
    ("lora_linear", "fwd"): _lora,
    ("lora_linear", "fwd_values"): _lora_values,
    ("lora_linear", "fwd_adapters"): _lora_adapters,
    ("lora_linear", "bwd"): _lora_bwd,
    ("attention", "fwd"): _attention,
    ("attention", "bwd"): _attention_bwd,
    ("linear_cross_entropy", "project"): _project,
    ("linear_cross_entropy", "d_hidden"): _d_hidden,
    ("linear_cross_entropy", "add_d_weight"): _d_weight,
}


# Registered operations, seen by torch's dispatcher: name and operations, from their arguments.
_REGISTERED: dict[str, tuple[str, Callable[..., float]]] = {
    "fastft::attention_fwd": (
        "attention.fwd",
        lambda q, k, v, mask, scale, causal, backend: _scores(q, k, v, 2.0, causal),
    ),
    "fastft::attention_bwd": (
        "attention.bwd",
        lambda d, q, k, v, mask, out, lse, scale, causal, backend: _scores(q, k, v, 5.0, causal),
    ),
}


@contextmanager
def metered(meter: Meter, device_type: str) -> Iterator[None]:
    """Inside, work on meta tensors is counted as on a device of this type."""
    launchers = Launchers(meter, device_type)
    pool = looked_at(meter.pooled) if device_type == "cpu" else nullcontext()
    with backends.planning(launchers), uncounted(), pool, _Watch(meter):
        yield
