"""CPU launcher of ``embedding``."""

from __future__ import annotations

from torch import Tensor

from fastft import native
from fastft.cpu._supports import supports as supports


def bwd(d_weight: Tensor, dy: Tensor, order: Tensor, ids: Tensor, *, padding: int) -> None:
    """Writes the sums of dy's rows into those of d_weight that have a token."""
    native.module().embedding_backward(
        *(t.data_ptr() for t in (d_weight, dy, order, ids)),
        *dy.shape,
        padding,
        native.DTYPE_CODES[dy.dtype],
    )
