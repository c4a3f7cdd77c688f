"""What a divergence is of, and what it is not defined for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)

__all__ = ["KINDS", "WHERE", "Teacher", "check"]

WHERE = "fastft.ops.linear_divergence"
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jensen_shannon": 2}


class Teacher(NamedTuple):
    """A teacher as hidden states and head, whose logits then exist a slab at a time, too.

    hidden_states (..., its hidden), weight (vocabulary, its hidden), bias (vocabulary,).
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def check(
    hidden_states: Tensor,
    weight: Tensor,
    teacher: Tensor | Teacher,
    kind: str,
    temperature: float,
    beta: float,
    bias: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    chunk: int | None,
    lora_s: Tensor | None = None,
    lora_b: Tensor | None = None,
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, or weight in another dtype than hidden_states
            outside autocast.
        ShapeError: shapes that do not fit.
        DeviceError: tensors on different devices.
        ArgumentError: an unknown kind or reduction, a temperature not above 0, a beta not between 0
            and 1, or a head that is trained with reduction="none".
    """
    check_tensor(WHERE, "hidden_states", hidden_states)
    check_dtype(WHERE, "hidden_states", hidden_states, FLOATS)
    device = hidden_states.device
    autocast = autocast_dtype(device.type) is not None
    check_tensor(WHERE, "weight", weight)
    check_device(WHERE, "weight", weight, device)
    check_dtype(WHERE, "weight", weight, FLOATS if autocast else (hidden_states.dtype,))
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        expected = f"(vocabulary, {hidden_states.shape[-1]})"
        raise ShapeError(WHERE, "weight", expected=expected, got=str(tuple(weight.shape)))
    leading, vocabulary = tuple(hidden_states.shape[:-1]), weight.shape[0]
    if isinstance(teacher, Teacher):
        for name in ("hidden_states", "weight", "bias"):
            tensor, name = getattr(teacher, name), f"teacher.{name}"
            if tensor is not None or name != "teacher.bias":
                check_tensor(WHERE, name, tensor)
                check_device(WHERE, name, tensor, device)
                check_dtype(WHERE, name, tensor, FLOATS)
        width = teacher.weight.shape[-1]
        what = "hidden_states[:-1], the teacher's width"
        check_shape(WHERE, "teacher.hidden_states", teacher.hidden_states, (*leading, width), what)
        what = "vocabulary, the teacher's width"
        check_shape(WHERE, "teacher.weight", teacher.weight, (vocabulary, width), what)
        if teacher.bias is not None:
            check_shape(WHERE, "teacher.bias", teacher.bias, (vocabulary,), "(vocabulary,)")
    else:
        check_tensor(WHERE, "teacher", teacher)
        check_device(WHERE, "teacher", teacher, device)
        check_dtype(WHERE, "teacher", teacher, FLOATS)
        what = "hidden_states[:-1], vocabulary"
        check_shape(WHERE, "teacher", teacher, (*leading, vocabulary), what)
    if bias is not None:
        check_shape(WHERE, "bias", bias, (vocabulary,), "(vocabulary,)")
    rank = lora_b.shape[-1] if isinstance(lora_b, Tensor) and lora_b.dim() else 0
    adapter = (("lora_s", lora_s, leading), ("lora_b", lora_b, (vocabulary,)))
    for name, tensor, rows in adapter if lora_s is not None or lora_b is not None else ():
        check_tensor(WHERE, name, tensor)
        check_device(WHERE, name, tensor, device)  # type: ignore[arg-type]
        check_dtype(WHERE, name, tensor, FLOATS)  # type: ignore[arg-type]
        check_shape(WHERE, name, tensor, (*rows, rank), "rows, r")  # type: ignore[arg-type]
    if mask is not None:
        check_tensor(WHERE, "mask", mask)
        check_dtype(WHERE, "mask", mask, (torch.bool,))
        check_shape(WHERE, "mask", mask, leading, "hidden_states[:-1]")
    trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight, bias, lora_b)
    )
    refusals = (
        ("kind", kind in KINDS, " or ".join(map(repr, KINDS)), repr(kind)),
        ("temperature", temperature > 0, "a number above 0", temperature),
        ("beta", 0 < beta < 1, "a number between 0 and 1", beta),
        ("reduction", reduction in ("mean", "sum", "none"), "'mean', 'sum' or 'none'",
         repr(reduction)),
        ("reduction", reduction != "none" or not trained, "'mean' or 'sum' over a trained head",
         "'none'"),
        ("chunk", chunk is None or chunk >= 1, "at least 1 token", chunk),
    )  # fmt: skip
    for name, fine, expected, got in refusals:
        if not fine:
            raise ArgumentError(WHERE, name, expected=expected, got=str(got))
