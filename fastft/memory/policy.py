"""``checkpoint``: a model's layers under a policy for what they keep for the backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from fastft import native
from fastft.errors import ArgumentError, DtypeError, nearest
from fastft.memory._auto import Plan, budget_or_free, reserved_bytes
from fastft.memory._compress import FORMATS
from fastft.memory._layers import (
    POLICIES,
    LayerState,
    find_layers,
    forget_state,
    set_state,
    state_of,
)
from fastft.nn.mlp import TILE, FusedGatedMLP

__all__ = ["checkpoint", "explain", "restore"]

_WHERE = "fastft.memory.checkpoint"
# Layers at the end whose tensors offload leaves on the device: their backward comes at once.
_ON_DEVICE = 2
# Of the budget, for the intermediates of one MLP; tokens of a tile are a multiple of the unit.
_TILE_SHARE, _TILE_UNIT = 0.125, 256


def checkpoint(
    model: nn.Module,
    policy: str = "auto",
    budget: int | None = None,
    *,
    compression: str | None = None,
    mlp_tile: int | str | None = None,
) -> nn.Module:
    """Puts the repeated layers of ``model`` under a policy, in place.

    Of a layer with hidden size h, intermediate size i, keys and values of width v, in numbers a
    token, accelerated, LoRA on all linears:

    * ``none``: all that the backward reads: 6h + 2v + 3i; on the CPU 6h + 2v + 2i, for a LoRA layer
      that reads a GLU makes its result again there.
    * ``lora``: no result that one pass over saved tensors makes again (those of fused norms and
      GLUs): 4h + 2v + 2i. No product is computed twice.
    * ``attention``: the layer's input and the result of attention, 2h; all else is recomputed.
    * ``full``: the layer's input, h; all is recomputed. In both, the last product of the
      recompute, whose value nobody needs, is left out.
    * ``offload``: as ``attention``, and both tensors lie in pinned host memory, copied beside the
      computation, but for the last two layers. On the CPU the same as ``attention``.
    * ``auto``: for each layer the one of the first four that keeps the sum within ``budget`` at the
      least recomputation. Measured in the first step, which runs under ``full``, solved (to a
      4096th of the budget) and printed before the second; and so again when a batch has more
      tokens than any before it. A copy of the model keeps the policies it was copied with.

    Gradients are those of ``none``, bit for bit, dropout included. Two exceptions, of rounding:
    layers that share an input which needs a gradient (T5's position bias), where any checkpoint
    adds it up in another order, and ``mlp_tile``. A second derivative goes through all but
    ``offload`` and ``mlp_tile``.

    On the CPU with glibc the process is told to map large tensors one by one (mallopt), so that it
    holds what is alive and no more: glibc before 2.38 finds no use for most of what aligned
    allocations leave behind. Mapping costs a page fault for every 4 KiB; the results of an
    accelerated model's own operations, which come from a pool, are spared it.

    Args:
        model: any model with repeated layers (lists of modules with two or more matrices each).
        policy: one of the above.
        budget: bytes for activations, the recomputed layer's among them, where the policy or the
            tile is "auto". None: nine tenths of the device's free memory, less gradients and two
            float32 states of trained parameters that do not exist yet.
        compression: None, or, with ``none`` and ``lora``, a lossy format for large activations:
            "int8" (rounded stochastically, by random numbers of its own that torch's seed decides;
            in a CUDA graph by torch's) or "float8" (e4m3), one scale a row.
        mlp_tile: tokens that a fused gated MLP treats at a time, its input saved and its gate and
            up made again: 8 units of work for 6, for sequences whose intermediates of one layer
            are too large. Adapter gradients are then sums over tiles, equal up to rounding. "auto":
            as many as take an eighth of the budget, so that shorter batches are not tiled at all.

    Returns:
        ``model``. Transformers' and a Trainer's own checkpointing have no effect on these layers.

    Raises:
        DtypeError: ``model`` is no torch module.
        ArgumentError: an unknown policy or format, a budget without "auto" or below 1, compression
            with a policy that recomputes, a tile below 1 or without a fused MLP, a model without
            repeated layers.

    Sources: Chen et al. 2016 (arXiv 1604.06174) for recomputation; Korthikanti et al. 2022 (arXiv
    2205.05198) for its choice; the rest is derived here.
    """
    _check(model, policy, budget, compression, mlp_tile)
    layers = find_layers(model)
    if not layers:
        raise ArgumentError(
            _WHERE,
            "model",
            expected="a model with a list of repeated layers",
            got=type(model).__name__,
            remedy="Pass the module that holds nn.ModuleList([...]) of its layers.",
        )
    mlps = [m for m in model.modules() if isinstance(m, FusedGatedMLP)]
    if mlp_tile is not None and not mlps:
        raise ArgumentError(
            _WHERE,
            "mlp_tile",
            expected="None, or a model with fused gated MLPs",
            got="a model without",
            remedy="Call fastft.accelerate(model) first.",
        )
    restore(model)
    for mlp in mlps if mlp_tile is not None else ():
        tile = _tile(mlp, budget, reserved_bytes(model)) if mlp_tile == "auto" else mlp_tile
        mlp.__dict__[TILE] = tile
    last = len(layers) - _ON_DEVICE
    if native.available() and any(p.device.type == "cpu" for p in model.parameters()):
        native.module().tight_heap()
    plan = Plan(layers, budget, model) if policy == "auto" else None
    chosen = "full" if policy == "auto" else policy
    for index, layer in enumerate(layers):
        set_state(layer, LayerState(index, chosen, index >= last, compression, plan))
    return model


def _tile(mlp: FusedGatedMLP, budget: int | None, reserved: int) -> int:
    """Tokens whose intermediates, gate, up, their product and the gradients of the three, take this
    share of the budget."""
    weights = list(mlp.parameters())  # type: ignore[attr-defined]
    device = weights[0].device
    width = getattr(mlp, mlp.fastft_layout.down).in_features
    # Quantised weights are computed with in 16 bits.
    sizes = [p.element_size() for p in weights if p.is_floating_point() and not p.requires_grad]
    itemsize = min(sizes, default=2)
    room = _TILE_SHARE * budget_or_free(budget, reserved, device)
    return max(1, int(room / (6 * width * itemsize)) // _TILE_UNIT) * _TILE_UNIT


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`checkpoint`; a model that has no policy is left alone."""
    for module in model.modules():
        module.__dict__.pop(TILE, None)
        if state_of(module) is not None:
            forget_state(module)
    return model


def explain(model: nn.Module) -> str:
    """How many layers are under which policy, a line."""
    states = [state_of(module) for module in model.modules()]
    counts = Counter(state.policy for state in states if state is not None)
    if not counts:
        return "no policy: every layer keeps all that its backward reads"
    return ", ".join(f"{counts[p]} x {p}" for p in POLICIES if counts[p])


def _check(model: Any, policy: Any, budget: Any, compression: Any, mlp_tile: Any) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise DtypeError(_WHERE, "model", expected="a torch.nn.Module", got=got)
    names = (*POLICIES, "auto")
    if policy not in names:
        raise ArgumentError(
            _WHERE,
            "policy",
            expected=f"one of {', '.join(names)}",
            got=repr(policy),
            remedy=nearest(str(policy), names) or None,
        )
    if budget is not None and "auto" not in (policy, mlp_tile):
        expected = "None, except with policy or mlp_tile 'auto'"
        raise ArgumentError(_WHERE, "budget", expected=expected, got=repr(budget))
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ArgumentError(_WHERE, "budget", expected="bytes, 1 or more", got=repr(budget))
    if mlp_tile not in (None, "auto") and (type(mlp_tile) is not int or mlp_tile < 1):
        expected = "tokens, 1 or more, or 'auto'"
        raise ArgumentError(_WHERE, "mlp_tile", expected=expected, got=repr(mlp_tile))
    if compression is not None and compression not in FORMATS:
        expected = f"None or one of {', '.join(FORMATS)}"
        raise ArgumentError(_WHERE, "compression", expected=expected, got=repr(compression))
    if compression is not None and policy not in ("none", "lora"):
        raise ArgumentError(
            _WHERE,
            "compression",
            expected="policy 'none' or 'lora', which keep activations",
            got=repr(policy),
        )
