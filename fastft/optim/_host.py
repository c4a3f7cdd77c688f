"""``HostBatch``: a step whose states are in host memory and visit the device a piece at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft import ops
from fastft.ops.optimizer_step import STATE_BLOCK, launcher_of
from fastft.optim._batch import Batch
from fastft.optim._places import absmax_name
from fastft.optim._shards import local

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer

__all__ = ["HostBatch"]

# A new run in a slot starts at a multiple of this many bytes.
_ALIGN = 64


@dataclass(frozen=True)
class _Share:
    """Elements start to stop of a member."""

    member: int
    start: int
    stop: int

    def of(self, flat: Tensor, share: int = 1) -> Tensor:
        """Them, in a tensor that has a number for so many elements."""
        return flat[self.start // share : -(-self.stop // share)]


@dataclass(eq=False)
class _Piece:
    """Shares whose states are in the device together.

    Attributes:
        runs: (host bytes, device bytes) of each copy.
        rows: of the table of hyper-parameters.
    """

    shares: list[_Share]
    slot: int
    rows: slice
    runs: list[tuple[Tensor, Tensor]]
    tensors: ops.StepTensors
    launcher: Any


class HostBatch(Batch):
    """A batch whose states are in host memory. The norm of the gradients is known before."""

    holds_views = True

    def _lay_out(self, optimizer: FusedOptimizer, keys: list[tuple[int, int]]) -> None:
        ring = optimizer.ring_of(self._params[0].device)
        if ring is None:
            raise RuntimeError("no ring for this device")
        self._ring = ring
        # A batch that this one replaces may be the last to hold slots that are being copied from.
        ring.begin()
        states = self._flat_states()
        pieces = _cut([p.numel() for p in self._params], states, ring.piece_bytes)
        plans = [_Plan(shares, states) for shares in pieces]
        slots = ring.slots(max(plan.size for plan in plans))
        flat, groups = [p.detach().view(-1) for p in self._params], self._group_of
        self._group_of = []
        self._pieces: list[_Piece] = []
        self._steps: list[tuple[Tensor, Tensor]] = []
        for number, plan in enumerate(plans):
            slot = number % len(slots)
            here = plan.views(slots[slot])
            shares = plan.shares
            steps = [self._step_of(share) for share in shares]
            tensors = ops.StepTensors(
                optimizer.rule,
                [share.of(flat[share.member]) for share in shares],
                steps,
                [[here.get((i, name)) for i in range(len(shares))] for name in self._names],
                [
                    [here.get((i, absmax_name(name))) for i in range(len(shares))]
                    for name in self._names
                ],
                [here.get((i, "compensation")) for i in range(len(shares))],
                optimizer.rounding,
                [keys[share.member][0] for share in shares],
                [keys[share.member][1] + share.start for share in shares],
            )
            first = len(self._group_of)
            self._group_of += [groups[share.member] for share in shares]
            rows = slice(first, len(self._group_of))
            runs = plan.runs(slots[slot])
            self._pieces.append(_Piece(shares, slot, rows, runs, tensors, launcher_of(tensors)))

    def _flat_states(self) -> list[dict[str, tuple[Tensor, int]]]:
        """By state: its elements in memory's order, and how many of the parameter's share one."""
        found: list[dict[str, tuple[Tensor, int]]] = [{} for _ in self._params]
        for number, name in (*enumerate(self._names), (-1, "compensation")):
            dense = self._dense(self._each(name, number))
            for own, state, value in zip(found, self._states, dense, strict=True):
                if value is None:
                    continue
                own[name] = (value.view(-1), 1)
                scale = absmax_name(name)
                if scale in state:
                    own[scale] = (local(state[scale]), STATE_BLOCK)
        return found

    def _step_of(self, share: _Share) -> Tensor:
        """The count of the member's steps; all its shares but the last have copies."""
        step: Tensor = self._states[share.member]["step"]
        if share.stop == self._params[share.member].numel():
            return step
        self._steps.append((step.clone(), step))
        return self._steps[-1][0]

    def _launch(
        self, optimizer: FusedOptimizer, grads: list[Tensor], stats: Tensor, needs_norm: bool
    ) -> None:
        flat = [g.view(-1) for g in grads]
        if self._steps:
            copies, steps = map(list, zip(*self._steps))
            torch._foreach_copy_(copies, steps)
        self._ring.begin()
        # A step that is skipped is counted once.
        others = stats.clone() if len(self._pieces) > 1 else stats
        coming = self._bring(self._pieces[0])
        for piece, following in zip(self._pieces, [*self._pieces[1:], None], strict=True):
            event, coming = coming, self._bring(following)
            if event is not None:
                self._ring.inward.wait(event)
            piece.launcher.step(
                piece.tensors,
                [share.of(flat[share.member]) for share in piece.shares],
                self.hyper[piece.rows],
                stats if piece is self._pieces[0] else others,
                max_norm=0.0,
                needs_norm=False,
                seed=optimizer.seed,
            )
            self._ring.send(piece.slot, piece.runs)

    def _bring(self, piece: _Piece | None) -> Any:
        return None if piece is None else self._ring.bring(piece.slot, piece.runs)


