"""The loop over slabs of logits that ``linear_cross_entropy`` and ``linear_divergence`` share.

A backend makes one slab and its rows; here is which tokens are in it, and what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ELSEWHERE",
    "IGNORED",
    "NO_GRADIENTS",
    "Gradients",
    "Head",
    "Needs",
    "Tokens",
    "default_chunk",
    "empty_gradients",
    "kept_tokens",
    "over",
    "slabs",
]

# Labels as the kernels see them: in no column of this slab, and not counted at all.
ELSEWHERE, IGNORED = -1, -2

# The slab of logits: at most this many bytes, and an eighth of free memory.
_SLAB_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
# Tokens a slab that a GPU's products want: with fewer, tiles of the hidden states' gradient are too
# few for all multiprocessors, and the weight is read more often than it need be.
_GPU_TOKENS = 2048
_GPU_TILE = 128
# Ignored tokens are dropped on a GPU where the products cost at least this: finding them takes a
# few small launches.
_COMPACT_FLOPS = 1e12


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_s: bool = False
    lora_b: bool = False


NO_GRADIENTS = Needs()


class Gradients(NamedTuple):
    """Of hidden and lora_s in their dtype, of weight, bias and lora_b in float32 (float64 for
    float64): sums over tokens. Empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_s: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Head:
    """hidden (T, H) and what makes logits of it: hidden weight^T + lora_s lora_b^T.

    weight (V, H), lora_s (T, r) and lora_b (V, r) in the dtype of hidden; the bias is the rows'.
    """

    hidden: Tensor
    weight: Tensor
    lora_s: Tensor | None = None
    lora_b: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


@dataclass(frozen=True)
class Tokens:
    """The tokens that count, first: order gives their places, None where all do, in order.

    Attributes:
        count: waits for the number of them; None: all of ``order``.
    """

    order: Tensor | None = None
    count: Callable[[], int] | None = None


