"""``Batch``: the tensors of one call, gathered once: states, step counts and hyper-parameters.
``Part``: what a step takes of one device, and its batches."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft import ops
from fastft.ops.optimizer_step import HYPER, STATE_BLOCK, launcher_of
from fastft.optim._hyper import GRAD_DTYPES
from fastft.optim._places import (
    absmax_name,
    check_place,
    in_order,
    is_home,
    lay_out,
    new_memory,
    order_of,
    put,
    strides_of,
)
from fastft.optim._shards import like_param, local

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer

__all__ = ["Batch", "Members", "Part", "by_device"]

Members = Sequence[tuple[Tensor, dict[str, Any]]]


class Batch:
    """Parameters of one device, what ``ops.optimizer_step`` takes of them, and their table of
    hyper-parameters, which changes only where a group's do."""

    def __init__(self, optimizer: FusedOptimizer, members: Members) -> None:
        for p, _ in members:
            optimizer.refuse(p, p if p.grad is None else p.grad)
        check_place(optimizer, [p for p, _ in members])
        make_states(optimizer, members)
        self._states = [optimizer.state_of(p) for p, _ in members]
        self._counts = [optimizer.n_states(group) for _, group in members]
        self._names = optimizer.state_names[: max(self._counts)]
        parts = [local(p) for p, _ in members]
        self._orders = [order_of(p) if self.reorders else None for p in parts]
        self._copies: list[tuple[Tensor, Tensor]] = []
        # Parameters go in themselves where they can: where their data moves, the table follows.
        self._params = self._dense([p for p, _ in members])
        follows = [view is p and not self.holds_views
                   for (p, _), view in zip(members, self._params, strict=True)]  # fmt: skip
        pairs = list(zip(members, follows, strict=True))
        self._views = [(p, local(p).data_ptr()) for (p, _), follows in pairs if not follows]
        self._followed = [p for (p, _), follows in pairs if follows]
        self._addresses = list(map(Tensor.data_ptr, self._followed))
        self._members = [p for p, _ in members]
        self._facts = _facts(self._members)
        self._shapes = list(map(_shape, self._members))
        wide = all(p.dtype == torch.float64 for p in self._members)
        self._grad_dtypes = GRAD_DTYPES | {torch.float64} if wide else GRAD_DTYPES
        self._contiguous = [p for p in self._members if p.is_contiguous()]
        self._strided = [(p, p.stride()) for p in self._members if not p.is_contiguous()]
        kept = ("step", *self._names, *map(absmax_name, self._names), "compensation")
        self._held = {name: [s.get(name) for s in self._states] for name in kept
                      if any(name in s for s in self._states)}  # fmt: skip
        self._groups = list({id(group): group for _, group in members}.values())
        index = {id(group): i for i, group in enumerate(self._groups)}
        self._group_of = [index[id(group)] for _, group in members]
        self._rows: list[tuple[Any, ...]] = []
        self._captured: list[Tensor] = []  # host memory that graphs copy from
        self._lay_out(optimizer, [optimizer.random_key(p) for p, _ in members])
        shape = (len(self._group_of), len(HYPER))
        self.hyper = torch.zeros(shape, dtype=torch.float32, device=self._params[0].device)

    # Whether the call holds views of the parameters' memory, not the parameters.
    holds_views = False
    # Whether dimensions may come in the order they lie in memory.
    reorders = True

    def _dense(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """The part here of tensors of the members, as it lies in memory; one that lies otherwise or
        with gaps is stepped in a copy."""
        found: list[Any] = []
        for tensor, order in zip(tensors, self._orders, strict=True):
            part = None if tensor is None else in_order(local(tensor), order)
            if part is not None and not part.is_contiguous():
                self._copies.append((part, part.contiguous()))
                part = self._copies[-1][1]
            found.append(part)
        return found

    def _each(self, key: str, number: int = -1) -> list[Tensor | None]:
        """What each member keeps under a key, of its state of this number; None without one."""
        pairs = zip(self._states, self._counts, strict=True)
        return [state.get(key) if number < count else None for state, count in pairs]

    def _lay_out(self, optimizer: FusedOptimizer, keys: list[tuple[int, int]]) -> None:
        states = self._states
        self.tensors = ops.StepTensors(
            optimizer.rule,
            self._params,
            [s["step"] for s in states],
            [self._dense(self._each(name, i)) for i, name in enumerate(self._names)],
            [self._each(absmax_name(name), i) for i, name in enumerate(self._names)],
            self._dense(self._each("compensation")),
            optimizer.rounding,
            [key for key, _ in keys],
            [offset for _, offset in keys],
        )
        self.launcher = launcher_of(self.tensors)

    def run(
        self, optimizer: FusedOptimizer, grads: list[Tensor], stats: Tensor, needs_norm: bool
    ) -> None:
        """The step of these parameters, by what :meth:`grads` gave."""
        self.set_hyper(optimizer)
        for theirs, own in self._copies:
            own.copy_(theirs)
        self._launch(optimizer, grads, stats, needs_norm)
        for theirs, own in self._copies:
            theirs.copy_(own)

    def _launch(
        self, optimizer: FusedOptimizer, grads: list[Tensor], stats: Tensor, needs_norm: bool
    ) -> None:
        self.launcher.step(
            self.tensors,
            grads,
            self.hyper,
            stats,
            max_norm=(optimizer.max_grad_norm or 0.0) if needs_norm else 0.0,
            needs_norm=needs_norm,
            seed=optimizer.seed,
        )

    def is_stale(self, optimizer: FusedOptimizer, params: list[Tensor]) -> bool:
        """Whether parameters have another shape, dtype or layout, views of them other memory, or
        their states were replaced."""
        if _facts(params) != self._facts or self._are_reshaped():
            return True
        # Gradients and states are laid out as the parameters were.
        if not all(map(Tensor.is_contiguous, self._contiguous)):
            return True
        if any(p.stride() != strides for p, strides in self._strided):
            return True
        if any(local(p).data_ptr() != address for p, address in self._views):
            return True
        return not still_held(optimizer.states_of(params), self._held)

    def _are_reshaped(self) -> bool:
        """Whether a shape has changed. Shapes are tuples, thousands of which wake the garbage
        collector: elementwise they matter, and are looked at, only where memory moved."""
        addresses = list(map(Tensor.data_ptr, self._followed))
        if addresses == self._addresses and self.reorders:
            return False
        self._addresses = addresses
        return list(map(_shape, self._members)) != self._shapes

    def grads(self, grads: list[Tensor], optimizer: FusedOptimizer) -> list[Tensor]:
        """Gradients as the kernel takes them: the part here, laid out as the parameter."""
        if not self._views and self._can_be_read(grads):
            return grads
        for p, g in zip(self._members, grads, strict=True):
            optimizer.refuse(p, g)
        pairs = zip(grads, self._orders, strict=True)
        return [in_order(local(g), order).resolve_neg().contiguous() for g, order in pairs]

    def _can_be_read(self, grads: list[Tensor]) -> bool:
        """Whether kernels can read gradients where they lie."""
        # An address says nothing of size, dtype or sign, and would be read as what was there.
        if list(map(Tensor.numel, grads)) != self._facts[1]:
            return False
        if not self._grad_dtypes.issuperset(map(_dtype, grads)):
            return False
        try:
            return all(map(Tensor.is_contiguous, grads)) and not any(map(Tensor.is_neg, grads))
        except RuntimeError:
            return False  # a sparse one

    def row(self, optimizer: FusedOptimizer, group: dict[str, Any]) -> tuple[Any, ...]:
        """A group's row of the table of hyper-parameters."""
        return optimizer.row(group)

    def set_hyper(self, optimizer: FusedOptimizer) -> None:
        """Writes the rows where a group changed. Tensors on the device are copied there each time,
        so that a captured graph reads what they hold when it runs."""
        device = self.hyper.device
        rows, moving = [], []
        for i, group in enumerate(self._groups):
            row = self.row(optimizer, group)
            for column, value in enumerate(row):
                if isinstance(value, Tensor) and value.device == device and device.type != "cpu":
                    moving.append((i, column, value))
            on_device = {column for j, column, _ in moving if j == i}
            rows.append(tuple(0.0 if c in on_device else float(v) for c, v in enumerate(row)))
        if rows != self._rows:
            self._rows = rows
            table = [rows[i] for i in self._group_of]
            host = torch.tensor(table, dtype=torch.float32, device="cpu")
            host = host.pin_memory() if device.type == "cuda" else host
            self.hyper.copy_(host, non_blocking=True)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._rows = []  # written when the graph runs, not yet
                self._captured.append(host)  # of which that copies
        for i, column, value in moving:
            # Members of a group are consecutive.
            first = self._group_of.index(i)
            self.hyper[first : first + self._group_of.count(i), column] = value


# This runs in each step, over tens of thousands of tensors: loops that are no Python's.
_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")


def _facts(params: list[Tensor]) -> tuple[list[torch.dtype], list[int]]:
    return list(map(_dtype, params)), list(map(Tensor.numel, params))


def still_held(states: list[dict[str, Any]], held: dict[str, list[Tensor | None]]) -> bool:
    """Whether the states of these names are the tensors they were."""
    return all(
        all(map(operator.is_, map(dict.get, states, itertools.repeat(name)), tensors))
        for name, tensors in held.items()
    )


def is_eight_bit(optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the states of a parameter of this group are in 8 bits."""
    return group["state_bits"] == 8 and p.numel() >= optimizer.min_8bit_size


def state_dtype(optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Of the states that a parameter of this group gets."""
    if is_eight_bit(optimizer, p, group):
        return torch.uint8
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.bfloat16 if group["state_bits"] == 16 and wide == torch.float32 else wide


def make_states(optimizer: FusedOptimizer, members: Members) -> None:
    """States of parameters that have none, in one arena; loaded ones are put where, and laid out
    as, the parameter is."""
    plan = []
    for p, group in members:
        _adopt(optimizer, p, group)
        plan += [(p, *wanted) for wanted in _missing(optimizer, p, group)]
    # One allocation for each dtype and memory: neighbours in it, and starts of 16 bytes.
    totals: dict[tuple[bool, torch.dtype], int] = {}
    for _, key, size, dtype in plan:
        kind = (key == "step", dtype)
        totals[kind] = totals.get(kind, 0) + _padded(size)
    device = local(members[0][0]).device
    arenas = {}
    for (counts, dtype), total in totals.items():
        place = "device" if counts else optimizer.states
        memory = new_memory(optimizer, place, device, total * dtype.itemsize)
        arenas[counts, dtype] = memory.view(dtype)
    used = dict.fromkeys(arenas, 0)
    for p, key, size, dtype in plan:
        kind = (key == "step", dtype)
        part = arenas[kind][used[kind] : used[kind] + size]
        used[kind] += _padded(size)
        state = optimizer.state_of(p)
        if key == "step":
            state[key] = part.view(())
        elif key.startswith("absmax"):
            state[key] = part
        else:
            here = local(p.detach())
            state[key] = like_param(part.as_strided(here.shape, strides_of(here),
                                                    part.storage_offset()), p)  # fmt: skip
            if dtype != torch.uint8 and key != "compensation":
                optimizer.fresh_state(key, local(state[key]), here)


def _padded(size: int) -> int:
    return -(-size // 16) * 16


def taken(optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]) -> float:
    """Steps behind the states of a parameter: none behind those that are yet to be made. torch's
    SGD counts none; with a buffer, the first lies behind it."""
    state = optimizer.state_of(p)
    return float(state.get("step", 1.0)) if _begun(optimizer, state, group) else 0.0


def _begun(optimizer: FusedOptimizer, state: dict[str, Any], group: dict[str, Any]) -> bool:
    return any(state.get(name) is not None for name in _names(optimizer, group) or state)


def _names(optimizer: FusedOptimizer, group: dict[str, Any]) -> tuple[str, ...]:
    return optimizer.state_names[: optimizer.n_states(group)]


def _adopt(optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]) -> None:
    state = optimizer.state_of(p)
    if not state:
        return
    here = local(p)
    step = state.get("step")
    fits = isinstance(step, Tensor) and not step.dim() and step.dtype == torch.float32
    if not fits or not _begun(optimizer, state, group):
        count = taken(optimizer, p, group)
        state["step"] = torch.tensor(count, dtype=torch.float32, device=here.device)
    for name, value in list(state.items()):
        if value is None:  # torch's momentum before the first step
            del state[name]
        elif isinstance(value, Tensor) and not is_home(optimizer, name, local(value), here.device):
            state[name] = put(optimizer, name, value, here.device)
    wide, narrow = torch.promote_types(p.dtype, torch.float32), state_dtype(optimizer, p, group)
    for name in optimizer.state_names:
        value = state.get(name)
        if value is not None and value.dtype not in (wide, torch.uint8, narrow):
            # torch keeps them in the parameters' dtype.
            state[name] = put(optimizer, name, value.to(wide), here.device)
    lay_out(optimizer, p, strides_of(here))


def _missing(
    optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]
) -> list[tuple[str, int, torch.dtype]]:
    """Key, elements and dtype of each state that is not there."""
    numel, state = local(p).numel(), optimizer.state_of(p)
    wanted = [("step", 1, torch.float32)]
    # All states of a parameter are of one dtype: that of those that are there.
    there = [state[name].dtype for name in optimizer.state_names if name in state]
    dtype = there[0] if there else state_dtype(optimizer, p, group)
    for name in _names(optimizer, group):
        if name in state:
            continue  # one that was loaded in another format stays in it
        if dtype == torch.uint8:
            wanted.append((name, numel, torch.uint8))
            wanted.append((absmax_name(name), -(-numel // STATE_BLOCK), torch.float32))
        else:
            wanted.append((name, numel, dtype))
    if optimizer.rounding == "compensated" and p.dtype == torch.bfloat16:
        wanted.append(("compensation", numel, torch.bfloat16))
    return [entry for entry in wanted if entry[0] not in state]


@dataclass(eq=False)
class Part:
    """Parameters of one device, their gradients and groups.

    Attributes:
        batches: what is run.
        ready: the gradients as the first of them takes these.
    """

    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    ready: list[Tensor] = field(default_factory=list)


def by_device(
    params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
) -> list[Part]:
    """A part for each device."""
    if len(set(map(Tensor.get_device, params))) <= 1:
        return [Part(params[0].device, params, grads, groups)] if params else []
    parts: dict[torch.device, Part] = {}
    for p, g, group in zip(params, grads, groups, strict=True):
        part = parts.setdefault(p.device, Part(p.device))
        part.params.append(p)
        part.grads.append(g)
        part.groups.append(group)
    return list(parts.values())
