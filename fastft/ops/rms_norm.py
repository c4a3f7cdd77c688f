"""``rms_norm``: root-mean-square normalisation in one pass, forward and backward.

    rstd = 1 / sqrt(mean(x^2) + eps);   xhat = x rstd;   y = xhat (weight + offset)
    dx = rstd (g - xhat mean(g xhat)), g = dy (weight + offset);   dweight = sum_rows dy xhat

and with a residual the same of the sum x + residual, which is kept for the next one.
(Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._eager import call, dispatched, recording
from fastft.ops._library import register
from fastft.ops._room import new_empty
from fastft.ops._saving import note
from fastft.reference import rms_norm as reference

__all__ = ["check", "rms_norm"]

_WHERE = "fastft.ops.rms_norm"
_AUTO = "auto"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    round_first: bool = True,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """RMS norm over the last dimension.

    Args:
        x: (..., features), float32, bfloat16, float16 or float64.
        weight: (features,), the dtype of x.
        eps: added to the mean of squares; at least 0.
        offset: added to the weight: 0 as in Llama, 1 as in Gemma.
        round_first: round xhat to the dtype of x before the weight, as Llama does; False: round
            only the result, as Gemma does. Without effect in float32.
        residual: the shape and dtype of x, or None: the stream that x is added to before it is
            normalised.

    Returns:
        the shape and dtype of x; with a residual (y, x + residual), the sum rounded to the dtype.
        Sums are float32 (float64 for float64). Saved: x (or the sum), weight, one number a row.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: eps below 0, an unknown backend, or one that cannot run this.
    """
    check(x, weight, eps, residual)
    if not recording():
        weight = weight.detach()
    arguments = (float(eps), float(offset), bool(round_first))
    name, through = backend or _AUTO, dispatched(x, weight, residual)
    if residual is not None:
        if through:
            found = torch.ops.fastft.add_rms_norm_fwd(x, residual, weight, *arguments, name)
            return found[0], found[1]
        return call(AddRMSNorm, x, residual, weight, *arguments, _choose(name, x)[0])
    if through:
        return torch.ops.fastft.rms_norm_fwd(x, weight, *arguments, name)[0]
    return call(RMSNorm, x, weight, *arguments, _choose(name, x)[0])


def check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, or dtypes that differ.
        ShapeError: a scalar x, a weight that is not (features,), or a residual of another shape.
        DeviceError: tensors on different devices.
        ArgumentError: eps below 0, or not a number.
    """
    check_tensor(_WHERE, "x", x)
    check_dtype(_WHERE, "x", x, FLOATS)
    if x.dim() < 1:
        raise ShapeError(_WHERE, "x", expected="(..., features)", got="a scalar")
    check_tensor(_WHERE, "weight", weight)
    check_dtype(_WHERE, "weight", weight, (x.dtype,))
    check_device(_WHERE, "weight", weight, x.device)
    check_shape(_WHERE, "weight", weight, (x.shape[-1],), "(features,)")
    if residual is not None:
        check_tensor(_WHERE, "residual", residual)
        check_dtype(_WHERE, "residual", residual, (x.dtype,))
        check_device(_WHERE, "residual", residual, x.device)
        check_shape(_WHERE, "residual", residual, tuple(x.shape), "the shape of x")
    if not eps >= 0:
        raise ArgumentError(_WHERE, "eps", expected="a number of at least 0", got=repr(eps))


