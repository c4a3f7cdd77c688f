"""CPU launcher of ``attention``.

One kernel where ``fastft.cpu.attention_fused`` serves; else library products on slabs of scores,
softmax in C++ between them.

A slab holds the scores of one block of queries for some key heads; the query heads of a group are
rows of one matrix, so a key head is multiplied once. Causal blocks skip the keys after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft import native
from fastft.cpu import attention_fused
from fastft.cpu.products import native_bfloat16, scratch

# Queries of a block: 128 of 512 skip 3/8 of a causal product and keep its matrices large.
_QUERIES = 128
_FEWEST = 16
# Bytes of a slab of scores of several key heads: it is written and read several times, so it stays
# in the last cache. And of one head over very many keys: few rows make slow products, and the sums
# of dK and dV are gone over once a block, which costs more than leaving the cache.
_SLAB_BYTES = 8 << 20
_HEAD_BYTES = 32 << 20


def supports(*, device_type: str, dtype: torch.dtype) -> str | None:
    """float32, and bfloat16 where the processor multiplies it."""
    if not native.available():
        return f"the compiled module is missing ({native.load_error()})"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and native_bfloat16()):
        return None
    return f"{dtype}: the CPU takes float32, and bfloat16 on processors that multiply it"


@dataclass(frozen=True)
class _Slab:
    """Queries first to last of some of the batch * kv_heads key heads; keys below ``keys``."""

    heads: slice
    first: int
    last: int
    keys: int


class _Problem:
    """Sizes and addresses that forward and backward share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        lse: Tensor,
    ) -> None:
        self.batch, heads, self.queries, _ = query.shape
        self.kv_heads, self.keys = key.shape[1:3]
        self.group = heads // self.kv_heads
        self.query, self.mask, self.lse = query, mask, lse
        self.scale, self.is_causal = scale, is_causal
        self.code = native.DTYPE_CODES[query.dtype]
        self.strides = attention_fused.mask_strides(mask)

    def slabs(self) -> Iterator[_Slab]:
        """Blocks of queries; of each, the key heads whose scores fit a slab: whole elements of the
        batch, or some heads of one."""
        item = self.query.element_size()
        block = _HEAD_BYTES // max(1, self.group * self.keys * item)
        block = max(_FEWEST, min(_QUERIES, block))
        for first in range(0, self.queries, block):
            last = min(self.queries, first + block)
            keys = min(self.keys, last) if self.is_causal else self.keys
            if self.mask is not None:
                whole = _Slab(slice(0, self.batch * self.kv_heads), first, last, keys)
                keys = native.module().attention_extent(
                    self.sizes(whole), self.is_causal, self.mask.data_ptr(), self.strides
                )
            fit = max(1, _SLAB_BYTES // (self.group * (last - first) * max(1, keys) * item))
            if fit >= self.kv_heads:
                step, element = fit // self.kv_heads * self.kv_heads, self.batch * self.kv_heads
            else:
                step = -(-self.kv_heads // -(-self.kv_heads // fit))
                element = self.kv_heads
            for begin in range(0, self.batch * self.kv_heads, element):
                for start in range(begin, begin + element, step):
                    stop = min(begin + element, start + step)
                    yield _Slab(slice(start, stop), first, last, keys)

    def sizes(self, slab: _Slab) -> list[int]:
        count = slab.heads.stop - slab.heads.start
        rows = slab.last - slab.first
        return [
            count,
            min(count, self.kv_heads),  # of an element of the batch, here
            self.group,
            rows,
            slab.keys,
            slab.first,
            self.queries,
        ]

    def facts(self, slab: _Slab) -> tuple[object, ...]:
        """What the compiled kernels ask of a slab."""
        mask = 0
        if self.mask is not None:
            element, head = divmod(slab.heads.start, self.kv_heads)
            offset = element * self.strides[0] + head * self.group * self.strides[1]
            mask = self.mask.data_ptr() + offset
        lse = self.lse.data_ptr() + 4 * slab.heads.start * self.group * self.queries
        sizes = self.sizes(slab)
        return (sizes, self.is_causal, self.scale, mask, self.strides, lse, self.code)

    def block(self, name: str, tensor: Tensor, slab: _Slab) -> Tensor:
        """The slab's rows of ``tensor`` (batch, heads, queries, width) as one matrix a key head."""
        view = self.part(tensor, slab)
        out = scratch(name, tuple(view.shape), tensor.dtype).copy_(view)
        return out.view(slab.heads.stop - slab.heads.start, -1, tensor.shape[-1])

    def part(self, tensor: Tensor, slab: _Slab) -> Tensor:
        """The same rows where they lie: (batch, kv_heads, group, rows, width)."""
        element, head = divmod(slab.heads.start, self.kv_heads)
        count = slab.heads.stop - slab.heads.start
        elements = slice(element, element + -(-count // self.kv_heads))
        heads = slice(head, head + min(count, self.kv_heads))
        grouped = tensor.unflatten(1, (self.kv_heads, self.group))
        return grouped[elements, heads, :, slab.first : slab.last]


def _flat(name: str, tensor: Tensor) -> Tensor:
    """(batch, heads, keys, width) as (batch * heads, keys, width), contiguous."""
    if tensor.is_contiguous():
        return tensor.flatten(0, 1)
    return scratch(name, tuple(tensor.shape), tensor.dtype).copy_(tensor).flatten(0, 1)


def fwd(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Writes out (batch, heads, queries, value width) and lse (batch, heads, queries)."""
    if attention_fused.serves(query, key, value):
        attention_fused.run([query, key, value, out], mask, lse, scale, is_causal)
        return
    problem = _Problem(query, key, mask, scale, is_causal, lse)
    k, v = _flat("attention_k", key), _flat("attention_v", value)
    for slab in problem.slabs():
        part = problem.part(out, slab)
        if slab.keys == 0:
            part.zero_()
            problem.part(lse.unsqueeze(-1), slab).fill_(float("inf"))
            continue
        q = problem.block("attention_q", query, slab)
        scores = scratch("attention_scores", (*q.shape[:2], slab.keys), q.dtype)
        torch.bmm(q, k[slab.heads, : slab.keys].transpose(1, 2), out=scores)
        native.module().attention_softmax(scores.data_ptr(), *problem.facts(slab))
        block = scratch("attention_out", (*q.shape[:2], v.shape[-1]), q.dtype)
        torch.bmm(scores, v[slab.heads, : slab.keys], out=block)
        part.copy_(block.view(part.shape))


def bwd(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Writes the gradients, each in the shape of its tensor; those of key and value are summed in
    float32 over the blocks of queries."""
    if attention_fused.serves(query, key, value, d_query, d_key, d_value):
        tensors = [query, key, value, out, d_out, d_query, d_key, d_value]
        attention_fused.run(tensors, mask, lse, scale, is_causal)
        return
    problem = _Problem(query, key, mask, scale, is_causal, lse)
    k, v = _flat("attention_k", key), _flat("attention_v", value)
    dk = scratch("attention_dk", tuple(k.shape), torch.float32).zero_()
    dv = scratch("attention_dv", tuple(v.shape), torch.float32).zero_()
    for slab in problem.slabs():
        part = problem.part(d_query, slab)
        if slab.keys == 0:
            part.zero_()
            continue
        q = problem.block("attention_q", query, slab)
        d = problem.block("attention_d", d_out, slab)
        seen = (slab.heads, slice(0, slab.keys))
        shape = (*q.shape[:2], slab.keys)
        scores = scratch("attention_scores", shape, q.dtype)
        d_scores = scratch("attention_d_scores", shape, q.dtype)
        torch.bmm(q, k[seen].transpose(1, 2), out=scores)
        torch.bmm(d, v[seen].transpose(1, 2), out=d_scores)
        native.module().attention_gradient(
            scores.data_ptr(), d_scores.data_ptr(), *problem.facts(slab)
        )
        block = scratch("attention_dq", tuple(q.shape), q.dtype)
        part.copy_(torch.bmm(d_scores, k[seen], out=block).view(part.shape))
        for total, left, right in ((dv, scores, d), (dk, d_scores, q)):
            product = scratch("attention_part", tuple(total[seen].shape), q.dtype)
            total[seen].add_(torch.bmm(left.transpose(1, 2), right, out=product))
    d_key.copy_(dk.view(key.shape))
    d_value.copy_(dv.view(value.shape))
