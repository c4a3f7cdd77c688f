"""``lora_linear``: a frozen linear layer and its LoRA adapter as one operation.

    y = x W^T + bias + scaling * drop(x) A^T B^T            (Hu et al. 2021, eq. 3)

With S = drop(x) A^T (tokens x r, the only thing saved beside the inputs), the backward is

    dS = scaling * dy B        dA = dS^T drop(x)        dB = scaling * dy^T S
    dx = dy W + mask / (1 - p) * (dS A)

Siblings, layers that read the same x (q/k/v, gate/up), run as one call: x is read once for all
their S and once for all their dA, and their dx is one accumulation. An adapter belongs to one
layer and to a span of the rows of x: a layer may have several (their terms add up), and a batch
may mix the samples of many adapters.

A result may be scaled by column before the bias, as DoRA does (``fastft.ops.dora_scale``):

    y = scale * (x W^T + scaling * drop(x) A^T B^T) + bias
    dz = dy * scale in the place of dy above;   dscale = sum_rows dy z
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastft.ops._lora_linear_registered  # noqa: F401  what torch.compile sees
from fastft import backends
from fastft.ops._checks import autocast_dtype
from fastft.ops._eager import dispatched
from fastft.ops._lora_linear_autograd import LoraLinear, late_values
from fastft.ops._lora_linear_call import AUTO, Constants, choose, draw_masks, flat, operands
from fastft.ops._lora_linear_checks import WHERE, check, check_remake, check_scales
from fastft.ops._saving import values_wanted
from fastft.ops.dora_scale import dora_scale

__all__ = ["check", "lay_out_weights", "lora_linear", "lora_linear_siblings", "vouched_siblings"]


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
        lora_a: (r, in_features), in x's dtype or float32 (any under autocast); no float32 copy of
            x is made.
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
    owners: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    scales: Sequence[Tensor | None] | None = None,
    remake: Sequence[Callable[[], Tensor] | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` for several layers that share the input x; one result for each layer.

    y_i = x W_i^T + bias_i, and for every adapter j of layer i = owners[j], on its rows of x:
    y_i[spans[j]] += scaling_j * drop_j(x[spans[j]]) A_j^T B_j^T.

    Args:
        x, backend: as in ``lora_linear``.
        weights, biases: one a layer; widths may differ.
        lora_as, lora_bs, scalings, dropout_ps: one an adapter, all in one dtype; ranks may differ.
            Each adapter draws a mask of its own, as in PEFT.
        owners: the index of the layer each adapter belongs to; None: one adapter a layer, in order.
        spans: (first, past the last) row of x, its leading dimensions flattened, that each adapter
            applies to; None: all rows.
        scales: one a layer, (out_features,) in float32 (float64 for float64), or None: the layer's
            result times it, before its bias. Gradients flow to it.
        remake: one a layer, or None: called in the backward, it gives the layer's weight, a frozen
            one that is not kept until then (its values are held in 4 bits). Not under
            torch.compile.

    Raises:
        As ``lora_linear``; ArgumentError also for owners and spans out of range, and for a weight
        made again that is trained.
    """
    biases = list(biases) if biases is not None else [None] * len(weights)
    ps = list(dropout_ps) if dropout_ps is not None else [0.0] * len(lora_as)
    owners = list(range(len(weights))) if owners is None else list(owners)
    check(x, weights, biases, lora_as, lora_bs, scalings, ps, owners)
    if scales is not None:
        scales = list(scales)
        check_scales(weights, scales, autocast_dtype(x.device.type) or x.dtype)
    compiling = dispatched(x, *weights, *biases, *lora_as, *lora_bs, *(scales or ()))
    shape = x.shape
    if compiling:
        x = x.reshape(-1, shape[-1])
    x, lora_as, lora_bs, bounds = operands(WHERE, x, lora_as, lora_bs, spans)
    if remake is not None:
        check_remake(weights, remake, compiling)
    # A compiled graph chooses when it runs: the choice reads facts that tracing should not guard.
    name, launcher = (backend or AUTO, None) if compiling else choose(backend, x, lora_as)
    masks = draw_masks(x, ps, bounds, lora_as[0], name, compiling)
    constants = Constants(
        len(weights), list(scalings), ps, owners, bounds, name, launcher=launcher, remake=remake
    )
    adapters = (lora_as, lora_bs, masks)
    if scales is None or all(scale is None for scale in scales):
        ys = _products(constants, x, weights, biases, *adapters)
    elif _scales_along(launcher, constants, x, weights, biases, *adapters, scales):
        constants = constants._replace(scaled=True)
        ys = _products(constants, x, weights, biases, *adapters, scales)
    else:
        own = [b if scale is None else None for b, scale in zip(biases, scales, strict=True)]
        ys = [
            y if scale is None else _scaled(y, scale, b, backend)
            for y, scale, b in zip(
                _products(constants, x, weights, own, *adapters), scales, biases, strict=True
            )
        ]
    if compiling:
        return tuple([y.view(*shape[:-1], y.shape[-1]) for y in ys])
    return tuple(ys)


