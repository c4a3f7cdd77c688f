"""Whether a batch has several sequences in a row, asked once instead of at each forward.

Transformers compares the positions of a batch without a mask at each forward, and waits for a GPU
to answer. Positions that a model makes itself depend on the batch's length alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

__all__ = ["begin_forward", "end_forward", "install"]

_thread = threading.local()
# Lengths of which a model's own positions were found to be one sequence.
_found: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()

# With one of these the answer depends on the batch, or it is not asked.
_GIVEN = ("attention_mask", "position_ids", "past_key_values")


def begin_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an accelerated model: whether its positions are its own."""
    if torch.compiler.is_compiling():
        return
    own = len(args) < 2 and all(kwargs.get(name) is None for name in _GIVEN)
    _thread.lengths = _found.setdefault(root, set()) if own else None


def end_forward(*_: Any) -> None:
    """Forward hook of an accelerated model."""
    if not torch.compiler.is_compiling():
        _thread.lengths = None


def _sequences_in(position_ids: Tensor) -> Tensor | None:
    """``find_packed_sequence_indices``, unless the answer is known to be None."""
    if torch.compiler.is_compiling():
        return _original(position_ids)
    lengths = getattr(_thread, "lengths", None)
    if lengths is None or not _one_row(position_ids):
        return _original(position_ids)
    length = position_ids.shape[1]
    if length in lengths:
        return None
    found = _original(position_ids)
    if found is None:
        lengths.add(length)
    return found


def _one_row(position_ids: Tensor) -> bool:
    """Whether these are views of one row: not made from each row's contents."""
    base = position_ids._base
    return position_ids.dim() == 2 and base is not None and base.dim() == 1


_original: Any = getattr(masking_utils, "find_packed_sequence_indices", None)


def install() -> None:
    """Has Transformers ask here; for all models, of which only accelerated ones are answered."""
    if _original is not None:
        masking_utils.find_packed_sequence_indices = _sequences_in