def _cut(
    sizes: list[int], states: list[dict[str, tuple[Tensor, int]]], limit: int
) -> list[list[_Share]]:
    """Shares of at most ``limit`` bytes of state together, cut at whole blocks of 8-bit states."""
    pieces: list[list[_Share]] = []
    room = 0.0
    for member, (size, own) in enumerate(zip(sizes, states, strict=True)):
        each = sum(flat.element_size() / share for flat, share in own.values())
        most = max(1, int(limit / max(each, 1e-9)) // STATE_BLOCK) * STATE_BLOCK
        for start in range(0, max(1, size), most):
            share = _Share(member, start, min(size, start + most))
            needed = (share.stop - share.start) * each
            if not pieces or needed > room:
                pieces.append([])
                room = limit
            pieces[-1].append(share)
            room -= needed
    return pieces


class _Plan:
    """Where the states of a piece lie in a slot: neighbours in host memory are neighbours in it."""

    def __init__(self, shares: list[_Share], states: list[dict[str, tuple[Tensor, int]]]) -> None:
        self.shares = shares
        # Host storage, its first byte, bytes, and the first byte in the slot.
        self._runs: list[list[Any]] = []
        self._at: dict[tuple[int, str], tuple[int, Tensor]] = {}
        held = [
            (i, name, share.of(*found))
            for i, share in enumerate(shares)
            for name, found in states[share.member].items()
        ]
        self.size, end, ended = _ALIGN, (0, 0), False
        for i, name, host in sorted(held, key=lambda entry: entry[2].data_ptr()):
            if not host.numel():
                self._at[i, name] = (0, host)
                continue
            storage = host.untyped_storage()
            first = int(host.storage_offset()) * host.element_size()
            # An arena starts each tensor at a multiple of 16 elements; what lies between the end of
            # one and the start of the next is nobody's.
            gap = first - end[1] if storage.data_ptr() == end[0] else -1
            most = 16 * host.element_size() if ended and shares[i].start == 0 else 1
            if not 0 <= gap < most:
                self._runs.append([storage, first, 0, -(-self.size // _ALIGN) * _ALIGN])
            run = self._runs[-1]
            run[2] = first + host.nbytes - run[1]
            self._at[i, name] = (run[3] + first - run[1], host)
            self.size = run[3] + run[2]
            end = (storage.data_ptr(), first + host.nbytes)
            whole, share = states[shares[i].member][name]
            ended = -(-shares[i].stop // share) == whole.numel()

    def views(self, slot: Tensor) -> dict[tuple[int, str], Tensor]:
        """Each share's states in a slot."""
        return {
            key: slot[start : start + host.nbytes].view(host.dtype)
            for key, (start, host) in self._at.items()
        }

    def runs(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(host bytes, bytes of the slot) of each copy."""
        return [
            (
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, first, (size,), (1,)),
                slot[start : start + size],
            )
            for storage, first, size, start in self._runs
        ]
