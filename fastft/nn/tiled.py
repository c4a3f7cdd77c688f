"""A gated MLP over a tile of tokens at a time: its intermediates exist for one tile only.

The input is saved, and the backward makes gate and up of each tile again: 8 units of work (3
forward, 2 again, 3 backward with frozen weights) where a checkpoint of the whole MLP takes 9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from fastft.errors import ArgumentError
from fastft.ops._checks import autocast_as, autocast_dtype
from fastft.ops._differentiable import wanted
from fastft.ops._saving import Late, noting, saves_first

__all__ = ["tiled"]

Run = Callable[[Tensor, bool], Tensor]


def tiled(module: nn.Module, run: Run, x: Tensor, tile: int) -> Tensor:
    """``run(x, True)`` for a ``run`` that treats each token by itself, ``tile`` tokens at a time.

    Args:
        module: whose trained parameters ``run`` uses.
        run: (tokens, features) -> (tokens, features); with False, the value need not be computed.
        x: (..., features).
    """
    rows = x.reshape(-1, x.shape[-1])
    trained = [p for p in module.parameters() if p.requires_grad]
    late = Late() if saves_first() else None
    y: Tensor = _Tiled.apply(late, run, tile, rows, *trained)
    if late is not None:
        late.compute()
    return y.view(*x.shape[:-1], y.shape[-1])


def _compute(run: Run, rows: Tensor, tile: int, y: Tensor) -> None:
    for part in _parts(rows.shape[0], tile):
        y[part] = run(rows[part], True)


def _parts(rows: int, tile: int) -> list[slice]:
    return [slice(begin, min(begin + tile, rows)) for begin in range(0, rows, tile)]


class _Tiled(torch.autograd.Function):
    """Eager autograd; a second derivative is refused."""

    @staticmethod
    def forward(
        ctx: Any, late: Late | None, run: Run, tile: int, rows: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.run, ctx.tile, ctx.trained = run, tile, trained
        ctx.autocast = autocast_dtype(rows.device.type)
        ctx.random = (torch.get_rng_state(), *get_device_states(rows))
        ctx.save_for_backward(rows)
        y = rows.new_empty(rows.shape, dtype=ctx.autocast)
        if late is None:
            with noting(None):  # a tile's results are nobody's to make again
                _compute(run, rows, tile, y)
        else:
            late.work = functools.partial(_compute, run, rows, tile, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if wanted(dy):
            raise ArgumentError(
                "fastft.memory (mlp_tile)",
                "input",
                expected="first derivatives, one at a time",
                got="create_graph=True or is_grads_batched=True",
                remedy="Leave mlp_tile out.",
            )
        (rows,) = ctx.saved_tensors
        need = ctx.needs_input_grad[3]
        d_rows = torch.empty_like(rows) if need else None
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        cpu_state, devices, states = ctx.random
        with torch.random.fork_rng(devices), autocast_as(rows.device.type, ctx.autocast):
            torch.set_rng_state(cpu_state)
            set_device_states(devices, states)
            for part in _parts(rows.shape[0], ctx.tile):
                with torch.enable_grad():
                    x = rows[part].detach().requires_grad_(need)
                    y = ctx.run(x, False)
                leaves = [*([x] if need else []), *ctx.trained]
                found = list(torch.autograd.grad(y, leaves, dy[part], allow_unused=True))
                if d_rows is not None:
                    d_rows[part] = found.pop(0)
                for i, gradient in enumerate(found):
                    if gradient is not None:
                        held = sums[i]
                        sums[i] = gradient if held is None else held.add_(gradient)
        return None, None, None, d_rows, *sums
