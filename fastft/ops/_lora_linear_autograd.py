"""``lora_linear`` for autograd, eager. What torch.compile sees calls the same launcher:
``_lora_linear_registered``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.ops._differentiable import wanted
from fastft.ops._lora_linear_call import WORTH, Constants, flat, launch, room_of
from fastft.ops._lora_linear_gradients import differentiable_backward, gradients, gradients_of
from fastft.ops._remade import keeping
from fastft.ops._room import new_empty
from fastft.ops._saving import Late, note, noted, saves_first
from fastft.ops._witness import unchanged, witnessed

__all__ = ["Left", "LoraLinear", "identity", "late_values", "saved_of"]


def late_values(constants: Constants) -> Late | None:
    """In a recompute, where the backend can: room for a call that saves before it computes."""
    return Late() if saves_first() and _splits(constants) else None


def _splits(constants: Constants) -> bool:
    """Whether the call's backend has its two halves apart."""
    return hasattr(constants.launcher, "fwd_adapters")


def _note_adapters(
    constants: Constants, held: Tensor, x: Tensor, lora_as: Sequence[Tensor], masks: Sequence[Any]
) -> None:
    """Says how the ss in ``held`` are made again, where that frees enough and the backend can."""
    if held.numel() >= WORTH * x.numel() and _splits(constants):
        note(held, (x, *lora_as, *masks), functools.partial(_adapters_again, constants))


def _adapters_again(constants: Constants, x: Tensor, *tensors: Any) -> Tensor:
    """The ss of a call once more, as ``room_of`` lays them out; tensors: its lora_as and masks."""
    x = flat(x)
    half = len(tensors) // 2
    lora_as, masks = list(tensors[:half]), list(tensors[half:])
    ss, held = room_of(x, lora_as, constants.spans)
    call: Any = (x, [], [], lora_as, [], masks, *constants.rest(), (), constants.launcher)
    launch("fwd_adapters", ss, *call)
    return held


class Left(NamedTuple):
    """What is left with a node: x and its other saved tensors, for they may be unpacked once, and
    what the backend has made, with the gradients it goes with."""

    saved: tuple[Tensor, Sequence[Tensor]]
    made: Any
    dys: list[tuple[Any, ...]]


def saved_of(node: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """x flattened, made again where it was not kept, and what else a call has saved."""
    saved = node.saved_tensors
    tensors = node.constants.again(saved[node.kept :])
    x = saved[0] if node.make is None else node.make(*saved[: node.kept])
    return flat(x), tensors


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from any other, and from itself once changed."""
    return (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride())


def _take(node: Any, dys: Any) -> Left | None:
    """What was left at this node, which forgets it; without what the backend has made where these
    are not the gradients it goes with."""
    left: Left | None = node.__dict__.pop("left", None)
    if left is None or left.made is None:
        return left
    if all(dy is not None for dy in dys) and [identity(dy) for dy in dys] == left.dys:
        return left
    return left._replace(made=None)


def _plainly(
    constants: Constants,
    ys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor] | None:
    """Writes the ys of a plain call and returns its ss, where the backend has a short way to them.
    It is what a model's layers call step after step: its host time counts."""
    forward = getattr(constants.launcher, "fwd_plain", None)
    if forward is None:
        return None
    ss = [x.new_empty((x.shape[0], a.shape[0])) for a in lora_as]
    served = forward(
        list(map(flat, ys)), ss, x, weights, biases, lora_as, lora_bs, constants.scalings, masks,
        constants.dropout_ps,
    )  # fmt: skip
    return ss if served else None


class LoraLinear(torch.autograd.Function):
    """Eager autograd of ``lora_linear_siblings``."""

    @staticmethod
    def forward(
        ctx: Any, late: Late | None, constants: Constants, x: Tensor, *tensors: Tensor | None
    ) -> Any:
        weights, biases, lora_as, lora_bs, masks, scales, *_ = constants.split(tensors)
        leading, rows = x.shape[:-1], flat(x)
        ys = [new_empty(x, (*leading, w.shape[0])) for w in weights]
        ss = None
        if constants.plain and late is None and not noted():
            ss = _plainly(constants, ys, rows, weights, biases, lora_as, lora_bs, masks)
        if ss is None:
            ss, held = room_of(rows, lora_as, constants.spans)
            rest = (*constants.rest(), scales, constants.launcher)
            outputs = [*map(flat, ys), *ss]
            call: Any = (rows, weights, biases, lora_as, lora_bs, masks, *rest)
            if late is None:
                launch("fwd", outputs, *call)
                _note_adapters(constants, held, x, lora_as, masks)
            else:
                launch("fwd_adapters", outputs, *call)
                late.work = functools.partial(launch, "fwd_values", outputs, *call)
        ctx.constants = constants
        kept, ctx.make = keeping(x)
        results: Sequence[Tensor | None] = ()
        if constants.scaled:
            read = [y if getattr(s, "requires_grad", False) else None for y, s in zip(ys, scales)]
            results, ctx.witnesses = witnessed(read)
        ctx.save_for_backward(*kept, *constants.kept(tensors), *ss, *results)
        ctx.kept = len(kept)
        # A layer that no gradient has reached has none, not one of zeros, which an optimizer would
        # take for a step.
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        constants: Constants = ctx.constants
        reached = [i for i, dy in enumerate(dys) if dy is not None]
        if not reached:  # autograd comes by where a function above gives None
            ctx.__dict__.pop("left", None)
            return (None,) * len(ctx.needs_input_grad)
        shape = dys[reached[0]].shape[:-1]  # type: ignore[union-attr]
        dys = tuple([None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys])
        left = _take(ctx, dys)
        x, tensors = saved_of(ctx) if left is None else left.saved
        needs = ctx.needs_input_grad[2:]
        if wanted(*dys):
            dx, *others = differentiable_backward(constants, x, tensors, dys, needs)
            return None, None, _shaped(dx, shape), *others
        saved, asked = constants.split(tensors), constants.split(needs[1:])
        if constants.scaled:
            results = unchanged(saved[-1], ctx.witnesses)
            saved[-1] = [None if y is None else flat(y) for y in results]
        made = None if left is None else left.made
        if len(reached) == len(dys):
            dx, parts = gradients(constants, x, saved, dys, needs[0], asked, made)
        else:
            dx, parts = gradients_of(reached, constants, x, saved, dys, needs[0], asked)
        return None, None, _shaped(dx, shape), *(t for part in parts for t in part)


def _shaped(dx: Tensor | None, leading: Sequence[int]) -> Tensor | None:
    """With the leading dimensions of x."""
    return dx if dx is None or len(leading) == 1 else dx.view(*leading, dx.shape[-1])
