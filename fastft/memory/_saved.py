"""What a layer saves for its backward, chosen tensor by tensor through torch's saved-tensor hooks.

A result that an operation can make again from tensors that are saved anyway (a norm's, a GLU's, the
S of adapters of a high rank) is replaced by its recipe; a large activation may be kept in 8 bits.
All else is saved as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from fastft.memory._compress import Compressed
from fastft.ops._saving import noting

__all__ = ["saving"]


@dataclass
class _Same:
    """A tensor as it is. torch checks no versions of what hooks return; this does."""

    held: Tensor
    version: int

    def tensor(self) -> Tensor:
        if self.held._version != self.version:
            raise RuntimeError(
                "fastft.memory: a tensor needed for the backward was changed in place after it was "
                "saved"
            )
        return self.held


def _same(tensor: Tensor) -> _Same:
    return _Same(tensor.detach(), tensor._version)


@dataclass
class _Recipe:
    """How one result is made again; the storage it lay in, and its version then."""

    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    make: Callable[..., Tensor]
    # Bytes read and written to make it.
    moved: int
    made: StorageWeakRef | None = None
    told: bool = False

    def value(self) -> Tensor:
        """The result, once for all who ask while somebody holds it: its memory, for autograd hands
        out tensors of its own."""
        if self.made is not None:
            held = torch.UntypedStorage._new_with_weak_ptr(self.made.cdata)
            if held is not None:
                return torch.empty(0, dtype=self.dtype, device=held.device).set_(held)
        with torch.no_grad():
            value = self.make(*(None if i is None else i.tensor() for i in self.inputs))
        self.made = StorageWeakRef(value.untyped_storage())
        return value


@dataclass
class _View:
    """A view of a result that is made again when it is needed."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: Any

    def tensor(self) -> Tensor:
        return self.recipe.value().as_strided(self.size, self.stride, self.offset)


class _Notebook:
    """What one layer's forward saved: recipes by their results' storages, tensors in 8 bits."""

    def __init__(self, compressed: Callable[[Tensor], Compressed | None] | None) -> None:
        self._by_storage: dict[int, _Recipe] = {}
        self._compressed = compressed
        self._in_8_bits: dict[Any, tuple[StorageWeakRef, Compressed]] = {}

    def add(
        self, result: Tensor, inputs: tuple[Tensor | None, ...], make: Callable[..., Tensor]
    ) -> None:
        """Of ``fastft.ops._saving.Notebook``. Inputs are kept as all else is, without a graph."""
        held = tuple(None if t is None else self.keep(t) for t in inputs)
        storage = StorageWeakRef(result.untyped_storage())
        moved = result.nbytes + sum(0 if t is None else t.nbytes for t in inputs)
        recipe = _Recipe(storage, result._version, result.dtype, held, make, moved)
        self._by_storage[storage.cdata] = recipe

    def view(self, tensor: Tensor) -> _View | None:
        """What is kept of a result that is made again; None of any other tensor."""
        recipe = self._by_storage.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.storage.expired() or recipe.version != tensor._version:
            return None
        if recipe.dtype != tensor.dtype:
            return None
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return _View(recipe, size, stride, tensor.storage_offset())

    def keep(self, tensor: Tensor) -> Any:
        """What is kept of any tensor."""
        return self.view(tensor) or self._narrow(tensor) or _same(tensor)

    def _narrow(self, tensor: Tensor) -> Compressed | None:
        """The tensor in 8 bits, where that is asked for: once for all who save it."""
        if self._compressed is None:
            return None
        storage = tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype, tensor._version)
        known = self._in_8_bits.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        made = self._compressed(tensor)
        if made is not None:
            self._in_8_bits[key] = (StorageWeakRef(storage), made)
        return made

    def clear(self) -> None:
        """Forgets all but what is held elsewhere."""
        self._by_storage.clear()
        self._in_8_bits.clear()


@contextmanager
def saving(
    *,
    recipes: bool,
    narrow: Callable[[Tensor], Compressed | None] | None = None,
    sink: Callable[[Tensor], None] | None = None,
    remade: Callable[[int], None] | None = None,
) -> Iterator[None]:
    """Inside, what is saved for the backward is kept by this module.

    Args:
        recipes: results that operations can make again are made again.
        narrow: None, or what gives an activation in 8 bits, and None of any other tensor.
        sink: told of every tensor that is kept.
        remade: told of every result that is made again, once: the bytes that takes.
    """
    notebook = _Notebook(narrow)

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor  # a parameter, or what only torch knows how to keep
        view = notebook.view(tensor)
        if view is not None and remade is not None and not view.recipe.told:
            view.recipe.told = True
            remade(view.recipe.moved)
        if view is None and sink is not None:
            sink(tensor)
        return view or notebook.keep(tensor)

    try:
        with noting(notebook) if recipes else nullcontext(), saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        # torch keeps the hook with each saved tensor; recipes that nobody saved end here.
        notebook.clear()


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.tensor()
