"""Attention as one C++ kernel with its products inside: csrc/cpu/attention_fused.inc.

It serves bfloat16 where vectors multiply it (AVX512-BF16 without AMX), up to a number of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import native
from fastft.cpu.product import vectors_multiply
from fastft.cpu.products import scratch

__all__ = ["mask_strides", "run", "serves", "visible"]

# Keys up to which the sums of dK and dV, float32 for a dozen stretches of queries, are no burden.
_MAX_KEYS = 32768
# Of so few queries that packing the keys is half of the work.
_FEW_QUERIES, _FEW_MAX_KEYS = 16, 4096


def serves(query: Tensor, key: Tensor, value: Tensor, *gradients: Tensor) -> bool:
    """Whether the kernel takes these, and pays."""
    return (
        query.dtype == torch.bfloat16
        and vectors_multiply()
        and key.shape[2] <= (_MAX_KEYS if query.shape[2] >= _FEW_QUERIES else _FEW_MAX_KEYS)
        and key.shape[3] % 2 == value.shape[3] % 2 == 0
        and all(t.stride(-1) == 1 for t in (query, key, value, *gradients))
    )


def mask_strides(mask: Tensor | None) -> list[int]:
    """In elements, of batch, head and query; 0 where all read the same."""
    if mask is None:
        return [0, 0, 0]
    sizes_strides = zip(mask.shape[:3], mask.stride()[:3], strict=True)
    return [0 if size == 1 else stride for size, stride in sizes_strides]


def run(
    tensors: list[Tensor], mask: Tensor | None, lse: Tensor, scale: float, causal: bool
) -> None:
    """Forward of query, key, value to out and lse; or, with out's gradient and three more, the
    backward."""
    query, key, value = tensors[:3]
    for i, tensor in enumerate(tensors[3:5], 3):
        if tensor.stride(-1) != 1:
            room = scratch(f"attention_{i}", tuple(tensor.shape), tensor.dtype)
            tensors[i] = room.copy_(tensor)
    batch, heads, queries, width = query.shape
    sizes = [batch, heads, key.shape[1], queries, key.shape[2], width, value.shape[3]]
    sizes.append(torch.get_num_threads())
    c, places = native.module(), [(t.data_ptr(), *t.stride()[:3]) for t in tensors]
    at_mask, seen, strides, causal = visible(mask, causal)
    room = scratch("attention", (c.attention_scratch(places, sizes, causal),), torch.float32)
    facts = (causal, scale, at_mask, seen, strides)
    c.attention_fused(places, sizes, lse.data_ptr(), *facts, room.data_ptr())


def visible(mask: Tensor | None, causal: bool) -> tuple[int, int, list[int], bool]:
    """Where the mask is, or how many keys each query sees of one by which it sees the first ones,
    their strides, and whether attention is causal besides; good until the next call."""
    strides = mask_strides(mask)
    if mask is None:
        return 0, 0, strides, causal
    seen, strides, causal = _prefixes(mask, strides, causal)
    return 0 if seen else mask.data_ptr(), seen, strides, causal


def _prefixes(mask: Tensor, strides: list[int], causal: bool) -> tuple[int, list[int], bool]:
    """Of a mask by which each query sees keys up to some key (a batch padded on the right): where
    that is written for each of its rows, those rows' strides, and whether it is causal besides. Of
    another mask 0, its strides, and what was known."""
    sizes = [size if stride else 1 for size, stride in zip(mask.shape[:2], strides, strict=False)]
    rows = [*sizes, mask.shape[2]]
    seen = scratch("attention_visible", tuple(rows), torch.int32)
    kind = native.module().attention_prefixes(
        mask.data_ptr(), strides, rows, mask.shape[3], seen.data_ptr()
    )
    if kind == 0:
        return 0, strides, causal
    apart = [stride if size > 1 else 0 for size, stride in zip(sizes, seen.stride(), strict=False)]
    return seen.data_ptr(), [*apart, 1], causal or kind == 2
