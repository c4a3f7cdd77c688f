"""Flat mode: parameters, gradients and states of a group in one buffer each."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.ops.optimizer_step import STATE_BLOCK
from fastft.optim._batch import is_eight_bit, still_held, taken
from fastft.optim._places import absmax_name, coded, lay_out
from fastft.optim._shards import is_sharded

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer

__all__ = ["Flat", "check_rounding", "flatten"]


class Flat:
    """Parameters of one group, device, dtype and kind of state as views of one buffer.

    Each starts at a multiple of 256 elements, so that blocks of 8-bit states are its own. What lies
    between is zero, has zero gradients and stays zero.
    """

    def __init__(self, optimizer: FusedOptimizer, group: dict[str, Any], params: list[Tensor]):
        self.group, self.params = group, params
        sizes = [-(-p.numel() // STATE_BLOCK) * STATE_BLOCK for p in params]
        total, first = sum(sizes), params[0]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.values = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.values)
        self.views = [self._view(self.grads, i) for i in range(len(params))]
        for i, p in enumerate(params):
            own = self._view(self.values, i)
            own.copy_(p.detach())
            p.data = own
        self.addresses = [p.data_ptr() for p in params]
        self.gather(optimizer)
        self._n_states = optimizer.n_states(group)
        self.state = self._states(optimizer, total)
        self._of_each = [optimizer.state[p] for p in params]
        self._held: dict[str, list[Tensor | None]] = {
            name: [state[name] for state in self._of_each] for name in self.state
        }

    def _view(self, buffer: Tensor, i: int) -> Tensor:
        p, start = self.params[i], self.starts[i]
        return buffer[start : start + p.numel()].view(p.shape)

    def _states(self, optimizer: FusedOptimizer, total: int) -> dict[str, Tensor]:
        """Buffers of the states, of which each parameter's state holds its views; states that are
        there already move in."""
        first, device = self.params[0], self.values.device
        eight = _is_eight_bit(optimizer, first, self.group)
        wide = torch.promote_types(first.dtype, torch.float32)
        names = optimizer.state_names[: optimizer.n_states(self.group)]
        kinds = dict.fromkeys(names, (torch.uint8 if eight else wide, 1))
        if eight:
            kinds |= {absmax_name(name): (torch.float32, STATE_BLOCK) for name in names}
        if optimizer.rounding == "compensated" and first.dtype == torch.bfloat16:
            kinds["compensation"] = (torch.bfloat16, 1)
        buffers = {
            key: torch.zeros(total // share, dtype=dtype, device=device)
            for key, (dtype, share) in kinds.items()
        }
        if eight:
            # Padding too: with a block's scale other codes would be more than nothing.
            zero = torch.zeros(1, dtype=torch.float32, device="cpu")
            buffers[names[0]].fill_(coded(zero, True)[0].item())
        for p in self.params:
            lay_out(optimizer, p, torch.empty(p.shape, device="meta").stride())
        old = [optimizer.state[p] for p in self.params]
        counts = [taken(optimizer, p, self.group) for p in self.params]
        count = max(counts, default=0.0)
        step = torch.full((), count, dtype=torch.float32, device=device)
        for i, (p, state) in enumerate(zip(self.params, old, strict=True)):
            for key, buffer in buffers.items():
                share = kinds[key][1]
                start, size = self.starts[i] // share, -(-p.numel() // share)
                part = buffer[start : start + size]
                view = part.view(p.shape) if share == 1 else part
                if state.get(key) is not None:
                    view.copy_(state[key])
                elif key in names and not eight:
                    optimizer.fresh_state(key, view, p.detach())
                state[key] = view
            state["step"] = step
        return {"step": step, **buffers}

    def is_current(self, optimizer: FusedOptimizer) -> bool:
        """Whether the parameters and their states still are the views that they were made."""
        params = self.params
        return (
            [p.data_ptr() for p in params] == self.addresses
            and list(map(Tensor.numel, params)) == list(map(Tensor.numel, self.views))
            and all(map(Tensor.is_contiguous, params))
            and optimizer.n_states(self.group) == self._n_states
            and still_held(self._of_each, self._held)
        )

    def gather(self, optimizer: FusedOptimizer) -> None:
        """Gradients that lie elsewhere move in; a parameter without one has a gradient of zero."""
        for p, view in zip(self.params, self.views, strict=True):
            grad = p.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            elif grad.data_ptr() != view.data_ptr():
                optimizer.refuse(p, grad)
                view.copy_(grad)
            p.grad = view

    def zero(self) -> None:
        """All gradients to zero, in one pass."""
        self.grads.zero_()
        for p, view in zip(self.params, self.views, strict=True):
            if p.grad is not view:
                p.grad = view


def _is_eight_bit(optimizer: FusedOptimizer, p: Tensor, group: dict[str, Any]) -> bool:
    """A state that is there stays in its format."""
    names = optimizer.state_names
    found = optimizer.state[p].get(names[0]) if names else None
    return is_eight_bit(optimizer, p, group) if found is None else found.dtype == torch.uint8


def check_rounding(optimizer: FusedOptimizer, params: Iterable[Tensor]) -> None:
    """Refuses parameters that would be flat and are rounded at random, by bits that each draws by
    its own key and place.

    Raises:
        ArgumentError: one of them.
    """
    at_random = optimizer.flat and optimizer.rounding == "stochastic"
    if at_random and any(p.requires_grad and p.dtype == torch.bfloat16 for p in params):
        raise ArgumentError(
            optimizer._where, "flat", expected="False with stochastic rounding of bfloat16",
            got="True", remedy='Say rounding="nearest" or "compensated", or leave flat out.',
        )  # fmt: skip


def flatten(optimizer: FusedOptimizer) -> list[Flat]:
    """The parameters of an optimizer that require gradients, made flat."""
    found: dict[tuple[Any, ...], tuple[dict[str, Any], list[Tensor]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        # Its parameters may have become bfloat16, or trainable, since they came.
        check_rounding(optimizer, group["params"])
        for p in group["params"]:
            if p.requires_grad:
                optimizer.refuse(p, p if p.grad is None else p.grad)
                if is_sharded(p):
                    raise ArgumentError(
                        "fastft.optim", "flat", expected="whole parameters", got="sharded ones"
                    )
                eight = _is_eight_bit(optimizer, p, group)
                key = (index, p.device, p.dtype, eight, taken(optimizer, p, group))
                found.setdefault(key, (group, []))[1].append(p)
            elif "step" in optimizer.state.get(p, {}):
                # Frozen since: it no longer shares a count.
                optimizer.state[p]["step"] = deepcopy(optimizer.state[p]["step"])
    return [Flat(optimizer, group, params) for group, params in found.values()]
