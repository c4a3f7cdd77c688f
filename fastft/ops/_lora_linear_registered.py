"""``lora_linear`` as registered operations: what torch.compile sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.ops._library import register
from fastft.ops._lora_linear_call import (
    SCHEMA,
    Constants,
    forward_of,
    new_dropout_mask,
    outputs_of,
)
from fastft.ops._lora_linear_gradients import backward_of

__all__ = ["absent"]


def _fwd_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    masks: list[Tensor | None],
    scalings: list[float],
    dropout_ps: list[float],
    owners: list[int],
    spans: list[int],
    backend: str,
) -> list[Tensor]:
    return outputs_of(x, weights, lora_as, spans)


def _bwd_kernel(*arguments: Any) -> list[Tensor]:
    every = [True] * len(arguments[4])
    needs: tuple[Any, ...] = (True, every, every)
    dx, das, dbs = backward_of(*arguments, *needs)
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
    x, weights, biases, lora_as, lora_bs, masks, *constants = inputs
    ctx.constants = Constants(len(weights), *constants)
    ss = output[len(weights) :]
    ctx.save_for_backward(x, *weights, *biases, *lora_as, *lora_bs, *masks, *ss)


def _registered_backward(ctx: Any, grads: list[Tensor]) -> Any:
    constants: Constants = ctx.constants
    x, *tensors = ctx.saved_tensors
    weights, biases, lora_as, lora_bs, masks, _, ss, _ = constants.split(tensors)
    dys = grads[: constants.layers]
    dx, *adapters = torch.ops.fastft.lora_linear_bwd(
        dys,
        x,
        ss,
        weights,
        lora_as,
        lora_bs,
        masks,
        *constants.rest(),
    )
    dws = [(dy.t() @ x).to(w.dtype) if w.requires_grad else None for dy, w in zip(dys, weights)]
    half = len(adapters) // 2
    das, dbs = adapters[:half], adapters[half:]
    no_gradients = [None] * 5  # scalings, dropout_ps, owners, spans, backend
    return dx, dws, absent(biases), das, dbs, absent(masks), *no_gradients


def absent(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """torch takes a list of gradients for a list of tensors, and a bare None for one that holds
    a None; trained biases are therefore added outside the registered operation."""
    return None if any(t is None for t in tensors) else [None] * len(tensors)


register(
    "lora_linear_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_as, "
    f"Tensor[] lora_bs, Tensor?[] masks, {SCHEMA}) -> Tensor[]",
    forward_of,
    _fwd_fake,
)
register(
    "lora_linear_bwd(Tensor[] dys, Tensor x, Tensor[] ss, Tensor[] weights, Tensor[] lora_as, "
    f"Tensor[] lora_bs, Tensor?[] masks, {SCHEMA}) -> Tensor[]",
    _bwd_kernel,
    _bwd_fake,
)
register(
    "dropout_mask(Tensor x, float p, Tensor lora_a, str backend) -> Tensor",
    new_dropout_mask,
    lambda x, p, lora_a, backend: x.new_empty(
        (x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8
    ),
    random=True,
)
torch.library.register_autograd(
    "fastft::lora_linear_fwd", _registered_backward, setup_context=_setup_context
)
