"""The single loader of the compiled module ``fastft._C``; it remembers why loading failed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

# torch first: its bundled OpenMP runtime has the soname _C links to, so both share one thread pool.
import torch

__all__ = ["DTYPE_CODES", "address", "available", "build_info", "load_error", "module"]

# The codes of csrc/include/fastft/numeric.h.
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastft._C"), None
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


def available() -> bool:
    """Whether the compiled module could be loaded."""
    return _load()[0] is not None


def load_error() -> str | None:
    """Why the compiled module could not be loaded, or None."""
    return _load()[1]


def module() -> Any:
    """The compiled module.

    Raises:
        BackendError: it could not be loaded; the message holds the loader's own words.
    """
    loaded, error = _load()
    if loaded is None:
        from fastft.errors import BackendError

        raise BackendError(
            "fastft.native",
            "fastft._C",
            expected="a compiled module",
            got=str(error),
            remedy="Build it: pip install . (needs a C++17 compiler)",
        )
    return loaded


def build_info() -> dict[str, Any]:
    """How the compiled module was built and what it uses here; empty when it is missing."""
    loaded, _ = _load()
    return dict(loaded.build_info()) if loaded is not None else {}


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's first element lies, as kernels take it; 0 of none."""
    return 0 if tensor is None else tensor.data_ptr()
