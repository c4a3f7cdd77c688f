"""``lora_linear`` for autograd: the eager Function, and the registered operations that
torch.compile sees. Both call the same launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import backends
from fastft.ops._library import register
from fastft.reference.lora_linear import lora_linear as reference_lora_linear

__all__ = ["AUTO", "Constants", "LoraLinear", "choose", "new_dropout_mask"]

# The backend argument of a registered operation that chooses when it runs.
AUTO = "auto"


def choose(backend: str | None, x: Tensor, lora_as: Sequence[Tensor]) -> tuple[str, Any]:
    """The backend for a call and its launcher."""
    return backends.select(
        "lora_linear",
        None if backend == AUTO else backend,
        device_type=x.device.type,
        dtype=x.dtype,
        adapter_dtype=lora_as[0].dtype,
        r=max(a.shape[0] for a in lora_as),
    )


@dataclass(frozen=True)
class Constants:
    """What a call holds beside tensors."""

    count: int
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    backend: str


def new_dropout_mask(x: Tensor, p: float, lora_a: Tensor, backend: str) -> Tensor:
    """A fresh bit-packed mask (M, ceil(K/8)) for x; the seed comes from torch's generator, so a
    recompute under checkpointing, which restores that, draws the same mask."""
    mask = torch.empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    choose(backend, x, [lora_a])[1].dropout_mask(mask, seed, p)
    return mask


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
    backend: str,
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
        choose(backend, x, lora_as)[1].fwd(
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
    backend: str,
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
        choose(backend, x, lora_as)[1].bwd(
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
    def forward(ctx: Any, constants: Constants, x: Tensor, *tensors: Tensor | None) -> Any:
        n = constants.count
        weights, biases, lora_as, lora_bs, masks = (tensors[i * n : (i + 1) * n] for i in range(5))
        outputs = _forward(
            constants.backend,
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
        constants: Constants = ctx.constants
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
            constants.backend,
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
    constants: Constants,
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
    return [next(grads) if need and t is not None else None for t, need in zip(inputs, needs[1:])]


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
        backend,
        x,
        weights,
        biases,
        lora_as,
        lora_bs,
        masks,
        scalings,
        dropout_ps,
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
        backend,
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
    return (
        dx,
        dws,
        _no_gradients(biases),
        adapters[:n],
        adapters[n:],
        _no_gradients(masks),
        None,
        None,
        None,
    )


def _no_gradients(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """torch takes a list of gradients for a list of tensors, and a bare None for one that holds
    a None; trained biases are therefore added outside the registered operation."""
    return None if any(t is None for t in tensors) else [None] * len(tensors)


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
