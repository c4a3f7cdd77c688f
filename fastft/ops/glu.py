"""``glu``: a gated linear unit without its intermediate tensors.

    y = activation(gate) * up;   dup = dy activation(gate);   dgate = dy up activation'(gate)

Only gate and up are saved; activation and slope are made again in the backward, which may make dS
and dB of LoRA layers that gate and up come from too (``_glu_pair``). A LoRA layer that reads the
result can make it again as well (``_remade``) (Shazeer 2020, "GLU Variants Improve Transformer";
Hendrycks and Gimpel 2016 for GELU and its tanh form).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, nearest
from fastft.ops import _glu_pair
from fastft.ops._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor
from fastft.ops._differentiable import plain_gradients, wanted
from fastft.ops._eager import call, dispatched
from fastft.ops._library import register
from fastft.ops._room import new_empty
from fastft.ops._saving import note
from fastft.reference import glu as reference

__all__ = ["ACTIVATIONS", "check", "glu", "makes_again"]

_WHERE = "fastft.ops.glu"
_AUTO = "auto"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu(
    gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str | None = None
) -> Tensor:
    """activation(gate) * up, elementwise.

    Args:
        gate: (..., features), float32, bfloat16, float16 or float64; its rows may be strided (one
            half of a tensor that holds gate and up).
        up: the same shape and dtype.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, exact) or "gelu_tanh".

    Returns:
        the shape and dtype of gate, computed in float32 and rounded once. Saved: gate and up.

    Raises:
        DtypeError, ShapeError, DeviceError: see ``check``.
        ArgumentError, BackendError: an unknown activation or backend, or one that cannot run this.
    """
    check(gate, up, activation)
    name = backend or _AUTO
    if dispatched(gate, up):
        return torch.ops.fastft.glu_fwd(gate, up, activation, name)
    return call(Glu, gate, up, activation, _choose(name, gate)[0])


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor, no floating dtype, or dtypes that differ.
        ShapeError: shapes that differ.
        DeviceError: tensors on different devices.
        ArgumentError: an unknown activation.
    """
    check_tensor(_WHERE, "gate", gate)
    check_dtype(_WHERE, "gate", gate, FLOATS)
    check_tensor(_WHERE, "up", up)
    check_dtype(_WHERE, "up", up, (gate.dtype,))
    check_device(_WHERE, "up", up, gate.device)
    check_shape(_WHERE, "up", up, tuple(gate.shape), "the shape of gate")
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            _WHERE,
            "activation",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            got=repr(activation),
            remedy=nearest(str(activation), ACTIVATIONS) or None,
        )


def _choose(backend: str, gate: Tensor) -> tuple[str, Any]:
    """The backend for a call and its launcher; a compiled graph asks when it runs."""
    return backends.select(
        "glu",
        None if backend == _AUTO else backend,
        device_type=gate.device.type,
        dtype=gate.dtype,
    )


def makes_again(gate: Tensor) -> bool:
    """Whether, by the backend that serves these, making the result again is worth its memory."""
    name, _ = _choose(_AUTO, gate)
    return hasattr(backends.launcher("glu", name), "MAKES_AGAIN")


def _rows(tensor: Tensor) -> Tensor:
    """(rows, features) with neighbouring features; no copy unless the strides demand it."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    flat = tensor.reshape(-1, columns)
    return flat if columns == 1 or flat.stride(1) == 1 else flat.contiguous()


def _fwd_kernel(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    out = _fwd_fake(gate, up, activation, backend)
    if out.numel():
        launcher = _choose(backend, gate)[1]
        launcher.fwd(_rows(out), _rows(gate), _rows(up), activation=activation)
    return out


def _fwd_fake(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return new_empty(gate, gate.shape)


def _bwd_kernel(
    d_out: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _bwd_fake(d_out, gate, up, activation, backend)
    if gate.numel():
        rows = [_rows(t) for t in (d_gate, d_up, d_out.contiguous(), gate, up)]
        _choose(backend, gate)[1].bwd(*rows, activation=activation)
    return d_gate, d_up


def _bwd_fake(
    d_out: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return new_empty(gate, gate.shape), new_empty(up, up.shape)


class Glu(torch.autograd.Function):
    """Eager autograd; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.facts = (activation, backend)
        ctx.producer = _glu_pair.producer(gate, up, backend)
        out = _fwd_kernel(gate, up, activation, backend)
        note(out, (gate, up), lambda gate, up: _fwd_kernel(gate, up, activation, backend))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if wanted(d_out):

            def again(gate: Tensor, up: Tensor) -> Tensor:
                return reference.glu(gate, up, ctx.facts[0])

            needs = ctx.needs_input_grad[:2]
            return (*plain_gradients(again, (gate, up), needs, [d_out]), None, None)
        if ctx.producer is not None:
            made = _glu_pair.backward(ctx.producer, d_out, gate, up, ctx.facts[0])
            if made is not None:
                return (*made, None, None)
        return (*_bwd_kernel(d_out, gate, up, *ctx.facts), None, None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.facts = inputs[2:]


def _registered_backward(ctx: Any, d_out: Tensor) -> Any:
    return (*torch.ops.fastft.glu_bwd(d_out, *ctx.saved_tensors, *ctx.facts), None, None)


register(
    "glu_fwd(Tensor gate, Tensor up, str activation, str backend) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "glu_bwd(Tensor d_out, Tensor gate, Tensor up, str activation, str backend) "
    "-> (Tensor, Tensor)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd(
    "fastft::glu_fwd", _registered_backward, setup_context=_setup_context
)
