"""What a layer saves for its backward, chosen tensor by tensor through torch's saved-tensor hooks.

A result that an operation can make again from tensors that are saved anyway (a norm's, a GLU's) is
replaced by its recipe; a large activation may be kept in 8 bits. All else is saved as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from fastft.memory._compress import Compressed, compress
from fastft.ops._saving import noting

__all__ = ["recipes"]


@dataclass
class _Recipe:
    """How one result is made again; the storage it lay in, and its version then."""

    storage: StorageWeakRef
    version: int
    inputs: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    make: Callable[..., Tensor]
    made: weakref.ref[Tensor] | None = field(default=None)

    def value(self) -> Tensor:
        """The result, once for all who ask while somebody holds it."""
        held = None if self.made is None else self.made()
        if held is not None:
            return held
        if self.versions != _versions(self.inputs):
            raise RuntimeError(
                "fastft.memory: a tensor needed to recompute an activation was changed in place "
                "after the forward"
            )
        with torch.no_grad():
            value = self.make(*self.inputs)
        self.made = weakref.ref(value)
        return value


@dataclass
class _View:
    """A view of a result that is made again when it is needed."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.value().as_strided(self.size, self.stride, self.offset)


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


class _Notebook:
    """The recipes of one layer's forward, by the storage of their results."""

    def __init__(self) -> None:
        self._by_storage: dict[int, _Recipe] = {}

    def add(
        self, result: Tensor, inputs: tuple[Tensor | None, ...], make: Callable[..., Tensor]
    ) -> None:
        """Of ``fastft.ops._saving.Notebook``. Inputs are held without their graph."""
        held = tuple(None if t is None else t.detach() for t in inputs)
        storage = StorageWeakRef(result.untyped_storage())
        recipe = _Recipe(storage, result._version, held, _versions(held), make)
        self._by_storage[storage.cdata] = recipe

    def find(self, tensor: Tensor) -> _Recipe | None:
        """The recipe of the result this is, or is a view of, unchanged."""
        recipe = self._by_storage.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.storage.expired() or recipe.version != tensor._version:
            return None
        return recipe


@contextmanager
def recipes(
    compression: str | None = None,
    spared: frozenset[int] = frozenset(),
    sink: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Inside, operations save recipes for results they can make again.

    Args:
        compression: None, or the format in which other large activations are kept.
        spared: addresses of storages that are never compressed: the layer's weights.
        sink: told of every tensor that is saved as it is.
    """
    notebook = _Notebook()

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor  # a parameter, or what only torch knows how to keep
        recipe = notebook.find(tensor)
        if recipe is not None:
            return _View(
                recipe, tuple(tensor.size()), tuple(tensor.stride()), tensor.storage_offset()
            )
        tensor = tensor.detach()
        if sink is not None:
            sink(tensor)
        if compression is not None and tensor.untyped_storage().data_ptr() not in spared:
            return compress(tensor, compression)
        return tensor

    with noting(notebook), saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, (_View, Compressed)) else packed
