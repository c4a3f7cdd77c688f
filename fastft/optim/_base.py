"""``FusedOptimizer``: torch's optimizer with the step as one call for each device."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastft import ops
from fastft.errors import ArgumentError
from fastft.ops.optimizer_step import ROUNDINGS, RULES
from fastft.optim._batch import Batch, Part, by_device
from fastft.optim._flat import Flat, check_rounding, flatten
from fastft.optim._host import HostBatch
from fastft.optim._hyper import check_group, check_hyper, refuse_grad
from fastft.optim._places import PLACES
from fastft.optim._saved import SavedState
from fastft.optim._shards import aligned, any_sharded, global_norm, shard_offset

__all__ = ["FusedOptimizer"]


class FusedOptimizer(SavedState):
    """What the optimizers share: one call a step, clip, skip, states, rounding.

    Args:
        params: parameters, named parameters or param groups, on any devices, sharded or not.
        defaults: hyper-parameters of a group that names none of its own.
        max_grad_norm: clip the global norm of all gradients of the step at this, inside the step;
            None where the trainer clips already.
        skip_nonfinite: leave out steps whose gradient norm is not finite, and count them. It takes
            a read of all gradients, which the clip takes anyway.
        state_bits: 32, 16 or 8; a param group may say another. 16: bfloat16, rounded at random
            whatever ``rounding`` says: to nearest, a second moment could not shrink. 8: tensors of
            fewer than 4,096 elements (``min_8bit_size``) keep float32 states, as in bitsandbytes.
        rounding: of bfloat16 parameters: "nearest", "stochastic", or "compensated" with a second
            bfloat16 for what rounding takes away.
        seed: of stochastic rounding. An element's bits depend on it, on the parameter's name (if
            the optimizer is given named parameters, else its position), on the element's place in
            the whole parameter and on the parameter's step alone. Under torch's
            ZeroRedundancyOptimizer, which passes no names on, it is the position among a process's
            own parameters: there bits depend on the number of processes.
        flat: lay the parameters of each group, their gradients and their states out as views of one
            buffer each, so that step, clip and ``zero_grad`` are one pass whatever their number.
            Gradients are then zeroed and not dropped; a parameter without one steps by a gradient
            of zero. Not for bfloat16 parameters under stochastic rounding, whose bits go by
            parameter, nor for shards.
        states: where the states of parameters on a GPU are. "device": there. "host": in pinned
            host memory, from where 64 MiB at a time visit the GPU beside the step; it takes 192 MiB
            there, and a step takes as long as the states take over the bus, both ways at once. The
            same bits, but that a clip's norm may differ by a rounding. Not for shards, nor in CUDA
            graphs. "paged": in managed memory, which the driver moves to the host where the GPU
            runs full, and back as it is touched.

    ``foreach``, ``fused`` and ``capturable`` are accepted and change nothing: all steps run on the
    device in one call, never wait for it, and can be captured in a CUDA graph. ``capturable`` is
    refused with states in host memory, and by ``ScheduleFreeAdamW``, whose average has weights that
    the host counts.
    """

    rule: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    # What gathers the tensors of a call.
    batch: ClassVar[type[Batch]] = Batch
    min_8bit_size = 4096
    # Sets of parameters whose tables are kept; a set is those that had gradients together.
    kept_batches = 8
    # Defaults that check_hyper does not know.
    _more: dict[str, Any] = {}  # noqa: RUF012
    _batches: dict[Any, Batch]
    _stats: dict[torch.device, Tensor]
    _keys: dict[int, int]
    _flats: list[Flat]
    # Of each flat parameter its group, and all states, as they were when they were made flat.
    _flat_seen: tuple[dict[int, int], list[Any]]
    _norm_is_global: bool
    # Whether before_step has run: StepInBackward began the step.
    _step_begun: bool
    # GradScaler hands its scale over instead of unscaling and asking.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        state_bits: int = 32,
        rounding: str = "nearest",
        seed: int = 0,
        flat: bool = False,
        states: str = "device",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        where = self._where = f"fastft.optim.{type(self).__name__}"
        ranged = {k: v for k, v in defaults.items() if not isinstance(v, bool)}
        check_hyper(where, ranged)
        above_zero = hasattr(max_grad_norm, "__float__") and max_grad_norm > 0  # type: ignore[operator]
        for name, value, valid, expected in (
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or above_zero, "> 0"),
            ("rounding", rounding, rounding in ROUNDINGS, " or ".join(ROUNDINGS)),
            ("seed", seed, isinstance(seed, Integral) and 0 <= seed < 2**64, "0 to 2**64 - 1"),
            ("differentiable", differentiable, not differentiable, "False"),
            ("flat", flat, not flat or state_bits != 16, "False with state_bits=16"),
            ("states", states, states in PLACES, " or ".join(PLACES)),
            ("states", states, states == "device" or not flat, "device with flat=True"),
            ("states", states, states != "host" or not capturable, "not host with capturable=True"),
        ):
            if not valid:
                raise ArgumentError(where, name, expected=expected, got=repr(value))
        for name in ("lr", "betas"):
            value = defaults.get(name)
            first = value[0] if isinstance(value, tuple) else value
            if foreach and isinstance(first, Tensor) and not capturable:
                label = f"{name}[0]" if isinstance(value, tuple) else name
                raise ArgumentError(
                    where, name, expected="a float with foreach=True", got=repr(value),
                    remedy=f"{label} as a Tensor is not supported for capturable=False and "
                    "foreach=True, in torch; here leave foreach out.",
                )  # fmt: skip
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.rounding, self.seed, self.flat, self.states = rounding, seed, flat, states
        self._start()
        # torch moves "step" to the device when it loads groups that say they are capturable.
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable}
        super().__init__(params, {**defaults, "state_bits": state_bits, **flags})

    @classmethod
    def _bits(cls) -> tuple[int, ...]:
        """What ``state_bits`` may be: codes need the names and files of the 8-bit optimizers."""
        bits = RULES[cls.rule].bits if cls.state_names else (32,)
        return bits if "state1" in cls.state_names else tuple(b for b in bits if b != 8)

    # What a group means to the kernel.

    def hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """lr, beta1, beta2, eps, weight decay and extra of a group; see ops.optimizer_step."""
        raise NotImplementedError

    def n_states(self, group: dict[str, Any]) -> int:
        """How many states the parameters of a group have."""
        return len(self.state_names)

    def fresh_state(self, name: str, state: Tensor, param: Tensor) -> None:
        """Fills a new state, which is zero; for rules that start elsewhere."""

    # What a user asks.

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradients, 0-dim float32, over all devices; 0 where
        neither ``max_grad_norm`` nor ``skip_nonfinite`` asked for it."""
        norms = [stats[0].cpu() for stats in self._stats.values()]
        if self._norm_is_global:
            return norms[0].clone()
        norms = norms or [torch.zeros((), dtype=torch.float32, device="cpu")]
        return torch.linalg.vector_norm(torch.stack(norms))

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a norm that was not finite; reads the device."""
        return max((int(s[2].item()) for s in self._stats.values()), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = []
        grads: list[Tensor] = []
        groups: list[dict[str, Any]] = []
        for flat in self._flat_parts():
            flat.gather(self)
            params.append(flat.values)
            grads.append(flat.grads)
            groups.append(flat.group)
        for group in self.param_groups:
            params += self._apart(group)
            groups += [group] * (len(params) - len(groups))
        grads += [g for p in params[len(grads) :] if (g := p.grad) is not None]
        if params:
            parts = self.prepare(params, grads, groups)
            if not self._step_begun:
                self.before_step()
            self.launch(parts)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; in flat mode gradients are zeroed in one pass."""
        if not self.flat:
            return super().zero_grad(set_to_none)
        for flat in self._flat_parts():
            flat.zero()
        for p in (p for group in self.param_groups for p in self._apart(group)):
            p.grad = None
        return None

    def _apart(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters that have a gradient and lie in no flat buffer; there frozen ones."""
        flat = self.flat
        return [p for p in group["params"] if not (flat and p.requires_grad) and p.grad is not None]

    def _flat_parts(self) -> list[Flat]:
        if not self.flat:
            return []
        trained = {id(p): id(g) for g in self.param_groups for p in g["params"] if p.requires_grad}
        seen, states = self._flat_seen
        changed = not self._flats or trained != seen or len(states) != len(self.state)
        changed = changed or not all(map(operator.is_, self.state.values(), states))
        if changed or not all(flat.is_current(self) for flat in self._flats):
            self._flats = flatten(self)
            self._flat_seen = trained, list(self.state.values())
            self._batches = {}
        return self._flats

    def state_of(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter, or of a flat buffer of several."""
        for flat in self._flats:
            if flat.values is p:
                return flat.state
        return self.state[p]

    def states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Those of several."""
        if self._flats:
            return list(map(self.state_of, params))
        return list(map(self.state.__getitem__, params))

    def before_step(self) -> None:
        """Runs before each step; for what changes with the count of steps."""

    def prepare(
        self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]
    ) -> list[Part]:
        """What :meth:`launch` takes; groups are those of the parameters. What no step is defined
        for is refused here, where nothing is stepped yet."""
        if any_sharded(params):
            grads = [aligned(g, p) for p, g in zip(params, grads, strict=True)]
        parts = by_device(params, grads, groups)
        for part in parts:
            part.batches = self._batches_of(part)
            part.ready = part.batches[0].grads(part.grads, self)
        return parts

    def launch(self, parts: list[Part]) -> None:
        """Steps parameters, whose norm is one."""
        norm = None
        measures = self.max_grad_norm is not None or self.skip_nonfinite
        in_pieces = self.states == "host" and any(self.ring_of(part.device) for part in parts)
        sharded = any(any_sharded(part.params) for part in parts)
        if measures and (len(parts) > 1 or sharded or in_pieces):
            norm = global_norm([g for part in parts for g in part.grads])
        self._norm_is_global = norm is not None
        for part in parts:
            device = part.device
            self._scale(self._stats_of(device), norm)
            self.run_part(part, norm is None and measures)
            if norm is not None:
                self._stats_of(device)[0] = norm.to(device) * self._inverse_scale(device)

    def run_part(self, part: Part, needs_norm: bool) -> None:
        """Steps the parameters of one device."""
        self._run(part, needs_norm)
        # Kernels write by address: autograd, and whoever keeps what was made of a parameter, learn
        # of it here.
        torch.autograd.graph.increment_version(part.params)
        for flat in self._flats:
            torch.autograd.graph.increment_version(flat.params)

    def _batches_of(self, part: Part) -> list[Any]:
        return [self._batch(part.device, part.params, part.groups)]

    def _run(self, part: Part, needs_norm: bool) -> None:
        part.batches[0].run(self, part.ready, self._stats_of(part.device), needs_norm)

    def _inverse_scale(self, device: torch.device) -> Tensor | float:
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else scale.to(device, non_blocking=True).float().reciprocal()

    def _scale(self, stats: Tensor, norm: Tensor | None) -> None:
        """What the step reads: 1 over the loss scale, times a clip known already, and whether a
        scaler found infinities. GradScaler sets ``grad_scale`` and ``found_inf`` for the call."""
        found = getattr(self, "found_inf", None)
        if norm is None and getattr(self, "grad_scale", None) is None and found is None:
            if stats.device in self._scaled:  # else they are as they were made
                stats[3].fill_(1.0)
                stats[4].zero_()
                self._scaled.discard(stats.device)
            return
        self._scaled.add(stats.device)
        inverse = self._inverse_scale(stats.device)
        if isinstance(inverse, Tensor):
            stats[3] = inverse
        else:
            stats[3].fill_(inverse)
        if found is None:
            stats[4].zero_()
        else:
            stats[4] = found.to(stats.device, non_blocking=True)
        if norm is not None:
            here = norm.to(stats.device, non_blocking=True) * inverse
            if self.max_grad_norm is not None:
                stats[3] *= (self.max_grad_norm / (here + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
            stats[4] += (~here.isfinite()).float()

    def row(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """A group's row of the table of hyper-parameters."""
        return (*self.hyper(group), -1.0 if group.get("maximize") else 1.0)

    def refuse(self, p: Tensor, grad: Tensor) -> None:
        """Raises for parameters and gradients that no rule is defined for."""
        refuse_grad(self, p, grad)

    def _batch(
        self,
        device: torch.device,
        params: list[Tensor],
        groups: list[dict[str, Any]],
        kind: type[Any] | None = None,
    ) -> Any:
        kind = kind or (self.batch if self.ring_of(device) is None else HostBatch)
        ids = (tuple(map(id, params)), tuple(map(id, groups)))
        key = (kind, device, tuple(map(self.n_states, self.param_groups)), *ids)
        batch = self._batches.pop(key, None)
        if batch is None or batch.is_stale(self, params):
            batch = kind(self, list(zip(params, groups, strict=True)))
        self._batches[key] = batch
        if len(self._batches) > self.kept_batches:
            self._batches.pop(next(iter(self._batches)))
        return batch

    def _stats_of(self, device: torch.device) -> Tensor:
        if device not in self._stats:
            self._stats[device] = ops.new_stats(device)
        return self._stats[device]

    def random_key(self, p: Tensor) -> tuple[int, int]:
        """The tensor's key of stochastic rounding, and the place of its first element."""
        if any(flat.values is p for flat in self._flats):
            return 0, 0  # nothing is rounded at random
        if id(p) not in self._keys:
            self._keys, position = {}, 0
            for group in self.param_groups:
                names = group.get("param_names")
                for i, q in enumerate(group["params"]):
                    name = zlib.crc32(names[i].encode()) if names else position
                    self._keys[id(q)] = name
                    position += 1
        return self._keys[id(p)], shard_offset(p)

    def _start(self) -> None:
        self._batches, self._stats, self._keys, self._flats = {}, {}, {}, []
        self._rings, self._flat_seen = {}, ({}, [])
        self._scaled: set[torch.device] = set()
        self._norm_is_global = self._step_begun = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        bits = param_group.get("state_bits", self.defaults["state_bits"])
        allowed = tuple(b for b in self._bits() if not self.flat or b != 16)
        if bits not in allowed:
            whose = " of a group" if "state_bits" in param_group else ""
            raise ArgumentError(
                self._where, "state_bits", expected=_either(allowed), got=f"{bits!r}{whose}"
            )
        check_group(self._where, param_group, self.defaults)
        self.defaults.update(self._more)
        super().add_param_group(param_group)
        try:
            check_rounding(self, self.param_groups[-1]["params"])
        except ArgumentError:
            self.param_groups.pop()
            raise
        self._keys, self._flats = {}, []


def _either(values: Sequence[int]) -> str:
    *most, last = map(str, sorted(values))
    return f"{', '.join(most)} or {last}" if most else last
