"""A gated unit's backward and the thin products of the LoRA layers before it, as one pass.

gate and up of SwiGLU come, mostly, from two LoRA layers that ran as one call. That call's node of
the autograd graph is found from the tensors themselves; where its backend has a ``glu_bwd``, the
unit's backward makes the gradients of gate and up and of each adapter dS and dB, and leaves them
with that node, whose own backward comes next. There they count only if what autograd hands over is
the very gradients left: whoever else used gate or up, or hooked them, made others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import backends
from fastft.ops._lora_linear_autograd import Left, LoraLinear, identity, saved_of
from fastft.ops._lora_linear_call import cast

__all__ = ["backward", "producer"]


class Producer(NamedTuple):
    """The call that made gate and up: its node, and whether gate is its first result."""

    node: Any
    gate_first: bool


def producer(gate: Tensor, up: Tensor, backend: str) -> Producer | None:
    """The LoRA call of this backend whose two results these are; None where there is none, or the
    backend makes no pair. The planner's tensors look at the operations apart."""
    if gate.device.type == "meta" or not _has_pair(backend):
        return None
    first, second = _origin(gate), _origin(up)
    if first is None or second is None or first[0] is not second[0]:
        return None
    node, places = first[0], (first[1], second[1])
    constants = node.constants
    if constants.backend != backend:
        return None
    rows = gate.numel() // max(gate.shape[-1], 1)
    plain = constants.owners == [0, 1] and constants.spans == [0, rows] * 2
    if constants.layers != 2 or constants.scaled or not plain or sorted(places) != [0, 1]:
        return None
    return Producer(node, places[0] == 0)


@functools.cache
def _has_pair(backend: str) -> bool:
    return hasattr(backends.launcher("lora_linear", backend), "glu_bwd")


def _origin(tensor: Tensor) -> tuple[Any, int] | None:
    """The node of a LoRA call, and which of its results the tensor is, maybe in another shape."""
    node, place = tensor.grad_fn, tensor.output_nr
    if node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node, place = node.next_functions[0]
    return (node, place) if getattr(node, "_forward_cls", None) is LoraLinear else None


def _comes(node: Any) -> bool:
    """Whether this backward goes on to the node's own. torch's answer is yes also where it ends at
    the node's results, whose gradients are asked for: then none of what comes after it is run."""
    will: Any = torch._C._will_engine_execute_node  # type: ignore[attr-defined]
    if not will(node):
        return False
    for after, _ in node.next_functions:
        try:
            if after is not None and will(after):
                return True
        except RuntimeError:  # it does not answer for a leaf whose gradient is asked for
            return True
    return False


def backward(
    found: Producer, d_out: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor] | None:
    """The gradients of gate and up, with more left at the node; None where it cannot or would not
    pay, or where the node's own backward does not come."""
    node, constants = found.node, found.node.constants
    _, _, _, need_b, *_ = constants.split(node.needs_input_grad[3:])
    if not node.needs_input_grad[2] or not all(need_b):
        return None
    if gate.numel() == 0 or not _comes(node):
        return None
    saved = saved_of(node)
    x, tensors = saved
    weights, _, lora_as, lora_bs, masks, _, ss, _ = constants.split(tensors)
    columns = gate.shape[-1]
    launcher: Any = backends.launcher("lora_linear", constants.backend)
    made = launcher.glu_bwd(
        d_out.reshape(-1, columns).contiguous(),
        gate.reshape(-1, columns),
        up.reshape(-1, columns),
        x,
        list(ss),
        cast(weights, x.dtype),
        list(lora_as),
        list(lora_bs),
        list(constants.scalings),
        list(masks),
        gate_first=found.gate_first,
        activation=activation,
    )
    if made is None:
        node.left = Left(saved, None, [])
        return None
    node.left = Left(saved, made, [identity(dy) for dy in made.dys])
    d_gate, d_up = made.dys if found.gate_first else reversed(made.dys)
    return d_gate.view(gate.shape), d_up.view(up.shape)
