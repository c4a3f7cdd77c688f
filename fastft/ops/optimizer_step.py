"""``optimizer_step``: a step of an optimizer over all tensors, with clip and non-finite check.

    norm = s sqrt(sum g^2), s = 1 / loss scale;  c = min(1, max_norm / (norm + 1e-6));  g <- c s g

    adamw          p <- p (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
                   p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    lion           p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g
    sgd            g <- g + wd p;  m <- b1 m + (1 - b2) g (t = 1: m <- g)
                   p <- p - lr m, with Nesterov's momentum p <- p - lr (g + b1 m)
    schedule_free  v as in adamw;  u = g / (sqrt(v / (1 - b2^t)) + eps) + wd p
                   p <- p + e (z - p) + lr (b1 (1 - e) - 1) u;  z <- z - lr u
    muon           m <- b1 m + (1 - b1) g;  p <- m, with Nesterov's momentum (1 - b1) g + b1 m

Columns of ``hyper``: lr, b1, b2, eps, wd, e, sign. sgd: b1 is the momentum, b2 the dampening. sgd
and muon: e is 1 for Nesterov's. sign is -1 where the objective is maximised, which turns g. muon's
p is no parameter: it is what the optimizer orthogonalizes, and is written without being read.

States are float32, bfloat16 (always rounded at random), or 8-bit codes of blocks of 256 that
bitsandbytes' maps decode (:mod:`fastft.reference.optimizer_step`). Parameters in bfloat16 are
rounded to nearest, at random with the probability of what is cut off (``stochastic``), or with a
second bfloat16 that holds what was cut off (``compensated``). The random bits of an element depend
on the seed, its tensor's key, its place in the tensor and the tensor's step alone.

Sources: Loshchilov & Hutter 2019, algorithm 2, https://arxiv.org/abs/1711.05101; Chen et al. 2023,
https://arxiv.org/abs/2302.06675; ``torch.optim.SGD``; Defazio et al. 2024,
https://arxiv.org/abs/2405.15682; Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/;
8-bit: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, DtypeError, ShapeError
from fastft.ops._checks import check_device, check_dtype, check_shape, check_tensor
from fastft.reference.optimizer_step import dynamic_map

__all__ = [
    "HYPER",
    "ROUNDINGS",
    "RULES",
    "STATE_BLOCK",
    "Rule",
    "StepTensors",
    "check_step",
    "dynamic_map",
    "facts_of",
    "launcher_of",
    "new_stats",
    "optimizer_step",
]

_WHERE = "fastft.ops.optimizer_step"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_FLOATS)}
_STATE_CODES = {torch.uint8: 1, torch.bfloat16: 2}

STATE_BLOCK = 256
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "extra", "sign")
ROUNDINGS = ("nearest", "stochastic", "compensated")


@dataclass(frozen=True)
class Rule:
    """A rule: its code in csrc/include/fastft/optimizer.h, how many states, in how many bits."""

    code: int
    states: int
    bits: tuple[int, ...]


RULES = {
    "adamw": Rule(0, 2, (32, 16, 8)),
    "lion": Rule(1, 1, (32, 16, 8)),
    "sgd": Rule(2, 1, (32, 16, 8)),
    "schedule_free": Rule(3, 2, (32,)),
    "muon": Rule(4, 1, (32,)),
}

# Columns of the table of csrc/include/fastft/optimizer.h.
_PARAM, _GRAD, _CODES = 0, 1, 11


@dataclass(eq=False)
class StepTensors:
    """The tensors of a step but the gradients, all on one device; checked when it is made.

    Args:
        rule: a key of ``RULES``.
        params: n tensors, float32, bfloat16, float16 or (reference) float64, contiguous, updated in
            place.
        steps: n 0-dim float32 tensors, t of each, incremented.
        states: for each state of the rule n tensors of the parameters' shapes, float32 (float64 for
            float64 parameters), bfloat16, or uint8 where in 8 bits. sgd without momentum has none:
            None, or no list where no tensor has one.
        absmax: like ``states``, float32 (ceil(numel / 256),) of those in 8 bits, None of others.
        compensation: n bfloat16 tensors of the parameters' shapes for ``compensated``, else None.
        rounding: one of ``ROUNDINGS``; bfloat16 parameters only, others are rounded to nearest.
        keys, offsets: of the random bits: element i of tensor j draws (keys[j], offsets[j] + i).

    Raises:
        ArgumentError, DtypeError, ShapeError, DeviceError: what does not fit the above.
    """

    rule: str
    params: Sequence[Tensor]
    steps: Sequence[Tensor]
    states: Sequence[Sequence[Tensor | None]]
    absmax: Sequence[Sequence[Tensor | None]] = ()
    compensation: Sequence[Tensor | None] = ()
    rounding: str = "nearest"
    keys: Sequence[int] = ()
    offsets: Sequence[int] = ()
    launcher_tables: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _table: Tensor = field(init=False, repr=False)
    _seen: tuple[list[int], list[int], list[torch.dtype]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        n = len(self.params)
        self.absmax = self.absmax or [[None] * n for _ in self.states]
        self.compensation = self.compensation or [None] * n
        self.keys, self.offsets = self.keys or range(n), self.offsets or [0] * n
        _check_tensors(self)
        columns = [[0] * n, [0] * n]
        for group in (self.states, self.absmax):
            columns += [[_address(t) for t in tensors] for tensors in group]
            columns += [[0] * n] * (2 - len(group))
        columns += [[_address(t) for t in self.compensation], [_address(t) for t in self.steps]]
        columns += [[p.numel() for p in self.params], list(self.keys), list(self.offsets), [0] * n]
        self._table = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()

    @property
    def rule_code(self) -> int:
        """The rule's code in csrc/include/fastft/optimizer.h."""
        return RULES[self.rule].code

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.params[0].device

    @functools.cached_property
    def state_bits(self) -> int:
        """The fewest bits that any state has."""
        sizes = {t.element_size() for tensors in self.states for t in tensors if t is not None}
        return min(32, *(8 * size for size in sizes)) if sizes else 32

    def table(self, grads: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """The rows of csrc/include/fastft/optimizer.h, int64 (n, 12) on the CPU, and whether
        anything has changed since the last call."""
        now = (
            list(map(Tensor.data_ptr, self.params)),
            list(map(Tensor.data_ptr, grads)),
            [g.dtype for g in grads],
        )
        if now == self._seen:
            return self._table, False
        self._seen = now
        how = ROUNDINGS.index(self.rounding)
        first: Sequence[Tensor | None] = self.states[0] if self.states else [None] * len(grads)
        codes = [
            _DTYPE_CODES[p.dtype] + 4 * _DTYPE_CODES[dtype]
            + 16 * (0 if state is None else _STATE_CODES.get(state.dtype, 0))
            + 64 * (how if p.dtype == torch.bfloat16 and (how != 2 or rest is not None) else 0)
            for p, dtype, state, rest in zip(
                self.params, now[2], first, self.compensation, strict=True)
        ]  # fmt: skip
        for column, values in ((_PARAM, now[0]), (_GRAD, now[1]), (_CODES, codes)):
            self._table[:, column] = torch.tensor(values, dtype=torch.int64, device="cpu")
        return self._table, True

    @property
    def codes(self) -> Tensor:
        """Dtypes, state kind and rounding of each row, as ``table`` last made them."""
        return self._table[:, _CODES]

    def forget(self) -> None:
        """The next call of ``table`` says that it has changed."""
        self._seen = None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def new_stats(device: torch.device) -> Tensor:
    """The statistics of a step, float32 (6,): norm, clip coefficient and count of skipped steps,
    written; 1 over the loss scale and whether a scaler found infinities, read; scratch."""
    stats = torch.zeros(6, dtype=torch.float32, device=device)
    stats[3].fill_(1.0)
    return stats


def optimizer_step(
    tensors: StepTensors,
    grads: Sequence[Tensor],
    hyper: Tensor,
    stats: Tensor,
    *,
    max_norm: float = 0.0,
    needs_norm: bool = True,
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """One step, in place, over every tensor.

    Args:
        tensors: parameters and states.
        grads: n tensors of the parameters' shapes, float32, bfloat16 or float16, contiguous.
        hyper: (n, 7) float32, see above.
        stats: see :func:`new_stats`; on the parameters' device.
        max_norm: clip the global norm at this; 0 for no clip.
        needs_norm: sum the gradients' squares: for the clip, and to skip the step where the norm
            is not finite. False leaves only ``stats[4]`` to skip it, and saves reading them.
        seed: of stochastic rounding, 64 bits.

    A skipped step changes nothing but ``stats``: norm, coefficient 0, one more skipped step.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: gradients or tables that do not fit.
        BackendError: the backend asked for cannot run it.
    """
    check_step(_WHERE, tensors, grads, hyper, stats, max_norm, needs_norm)
    if len(tensors.params):
        launcher_of(tensors, backend).step(
            tensors, list(grads), hyper, stats, max_norm=max_norm, needs_norm=needs_norm, seed=seed
        )


def check_step(
    where: str,
    tensors: StepTensors,
    grads: Sequence[Tensor],
    hyper: Tensor,
    stats: Tensor,
    max_norm: float,
    needs_norm: bool,
) -> None:
    """Refuses what a step is not defined for.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: gradients or tables that do not fit.
    """
    if not max_norm >= 0.0:
        raise ArgumentError(where, "max_norm", expected="0 (no clip) or more", got=repr(max_norm))
    if max_norm > 0.0 and not needs_norm:
        raise ArgumentError(where, "needs_norm", expected="True with a max_norm", got="False")
    _check_grads(where, tensors, grads)
    count = len(tensors.params)
    for name, tensor, shape in (("hyper", hyper, (count, len(HYPER))), ("stats", stats, (6,))):
        check_tensor(where, name, tensor)
        check_dtype(where, name, tensor, (torch.float32,))
        check_shape(where, name, tensor, shape, "shape")
        _check_contiguous(where, name, tensor)
        if count:
            check_device(where, name, tensor, tensors.device)


def launcher_of(tensors: StepTensors, backend: str | None = None) -> Any:
    """The backend's module whose ``step`` takes these tensors, with no check of what else it is
    given: an optimizer's gradients are what torch lets be a parameter's.

    Raises:
        BackendError: the backend asked for cannot run it.
    """
    return backends.select("optimizer_step", backend, **facts_of(tensors))[1]


def facts_of(tensors: StepTensors) -> dict[str, Any]:
    """What a launcher's ``supports`` asks."""
    # The dtype least supported decides: every tensor of the step goes through one launcher.
    dtype = max({p.dtype for p in tensors.params}, key=_FLOATS.index)
    return {
        "device_type": tensors.device.type,
        "dtype": dtype,
        "rule": tensors.rule,
        "state_bits": tensors.state_bits,
        "rounding": tensors.rounding,
    }


def _check_tensors(tensors: StepTensors) -> None:
    for name, value, allowed in (
        ("rule", tensors.rule, tuple(RULES)),
        ("rounding", tensors.rounding, ROUNDINGS),
    ):
        if value not in allowed:
            raise ArgumentError(_WHERE, name, expected=" or ".join(allowed), got=repr(value))
    n, rule = len(tensors.params), RULES[tensors.rule]
    if len(tensors.states) != rule.states and (tensors.rule != "sgd" or tensors.states):
        raise ShapeError(
            _WHERE, "states", expected=f"{rule.states} of {tensors.rule}",
            got=str(len(tensors.states)),
        )  # fmt: skip
    lists = [*tensors.states, *tensors.absmax, tensors.compensation, tensors.steps, tensors.keys,
             tensors.offsets]  # fmt: skip
    if any(len(values) != n for values in lists) or len(tensors.absmax) != len(tensors.states):
        lengths = [n, *(len(values) for values in lists)]
        raise ShapeError(_WHERE, "params", expected="as many of each", got=str(lengths))
    compensated = tensors.rounding == "compensated"
    for i, p in enumerate(tensors.params):
        check_dtype(_WHERE, "params", p, _FLOATS)
        _check_contiguous(_WHERE, "params", p)
        _check_like("steps", tensors.steps[i], (torch.float32,), p.device, ())
        shape = tuple(p.shape)
        scales = {values[i] is None for values in tensors.absmax}
        if len(scales) > 1:
            raise ShapeError(_WHERE, "absmax", expected="of all states or none", got="of some")
        wide = torch.promote_types(p.dtype, torch.float32)
        narrow = 16 in rule.bits and wide == torch.float32
        unscaled = (wide, torch.bfloat16) if narrow else (wide,)
        kinds: set[torch.dtype] = set()
        for states, absmax in zip(tensors.states, tensors.absmax, strict=True):
            state, scale = states[i], absmax[i]
            if state is None:
                if tensors.rule == "sgd":
                    continue
                raise ArgumentError(
                    _WHERE, "states", expected=f"a tensor with {tensors.rule}", got="None"
                )
            dtypes = unscaled if scale is None else (torch.uint8,)
            _check_like("states", state, dtypes, p.device, shape)
            kinds.add(state.dtype)
            if len(kinds) > 1:
                got = " and ".join(sorted(map(str, kinds)))
                raise DtypeError(_WHERE, "states", expected="one dtype of a parameter's", got=got)
            if scale is not None:
                if 8 not in rule.bits:
                    raise ArgumentError(
                        _WHERE, "absmax", expected=f"None with {tensors.rule}", got="8-bit states"
                    )
                blocks = (-(-p.numel() // STATE_BLOCK),)
                _check_like("absmax", scale, (torch.float32,), p.device, blocks)
        rest = tensors.compensation[i]
        if compensated and p.dtype == torch.bfloat16 and rest is None:
            raise ArgumentError(_WHERE, "compensation", expected="a tensor", got="None")
        if rest is not None:
            _check_like("compensation", rest, (torch.bfloat16,), p.device, shape)


def _check_like(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device, shape: Any
) -> None:
    check_tensor(_WHERE, name, tensor)
    check_dtype(_WHERE, name, tensor, dtypes)
    check_device(_WHERE, name, tensor, device)
    check_shape(_WHERE, name, tensor, shape, "shape")
    _check_contiguous(_WHERE, name, tensor)


def _check_grads(where: str, tensors: StepTensors, grads: Sequence[Tensor]) -> None:
    if len(grads) != len(tensors.params):
        got = f"{len(grads)} for {len(tensors.params)} parameters"
        raise ShapeError(where, "grads", expected="as many as parameters", got=got)
    device = tensors.device if grads else None
    for p, g in zip(tensors.params, grads, strict=True):
        if g.layout is not torch.strided:
            raise DtypeError(where, "grads", expected="dense gradients", got=str(g.layout))
        if g.dtype not in _DTYPE_CODES or (g.dtype == torch.float64) != (p.dtype == torch.float64):
            wide = p.dtype == torch.float64
            check_dtype(where, "grads", g, (torch.float64,) if wide else _FLOATS[:3])
        if g.shape != p.shape:
            check_shape(where, "grads", g, tuple(p.shape), "the parameter's shape")
        if g.device != device:
            check_device(where, "grads", g, p.device)
        if not g.is_contiguous():
            _check_contiguous(where, "grads", g)


def _check_contiguous(where: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ShapeError(
            where,
            name,
            expected="contiguous tensors",
            got=f"strides {tensor.stride()}",
            remedy=f"Use {name}.contiguous().",
        )
