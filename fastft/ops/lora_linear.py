"""``lora_linear``: a frozen linear layer and its LoRA adapter as one operation.

    y = x W^T + bias + scaling * drop(x) A^T B^T            (Hu et al. 2021, eq. 3)

With S = drop(x) A^T (tokens x r, the only thing saved beside the inputs), the backward is

    dS = scaling * dy B        dA = dS^T drop(x)        dB = scaling * dy^T S
    dx = dy W + mask / (1 - p) * (dS A)

Siblings, layers that read the same x (q/k/v, gate/up), run as one call: x is read once for all
their S and once for all their dA, and their dx is one accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.errors import ArgumentError, ShapeError
from fastft.ops._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from fastft.ops._library import register
from fastft.reference.lora_linear import lora_linear as reference_lora_linear

__all__ = ["check", "lora_linear", "lora_linear_siblings"]

_WHERE = "fastft.ops.lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * drop(x) A^T B^T.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64. Under autocast it is cast to
            the autocast dtype, as ``torch.nn.functional.linear`` does.
        weight: (out_features, in_features), the frozen W, in x's dtype (any under autocast).
        lora_a: (r, in_features), in x's dtype or float32; no float32 copy of x is made.
        lora_b: (out_features, r), in the dtype of ``lora_a``.
        scaling: lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)).
        bias: (out_features,) or None.
        dropout_p: probability of zeroing an element of drop(x), 0 <= p < 1; the mask is drawn
            from torch's generator, one bit an element, and saved for the backward.
        backend: "cuda", "triton", "cpu" or "reference" to insist on one; None for the first that
            can run.

    Returns:
        (..., out_features) in x's dtype (the autocast dtype under autocast). Accumulation is in
        float32. NaN and Inf propagate as in torch.

    Gradients flow to x, lora_a, lora_b, and to weight and bias where they ask for it.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``.
        BackendError: the backend asked for cannot run the call.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    return lora_linear_siblings(
        x,
        [weight],
        [lora_a],
        [lora_b],
        scalings=[scaling],
        biases=[bias],
        dropout_ps=[dropout_p],
        backend=backend,
    )[0]


def lora_linear_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout_ps: Sequence[float] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` for several layers that share the input x; one result for each.

    The arguments are those of ``lora_linear``, one of each a layer; ranks, widths, scalings and
    dropouts may differ. Each layer draws a mask of its own, as in PEFT.
    """
    biases = list(biases) if biases is not None else [None] * len(weights)
    ps = list(dropout_ps) if dropout_ps is not None else [0.0] * len(weights)
    check(x, weights, biases, lora_as, lora_bs, scalings, ps)
    dtype = autocast_dtype(x.device.type) or x.dtype
    flat = x.reshape(-1, x.shape[-1])
    flat = flat.to(dtype).contiguous()
    facts = {
        "device_type": x.device.type,
        "dtype": dtype,
        "adapter_dtype": lora_as[0].dtype,
        "r": max(a.shape[0] for a in lora_as),
    }
    name, launcher = backends.select("lora_linear", backend, **facts)
    compiling = torch.compiler.is_compiling()
    masks: list[Tensor | None] = []
    for p in ps:
        if p == 0.0:
            masks.append(None)
        elif compiling:
            masks.append(torch.ops.fastft.dropout_mask(flat, p, name))
        else:
            masks.append(_dropout_mask(flat, p, name))
    if compiling:
        outputs = torch.ops.fastft.lora_linear_fwd(
            flat,
            list(weights),
            biases,
            list(lora_as),
            list(lora_bs),
            masks,
            list(scalings),
            ps,
            name,
        )
        ys = outputs[: len(weights)]
    else:
        constants = _Constants(len(weights), tuple(scalings), tuple(ps), launcher)
        ys = LoraLinear.apply(constants, flat, *weights, *biases, *lora_as, *lora_bs, *masks)
    if x.dim() == 2:
        return tuple(ys)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor; no floating dtype; weight or bias in another dtype than x outside
            autocast; an adapter neither in x's dtype nor in float32.
        ShapeError: shapes that do not fit the formula, or lists of different lengths.
        DeviceError: a tensor on another device than x.
        ArgumentError: r = 0, r > min(in_features, out_features), dropout outside [0, 1), a
            scaling that is no finite number.
    """
    check_tensor(_WHERE, "x", x)
    check_dtype(_WHERE, "x", x, FLOATS)
    if x.dim() == 0:
        raise ShapeError(_WHERE, "x", expected="(..., in_features)", got="a scalar")
    lengths = [len(v) for v in (weights, biases, lora_as, lora_bs, scalings, dropout_ps)]
    if not weights or len(set(lengths)) != 1:
        raise ShapeError(_WHERE, "weights", expected="as many of each argument", got=str(lengths))
    in_features = x.shape[-1]
    autocast = autocast_dtype(x.device.type)
    for i, (weight, bias, a, b) in enumerate(zip(weights, biases, lora_as, lora_bs, strict=True)):
        for name, tensor in (("weight", weight), ("lora_a", a), ("lora_b", b), ("bias", bias)):
            if name == "bias" and tensor is None:
                continue
            check_tensor(_WHERE, name, tensor)
            check_device(_WHERE, name, tensor, x.device)
            if autocast is not None:
                check_dtype(_WHERE, name, tensor, FLOATS)
            elif name.startswith("lora"):
                check_dtype(_WHERE, name, tensor, (x.dtype, torch.float32))
            else:
                check_dtype(_WHERE, name, tensor, (x.dtype,))
        if weight.dim() != 2:
            raise ShapeError(
                _WHERE,
                "weight",
                expected="(out_features, in_features)",
                got=str(tuple(weight.shape)),
            )
        out_features = weight.shape[0]
        check_shape(_WHERE, "weight", weight, (out_features, in_features), "(out, in_features)")
        if a.dim() != 2 or a.shape[1] != in_features:
            raise ShapeError(
                _WHERE, "lora_a", expected=f"(r, {in_features})", got=str(tuple(a.shape))
            )
        r = a.shape[0]
        if not 1 <= r <= min(in_features, out_features):
            raise ArgumentError(
                _WHERE,
                "r",
                expected=f"1 to min(in_features, out_features) = {min(in_features, out_features)}",
                got=str(r),
                remedy="A larger rank than the matrix has adds nothing; r = 0 is no adapter.",
            )
        check_shape(_WHERE, "lora_b", b, (out_features, r), "(out_features, r)")
        if b.dtype != a.dtype:
            check_dtype(_WHERE, "lora_b", b, (a.dtype,))
        if bias is not None:
            check_shape(_WHERE, "bias", bias, (out_features,), "(out_features,)")
        if not 0.0 <= dropout_ps[i] < 1.0:
            raise ArgumentError(
                _WHERE, "dropout_p", expected="0 <= p < 1", got=repr(dropout_ps[i])
            )
        if not abs(scalings[i]) < float("inf"):
            raise ArgumentError(_WHERE, "scaling", expected="a finite number", got=repr(scalings[i]))


@dataclass(frozen=True)
class _Constants:
    """What a call holds beside tensors."""

    count: int
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    launcher: Any


def _dropout_mask(x: Tensor, p: float, backend: str) -> Tensor:
    """A fresh bit-packed mask (M, ceil(K/8)) for x; the seed comes from torch's generator, so a
    recompute under checkpointing, which restores that, draws the same mask."""
    mask = torch.empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    _launcher(backend).dropout_mask(mask, seed, p)
    return mask


def _launcher(backend: str) -> Any:
    launcher = backends.launcher("lora_linear", backend)
    if isinstance(launcher, str):
        raise ArgumentError(_WHERE, "backend", expected="a backend with this op", got=launcher)
    return launcher


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _cast_biases(biases: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if b is None else b.to(dtype) for b in biases]


def _outputs(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor]) -> list[Tensor]:
    """Room for ys and ss."""
    rows = x.shape[0]
    widths = [w.shape[0] for w in weights] + [a.shape[0] for a in lora_as]
    return [x.new_empty(rows, width) for width in widths]


def _forward(
    launcher: Any,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
) -> list[Tensor]:
    """ys and ss, from the launcher."""
    outputs = _outputs(x, weights, lora_as)
    n = len(weights)
    with torch.autocast(x.device.type, enabled=False):
        launcher.fwd(
            outputs[:n],
            outputs[n:],
            x,
            _cast(weights, x.dtype),
            _cast_biases(biases, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
        )
    return outputs


def _backward(
    launcher: Any,
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, dAs and dBs, from the launcher."""
    dx = torch.empty_like(x) if need_dx else None
    das = [torch.empty_like(a) if need else None for a, need in zip(lora_as, need_da, strict=True)]
    dbs = [torch.empty_like(b) if need else None for b, need in zip(lora_bs, need_db, strict=True)]
    with torch.autocast(x.device.type, enabled=False):
        launcher.bwd(
            dx,
            das,
            dbs,
            [dy.contiguous() for dy in dys],
            x,
            list(ss),
            _cast(weights, x.dtype),
            list(lora_as),
            list(lora_bs),
            list(scalings),
            list(masks),
            list(dropout_ps),
        )
    return dx, das, dbs


