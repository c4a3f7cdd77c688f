"""``layer_norm``: layer normalisation in one pass, forward and backward.

    y = xhat (weight + offset) + bias,   xhat = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps)
    dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy (weight + offset)
    dweight = sum_rows dy xhat;   dbias = sum_rows dy

(Ba, Kiros and Hinton 2016, "Layer Normalization".)
"""

from __future__ import annotations

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
from fastft.reference import layer_norm as reference

__all__ = ["check", "layer_norm"]

_WHERE = "fastft.ops.layer_norm"
_AUTO = "auto"


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    offset: float = 0.0,
    round_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Layer norm over the last dimension.

    Args:
        x: (..., features), float32, bfloat16, float16 or float64.
        weight, bias: (features,) in the dtype of x, or None.
        eps: added to the variance; at least 0.
        offset: added to the weight: 0 as in ``nn.LayerNorm``, 1 as in Nemotron.
        round_first: round xhat to the dtype of x before the weight; without effect in float32.

    Returns:
        the shape and dtype of x. Sums are float32 (float64 for float64). Saved: x, weight, and two
        numbers a row.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: eps below 0, an unknown backend, or one that cannot run this.
    """
    check(x, weight, bias, eps)
    if not recording():
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    arguments = (float(eps), float(offset), bool(round_first))
    name = backend or _AUTO
    if dispatched(x, weight, bias):
        return torch.ops.fastft.layer_norm_fwd(x, weight, bias, *arguments, name)[0]
    return call(LayerNorm, x, weight, bias, *arguments, _choose(name, x)[0])


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, or dtypes that differ.
        ShapeError: a scalar x, or a weight or bias that is not (features,).
        DeviceError: tensors on different devices.
        ArgumentError: eps below 0, or not a number.
    """
    check_tensor(_WHERE, "x", x)
    check_dtype(_WHERE, "x", x, FLOATS)
    if x.dim() < 1:
        raise ShapeError(_WHERE, "x", expected="(..., features)", got="a scalar")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(_WHERE, name, tensor)
            check_dtype(_WHERE, name, tensor, (x.dtype,))
            check_device(_WHERE, name, tensor, x.device)
            check_shape(_WHERE, name, tensor, (x.shape[-1],), "(features,)")
    if not eps >= 0:
        raise ArgumentError(_WHERE, "eps", expected="a number of at least 0", got=repr(eps))


def _choose(backend: str, x: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "layer_norm",
        None if backend == _AUTO else backend,
        device_type=x.device.type,
        dtype=x.dtype,
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _fwd_kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *facts: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _fwd_fake(x, weight, bias, *facts)
    eps, offset, round_first, backend = facts
    if y.numel():
        _choose(backend, x)[1].fwd(
            y.view(-1, y.shape[-1]),
            mean,
            rstd,
            _rows(x),
            _dense(weight),
            _dense(bias),
            eps=eps,
            offset=offset,
            round_first=round_first,
        )
    return y, mean, rstd


def _fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *facts: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[:-1].numel()
    return new_empty(x, x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _bwd_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    need_d_weight: bool,
    need_d_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    facts = (offset, need_d_weight, need_d_bias, backend)
    dx, d_weight, d_bias = _bwd_fake(dy, x, weight, mean, rstd, *facts)
    if not x.numel():
        return dx, d_weight.zero_(), d_bias.zero_()
    _choose(backend, x)[1].bwd(
        dx.view(-1, x.shape[-1]),
        d_weight if need_d_weight else None,
        d_bias if need_d_bias else None,
        _rows(dy),
        _rows(x),
        _dense(weight),
        mean,
        rstd,
        offset=offset,
    )
    return dx, d_weight, d_bias


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    need_d_weight: bool,
    need_d_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [x.shape[-1] if need else 0 for need in (need_d_weight, need_d_bias)]
    return new_empty(x, x.shape), x.new_empty(sizes[0]), x.new_empty(sizes[1])


class LayerNorm(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *facts: Any
    ) -> Tensor:
        y, mean, rstd = _fwd_kernel(x, weight, bias, *facts)
        note(y, (x, weight, bias), lambda *inputs: _fwd_kernel(*inputs, *facts)[0])
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.facts = facts
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        eps, offset, round_first, backend = ctx.facts
        needs: list[bool] = list(ctx.needs_input_grad[:3])
        if wanted(dy):

            def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return reference.layer_norm(x, weight, bias, eps, offset, round_first)[0]

            gradients = plain_gradients(again, (x, weight, bias), needs, [dy])
        else:
            made = _bwd_kernel(dy, x, weight, mean, rstd, offset, needs[1], needs[2], backend)
            gradients = [t if need else None for t, need in zip(made, (True, *needs[1:]))]
        return (*gradients, *[None] * 4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.offset, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _registered_backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
    needs = ctx.needs_input_grad[1:3]
    facts = (ctx.offset, *needs, ctx.backend)
    dx, *rest = torch.ops.fastft.layer_norm_bwd(dy, *ctx.saved_tensors, *facts)
    return (dx, *(t if need else None for t, need in zip(rest, needs, strict=True)), *[None] * 4)


register(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, "
    "bool round_first, str backend) -> (Tensor, Tensor, Tensor)",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, float offset, "
    "bool need_d_weight, bool need_d_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::layer_norm_fwd", _registered_backward, setup_context=_setup_context
)
