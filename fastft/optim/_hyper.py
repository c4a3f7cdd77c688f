"""Checks of what an optimizer is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastft.errors import ArgumentError, DtypeError

__all__ = ["RefusedError", "check_hyper"]


class RefusedError(DtypeError, RuntimeError):
    """Sparse or complex: torch's optimizers raise a RuntimeError, some of ours a TypeError."""


def check_hyper(where: str, values: dict[str, Any]) -> None:
    """Hyper-parameters in range: betas and momenta in [0, 1), all else non-negative.

    Raises:
        ArgumentError: with torch's words in its text, which callers may look for.
    """
    for name, value in values.items():
        if name == "betas":
            tensors = [isinstance(b, Tensor) for b in value]
            if any(tensors) and not all(tensors):
                raise ArgumentError(
                    where, name, expected="both floats or both Tensors", got=repr(value),
                    remedy="betas must be either both floats or both Tensors.",
                )  # fmt: skip
            for i, beta in enumerate(value):
                if not 0 <= beta < 1:
                    raise ArgumentError(
                        where, name, expected="two numbers in [0, 1)", got=repr(value),
                        remedy=f"Invalid beta parameter at index {i}: {beta}.",
                    )  # fmt: skip
            continue
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ArgumentError(
                    where, name, expected="one number", got=f"shape {tuple(value.shape)}",
                    remedy=f"Tensor {name} must be 1-element.",
                )  # fmt: skip
            continue
        if not value >= 0:
            word = {"lr": "learning rate", "eps": "epsilon value"}.get(name, f"{name} value")
            raise ArgumentError(
                where, name, expected=">= 0", got=repr(value), remedy=f"Invalid {word}: {value}."
            )
