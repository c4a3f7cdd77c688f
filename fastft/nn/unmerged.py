"""The weights of a layer from before its adapters were merged into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Unmerged"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Rows are summed so many at a time: the sum widens them first.
_ROWS = 1024


def _sums(tensor: Tensor) -> list[Tensor]:
    """The sums of the tensor's bits along each dimension: other for other values, but by chance."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    if bits.dim() < 2:
        return [bits.to("cpu", copy=True)]
    columns, rows = torch.zeros((), dtype=torch.int64, device=bits.device), []
    for part in bits.split(_ROWS):
        wide = part.to(torch.int64)
        columns = columns + wide.sum(0)
        rows.append(wide.flatten(1).sum(1))
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
