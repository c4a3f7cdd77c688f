"""What one call of ``lora_linear`` is beside its tensors, and its forward, from a launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.ops._checks import autocast_dtype, without_autocast
from fastft.ops._lora_linear_checks import check_spans
from fastft.ops._room import new_empty

__all__ = [
    "AUTO",
    "SCHEMA",
    "WORTH",
    "Constants",
    "cast",
    "cast_biases",
    "choose",
    "draw_masks",
    "flat",
    "forward_of",
    "launch",
    "new_dropout_mask",
    "operands",
    "outputs_of",
    "pairs_of",
    "room_of",
]

# The backend argument of a registered operation that chooses when it runs.
AUTO = "auto"
# Its last arguments: those of ``Constants.rest``.
SCHEMA = "float[] scalings, float[] dropout_ps, int[] owners, SymInt[] spans, str backend"


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
    past the last) an adapter; whether results are scaled (DoRA); the launcher, once chosen; what
    makes each weight that is not kept for the backward again; whether the call is plain: one
    adapter a layer over all rows, and all tensors as a launcher takes them."""

    layers: int
    scalings: list[float]
    dropout_ps: list[float]
    owners: list[int]
    spans: list[int]
    backend: str
    scaled: bool = False
    launcher: Any = None
    remake: Sequence[Callable[[], Tensor] | None] | None = None
    plain: bool = False

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

    def kept(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The tensors of a call that its backward is to have; None for those made again."""
        if self.remake is None:
            return tensors
        weights = zip(tensors, self.remake)
        return [*[None if make else w for w, make in weights], *tensors[self.layers :]]

    def again(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """What :meth:`kept` has left out made again."""
        if self.remake is None:
            return tensors
        weights = zip(tensors, self.remake)
        return [*[make() if make else w for w, make in weights], *tensors[self.layers :]]

    def rest(self) -> tuple[list[float], list[float], list[int], list[int], str]:
        """The arguments of the registered operation after its tensors."""
        return self.scalings, self.dropout_ps, self.owners, self.spans, self.backend

    def pairs(self) -> list[tuple[int, int]]:
        """The rows of each adapter."""
        return pairs_of(self.spans)

    def part(self, layers: Sequence[int]) -> tuple[Constants, list[int]]:
        """Of these layers alone, and the adapters they have."""
        members = [j for j, owner in enumerate(self.owners) if owner in layers]
        own = self._replace(
            layers=len(layers),
            scalings=[self.scalings[j] for j in members],
            dropout_ps=[self.dropout_ps[j] for j in members],
            owners=[layers.index(self.owners[j]) for j in members],
            spans=[n for j in members for n in self.spans[2 * j : 2 * j + 2]],
        )
        return own, members

    def rows(self, adapter: int) -> slice:
        return slice(self.spans[2 * adapter], self.spans[2 * adapter + 1])


def new_dropout_mask(x: Tensor, p: float, lora_a: Tensor, backend: str) -> Tensor:
    """A fresh bit-packed mask (M, ceil(K/8)) for x; the seed comes from torch's generator, so a
    recompute under checkpointing, which restores that, draws the same mask."""
    mask = torch.empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    choose(backend, x, [lora_a])[1].dropout_mask(mask, seed, p)
    return mask


def draw_masks(
    x: Tensor,
    dropout_ps: Sequence[float],
    spans: Sequence[int],
    lora_a: Tensor,
    backend: str,
    compiling: bool,
) -> list[Tensor | None]:
    """A mask for each adapter that drops, of its rows of x, its leading dimensions flattened."""
    if not any(dropout_ps):
        return [None] * len(dropout_ps)
    if x.dim() != 2:
        x = x.detach().view(-1, x.shape[-1])
    draw = torch.ops.fastft.dropout_mask if compiling else new_dropout_mask
    # Traced, to compare would be a guard.
    whole = None if compiling else (0, x.shape[0])
    return [
        None if p == 0.0 else draw(x if span == whole else x[slice(*span)], p, lora_a, backend)
        for p, span in zip(dropout_ps, pairs_of(spans), strict=True)
    ]


def operands(
    where: str,
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    spans: Sequence[tuple[int, int]] | None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], list[int]]:
    """x in the dtype of products, contiguous, the adapters as kernels read them, and the bounds of
    each adapter's rows, checked."""
    dtype = autocast_dtype(x.device.type) or x.dtype
    if lora_as[0].dtype not in (dtype, torch.float32):  # under autocast; kernels read no other
        lora_as, lora_bs = cast(lora_as, dtype), cast(lora_bs, dtype)
    x = (x if x.dtype == dtype else x.to(dtype)).contiguous()
    rows = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
    if spans is None:
        return x, lora_as, lora_bs, [0, rows] * len(lora_as)
    check_spans(where, spans, len(lora_as), rows)
    return x, lora_as, lora_bs, [row for span in spans for row in span]


def flat(tensor: Tensor) -> Tensor:
    """(rows, features) of a contiguous tensor."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those of another dtype, cast."""
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def cast_biases(biases: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """In this dtype, elements next to each other: kernels read them by address."""
    plain = [b is None or (b.dtype == dtype and b.is_contiguous()) for b in biases]
    return [b if ok or b is None else b.to(dtype).contiguous() for b, ok in zip(biases, plain)]


def pairs_of(spans: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spans[::2], spans[1::2]))


def outputs_of(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], spans: Sequence[int]
) -> list[Tensor]:
    """Room for ys and ss."""
    ys = [new_empty(x, (x.shape[0], w.shape[0])) for w in weights]
    rows = [stop - start for start, stop in pairs_of(spans)]
    return ys + [x.new_empty(n, a.shape[0]) for n, a in zip(rows, lora_as, strict=True)]


# Bytes that the start of each S is a multiple of.
_ALIGN = 64
# The ss of a call can be made again where they are at least this part of x: to read x again for
# less costs more than it frees.
WORTH = 1 / 16


def room_of(
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
    return launch("fwd", outputs_of(x, weights, lora_as, spans), *call)


def launch(
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
            cast_biases(biases, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
            list(owners),
            pairs_of(spans),
            **({"scales": scales} if scales else {}),
        )
    return outputs
