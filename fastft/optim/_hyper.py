"""Checks of what an optimizer is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    from fastft.optim._base import FusedOptimizer

__all__ = ["GRAD_DTYPES", "RefusedError", "check_group", "check_hyper", "refuse_grad"]

# Of gradients; those of float64 parameters may be float64 too.
GRAD_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_YAML = "In YAML 1e-3 is a text and 1.0e-3 a number."


class RefusedError(DtypeError, RuntimeError):
    """Sparse or complex: torch's optimizers raise a RuntimeError, some of ours a TypeError."""


def check_group(where: str, group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A group's own hyper-parameters: numbers where the optimizer's are. Their range is, as in
    torch, the caller's.

    Raises:
        ArgumentError: a text for a number, or betas that are not two numbers in [0, 1).
    """
    for name, value in group.items():
        number = isinstance(defaults.get(name), (int, float, Tensor))
        if (number and isinstance(value, str)) or name == "betas":
            check_hyper(where, {name: value})


def check_hyper(where: str, values: dict[str, Any]) -> None:
    """Hyper-parameters that are numbers in range: betas in [0, 1), all else non-negative.

    Raises:
        ArgumentError: with torch's words in its text, which callers may look for.
    """
    for name, value in values.items():
        if name == "betas" and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise ArgumentError(where, name, expected="two numbers", got=repr(value))
        for number in value if name == "betas" else (value,):
            if not hasattr(number, "__float__"):
                raise ArgumentError(
                    where, name, expected="numbers" if name == "betas" else "a number",
                    got=repr(value), remedy=_YAML if isinstance(number, str) else None,
                )  # fmt: skip
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


def refuse_grad(optimizer: FusedOptimizer, p: Tensor, grad: Tensor) -> None:
    """Raises for a parameter and its gradient that no rule is defined for.

    Raises:
        RefusedError: a sparse one, a complex parameter, a dtype that no kernel reads.
        ShapeError: one of another shape, as where the parameter's data was replaced; a parameter
            whose elements share memory.
    """
    if grad.layout is not torch.strided or p.is_complex():
        dense = grad.layout is torch.strided
        raise RefusedError(
            optimizer._where,
            "grad",
            expected="dense real gradients",
            got=str(p.dtype) if dense else "sparse",
            remedy=f"{type(optimizer).__name__} does not support "
            f"{'complex parameters' if dense else 'sparse gradients'}.",
        )
    if any(not stride and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ShapeError(
            optimizer._where, "params", expected="elements with memory of their own",
            got=f"strides {p.stride()}", remedy="Make the parameter of tensor.contiguous().",
        )  # fmt: skip
    if grad.dtype not in GRAD_DTYPES and grad.dtype != p.dtype:
        raise RefusedError(
            optimizer._where, "grad",
            expected=f"float32, bfloat16 or float16 of a parameter in {p.dtype}",
            got=str(grad.dtype), remedy="Leave the parameter's grad_dtype as it is.",
        )  # fmt: skip
    if grad.shape != p.shape:
        raise ShapeError(
            optimizer._where, "grad", expected=f"the parameter's shape {tuple(p.shape)}",
            got=str(tuple(grad.shape)),
            remedy="Set gradients to None where a parameter's data is replaced.",
        )  # fmt: skip