class LoraLinear(torch.autograd.Function):
    """Eager autograd of ``lora_linear_siblings``."""

    @staticmethod
    def forward(ctx: Any, constants: _Constants, x: Tensor, *tensors: Tensor | None) -> Any:
        n = constants.count
        weights, biases, lora_as, lora_bs, masks = (
            tensors[i * n : (i + 1) * n] for i in range(5)
        )
        outputs = _forward(
            constants.launcher,
            x,
            weights,  # type: ignore[arg-type]
            biases,
            lora_as,  # type: ignore[arg-type]
            lora_bs,  # type: ignore[arg-type]
            masks,
            constants.scalings,
            constants.dropout_ps,
        )
        ctx.constants = constants
        ctx.save_for_backward(x, *tensors, *outputs[n:])
        return tuple(outputs[:n])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        constants: _Constants = ctx.constants
        n = constants.count
        x, *tensors = ctx.saved_tensors
        weights, biases, lora_as, lora_bs, masks, ss = (
            tensors[i * n : (i + 1) * n] for i in range(6)
        )
        if torch.is_grad_enabled():
            inputs = [x, *weights, *biases, *lora_as, *lora_bs]
            grads = _differentiable_backward(constants, inputs, masks, dys, ctx.needs_input_grad)
            return None, *grads, *([None] * n)
        needs = ctx.needs_input_grad
        need = [needs[2 + i * n : 2 + (i + 1) * n] for i in range(4)]
        dx, das, dbs = _backward(
            constants.launcher,
            dys,
            x,
            ss,
            weights,
            lora_as,
            lora_bs,
            masks,
            constants.scalings,
            constants.dropout_ps,
            needs[1],
            need[2],
            need[3],
        )
        dws = [(dy.t() @ x).to(w.dtype) if k else None for dy, w, k in zip(dys, weights, need[0])]
        dbiases = [dy.sum(0).to(b.dtype) if k else None for dy, b, k in zip(dys, biases, need[1])]
        return None, dx, *dws, *dbiases, *das, *dbs, *([None] * n)


