"""Checks shared by the operations. Each raises one of fastft.errors, before anything is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastft.errors import DeviceError, DtypeError, ShapeError

__all__ = [
    "FLOATS",
    "autocast_as",
    "autocast_dtype",
    "check_device",
    "check_dtype",
    "check_shape",
    "check_tensor",
    "without_autocast",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(where: str, name: str, value: object) -> None:
    """It is a tensor."""
    if not isinstance(value, Tensor):
        raise DtypeError(where, name, expected="a torch.Tensor", got=type(value).__name__)


def check_dtype(where: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Its dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        raise DtypeError(
            where,
            name,
            expected=_names(allowed),
            got=str(tensor.dtype).removeprefix("torch."),
            remedy=f"Cast it: {name}.to(torch.{str(allowed[0]).removeprefix('torch.')}).",
        )


def check_shape(where: str, name: str, tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Its shape is ``shape``; ``what`` names the dimensions."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(where, name, expected=f"{what} = {shape}", got=str(tuple(tensor.shape)))


def check_device(where: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """It lies on ``device``."""
    if tensor.device != device:
        raise DeviceError(
            where,
            name,
            expected=f"a tensor on {device}, where the first argument is",
            got=str(tensor.device),
            remedy=f"Move it: {name}.to({str(device)!r}).",
        )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks products to run in, or None when it is off."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_as(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast as ``autocast_dtype`` found it elsewhere."""
    return without_autocast(device_type) if dtype is None else torch.autocast(device_type, dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Entering torch's own context costs as much as a small launch: only where there is need."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