def _choose(backend: str, x: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "rms_norm",
        None if backend == _AUTO else backend,
        device_type=x.device.type,
        dtype=x.dtype,
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _fwd_kernel(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y, rstd = _fwd_fake(x, weight, eps, offset, round_first, backend)
    if y.numel():
        _choose(backend, x)[1].fwd(
            y.view(-1, y.shape[-1]),
            rstd,
            _rows(x),
            weight.contiguous(),
            eps=eps,
            offset=offset,
            round_first=round_first,
        )
    return y, rstd


def _fwd_fake(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return new_empty(x, x.shape), x.new_empty(x.shape[:-1].numel(), dtype=wide)


def _bwd_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_d_weight: bool,
    backend: str,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx, d_weight = _bwd_fake(dy, x, weight, rstd, offset, need_d_weight, backend)
    if not x.numel():
        return dx, d_weight.zero_()
    _choose(backend, x)[1].bwd(
        dx.view(-1, x.shape[-1]),
        d_weight if need_d_weight else None,
        _rows(dy),
        _rows(x),
        weight.contiguous(),
        rstd,
        None if more is None else _rows(more),
        offset=offset,
    )
    return dx, d_weight


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_d_weight: bool,
    backend: str,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return new_empty(x, x.shape), weight.new_empty(weight.shape if need_d_weight else (0,))


class RMSNorm(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        offset: float,
        round_first: bool,
        backend: str,
    ) -> Tensor:
        y, rstd = _fwd_kernel(x, weight, eps, offset, round_first, backend)
        facts = (eps, offset, round_first, backend)
        note(y, (x, weight), lambda x, weight: _fwd_kernel(x, weight, *facts)[0])
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.offset, ctx.round_first, ctx.backend = eps, offset, round_first, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if wanted(dy):
            gradients = plain_gradients(_again(ctx), (x, weight), needs, [dy])
        else:
            dx, dw = _bwd_kernel(dy, x, weight, rstd, ctx.offset, needs[1], ctx.backend)
            gradients = [dx, dw if needs[1] else None]
        return (*gradients, *[None] * 4)


def _again(ctx: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm as torch operations."""
    facts = (ctx.eps, ctx.offset, ctx.round_first)
    return lambda x, weight: reference.rms_norm(x, weight, *facts)[0]


def _add_fwd_kernel(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    facts = (eps, offset, round_first)
    y, summed, rstd = _add_fwd_fake(x, residual, weight, *facts, backend)
    if y.numel():
        columns = y.shape[-1]
        _choose(backend, x)[1].fwd(
            y.view(-1, columns),
            rstd,
            _rows(x),
            weight.contiguous(),
            _rows(residual),
            summed.view(-1, columns),
            eps=eps,
            offset=offset,
            round_first=round_first,
        )
    return y, summed, rstd


def _add_fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fwd_fake(x, weight, eps, offset, round_first, backend)
    return y, new_empty(x, x.shape), rstd


class AddRMSNorm(torch.autograd.Function):
    """Eager autograd of (y, x + residual): the gradient of the sum is the same for both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, *facts: Any) -> Any:
        found = _add_fwd_kernel(x, residual, weight, *facts)
        note(found[0], (found[1], weight), lambda x, weight: _fwd_kernel(x, weight, *facts)[0])
        _add_setup_context(ctx, (x, residual, weight, *facts), found)
        ctx.set_materialize_grads(False)  # what no gradient reaches has none
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_sum: Tensor | None) -> Any:
        if dy is None:
            return d_sum, d_sum, *[None] * 5
        summed, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[2]
        if wanted(dy, d_sum):
            dx, dw = plain_gradients(_again(ctx), (summed, weight), (True, need), [dy])
            dx = d_sum if dx is None else dx if d_sum is None else dx + d_sum
            return dx, dx, dw, *[None] * 4
        dx, dw = _bwd_kernel(dy, summed, weight, rstd, ctx.offset, need, ctx.backend, d_sum)
        return dx, dx, dw if need else None, *[None] * 4


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, ctx.eps, ctx.offset, ctx.round_first, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _add_registered_backward(ctx: Any, dy: Tensor, d_sum: Tensor, _: Any) -> Any:
    need = ctx.needs_input_grad[2]
    facts = (ctx.offset, need, ctx.backend, d_sum)
    dx, dw = torch.ops.fastft.rms_norm_bwd(dy, *ctx.saved_tensors, *facts)
    return dx, dx.clone(), dw if need else None, *[None] * 4


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.offset, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _registered_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    need = ctx.needs_input_grad[1]
    dx, dw = torch.ops.fastft.rms_norm_bwd(dy, *ctx.saved_tensors, ctx.offset, need, ctx.backend)
    return (dx, dw if need else None, *[None] * 4)


register(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, bool round_first, "
    "str backend) -> (Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, "
    "bool need_d_weight, str backend, Tensor? more=None) -> (Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
register(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float offset, "
    "bool round_first, str backend) -> (Tensor, Tensor, Tensor)",
    _add_fwd_kernel,
    _add_fwd_fake,
)
torch.library.register_autograd(
    "fastft::add_rms_norm_fwd", _add_registered_backward, setup_context=_add_setup_context
)
torch.library.register_autograd(
    "fastft::rms_norm_fwd", _registered_backward, setup_context=_setup_context
)
