"""``dora_scale``: the magnitude of a weight-decomposed adapter (DoRA).

    W' = magnitude * (W + scaling B A) / norm,   norm = ||W + scaling B A||_row, a constant here
    z = x W^T + scaling x A^T B^T,   scale = magnitude / norm
    y = x W'^T + bias = z * scale + bias
    dz = dy * scale;   dscale = sum_rows dy z

z is :func:`fastft.ops.lora_linear`'s. The norm needs no product of W's size with itself:

    ||w_n + s b_n A||^2 = ||w_n||^2 + 2 s b_n . (A w_n) + s^2 b_n (A A^T) b_n

(Liu et al. 2024, https://arxiv.org/abs/2402.09353; section 4.3 keeps the norm out of the gradient.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ShapeError
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
from fastft.ops._room import new_empty
from fastft.reference import dora_scale as reference

__all__ = ["check", "dora_norm", "dora_scale", "squared_row_norms"]

_WHERE = "fastft.ops.dora_scale"
_AUTO = "auto"


@torch.no_grad()
def dora_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    squared_rows: Tensor | None = None,
) -> Tensor:
    """||W + scaling B A|| of every row, from W A^T and A A^T.

    Args:
        weight: (out_features, in_features).
        lora_a: (r, in_features).
        lora_b: (out_features, r).
        squared_rows: ||w_n||^2 in float64 if known; W is frozen, so it may be kept from step to
            step.

    Returns:
        (out_features,) in float32 (float64 for float64). No gradient.
    """
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    if squared_rows is None:
        squared_rows = squared_row_norms(weight)
    if not dispatched(weight, lora_a, lora_b):
        own = getattr(_choose(_AUTO, weight)[1], "norm", None)
        found = own(weight, lora_a, lora_b, scaling, squared_rows) if own else None
        if found is not None:
            return found
    a, b = lora_a.to(wide), lora_b.to(wide)
    with without_autocast(weight.device.type):
        cross = (weight @ lora_a.to(weight.dtype).t()).to(wide)
        own = b @ (a @ a.t())
    low_rank = 2 * scaling * (cross * b).sum(1) + scaling**2 * (own * b).sum(1)
    # The square of a float32 is exact in float64, and so is its root: with B = 0 the norm is that
    # of W to the last bit, and a fresh adapter changes nothing.
    return (squared_rows + low_rank).clamp_(min=0.0).sqrt_().to(wide)


# Elements of a weight that are widened at a time: 16 MiB in float32.
_WIDENED = 1 << 22


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """||w_n||^2 of every row, in float64, from norms in float32 (float64 for float64).

    Some rows at a time: torch widens all it is given.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, _WIDENED // max(1, weight.shape[1]))
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in weight.split(rows)]
    return torch.cat(norms).double().square_()


def dora_scale(
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = z * scale + bias, column by column.

    Args:
        z: (..., out_features), float32, bfloat16, float16 or float64.
        scale: (out_features,), magnitude / norm, float32 whatever z's dtype (float64 for float64):
            a training step changes it by less than bfloat16 can hold.
        bias: (out_features,) in z's dtype, or None.

    Returns:
        the shape and dtype of z, computed in float32 and rounded once. Saved: z and scale.
        Gradients flow to z, scale and bias.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: an unknown backend, or one that cannot run this call.
    """
    check(z, scale, bias)
    name = backend or _AUTO
    if dispatched(z, scale, bias):
        trained = bias is not None and bias.requires_grad
        y = torch.ops.fastft.dora_scale_fwd(z, scale, None if trained else bias, name)
        return y + bias if trained else y
    return DoraScale.apply(z, scale, bias, _choose(name, z)[0])


def check(z: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, a scale that is not float32 (float64 for
            float64), a bias in another dtype than z.
        ShapeError: a scalar z, or a scale or bias that is not (out_features,).
        DeviceError: tensors on different devices.
    """
    check_tensor(_WHERE, "z", z)
    check_dtype(_WHERE, "z", z, FLOATS)
    if z.dim() < 1:
        raise ShapeError(_WHERE, "z", expected="(..., out_features)", got="a scalar")
    given = {"scale": (scale, torch.promote_types(z.dtype, torch.float32))}
    if bias is not None:
        given["bias"] = (bias, z.dtype)
    for name, (tensor, dtype) in given.items():
        check_tensor(_WHERE, name, tensor)
        check_dtype(_WHERE, name, tensor, (dtype,))
        check_device(_WHERE, name, tensor, z.device)
        check_shape(_WHERE, name, tensor, (z.shape[-1],), "(out_features,)")


def _choose(backend: str, z: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "dora_scale",
        None if backend == _AUTO else backend,
        device_type=z.device.type,
        dtype=z.dtype,
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _fwd_kernel(z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    y = _fwd_fake(z, scale, bias, backend)
    if z.numel():
        dense = None if bias is None else bias.contiguous()
        rows = y.view(-1, y.shape[-1])
        _choose(backend, z)[1].fwd(rows, _rows(z), scale.contiguous(), dense)
    return y


def _fwd_fake(z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return new_empty(z, z.shape)


def _bwd_kernel(
    dy: Tensor, z: Tensor, scale: Tensor, need_d_scale: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dz, d_scale = _bwd_fake(dy, z, scale, need_d_scale, backend)
    if not z.numel():
        return dz, d_scale.zero_()
    _choose(backend, z)[1].bwd(
        dz.view(-1, z.shape[-1]),
        d_scale if need_d_scale else None,
        _rows(dy),
        _rows(z),
        scale.contiguous(),
    )
    return dz, d_scale


def _bwd_fake(
    dy: Tensor, z: Tensor, scale: Tensor, need_d_scale: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return new_empty(z, z.shape), scale.new_empty(scale.shape if need_d_scale else (0,))


class DoraScale(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(z, scale, bias)
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # what no gradient reaches has none
        return _fwd_kernel(z, scale, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None, None
        z, scale, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if wanted(dy):
            return (*plain_gradients(reference.dora_scale, (z, scale, bias), needs, [dy]), None)
        dz, d_scale = _bwd_kernel(dy, z, scale, needs[1], ctx.backend)
        d_bias = _rows(dy).sum(0) if needs[2] else None
        return dz, d_scale if needs[1] else None, d_bias, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.backend = inputs[3]


def _registered_backward(ctx: Any, dy: Tensor) -> Any:
    need = ctx.needs_input_grad[1]
    dz, d_scale = torch.ops.fastft.dora_scale_bwd(dy, *ctx.saved_tensors, need, ctx.backend)
    return dz, d_scale if need else None, None, None


register(
    "dora_scale_fwd(Tensor z, Tensor scale, Tensor? bias, str backend) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "dora_scale_bwd(Tensor dy, Tensor z, Tensor scale, bool need_d_scale, str backend) "
    "-> (Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::dora_scale_fwd", _registered_backward, setup_context=_setup_context
)
