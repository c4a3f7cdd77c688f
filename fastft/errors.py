"""One family of errors. Every message says where, which argument, what was expected, what came
instead and, where there is one, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "ArgumentError",
    "BackendError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "FastftError",
    "ShapeError",
    "VerificationError",
    "nearest",
]


class FastftError(Exception):
    """Base of all errors fastft raises.

    Args:
        where: the public function, command or file that refuses.
        argument: the argument, key or part that is wrong.
        expected: what would have been accepted.
        got: what came instead.
        remedy: what the user can do about it.
    """

    def __init__(
        self, where: str, argument: str, *, expected: str, got: str, remedy: str | None = None
    ) -> None:
        self.where, self.argument = where, argument
        self.expected, self.got, self.remedy = expected, got, remedy
        text = f"{where}: {argument}: expected {expected}, got {got}."
        super().__init__(f"{text} {remedy}" if remedy else text)

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles through args, which holds only the text: rebuild from the fields.
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(kind: type[FastftError], fields: dict[str, str]) -> FastftError:
    return kind(
        fields["where"],
        fields["argument"],
        expected=fields["expected"],
        got=fields["got"],
        remedy=fields["remedy"],
    )


class ArgumentError(FastftError, ValueError):
    """A value outside what the function is defined for."""


class ShapeError(FastftError, ValueError):
    """A tensor of the wrong shape."""


class DtypeError(FastftError, TypeError):
    """A tensor of the wrong dtype, or something that is no tensor."""


class DeviceError(FastftError, RuntimeError):
    """Tensors on different devices, or on one that is not there."""


class BackendError(FastftError, RuntimeError):
    """No backend, or not the one that was asked for, can run the call."""


class ConfigError(FastftError, ValueError):
    """A configuration that cannot be used: unknown key, wrong type, value out of range."""


class DataError(FastftError, ValueError):
    """Training data that cannot be read or used."""


class AdapterError(FastftError, RuntimeError):
    """An adapter folder that is broken, foreign, or could not be written."""


class VerificationError(FastftError, RuntimeError):
    """A fused module that does not compute what it replaces."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``"did you mean 'x' or 'y'?"`` for the candidates closest to ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
