"""``lora_add``: its forward and backward from a launcher of ``lora_linear``, for autograd, and as
registered operations, which torch.compile sees."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.ops._checks import without_autocast
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._library import register
from fastft.ops._lora_linear_autograd import saved_of
from fastft.ops._lora_linear_call import SCHEMA, Constants, choose, outputs_of, room_of
from fastft.ops._lora_linear_gradients import backward_of, with_terms
from fastft.ops._lora_linear_registered import absent
from fastft.ops._remade import keeping

__all__ = ["LoraAdd"]


def _split(constants: Constants, tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """lora_as, lora_bs, masks and, where there are more, ss."""
    n = len(constants.owners)
    return [tensors[i * n : (i + 1) * n] for i in range(4)]


def _flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def _is_own(y: Tensor) -> bool:
    """Whether it is no module's parameter and nothing else lies where it does, all of it next to
    each other. What inference mode made carries no gradient on."""
    return (
        type(y) is Tensor
        and y.is_contiguous()
        and y.untyped_storage().nbytes() == y.numel() * y.element_size()
        and not (y.is_leaf and y.requires_grad)
        and y.is_inference() == torch.is_inference_mode_enabled()
    )


def _add(
    constants: Constants,
    overwrite: bool,
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    ss: list[Tensor],
) -> list[Tensor]:
    """The results, in the memory of ys where that may be; writes the ss."""
    whole = torch.contiguous_format
    outs, sums = [], []
    for y in ys:
        own = overwrite and _is_own(y)
        outs.append(y.data if own else y.detach().clone(memory_format=whole))
        if own and not y.is_inference():
            torch.autograd.graph.increment_version(y)  # who saved it is told
        # Kernels add to what has x's dtype; a result of another takes the sum of its terms.
        same = y.dtype == x.dtype
        sums.append(_flat(outs[-1]) if same else x.new_zeros(x.shape[0], y.shape[-1]))
    with without_autocast(x.device.type):
        (constants.launcher or choose(constants.backend, x, lora_as)[1]).fwd(
            sums,
            ss,
            x,
            [],
            [None] * len(ys),
            list(lora_as),
            list(lora_bs),
            constants.scalings,
            list(masks),
            constants.dropout_ps,
            constants.owners,
            constants.pairs(),
        )
    for out, added in zip(outs, sums, strict=True):
        if out.dtype != added.dtype:
            out.add_(added.view(out.shape))
    return outs


def _gradients(
    constants: Constants,
    x: Tensor,
    saved: list[Sequence[Any]],
    dys: Sequence[Tensor | None],
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> list[Tensor | None]:
    """dx, dAs and dBs; None where no gradient has reached a layer, as in PEFT."""
    reached = [i for i, dy in enumerate(dys) if dy is not None]
    own, members = constants.part(reached)
    n = len(constants.owners)
    gradients: list[Tensor | None] = [None] * (1 + 2 * n)
    if not members:
        return gradients
    lora_as, lora_bs, masks, ss = ([values[j] for j in members] for values in saved)
    gradients[0], das, dbs = backward_of(
        [_flat(dy).to(x.dtype) for dy in dys if dy is not None],
        x,
        ss,
        [],
        lora_as,
        lora_bs,
        masks,
        *own.rest(),
        need_dx,
        [need_da[j] for j in members],
        [need_db[j] for j in members],
        launcher=own.launcher,
    )
    for j, da, db in zip(members, das, dbs, strict=True):
        gradients[1 + j], gradients[1 + n + j] = da, db
    return gradients


def _terms(constants: Constants, x: Tensor, *tensors: Any) -> list[Tensor]:
    """What is added to each y, as torch operations."""
    lora_as, lora_bs, masks, _ = _split(constants, tensors)
    nothing = [x.new_zeros(()) for _ in range(constants.layers)]
    return with_terms(constants, nothing, x, lora_as, lora_bs, masks)


class LoraAdd(torch.autograd.Function):
    """Eager autograd of ``lora_add_siblings``."""

    @staticmethod
    def forward(ctx: Any, constants: Constants, overwrite: bool, x: Tensor, *tensors: Any) -> Any:
        ys, rest = tensors[: constants.layers], tensors[constants.layers :]
        lora_as, lora_bs, masks, _ = _split(constants, rest)
        ss, _ = room_of(x, lora_as, constants.spans)
        outs = _add(constants, overwrite, ys, x, lora_as, lora_bs, masks, ss)
        ctx.constants = constants
        kept, ctx.make = keeping(x)
        ctx.save_for_backward(*kept, *rest, *ss)
        ctx.kept = len(kept)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        constants: Constants = ctx.constants
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        x, tensors = saved_of(ctx)
        _, _, need_dx, *needs = ctx.needs_input_grad
        to_ys = [dy if need else None for dy, need in zip(dys, needs)]
        saved, asked = _split(constants, tensors), needs[constants.layers :]
        if wanted(*dys):
            inputs = [x, *tensors][: 1 + len(asked)]
            flat = [None if dy is None else _flat(dy).to(x.dtype) for dy in dys]
            function = functools.partial(_terms, constants)
            found = plain_gradients(function, inputs, [need_dx, *asked], flat)
        else:
            n = len(constants.owners)
            needed = (need_dx, asked[:n], asked[n : 2 * n])
            found = _gradients(constants, x, saved, dys, *needed) + [None] * n
        return None, None, found[0], *to_ys, *found[1:]


def _fwd_kernel(
    ys: list[Tensor],
    x: Tensor,
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    constants = Constants(len(ys), *rest)
    ss = outputs_of(x, [], lora_as, constants.spans)
    return _add(constants, False, ys, x, lora_as, lora_bs, masks, ss) + ss


def _fwd_fake(
    ys: list[Tensor],
    x: Tensor,
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    scalings: list[float],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[int],
    backend: str,
) -> list[Tensor]:
    outs = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys]
    return outs + outputs_of(x, [], lora_as, spans)


def _bwd_kernel(
    dys: list[Tensor],
    x: Tensor,
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    ss: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    every = [True] * len(lora_as)
    saved: list[Sequence[Any]] = [lora_as, lora_bs, masks, ss]
    found = _gradients(Constants(len(dys), *rest), x, saved, dys, True, every, every)
    return [t for t in found if t is not None]


def _bwd_fake(
    dys: list[Tensor], x: Tensor, lora_as: list[Tensor], lora_bs: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *lora_as, *lora_bs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ys, x, lora_as, lora_bs, masks, *constants = inputs
    ctx.constants = Constants(len(ys), *constants)
    ctx.save_for_backward(x, *lora_as, *lora_bs, *masks, *output[len(ys) :])


def _registered_backward(ctx: Any, grads: list[Tensor]) -> Any:
    constants: Constants = ctx.constants
    x, *tensors = ctx.saved_tensors
    saved = [list(values) for values in _split(constants, tensors)]
    dys, n = grads[: constants.layers], len(constants.owners)
    dx, *adapters = torch.ops.fastft.lora_add_bwd(dys, x, *saved, *constants.rest())
    return list(dys), dx, adapters[:n], adapters[n:], absent(saved[2]), *[None] * 5


_ADAPTERS = "Tensor x, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] masks"
register(f"lora_add_fwd(Tensor[] ys, {_ADAPTERS}, {SCHEMA}) -> Tensor[]", _fwd_kernel, _fwd_fake)
register(
    f"lora_add_bwd(Tensor[] dys, {_ADAPTERS}, Tensor[] ss, {SCHEMA}) -> Tensor[]",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::lora_add_fwd", _registered_backward, setup_context=_setup_context
)
