"""Gated MLPs, fused between their projections."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.few import few_rows
from fastft.nn.lora import FusedLora
from fastft.nn.mixed import adapter_names_of
from fastft.nn.rules import hooked, hooked_everywhere
from fastft.nn.swap import Swapped, call_refusal
from fastft.nn.tiled import tiled
from fastft.ops._checks import autocast_dtype
from fastft.ops._remade import remaking
from fastft.ops._saving import without_values
from fastft.ops.glu import makes_again

__all__ = ["FusedGatedMLP", "Layout", "activation_of", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """How a gated MLP names its parts: y = down(activation(gate(x)) * up(x)); with up None, gate
    gives both halves in one tensor; with a dropout, it drops elements of the product."""

    gate: str
    up: str | None
    down: str
    activation: str
    dropout: str | None = None


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    Layout("w1", "w3", "w2", "act_fn"),
    Layout("gate_proj", "up_proj", "down_proj", "activation_fn"),
    Layout("gate_up_proj", None, "down_proj", "activation_fn"),
    Layout("wi_0", "wi_1", "wo", "act", "dropout"),
)
_ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout whose parts are exactly what the module holds; a part more, and it is none."""
    if module._parameters or module._buffers:
        return None
    children = {name for name, _ in module.named_children()}
    for layout in LAYOUTS:
        if children == {name for name in vars(layout).values() if name is not None}:
            return layout
    return None


def activation_of(module: nn.Module, layout: Layout) -> str | None:
    """The activation's name in ``fastft.ops.glu``, or None, also where hooks look at it."""
    function = getattr(module, layout.activation)
    if hooked(function) or hooked_everywhere(function):
        return None
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function))


# Where a module holds the number of tokens it treats at a time; set by fastft.memory.
TILE = "fastft_tile"


class FusedGatedMLP(Swapped):
    """The forward of a gated MLP: its own projections, and one operation between them."""

    fastft_layout: Layout

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Projections and :func:`fastft.ops.glu`, or the original's forward, counted."""
        if len(args) != 1 or kwargs:
            self._count("arguments passed to the layer")
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        activation = activation_of(self, self.fastft_layout)
        if activation is None:
            self._count("activation is hooked, or neither SiLU nor GELU")
            return super().forward(*args)  # type: ignore[misc]
        x, tile = args[0], self.__dict__.get(TILE)
        if self._casts(x):
            self._count("mixed dtypes")
            return super().forward(x)  # type: ignore[misc]
        if tile is not None and self._tiles(x, tile):
            return tiled(self, self._project, x, tile)
        return self._project(x)

    def _casts(self: Any, x: Tensor) -> bool:
        """Whether the last projection has a dtype of its own: T5's, in float32 beside 16-bit ones,
        is given what was cast to it. Autocast casts by itself."""
        if self.fastft_layout.dropout is None or autocast_dtype(x.device.type) is not None:
            return False
        weight = getattr(getattr(self, self.fastft_layout.down), "weight", None)
        return weight is None or weight.dtype != x.dtype

    def _tiles(self: Any, x: Tensor, tile: int) -> bool:
        """Whether this call is treated a tile at a time."""
        long = x.dim() > 1 and x.shape[:-1].numel() > tile
        if not long or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        layout = self.fastft_layout
        names = [name for name in (layout.gate, layout.up, layout.down) if name is not None]
        # In a mixed batch a layer asks which sample a row belongs to.
        return all(adapter_names_of(getattr(self, name), {}) is None for name in names)

    def _project(self: Any, x: Tensor, value: bool = True) -> Tensor:
        """value: whether the result itself is wanted, or only what its backward needs."""
        layout = self.fastft_layout
        hidden = getattr(self, layout.gate)(x)
        if layout.up is None:
            gate, up = hidden.chunk(2, dim=-1)
        else:
            gate, up = hidden, getattr(self, layout.up)(x)
        reason = call_refusal("glu", gate, up)
        self._count(reason)
        unit = functools.partial(ops.glu, activation=str(activation_of(self, layout)))
        if reason is None and not few_rows(self, gate):
            product = unit(gate, up)
        else:
            product = getattr(self, layout.activation)(gate) * up
        dropped = product if layout.dropout is None else getattr(self, layout.dropout)(product)
        down = getattr(self, layout.down)
        # A wrapper, or a hook, may look at the value, and call the layer again alone.
        own = isinstance(down, FusedLora) and "fastft_original" in vars(type(down))
        alone = own and not hooked(down)
        # Where nothing looks at the value after the product that makes it; DoRA's scale does.
        leaves_out = not value and alone and not down.lora_variant
        recorded = product.requires_grad and not torch.compiler.is_compiling()
        remakes = reason is None and alone and recorded and makes_again(gate)
        remakes = remakes and dropped is product
        with (
            without_values() if leaves_out else nullcontext(),
            remaking(product, (gate, up), unit) if remakes else nullcontext(),
        ):
            return down(dropped)

    def _count(self: Any, reason: str | None) -> None:
        if not torch.compiler.is_compiling():
            count(self, reason)
