"""Who runs an operation: cuda | triton | cpu | reference, chosen by what each one supports.

A backend is a package; the launchers of operation ``op`` are its module ``op``, found by name, so
adding an operation registers nothing here. Every launcher module has
``supports(**facts) -> str | None``: None when it can run a call with these facts (device type,
dtypes, sizes), else the reason why it cannot.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from fastft.errors import ArgumentError, BackendError, nearest

__all__ = [
    "BACKENDS",
    "ORDER",
    "Planned",
    "device_type_of",
    "explain_op",
    "launcher",
    "planning",
    "select",
]


@dataclass(frozen=True)
class Backend:
    """A package of launchers and the device types it serves (None: every one)."""

    name: str
    package: str
    device_types: tuple[str, ...] | None

    def refuses_device(self, device_type: str) -> str | None:
        """Why tensors on this device type are not served; None when they are."""
        if self.device_types is None or device_type in self.device_types:
            return None
        if self.name == "triton" and device_type == "cpu" and _triton_interpreted():
            return None
        return f"runs on {' and '.join(self.device_types)}, not on {device_type}"


def _triton_interpreted() -> bool:
    # Triton's own switch: its kernels then run on CPU tensors, slowly, for testing.
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cuda", "fastft.cuda", ("cuda",)),
        Backend("triton", "fastft_kernels", ("cuda",)),
        Backend("cpu", "fastft.cpu", ("cpu",)),
        Backend("reference", "fastft.reference", None),
    )
}
ORDER: tuple[str, ...] = tuple(BACKENDS)


class Planned(Protocol):
    """Who runs operations on meta tensors: nobody, but he is told."""

    device_type: str

    def select(self, op: str) -> tuple[str, Any]:
        """As ``select`` on the device that is planned for, with launchers that only look."""


class _Thread(threading.local):
    planned: Planned | None = None


_thread = _Thread()


@contextmanager
def planning(planned: Planned) -> Iterator[None]:
    """Inside, meta tensors of this thread stand for tensors on ``planned.device_type``."""
    outer, _thread.planned = _thread.planned, planned
    try:
        yield
    finally:
        _thread.planned = outer


def device_type_of(tensor: Any) -> str:
    """The type of device a tensor lies on or, on meta, is planned for."""
    kind: str = tensor.device.type
    return kind if kind != "meta" or _thread.planned is None else _thread.planned.device_type


@functools.cache
def launcher(op: str, name: str) -> ModuleType | str:
    """The launcher module of ``op`` in backend ``name``, or why there is none."""
    package = BACKENDS[name].package
    try:
        if importlib.util.find_spec(f"{package}.{op}") is None:
            return f"has no {op} kernel"
        return importlib.import_module(f"{package}.{op}")
    except ImportError as error:
        return f"could not be imported: {error}"


@functools.lru_cache(maxsize=4096)
def _reason(op: str, name: str, facts: tuple[tuple[str, Hashable], ...]) -> str | None:
    known = dict(facts)
    refusal = BACKENDS[name].refuses_device(str(known["device_type"]))
    if refusal is not None:
        return refusal
    found = launcher(op, name)
    return found if isinstance(found, str) else found.supports(**known)


def explain_op(op: str, **facts: Any) -> list[tuple[str, str | None]]:
    """For each backend in order of preference: None if it can run ``op``, else the reason."""
    key = tuple(sorted(facts.items()))
    return [(name, _reason(op, name, key)) for name in ORDER]


@functools.lru_cache(maxsize=4096)
def _select(op: str, facts: tuple[tuple[str, Hashable], ...]) -> tuple[str, ModuleType]:
    for name in ORDER:
        if _reason(op, name, facts) is None:
            found = launcher(op, name)
            if isinstance(found, ModuleType):
                return name, found
    reasons = "; ".join(f"{name}: {_reason(op, name, facts)}" for name in ORDER)
    raise BackendError(f"fastft.ops.{op}", "backend", expected="one that can run", got=reasons)


def select(op: str, backend: str | None = None, **facts: Any) -> tuple[str, Any]:
    """The backend for a call with these facts, and its launcher module.

    Args:
        op: name of the operation, e.g. ``"lora_linear"``.
        backend: one of ``ORDER`` to insist on it; None for the first that can run.
        facts: what ``supports`` of the launchers asks; always ``device_type``.

    Raises:
        ArgumentError: ``backend`` is no backend's name.
        BackendError: the backend asked for cannot run the call (never replaced in silence).
    """
    if facts.get("device_type") == "meta" and _thread.planned is not None:
        return _thread.planned.select(op)
    key = tuple(facts.items())  # in its caller's order: sorted, two orders would be one entry
    if backend is None:
        return _select(op, key)
    if backend not in BACKENDS:
        raise ArgumentError(
            f"fastft.ops.{op}",
            "backend",
            expected=f"one of {', '.join(ORDER)}",
            got=repr(backend),
            remedy=nearest(backend, ORDER) or None,
        )
    reason = _reason(op, backend, key)
    if reason is not None:
        raise BackendError(
            f"fastft.ops.{op}",
            "backend",
            expected=f"a call that {backend!r} can run",
            got=f"{', '.join(f'{k}={v}' for k, v in key)}: {reason}",
            remedy="Leave backend unset to take the first that can.",
        )
    return backend, launcher(op, backend)
