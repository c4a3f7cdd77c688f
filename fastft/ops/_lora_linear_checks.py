"""What ``lora_linear`` is not defined for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

__all__ = [
    "WHERE",
    "check",
    "check_adapters",
    "check_input",
    "check_remake",
    "check_scales",
    "check_spans",
]

WHERE = "fastft.ops.lora_linear"


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor; no floating dtype; weight or bias in another dtype than x outside
            autocast; an adapter neither in x's dtype nor in float32, or in another than the rest.
        ShapeError: shapes that do not fit the formula, or lists of different lengths.
        DeviceError: a tensor on another device than x.
        ArgumentError: r = 0, r > min(in_features, out_features), dropout outside [0, 1), a
            scaling that is no finite number, an owner that is no layer.
    """
    check_input(WHERE, x)
    if not weights or len(biases) != len(weights):
        got = f"{len(weights)} weights and {len(biases)} biases"
        raise ShapeError(WHERE, "weights", expected="one weight and one bias a layer", got=got)
    autocast = autocast_dtype(x.device.type)
    for weight, bias in zip(weights, biases, strict=True):
        _check_layer(x, weight, bias, autocast)
    widths = [weight.shape[0] for weight in weights]
    check_adapters(WHERE, x, widths, lora_as, lora_bs, scalings, dropout_ps, owners)


def check_input(where: str, x: Tensor) -> None:
    """Floats of one dimension or more."""
    check_tensor(where, "x", x)
    check_dtype(where, "x", x, FLOATS)
    if x.dim() == 0:
        raise ShapeError(where, "x", expected="(..., in_features)", got="a scalar")


def check_adapters(
    where: str,
    x: Tensor,
    widths: Sequence[int],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
) -> None:
    """The adapters of layers with so many out_features each."""
    lengths = [len(v) for v in (lora_as, lora_bs, scalings, dropout_ps, owners)]
    if not lora_as or len(set(lengths)) != 1:
        raise ShapeError(where, "lora_as", expected="as many of each argument", got=str(lengths))
    autocast = autocast_dtype(x.device.type)
    for j, owner in enumerate(owners):
        if not 0 <= owner < len(widths):
            expected = f"0 to {len(widths) - 1}, the index of a layer"
            raise ArgumentError(where, "owners", expected=expected, got=str(owner))
        dtype = lora_as[0].dtype
        _check_adapter(where, x, widths[owner], lora_as[j], lora_bs[j], dtype, autocast)
        if not 0.0 <= dropout_ps[j] < 1.0:
            raise ArgumentError(where, "dropout_p", expected="0 <= p < 1", got=repr(dropout_ps[j]))
        if not abs(scalings[j]) < float("inf"):
            raise ArgumentError(where, "scaling", expected="a finite number", got=repr(scalings[j]))


def _check_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None
) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        check_tensor(WHERE, name, tensor)
        check_device(WHERE, name, tensor, x.device)  # type: ignore[arg-type]
        check_dtype(WHERE, name, tensor, FLOATS if autocast is not None else (x.dtype,))  # type: ignore[arg-type]
    if weight.dim() != 2:
        got = str(tuple(weight.shape))
        raise ShapeError(WHERE, "weight", expected="(out_features, in_features)", got=got)
    out_features = weight.shape[0]
    check_shape(WHERE, "weight", weight, (out_features, x.shape[-1]), "(out, in_features)")
    if bias is not None:
        check_shape(WHERE, "bias", bias, (out_features,), "(out_features,)")


def _check_adapter(
    where: str,
    x: Tensor,
    out_features: int,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    for name, tensor in (("lora_a", a), ("lora_b", b)):
        check_tensor(where, name, tensor)
        check_device(where, name, tensor, x.device)
        allowed = FLOATS if autocast is not None else (x.dtype, torch.float32)
        check_dtype(where, name, tensor, allowed)
        if tensor.dtype != dtype:
            check_dtype(where, name, tensor, (dtype,))
    in_features = x.shape[-1]
    if a.dim() != 2 or a.shape[1] != in_features:
        raise ShapeError(where, "lora_a", expected=f"(r, {in_features})", got=str(tuple(a.shape)))
    r = a.shape[0]
    if not 1 <= r <= min(in_features, out_features):
        raise ArgumentError(
            where,
            "r",
            expected=f"1 to min(in_features, out_features) = {min(in_features, out_features)}",
            got=str(r),
            remedy="A larger rank than the matrix has adds nothing; r = 0 is no adapter.",
        )
    check_shape(where, "lora_b", b, (out_features, r), "(out_features, r)")


def check_scales(
    weights: Sequence[Tensor], scales: Sequence[Tensor | None], dtype: torch.dtype
) -> None:
    """One a layer or None, of its columns."""
    if len(scales) != len(weights):
        expected = f"{len(weights)} scales, one a layer or None"
        raise ShapeError(WHERE, "scales", expected=expected, got=str(len(scales)))
    wide = torch.promote_types(dtype, torch.float32)
    for weight, scale in zip(weights, scales, strict=True):
        if scale is not None:
            check_tensor(WHERE, "scale", scale)
            check_dtype(WHERE, "scale", scale, (wide,))
            check_device(WHERE, "scale", scale, weight.device)
            check_shape(WHERE, "scale", scale, (weight.shape[0],), "(out_features,)")


def check_remake(
    weights: Sequence[Tensor],
    remake: Sequence[Callable[[], Tensor] | None],
    compiling: bool,
) -> None:
    """One a layer or None, of frozen weights."""
    trained = any(make and w.requires_grad for make, w in zip(remake, weights))
    for fine, expected, got in (
        (len(remake) == len(weights), f"{len(weights)}, one a layer or None", str(len(remake))),
        (not trained, "frozen weights", "one that is trained"),
        (not compiling, "a call outside torch.compile", "one under it"),
    ):
        if not fine:
            raise ArgumentError(WHERE, "remake", expected=expected, got=got)


def check_spans(where: str, spans: Sequence[tuple[int, int]], adapters: int, rows: int) -> None:
    """One an adapter, of rows that there are."""
    if len(spans) != adapters:
        expected = f"{adapters} spans, one an adapter"
        raise ShapeError(where, "spans", expected=expected, got=str(len(spans)))
    for start, stop in spans:
        if not 0 <= start <= stop <= rows:
            expected = f"0 <= first <= past the last <= {rows}, the rows of x"
            raise ArgumentError(where, "spans", expected=expected, got=f"({start}, {stop})")
