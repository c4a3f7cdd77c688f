"""What optimizers of whole matrices share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError
from fastft.optim._base import FusedOptimizer
from fastft.optim._batch import Batch
from fastft.optim._shards import is_sharded

if TYPE_CHECKING:
    from fastft.optim._batch import Members

__all__ = ["MatrixBatch", "MatrixOptimizer", "own_state"]


class MatrixBatch(Batch):
    """A batch whose tensors keep the order of their dimensions."""

    reorders = False
    # States of a parameter that the optimizer makes itself.
    own_states: tuple[str, ...] = ()

    def __init__(self, optimizer: FusedOptimizer, members: Members) -> None:
        super().__init__(optimizer, members)
        self._held |= {name: [s.get(name) for s in self._states] for name in self.own_states}


def own_state(state: dict[str, Any], name: str, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The state of this name, zeros where there is none, on p's device in float32 or wider."""
    wide = torch.promote_types(p.dtype, torch.float32)
    found = state.get(name)
    if found is None:
        state[name] = torch.zeros(shape, dtype=wide, device=p.device)
    else:
        state[name] = found.to(p.device, wide).contiguous()
    kept: Tensor = state[name]
    return kept


class MatrixOptimizer(FusedOptimizer):
    """Rows and columns, or the matrix as a whole, say how an element steps: sharded parameters are
    refused, for theirs lie apart, and so are flat buffers and states elsewhere."""

    rule = "sgd"
    state_names = ()

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        super().__init__(params, defaults, **options)
        for name, only in (("flat", False), ("states", "device")):
            if options.get(name, only) != only:
                raise ArgumentError(
                    self._where, name, expected=repr(only), got=repr(options[name]),
                    remedy="Matrices and their states stay whole.",
                )  # fmt: skip

    def refuse(self, p: Tensor, grad: Tensor) -> None:
        """As the base; sharded parameters too."""
        super().refuse(p, grad)
        if is_sharded(p):
            raise ArgumentError(
                self._where, "params", expected="whole tensors", got="a sharded one",
                remedy="Keep these parameters out of FSDP, or use AdamW.",
            )  # fmt: skip
