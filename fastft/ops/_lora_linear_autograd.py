"""``lora_linear`` for autograd, eager. What torch.compile sees calls the same launcher:
``_lora_linear_registered``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.ops._checks import without_autocast
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._remade import keeping
from fastft.ops._room import empty_like, new_empty
from fastft.ops._saving import Late, note, saves_first
from fastft.ops._witness import unchanged, witnessed
from fastft.reference.lora_linear import lora_term

__all__ = [
    "AUTO",
    "Constants",
    "Left",
    "LoraLinear",
    "backward_of",
    "cast",
    "choose",
    "forward_of",
    "identity",
    "late_values",
    "new_dropout_mask",
    "outputs_of",
    "saved_of",
]

# The backend argument of a registered operation that chooses when it runs.
AUTO = "auto"


def choose(backend: str | None, x: Tensor, lora_as: Sequence[Tensor]) -> tuple[str, Any]:
    """The backend for a call and its launcher."""
    return backends.select(
        "lora_linear",
        None if backend == AUTO else backend,
        device_type=x.device.type,
        dtype=x.dtype,
        adapter_dtype=lora_as[0].dtype,
        r=max([a.shape[0] for a in lora_as]),
    )


class Constants(NamedTuple):
    """What a call holds beside tensors: one scaling, dropout, owner and two row numbers (first,
    past the last) an adapter; whether results are scaled (DoRA); the launcher, once chosen."""

    layers: int
    scalings: list[float]
    dropout_ps: list[float]
    owners: list[int]
    spans: list[int]
    backend: str
    scaled: bool = False
    launcher: Any = None

    def split(self, tensors: Sequence[Any]) -> list[Sequence[Any]]:
        """weights, biases, lora_as, lora_bs, masks, scales (none of a call without) and, where
        there are more, ss and the results of a scaled call."""
        n, adapters = self.layers, len(self.owners)
        sizes = (n, n, adapters, adapters, adapters, n if self.scaled else 0, adapters)
        found, end = [], 0
        for size in sizes:
            found.append(tensors[end : end + size])
            end += size
        return [*found, tensors[end:]]

    def rest(self) -> Any:
        """The arguments of the registered operation after its tensors."""
        return self.scalings, self.dropout_ps, self.owners, self.spans, self.backend

    def pairs(self) -> list[tuple[int, int]]:
        """The rows of each adapter."""
        return _pairs(self.spans)

    def rows(self, adapter: int) -> slice:
        return slice(self.spans[2 * adapter], self.spans[2 * adapter + 1])


def new_dropout_mask(x: Tensor, p: float, lora_a: Tensor, backend: str) -> Tensor:
    """A fresh bit-packed mask (M, ceil(K/8)) for x; the seed comes from torch's generator, so a
    recompute under checkpointing, which restores that, draws the same mask."""
    mask = torch.empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    choose(backend, x, [lora_a])[1].dropout_mask(mask, seed, p)
    return mask


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those of another dtype, cast."""
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _cast_biases(biases: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [b if b is None or b.dtype == dtype else b.to(dtype) for b in biases]


def _pairs(spans: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spans[::2], spans[1::2]))


def outputs_of(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], spans: Sequence[int]
) -> list[Tensor]:
    """Room for ys and ss."""
    ys = [new_empty(x, (x.shape[0], w.shape[0])) for w in weights]
    rows = [stop - start for start, stop in _pairs(spans)]
    return ys + [x.new_empty(n, a.shape[0]) for n, a in zip(rows, lora_as, strict=True)]


# Bytes that the start of each S is a multiple of.
_ALIGN = 64
# The ss of a call can be made again where they are at least this part of x: to read x again for
# less costs more than it frees.
_WORTH = 1 / 16


