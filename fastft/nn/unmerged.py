"""The weights of a layer from before its adapters were merged into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNMERGED", "KeepsUnmerged", "Unmerged"]

# Where a merged layer keeps its weights from before the merge.
UNMERGED = "fastft_unmerged"

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Rows are summed so many at a time: the sum widens them first.
_ROWS = 1024


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor as a matrix, as near to a square as its dimensions allow: it has few sums."""
    shape = tensor.shape
    sizes = [(math.prod(shape[:d]), math.prod(shape[d:])) for d in range(1, len(shape))]
    return tensor.reshape(min(sizes, key=sum))


def _sums(tensor: Tensor) -> list[Tensor]:
    """The sums of the tensor's bits by rows and columns: other for other values, but by chance."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    if bits.dim() < 2:
        return [bits.to("cpu", copy=True)]
    bits = _matrix(bits)
    columns, rows = torch.zeros((), dtype=torch.int64, device=bits.device), []
    for part in bits.split(_ROWS):
        wide = part.to(torch.int64)
        columns = columns + wide.sum(0)
        rows.append(wide.sum(1))
    return [columns.cpu(), torch.cat(rows).cpu()]


class Unmerged:
    """Copies in host memory, and what tells whether the merged weights are still what they were."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kept = [t.detach().to("cpu", copy=True) for t in tensors]
        self._sums: list[list[Tensor]] = []

    def merged(self, tensors: Sequence[Tensor]) -> None:
        """Takes down what the merge has made."""
        self._sums = [_sums(t) for t in tensors]

    def follows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are what the merge has made."""
        if len(tensors) != len(self._kept):
            return False
        for tensor, kept, sums in zip(tensors, self._kept, self._sums, strict=True):
            if tensor.shape != kept.shape or tensor.dtype != kept.dtype:
                return False
            if not all(torch.equal(a, b) for a, b in zip(_sums(tensor), sums, strict=True)):
                return False
        return True

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Writes the copies."""
        for tensor, kept in zip(tensors, self._kept, strict=True):
            tensor.copy_(kept)


class KeepsUnmerged:
    """Mixin of fused layers, before PEFT's class: merging keeps the weights as they were."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """PEFT's merge, which also keeps the weights as they were, in host memory."""
        before = self.__dict__.pop(UNMERGED, None)
        if not self.merged:
            before = Unmerged(self._merged_into())
        elif before is not None and not before.follows(self._merged_into()):
            before = None
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            if before is not None and self.merged:
                before.merged(self._merged_into())
                self.__dict__[UNMERGED] = before

    def unmerge(self: Any) -> None:
        """PEFT's unmerge, then the very bits from before the merge, if nobody has changed what it
        made: a sum in 16 bits and its difference do not cancel, and each round trip of PEFT's would
        leave another rounding."""
        before = self.__dict__.pop(UNMERGED, None)
        unchanged = before is not None and before.follows(self._merged_into())
        super().unmerge()  # type: ignore[misc]
        if unchanged:
            before.put_back(self._merged_into())

    def _merged_into(self: Any) -> list[Tensor]:
        """What a merge of this class changes."""
        base = self.base_layer
        return [t.data for t in (base.weight, getattr(base, "bias", None)) if t is not None]
