"""Gated MLPs, fused between their projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.swap import Swapped, call_refusal

__all__ = ["FusedGatedMLP", "Layout", "activation_of", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """How a gated MLP names its parts: y = down(activation(gate(x)) * up(x)); with up None, gate
    gives both halves in one tensor."""

    gate: str
    up: str | None
    down: str
    activation: str


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    Layout("w1", "w3", "w2", "act_fn"),
    Layout("gate_up_proj", None, "down_proj", "activation_fn"),
)
_ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout whose parts are exactly what the module holds; a dropout more, and it is none."""
    if module._parameters or module._buffers:
        return None
    children = {name for name, _ in module.named_children()}
    for layout in LAYOUTS:
        parts = {layout.gate, layout.down, layout.activation}
        if layout.up is not None:
            parts.add(layout.up)
        if children == parts:
            return layout
    return None


def activation_of(module: nn.Module, layout: Layout) -> str | None:
    """The activation's name in ``fastft.ops.glu``, or None."""
    function = getattr(module, layout.activation)
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function))


class FusedGatedMLP(Swapped):
    """The forward of a gated MLP: its own projections, and one operation between them."""

    fastft_layout: Layout

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Projections and :func:`fastft.ops.glu`, or the original's forward, counted."""
        layout = self.fastft_layout
        activation = activation_of(self, layout)
        reason = None
        if len(args) != 1 or kwargs:
            reason = "arguments passed to the layer"
        elif activation is None:
            reason = "activation is neither SiLU nor GELU"
        else:
            hidden = getattr(self, layout.gate)(args[0])
            if layout.up is None:
                gate, up = hidden.chunk(2, dim=-1)
            else:
                gate, up = hidden, getattr(self, layout.up)(args[0])
            reason = call_refusal("glu", gate, up)
        if not torch.compiler.is_compiling():
            count(self, reason)
        down = getattr(self, layout.down)
        if reason is None and activation is not None:
            return down(ops.glu(gate, up, activation))
        if activation is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return down(getattr(self, layout.activation)(gate) * up)