def _room(
    x: Tensor, lora_as: Sequence[Tensor], spans: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Room for the ss in one piece, which comes last: what is made again at once."""
    step = _ALIGN // x.element_size()
    places, end = [], 0
    for i, lora_a in enumerate(lora_as):
        rows, r = spans[2 * i + 1] - spans[2 * i], lora_a.shape[0]
        places.append(((rows, r), (r, 1), end))
        end += -(-rows * r // step) * step
    held = new_empty(x, (end,))
    return [held.as_strided(*place) for place in places], held


def forward_of(*call: Any) -> list[Tensor]:
    """ys and ss, from the launcher: the registered operation."""
    x, weights, _, lora_as, *_, spans, _ = call
    return _launch("fwd", outputs_of(x, weights, lora_as, spans), *call)


def _launch(
    part: str,
    outputs: list[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
    spans: Sequence[int],
    backend: str,
    scales: Sequence[Tensor | None] = (),
    launcher: Any = None,
) -> list[Tensor]:
    """ys and ss, written into ``outputs``; part: "fwd", or only the ss ("fwd_adapters"), or then
    only the ys ("fwd_values"). launcher: None where the call has still to choose."""
    n = len(weights)
    with without_autocast(x.device.type):
        getattr(launcher or choose(backend, x, lora_as)[1], part)(
            outputs[:n],
            outputs[n:],
            x,
            cast(weights, x.dtype),
            _cast_biases(biases, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
            list(owners),
            _pairs(spans),
            **({"scales": scales} if scales else {}),
        )
    return outputs


def backward_of(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
    spans: Sequence[int],
    backend: str,
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
    made: Any = None,
    scaled: Any = None,
    launcher: Any = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, dAs and dBs, from the launcher; of these ``made`` has the dBs already (``_glu_pair``).
    scaled: the scales, results and room for the d_scales of a scaled call."""
    dx = empty_like(x) if need_dx else None
    das = [torch.empty_like(a) if need else None for a, need in zip(lora_as, need_da, strict=True)]
    needed = zip(lora_bs, need_db, strict=True)
    dbs = [torch.empty_like(b) if need and made is None else None for b, need in needed]
    with without_autocast(x.device.type):
        (launcher or choose(backend, x, lora_as)[1]).bwd(
            dx,
            das,
            dbs,
            [dy.contiguous() for dy in dys] if made is None else list(dys),
            x,
            list(ss),
            cast(weights, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
            list(owners),
            _pairs(spans),
            **({} if made is None else {"made": made}),
            **({} if scaled is None else {"scaled": scaled}),
        )
    return dx, das, dbs if made is None else list(made.dbs)


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
    if held.numel() >= _WORTH * x.numel() and _splits(constants):
        note(held, (x, *lora_as, *masks), functools.partial(_adapters_again, constants))


def _adapters_again(constants: Constants, x: Tensor, *tensors: Any) -> Tensor:
    """The ss of a call once more, as ``_room`` lays them out; tensors: its lora_as and masks."""
    half = len(tensors) // 2
    lora_as, masks = list(tensors[:half]), list(tensors[half:])
    ss, held = _room(x, lora_as, constants.spans)
    call: Any = (x, [], [], lora_as, [], masks, *constants.rest(), (), constants.launcher)
    _launch("fwd_adapters", ss, *call)
    return held


class Left(NamedTuple):
    """What is left with a node: x and its other saved tensors, for they may be unpacked once, and
    what the backend has made, with the gradients it goes with."""

    saved: tuple[Tensor, Sequence[Tensor]]
    made: Any
    dys: list[tuple[Any, ...]]


def saved_of(node: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """x, made again where it was not kept, and what else a call has saved."""
    saved = node.saved_tensors
    if node.make is None:
        return saved[0], saved[1:]
    x = node.make(*saved[: node.kept])
    return x.view(-1, x.shape[-1]), saved[node.kept :]


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from any other, and from itself once changed."""
    return (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride())


def _take(node: Any, dys: Any) -> Left | None:
    """What was left at this node, which forgets it; without what the backend has made where these
    are not the gradients it goes with."""
    left: Left | None = node.__dict__.pop("left", None)
    if left is None or left.made is None:
        return left
    if [identity(dy) for dy in dys] == left.dys:
        return left
    return left._replace(made=None)


class LoraLinear(torch.autograd.Function):
    """Eager autograd of ``lora_linear_siblings``."""

    @staticmethod
    def forward(
        ctx: Any, late: Late | None, constants: Constants, x: Tensor, *tensors: Tensor | None
    ) -> Any:
        weights, biases, lora_as, lora_bs, masks, scales, *_ = constants.split(tensors)
        ss, held = _room(x, lora_as, constants.spans)
        rows, rest = x.shape[0], (*constants.rest(), scales, constants.launcher)
        outputs = [*[new_empty(x, (rows, w.shape[0])) for w in weights], *ss]
        call: Any = (x, weights, biases, lora_as, lora_bs, masks, *rest)
        if late is None:
            _launch("fwd", outputs, *call)
            _note_adapters(constants, held, x, lora_as, masks)
        else:
            _launch("fwd_adapters", outputs, *call)
            late.work = functools.partial(_launch, "fwd_values", outputs, *call)
        ctx.constants = constants
        kept, ctx.make = keeping(x)
        ys = outputs[: constants.layers]
        results: Sequence[Tensor | None] = ()
        if constants.scaled:
            read = [y if getattr(s, "requires_grad", False) else None for y, s in zip(ys, scales)]
            results, ctx.witnesses = witnessed(read)
        ctx.save_for_backward(*kept, *tensors, *ss, *results)
        ctx.kept = len(kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        constants: Constants = ctx.constants
        left = _take(ctx, dys)
        x, tensors = saved_of(ctx) if left is None else left.saved
        weights, biases, lora_as, lora_bs, masks, scales, ss, results = constants.split(tensors)
        if wanted(*dys):
            needs = ctx.needs_input_grad[2:]
            return None, None, *_differentiable_backward(constants, x, tensors, dys, needs)
        needs = constants.split(ctx.needs_input_grad[3:])
        need_w, need_bias, need_a, need_b, _, need_scale, *_ = needs
        room = zip(scales, need_scale, strict=True)
        d_scales = [torch.empty_like(s) if need else None for s, need in room]
        dx, das, dbs = backward_of(
            dys,
            x,
            ss,
            weights,
            lora_as,
            lora_bs,
            masks,
            constants.scalings,
            constants.dropout_ps,
            constants.owners,
            constants.spans,
            constants.backend,
            ctx.needs_input_grad[2],
            need_a,
            need_b,
            None if left is None else left.made,
            (scales, unchanged(results, ctx.witnesses), d_scales) if constants.scaled else None,
            constants.launcher,
        )
        dws = [(dy.t() @ x).to(w.dtype) if k else None for dy, w, k in zip(dys, weights, need_w)]
        dbiases = [dy.sum(0).to(b.dtype) if k else None for dy, b, k in zip(dys, biases, need_bias)]
        no_masks = [None] * len(masks)
        return None, None, dx, *dws, *dbiases, *das, *dbs, *no_masks, *d_scales


def _differentiable_backward(
    constants: Constants,
    x: Tensor,
    tensors: Sequence[Any],
    dys: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward as torch operations: of x and the first of the saved tensors, as ``needs`` has
    them."""
    inputs = [x, *tensors][: len(needs)]
    return plain_gradients(functools.partial(_again, constants), inputs, needs, dys)


def _again(constants: Constants, x: Tensor, *tensors: Any) -> list[Tensor]:
    """The results as torch operations."""
    weights, biases, lora_as, lora_bs, masks, scales, *_ = constants.split(tensors)
    ys = [
        torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for w, bias in zip(weights, biases, strict=True)
    ]
    for i, owner in enumerate(constants.owners):
        rows = constants.rows(i)
        term = lora_term(
            x[rows],
            lora_as[i],
            lora_bs[i],
            constants.scalings[i],
            masks[i],
            constants.dropout_ps[i],
        )
        above, below = rows.start, x.shape[0] - rows.stop
        ys[owner] = ys[owner] + torch.nn.functional.pad(term, (0, 0, above, below))
    for i, scale in enumerate(scales):
        if scale is not None:
            ys[i] = (ys[i] * scale).to(x.dtype)
    return ys
