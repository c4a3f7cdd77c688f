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
from fastft.ops._lora_linear_autograd import (
    AUTO,
    Constants,
    LoraLinear,
    choose,
    new_dropout_mask,
)

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
    compiling = torch.compiler.is_compiling()
    # A compiled graph chooses when it runs: the choice reads facts that tracing should not guard.
    name = backend or AUTO if compiling else choose(backend, flat, lora_as)[0]
    masks: list[Tensor | None] = []
    for p in ps:
        if p == 0.0:
            masks.append(None)
        elif compiling:
            masks.append(torch.ops.fastft.dropout_mask(flat, p, lora_as[0], name))
        else:
            masks.append(new_dropout_mask(flat, p, lora_as[0], name))
    if compiling:
        outputs = torch.ops.fastft.lora_linear_fwd(
            flat,
            list(weights),
            [None if b is None or b.requires_grad else b for b in biases],
            list(lora_as),
            list(lora_bs),
            masks,
            list(scalings),
            ps,
            name,
        )
        ys = [
            y + b.to(dtype) if b is not None and b.requires_grad else y
            for y, b in zip(outputs, biases)
        ]
    else:
        constants = Constants(len(weights), tuple(scalings), tuple(ps), name)
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
        given = {"weight": weight, "lora_a": a, "lora_b": b}
        if bias is not None:
            given["bias"] = bias
        for name, tensor in given.items():
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
            raise ArgumentError(_WHERE, "dropout_p", expected="0 <= p < 1", got=repr(dropout_ps[i]))
        if not abs(scalings[i]) < float("inf"):
            raise ArgumentError(
                _WHERE, "scaling", expected="a finite number", got=repr(scalings[i])
            )