def default_chunk(
    tokens: int,
    vocabulary: int,
    itemsize: int,
    device_type: str,
    *,
    trained: bool = False,
    free_bytes: int | None = None,
) -> int:
    """Tokens a slab: an eighth of them, at least 16 and on a GPU 2048 or half of them, within its
    limits of bytes.

    A trained head's float32 gradient is read and written once a slab, and is larger than the slab:
    half of the tokens then. free_bytes: memory there is; the slab takes at most an eighth.
    """
    limit = _SLAB_BYTES.get(device_type, _SLAB_BYTES["cpu"])
    if free_bytes is not None:
        limit = min(limit, free_bytes // 8)
    within = limit // max(1, vocabulary * itemsize)
    wanted = -(-tokens // (2 if trained else 8))
    if device_type == "cuda":
        wanted = max(wanted, min(-(-tokens // 2), _GPU_TOKENS))
        if _GPU_TILE < within < wanted:
            within -= within % _GPU_TILE
    return max(16, min(wanted, within))


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that torch could use: free, or cached and unused. None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached)


def kept_tokens(ignored: Tensor, flops: float) -> Tokens:
    """Where the tokens that count are.

    On a GPU the host does not wait for their number before it has the first slab to launch, which
    needs none: by the time it asks, the answer, launched before that slab, is there.
    """
    if ignored.device.type == "cpu":
        kept = (~ignored).nonzero().flatten()
        return Tokens() if kept.numel() == ignored.numel() else Tokens(kept)
    if not ignored.is_cuda or flops < _COMPACT_FLOPS:
        return Tokens()
    # Asked of the head's device: another may be current.
    with torch.cuda.device(ignored.device):
        if torch.cuda.is_current_stream_capturing():
            return Tokens()
        order = torch.argsort(ignored.to(torch.uint8), stable=True)
        pinned = torch.empty(1, dtype=torch.int64, device="cpu", pin_memory=True)
        pinned.copy_((~ignored).sum().view(1), non_blocking=True)
        event = torch.cuda.Event()
        event.record()

    def count() -> int:
        event.synchronize()
        return int(pinned)

    return Tokens(order, count)


def _parts(tokens: Tokens, total: int, chunk: int) -> Iterator[tuple[Tensor | slice, int]]:
    """Places of the tokens of each slab, and their number."""
    order = tokens.order
    last = total if order is None else order.numel()
    begin = 0
    while begin < last:
        end = min(begin + chunk, last)
        yield (slice(begin, end) if order is None else order[begin:end]), end - begin
        begin = end
        if tokens.count is not None:
            last = tokens.count()
            tokens = replace(tokens, count=None)


def empty_gradients(head: Head, needs: Needs, classes: int) -> Gradients:
    """Uninitialised gradients, of no elements where none is wanted."""

    def make(like: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
        if like is None or not wanted:
            return head.hidden.new_empty(0)
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    return Gradients(
        make(head.hidden, needs.hidden),
        make(head.weight, needs.weight, head.wide),
        head.hidden.new_empty(classes if needs.bias else 0, dtype=head.wide),
        make(head.lora_s, needs.lora_s),
        make(head.lora_b, needs.lora_b, head.wide),
    )


def slabs(
    backend: Any,
    head: Head,
    tokens: Tokens,
    chunk: int,
    needs: Needs,
    out: Gradients,
    rows: Callable[[Tensor, Tensor | slice, slice], None],
) -> int:
    """Logits of a slab of tokens at a time; ``rows(slab, places, order)`` leaves in it the gradient
    of the sum of losses, from which ``out`` is made where ``needs`` asks for it.

    places: of its tokens among all; order: among those that are in any slab, whose number is
    returned.
    """
    hidden, weight, lora_s, lora_b = head.hidden, head.weight, head.lora_s, head.lora_b
    total = hidden.shape[0]
    apart = tokens.order is not None
    if apart or total == 0:
        for gradient in (out.hidden, out.lora_s):
            gradient.zero_()  # of the tokens in no slab
    done = 0
    # The last slab may be smaller, none is larger: one buffer serves all.
    most = min(chunk, total if tokens.order is None else tokens.order.numel())
    buffer = backend.new_slab("logits", most, weight.shape[0], hidden)
    if lora_b is not None:
        lora_b = lora_b.to(buffer.dtype)
    for places, n in _parts(tokens, total, chunk):
        slab, hidden_rows = buffer[:n], hidden[places]
        backend.project(slab, hidden_rows, weight)
        s_rows = None
        if lora_s is not None and lora_b is not None:
            s_rows = lora_s[places]
            slab.addmm_(s_rows.to(slab.dtype), lora_b.t())
        rows(slab, places, slice(done, done + n))
        first = done == 0
        if needs.hidden:
            _row_gradient(out.hidden, places, slab, weight, backend.d_hidden)
        if needs.lora_s and lora_b is not None:
            _row_gradient(out.lora_s, places, slab, lora_b, _product)
        if needs.weight:
            backend.add_d_weight(out.weight, slab, hidden_rows, first)
        if needs.lora_b and s_rows is not None:
            backend.add_d_weight(out.lora_b, slab, s_rows, first)
        if needs.bias:
            summed = slab.sum(0, dtype=out.bias.dtype)
            out.bias.copy_(summed) if first else out.bias.add_(summed)
        done += n
    if done == 0:  # no token counts
        for gradient in (out.weight, out.bias, out.lora_b):
            gradient.zero_()
    return done


def _product(out: Tensor, slab: Tensor, factor: Tensor) -> None:
    if out.dtype == slab.dtype:
        torch.mm(slab, factor, out=out)
    else:
        out.copy_(slab @ factor)


def _row_gradient(
    out: Tensor,
    places: Tensor | slice,
    slab: Tensor,
    factor: Tensor,
    product: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """out[places] = slab factor."""
    if isinstance(places, slice):
        return product(out[places], slab, factor)
    rows = out.new_empty(slab.shape[0], out.shape[1])
    product(rows, slab, factor)
    out.index_copy_(0, places, rows)
    return None


def over(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count: over no token NaN, with gradients of 0, as torch's own losses."""
    if not isinstance(count, Tensor):
        return total / count if count else total * 0 + torch.nan
    nothing = count == 0
    return torch.where(nothing, torch.nan, total / torch.where(nothing, 1, count))
