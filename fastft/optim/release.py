"""``StepInBackward``: each parameter steps when its gradient is ready, and the gradient goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer
from fastft.optim._shards import is_sharded

__all__ = ["StepInBackward"]

_WHERE = "fastft.optim.StepInBackward"


class StepInBackward:
    """Gradient release: no more gradients than one layer's are alive at a time.

    Hooks step each parameter as soon as backward has its gradient, and free that::

        release = StepInBackward(optimizer)
        loss.backward()                     # steps
        optimizer.step()                    # ends the step; there is nothing left to do
        with release.accumulating():        # gradient accumulation: gradients are held until the
            micro_batch_loss.backward()     # next backward outside, which steps with their sum
        release.step(closure)               # with optimizer.max_grad_norm

    Clipping by the global norm takes the norm before anything is stepped. ``step(closure)`` is
    exact: it calls the closure, which must compute a loss and run its backward, twice from the same
    random state: once for the norm, gradients going as they come, and once to step by the clipped
    ones. That costs another forward and backward. Where gradients are held by accumulation already,
    it runs once, holds those too and takes an ordinary step.

    Args:
        optimizer: one of fastft's, on whole tensors.

    Without ``max_grad_norm`` a parameter whose own gradient is not finite is left as it is, the
    others having stepped already; it is counted in ``skipped_steps``. ``grad_norm`` is that of all
    gradients of the step, known after ``optimizer.step()``. Hooks survive activation
    checkpointing; a parameter that gets a second gradient before ``optimizer.step()``, as a shared
    one does under reentrant checkpointing, raises.

    Raises:
        ArgumentError: another optimizer; a backward outside ``step`` although ``max_grad_norm`` is
            set; a second gradient before ``optimizer.step()``.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            got = type(optimizer).__name__
            raise ArgumentError(_WHERE, "optimizer", expected="one of fastft.optim", got=got)
        if optimizer.flat or (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise ArgumentError(
                _WHERE, "optimizer", expected="parameters apart, in one process",
                got="flat ones" if optimizer.flat else "several processes",
                remedy="Gradients are stepped by before they are flat, or reduced.",
            )  # fmt: skip
        self.optimizer = optimizer
        self._mode = "step"
        self._done: set[int] = set()
        self._squares: dict[torch.device, Tensor] = {}
        # Of what was stepped since the last step ended.
        self._norms: dict[torch.device, list[Tensor]] = {}
        self._scale: Tensor | None = None
        self._group: dict[int, dict[str, Any]] = {}
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._end)]
        for group in optimizer.param_groups:
            for p in group["params"]:
                if is_sharded(p):
                    raise ArgumentError(
                        _WHERE, "optimizer", expected="whole parameters", got="sharded ones"
                    )
                if not p.requires_grad:
                    continue
                self._group[id(p)] = group
                self._handles.append(p.register_post_accumulate_grad_hook(self._ready))
        # Each parameter is a set of its own.
        optimizer.kept_batches *= len(self._group) + 1

    def remove(self) -> None:
        """Takes the hooks off; gradients stay from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._norms = {}
        self.optimizer._step_begun = False
        self.optimizer.__dict__.pop("kept_batches", None)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backwards inside add to the gradients and step nothing."""
        before, self._mode = self._mode, "hold"
        try:
            yield
        finally:
            self._mode = before

    def step(self, closure: Callable[[], Any]) -> Any:
        """One step by ``closure``, which computes the loss, runs its backward and returns the loss;
        clipped by the global norm where the optimizer has a ``max_grad_norm``."""
        optimizer = self.optimizer
        if optimizer.max_grad_norm is None:
            loss = closure()
            optimizer.step()
            return loss
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.grad is not None for p in params):
            with self.accumulating():
                loss = closure()
            optimizer.step()
            return loss
        self._squares = {}
        state = _random_state()
        loss = self._run("norm", closure)
        device = params[0].device
        norm = sum((s.to(device) for s in self._squares.values()), torch.zeros((), device=device))
        norm = norm.sqrt().float()
        for own in {p.device for p in params}:
            stats = optimizer._stats_of(own)
            stats[0] = norm
        finite = bool(norm.isfinite())
        if not finite:
            for own in {p.device for p in params}:
                optimizer._stats_of(own)[2] += 1
            optimizer.step()
            return loss
        self._scale = (optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        _set_random_state(state)
        try:
            loss = self._run("scaled", closure)
        finally:
            self._scale = None
        optimizer.step()
        return loss

    def _run(self, mode: str, closure: Callable[[], Any]) -> Any:
        before, self._mode = self._mode, mode
        try:
            return closure()
        finally:
            self._mode = before
            self._done.clear()

    def _learn_groups(self) -> None:
        now = {id(p): g for g in self.optimizer.param_groups for p in g["params"]
               if p.requires_grad}  # fmt: skip
        if now.keys() != self._group.keys():
            raise ArgumentError(
                _WHERE, "optimizer", expected="the parameters it had", got="others",
                remedy="Make another StepInBackward after adding or freezing parameters.",
            )  # fmt: skip
        self._group = now

    def _end(self, *_: Any) -> None:
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise ArgumentError(
                _WHERE, "step", expected="no GradScaler", got="one",
                remedy="Gradients were stepped by in the backward, scale and all; use bfloat16.",
            )  # fmt: skip
        self.optimizer._step_begun = False
        self._done.clear()
        self._end_norm()
        # A gradient that was held, of a parameter that no later backward reached, has been stepped
        # by now as an ordinary one.
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def _note_norm(self, device: torch.device) -> None:
        """A launch writes the norm of its gradients over the one before."""
        optimizer = self.optimizer
        if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
            self._norms.setdefault(device, []).append(optimizer._stats_of(device)[0].clone())

    def _end_norm(self) -> None:
        """The norm of a step is that of all launches of it, on each device; none waits for it."""
        if not self._norms:
            return  # one launch or none, or a clip's, which wrote it
        optimizer = self.optimizer
        late = {p.device for group in optimizer.param_groups for p in group["params"]
                if p.grad is not None}  # fmt: skip
        # Where those were stepped over several devices, each has the norm of all.
        for device in [*late][:1] if optimizer._norm_is_global else late:
            self._note_norm(device)
        for device, stats in optimizer._stats.items():
            norms = torch.stack(self._norms.get(device) or [torch.zeros_like(stats[0])])
            stats[0] = torch.linalg.vector_norm(norms, dtype=torch.float64)
        self._norms, optimizer._norm_is_global = {}, False

    @torch.no_grad()
    def _ready(self, p: Tensor) -> None:
        if self._mode == "hold" or p.grad is None:
            return
        optimizer, grad = self.optimizer, p.grad
        if self._mode == "step" and optimizer.max_grad_norm is not None:
            raise ArgumentError(
                _WHERE, "backward", expected="release.step(closure), with max_grad_norm",
                got="a backward of its own",
            )  # fmt: skip
        if id(p) in self._done:
            raise ArgumentError(
                _WHERE, "backward", expected="one gradient of each parameter a step",
                got=f"a second one of a parameter of shape {tuple(p.shape)}",
                remedy="Call optimizer.step() after each backward, and checkpoint shared modules "
                "with use_reentrant=False.",
            )  # fmt: skip
        self._done.add(id(p))
        if self._mode == "norm":
            square = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
            self._squares[p.device] = self._squares.get(p.device, 0) + square
            p.grad = None
            return
        if not optimizer._step_begun:
            self._learn_groups()
        (part,) = optimizer.prepare([p], [grad], [self._group[id(p)]])
        if not optimizer._step_begun:
            optimizer.before_step()
            optimizer._step_begun = True
        if self._scale is not None:
            stats = optimizer._stats_of(p.device)
            norm = stats[0].clone()
            optimizer._scaled.add(p.device)  # the next plain step sets 1 again
            stats[3] = self._scale.to(p.device)
            stats[4].zero_()
            optimizer.run_part(part, False)
            stats[0] = norm
        else:
            optimizer.launch([part])
            self._note_norm(p.device)
        p.grad = None


def _random_state() -> list[Any]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]]


def _set_random_state(state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    for device, own in enumerate(state[1]):
        torch.cuda.set_rng_state(own, device)