def _differentiable_backward(
    constants: _Constants,
    inputs: list[Tensor | None],
    masks: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward as torch operations, for a second derivative (create_graph=True)."""
    n = constants.count
    x = inputs[0]
    weights, biases, lora_as, lora_bs = (inputs[1 + i * n : 1 + (i + 1) * n] for i in range(4))
    with torch.enable_grad():
        ys = [
            reference_lora_linear(
                x,  # type: ignore[arg-type]
                weights[i].to(x.dtype),  # type: ignore[union-attr]
                None if biases[i] is None else biases[i].to(x.dtype),  # type: ignore[union-attr]
                lora_as[i],  # type: ignore[arg-type]
                lora_bs[i],  # type: ignore[arg-type]
                constants.scalings[i],
                masks[i],
                constants.dropout_ps[i],
            )
            for i in range(n)
        ]
        wanted = [t for t, need in zip(inputs, needs[1:]) if need and t is not None]
        grads = iter(torch.autograd.grad(ys, wanted, list(dys), create_graph=True))
    return [
        next(grads) if need and t is not None else None for t, need in zip(inputs, needs[1:])
    ]


# The registered operations: what torch.compile sees.


def _fwd_kernel(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    scalings: list[float],
    dropout_ps: list[float],
    backend: str,
) -> list[Tensor]:
    return _forward(
        _launcher(backend), x, weights, biases, lora_as, lora_bs, masks, scalings, dropout_ps
    )


def _fwd_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return _outputs(x, weights, lora_as)


def _bwd_kernel(
    dys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    scalings: list[float],
    dropout_ps: list[float],
    backend: str,
) -> list[Tensor]:
    every = [True] * len(dys)
    dx, das, dbs = _backward(
        _launcher(backend),
        dys,
        x,
        ss,
        weights,
        lora_as,
        lora_bs,
        masks,
        scalings,
        dropout_ps,
        True,
        every,
        every,
    )
    return [t for t in (dx, *das, *dbs) if t is not None]


def _bwd_fake(
    dys: list[Tensor],
    x: Tensor,
    ss: list[Tensor],
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *lora_as, *lora_bs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, lora_as, lora_bs, masks, scalings, dropout_ps, backend = inputs
    n = len(weights)
    ctx.count, ctx.constants = n, (scalings, dropout_ps, backend)
    ctx.save_for_backward(x, *weights, *biases, *lora_as, *lora_bs, *masks, *output[n:])


def _registered_backward(ctx: Any, grads: list[Tensor]) -> Any:
    n = ctx.count
    x, *tensors = ctx.saved_tensors
    weights, biases, lora_as, lora_bs, masks, ss = (tensors[i * n : (i + 1) * n] for i in range(6))
    scalings, dropout_ps, backend = ctx.constants
    dys = grads[:n]
    dx, *adapters = torch.ops.fastft.lora_linear_bwd(
        dys, x, ss, weights, lora_as, lora_bs, masks, scalings, dropout_ps, backend
    )
    dws = [(dy.t() @ x).to(w.dtype) if w.requires_grad else None for dy, w in zip(dys, weights)]
    dbiases = [
        dy.sum(0).to(b.dtype) if b is not None and b.requires_grad else None
        for dy, b in zip(dys, biases)
    ]
    return dx, dws, dbiases, adapters[:n], adapters[n:], [None] * n, None, None, None


register(
    "lora_linear_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_as, "
    "Tensor[] lora_bs, Tensor?[] masks, float[] scalings, float[] dropout_ps, str backend) "
    "-> Tensor[]",
    _fwd_kernel,
    _fwd_fake,
)
register(
    "lora_linear_bwd(Tensor[] dys, Tensor x, Tensor[] ss, Tensor[] weights, Tensor[] lora_as, "
    "Tensor[] lora_bs, Tensor?[] masks, float[] scalings, float[] dropout_ps, str backend) "
    "-> Tensor[]",
    _bwd_kernel,
    _bwd_fake,
)
register(
    "dropout_mask(Tensor x, float p, str backend) -> Tensor",
    _dropout_mask,
    lambda x, p, backend: x.new_empty(
        (x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8
    ),
    random=True,
)
torch.library.register_autograd(
    "fastft::lora_linear_fwd", _registered_backward, setup_context=_setup_context
)