def vouched_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *,
    scalings: list[float],
    biases: Sequence[Tensor | None],
    dropout_ps: list[float],
    remake: Sequence[Callable[[], Tensor] | None] | None = None,
    chosen: tuple[str, Any] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear_siblings` of layers with one adapter each, eager, whose arguments the
    caller has held against the rules of ``check`` already: a model's layers, at every call.

    chosen: the backend and its launcher, outside autocast, where the caller has asked already.
    """
    x, lora_as, lora_bs, bounds = operands(WHERE, x, lora_as, lora_bs, None)
    name, launcher = chosen or choose(None, x, lora_as)
    masks = draw_masks(x, dropout_ps, bounds, lora_as[0], name, False)
    owners = list(range(len(weights)))
    constants = Constants(
        len(weights),
        scalings,
        dropout_ps,
        owners,
        bounds,
        name,
        launcher=launcher,
        remake=remake,
        plain=chosen is not None,
    )
    return tuple(_products(constants, x, weights, biases, lora_as, lora_bs, masks))


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    own = None if bias is None else bias.to(y.dtype)
    return dora_scale(y, scale, own, backend=backend)


def _scales_along(
    launcher: Any, constants: Constants, x: Tensor, *call: Sequence[Tensor | None]
) -> bool:
    """Whether the backend multiplies by the scales where it rounds the products."""
    if not hasattr(launcher, "takes_scales"):
        return False
    *tensors, scales = call
    return bool(launcher.takes_scales(flat(x), *tensors, constants.pairs(), scales))


def _products(
    constants: Constants,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[Tensor | None] = (),
) -> Sequence[Tensor]:
    """One result for each layer, with x's leading dimensions; of a registered operation, x is flat.
    scales: those the backend takes along."""
    if constants.launcher is None:
        outputs = torch.ops.fastft.lora_linear_fwd(
            x,
            list(weights),
            [None if b is None or b.requires_grad else b for b in biases],
            list(lora_as),
            list(lora_bs),
            list(masks),
            *constants.rest(),
        )
        return [
            y + b.to(x.dtype) if b is not None and b.requires_grad else y
            for y, b in zip(outputs, biases)
        ]
    # What is scaled along the way reads its value in the backward.
    late = None if scales else late_values(constants)
    tensors = (*weights, *biases, *lora_as, *lora_bs, *masks, *scales)
    ys: Sequence[Tensor] = LoraLinear.apply(late, constants, x, *tensors)
    if late is not None and values_wanted():  # the recompute goes on
        late.compute()
    return ys


def lay_out_weights(
    weights: Sequence[Tensor], ranks: Sequence[int], adapter_dtype: torch.dtype
) -> Any:
    """Frozen weights copied into one buffer with room for their adapters beside and below.

    [[W, scaling B], [A, 0]] makes y = [x | S] [W | scaling B]^T and dx = [dy | dS] [W ; A] one
    library product each, where the backend has that way.

    Args:
        weights: (out_features_i, in_features) of layers that share their input, one dtype and
            device, contiguous.
        ranks: of the one adapter of each layer.
        adapter_dtype: theirs.

    Returns:
        what must be held for as long as the weights are used; its ``weights`` are views with the
        values given, to be passed to :func:`lora_linear_siblings`. None where the backend that
        serves these tensors has no such way.

    Source: derived here; LoRA's two products of rank r ride in the borders of the frozen one.
    """
    first = weights[0]
    launcher = backends.select(
        "lora_linear",
        device_type=first.device.type,
        dtype=first.dtype,
        adapter_dtype=adapter_dtype,
        r=max(ranks),
    )[1]
    if not hasattr(launcher, "lay_out"):
        return None
    with torch.no_grad():
        return launcher.lay_out([w.detach() for w in weights], list(ranks))
