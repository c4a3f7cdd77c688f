"""``lora_add``: what LoRA adds to the result of a frozen layer that somebody else computed.

    y' = y + scaling * drop(x) A^T B^T

:func:`fastft.ops.lora_linear` without its product, for weights that only another package can
multiply with (8 bits, GPTQ, AWQ, ...). Saved are x and S = drop(x) A^T. The backward is

    dS = scaling * dy B        dA = dS^T drop(x)        dB = scaling * dy^T S
    dx = mask / (1 - p) * (dS A)

and dy goes on to y as it is, whose own backward gives the rest of dx. Siblings, whose layers read
the same x, share its reads as in ``lora_linear``, and their dx is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.errors import ShapeError
from fastft.ops._checks import FLOATS, check_device, check_dtype, check_tensor
from fastft.ops._eager import call, dispatched
from fastft.ops._lora_add_run import LoraAdd
from fastft.ops._lora_linear_call import AUTO, Constants, choose, draw_masks, operands
from fastft.ops._lora_linear_checks import check_adapters, check_input

__all__ = ["check", "lora_add", "lora_add_siblings"]

_WHERE = "fastft.ops.lora_add"


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y + scaling * drop(x) A^T B^T.

    Args:
        y: (..., out_features), float32, bfloat16, float16 or float64: what the frozen layer made
            of x.
        x, lora_a, lora_b, scaling, dropout_p, backend: as in ``lora_linear``. Under autocast the
            terms are computed in its dtype.
        overwrite: nobody reads y again: the result may lie where y does, if nothing else lies
            there. A backward that reads y after all raises torch's error for a tensor that was
            changed in place.

    Returns:
        y's shape and dtype. Accumulation is in float32; where y has another dtype than the terms
        they are rounded to their own before they are added.

    Gradients flow to y, x, lora_a and lora_b.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see ``check``.
        BackendError: the backend asked for cannot run the call.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """
    return lora_add_siblings(
        [y],
        x,
        [lora_a],
        [lora_b],
        scalings=[scaling],
        dropout_ps=[dropout_p],
        overwrite=overwrite,
        backend=backend,
    )[0]


def lora_add_siblings(
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *,
    scalings: Sequence[float],
    dropout_ps: Sequence[float] | None = None,
    owners: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    overwrite: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_add` for the results ys of layers that share the input x; one result for each.

    Args:
        ys: one a layer; widths and dtypes may differ.
        x, overwrite, backend: as in ``lora_add``.
        lora_as, lora_bs, scalings, dropout_ps, owners, spans: as in ``lora_linear_siblings``.

    Raises:
        As ``lora_add``; ArgumentError also for owners and spans out of range.
    """
    ps = list(dropout_ps) if dropout_ps is not None else [0.0] * len(lora_as)
    owners = list(range(len(ys))) if owners is None else list(owners)
    check(ys, x, lora_as, lora_bs, scalings, ps, owners)
    flat, lora_as, lora_bs, bounds = operands(
        _WHERE, x.reshape(-1, x.shape[-1]), lora_as, lora_bs, spans
    )
    compiling = dispatched(x, *ys, *lora_as, *lora_bs)
    # A compiled graph chooses when it runs: the choice reads facts that tracing should not guard.
    name, launcher = (backend or AUTO, None) if compiling else choose(backend, flat, lora_as)
    masks = draw_masks(flat, ps, bounds, lora_as[0], name, compiling)
    constants = Constants(len(ys), list(scalings), ps, owners, bounds, name, launcher=launcher)
    if launcher is None:
        outputs = torch.ops.fastft.lora_add_fwd(
            list(ys), flat, list(lora_as), list(lora_bs), masks, *constants.rest()
        )
        return tuple(outputs[: len(ys)])
    # A layer may return its input, which autocast then has copied for the terms.
    apart = len({t.untyped_storage()._cdata for t in (x, *ys)}) > len(ys)
    tensors = (*ys, *lora_as, *lora_bs, *masks)
    found: tuple[Tensor, ...] = call(LoraAdd, constants, overwrite and apart, flat, *tensors)
    return found


def check(
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    owners: Sequence[int],
) -> None:
    """Refuses what the operation is not defined for.

    Raises:
        DtypeError: no tensor; no floating dtype; an adapter neither in x's dtype nor in float32
            outside autocast, or in another than the rest.
        ShapeError: shapes that do not fit the formula, or lists of different lengths.
        DeviceError: a tensor on another device than x.
        ArgumentError: r = 0, r > min(in_features, out_features), dropout outside [0, 1), a
            scaling that is no finite number, an owner that is no layer.
    """
    check_input(_WHERE, x)
    if not ys:
        raise ShapeError(_WHERE, "ys", expected="one result a layer", got="none")
    for y in ys:
        check_tensor(_WHERE, "y", y)
        check_dtype(_WHERE, "y", y, FLOATS)
        check_device(_WHERE, "y", y, x.device)
        if y.shape[:-1] != x.shape[:-1] or y.dim() == 0:
            expected = f"{(*x.shape[:-1], 'out_features')}: x's shape but for the last dimension"
            raise ShapeError(_WHERE, "y", expected=expected, got=str(tuple(y.shape)))
    widths = [y.shape[-1] for y in ys]
    check_adapters(_WHERE, x, widths, lora_as, lora_bs, scalings, dropout_ps, owners)
