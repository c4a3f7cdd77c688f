"""``lora_grouped_linear``: LoRA over a stack of frozen matrices, each for its own rows (experts).

    y_e = x_e W_e^T + scaling * x_e A_e^T B_e^T        for the rows x_e of group e

The rows come sorted by group. The adapted stack W + scaling * B A, which PEFT makes at each
forward, is never made; saved are x and S = x A^T (rows x r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    without_autocast,
)
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._eager import dispatched
from fastft.ops._library import register
from fastft.reference.lora_grouped_linear import lora_grouped_linear as reference

__all__ = ["check", "lora_grouped_linear"]

_WHERE = "fastft.ops.lora_grouped_linear"
_AUTO = "auto"


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    *,
    scaling: float,
    backend: str | None = None,
) -> Tensor:
    """y_e = x_e W_e^T + scaling * x_e A_e^T B_e^T for each group of rows.

    Args:
        x: (rows, in_features), sorted by group; float32, bfloat16, float16 or float64.
        weight: (groups, out_features, in_features), frozen, in x's dtype; any strides.
        lora_a: (groups, r, in_features), in x's dtype or float32.
        lora_b: (groups, out_features, r), in the dtype of ``lora_a``; any strides.
        ends: (groups,) int32, the row past the last of each group, ascending, the last of them
            the number of rows: the running sum of the groups' sizes. Not read on the host by a GPU.
        scaling: lora_alpha / r.

    Returns:
        (rows, out_features) in x's dtype. Gradients flow to x, lora_a and lora_b.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``.
        BackendError: the backend asked for cannot run the call.
    """
    check(x, weight, lora_a, lora_b, ends, scaling)
    x = x.contiguous()
    name = backend or _AUTO
    if dispatched(x, weight, lora_a, lora_b, ends):
        fused = torch.ops.fastft.lora_grouped_linear_fwd
        return fused(x, weight, lora_a, lora_b, ends, float(scaling), name)[0]
    chosen = _choose(name, x, lora_a)[0]
    return GroupedLora.apply(x, weight, lora_a, lora_b, ends, float(scaling), chosen)


def check(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ends: Tensor, scaling: float
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor; no floating dtype; weight in another than x, adapters neither in x's
            nor in float32, or in two; ends that are not int32.
        ShapeError: shapes that do not fit the formula.
        DeviceError: tensors on different devices.
        ArgumentError: r = 0, a trained weight, a scaling that is no finite number; on the CPU also
            ends that do not ascend to the number of rows.
    """
    check_tensor(_WHERE, "x", x)
    check_dtype(_WHERE, "x", x, FLOATS)
    for name, tensor in (
        ("weight", weight),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("ends", ends),
    ):
        check_tensor(_WHERE, name, tensor)
        check_device(_WHERE, name, tensor, x.device)
    check_dtype(_WHERE, "weight", weight, (x.dtype,))
    check_dtype(_WHERE, "lora_a", lora_a, (x.dtype, torch.float32))
    check_dtype(_WHERE, "lora_b", lora_b, (lora_a.dtype,))
    check_dtype(_WHERE, "ends", ends, (torch.int32,))
    if x.dim() != 2:
        got = str(tuple(x.shape))
        raise ShapeError(_WHERE, "x", expected="(rows, in_features)", got=got)
    for name, tensor in (("weight", weight), ("lora_a", lora_a)):
        if tensor.dim() != 3:
            expected, got = f"three dimensions, {x.shape[1]} last", str(tuple(tensor.shape))
            raise ShapeError(_WHERE, name, expected=expected, got=got)
    groups, out_features = weight.shape[:2]
    r = lora_a.shape[1]
    shape = (groups, out_features, x.shape[1])
    check_shape(_WHERE, "weight", weight, shape, "(groups, out, in)")
    check_shape(_WHERE, "lora_a", lora_a, (groups, r, x.shape[1]), "(groups, r, in)")
    check_shape(_WHERE, "lora_b", lora_b, (groups, out_features, r), "(groups, out, r)")
    check_shape(_WHERE, "ends", ends, (groups,), "(groups,)")
    if r < 1:
        raise ArgumentError(_WHERE, "r", expected="at least 1", got="0")
    if weight.requires_grad:
        raise ArgumentError(
            _WHERE, "weight", expected="a frozen stack", got="one that requires a gradient"
        )
    if not abs(scaling) < float("inf"):
        raise ArgumentError(_WHERE, "scaling", expected="a finite number", got=repr(scaling))
    if x.device.type == "cpu" and not dispatched(x, ends):
        stops = [0, *ends.tolist()]
        if sorted(stops) != stops or stops[-1] != x.shape[0]:
            expected = f"ascending row numbers up to {x.shape[0]}, the rows of x"
            raise ArgumentError(_WHERE, "ends", expected=expected, got=str(stops[1:]))


def _choose(backend: str, x: Tensor, lora_a: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "lora_grouped_linear",
        None if backend == _AUTO else backend,
        device_type=x.device.type,
        dtype=x.dtype,
        adapter_dtype=lora_a.dtype,
        r=lora_a.shape[1],
    )


def _fwd_kernel(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y and S."""
    y, s = _fwd_fake(x, weight, lora_a, lora_b, ends, scaling, backend)
    with without_autocast(x.device.type):
        _choose(backend, x, lora_a)[1].fwd(y, s, x, weight, lora_a, lora_b, ends, scaling)
    return y, s


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_a.shape[1])


def _bwd_kernel(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB."""
    gradients = _bwd_fake(dy, x, s, weight, lora_a, lora_b, ends, scaling, backend)
    with without_autocast(x.device.type):
        _choose(backend, x, lora_a)[1].bwd(
            *gradients, dy.contiguous(), x, s, weight, lora_a, lora_b, ends, scaling
        )
    return gradients


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ends: Tensor,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


class GroupedLora(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        weight, lora_a, lora_b, ends, *ctx.facts = rest
        y, s = _fwd_kernel(x, *rest)  # type: ignore[call-arg]
        ctx.save_for_backward(x, s, weight, lora_a, lora_b, ends)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, s, weight, lora_a, lora_b, ends = ctx.saved_tensors
        if wanted(dy):

            def again(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
                return reference(x, weight, lora_a, lora_b, ends, ctx.facts[0])

            need_x, _, *need_adapter = ctx.needs_input_grad[:4]
            needs = (need_x, *need_adapter)
            dx, da, db = plain_gradients(again, (x, lora_a, lora_b), needs, [dy])
        else:
            dx, da, db = _bwd_kernel(dy, x, s, weight, lora_a, lora_b, ends, *ctx.facts)
        return dx, None, da, db, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_a, lora_b, ends, *ctx.facts = inputs
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, ends)


def _registered_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    dx, da, db = torch.ops.fastft.lora_grouped_linear_bwd(dy, *ctx.saved_tensors, *ctx.facts)
    return dx, None, da, db, None, None, None


register(
    "lora_grouped_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor ends, "
    "float scaling, str backend) -> (Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "lora_grouped_linear_bwd(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_a, "
    "Tensor lora_b, Tensor ends, float scaling, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::lora_grouped_linear_fwd", _registered_backward, setup_context=_setup_context
)
