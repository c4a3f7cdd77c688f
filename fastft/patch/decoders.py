"""Decoder layers that run as one operation: found by their parts and the names in their code, and
proved by trying.

What a layer does with its parts is its code's matter: a scale of the residual, a clamp, a scale of
queries far along. Code that says more than Llama's is left alone, by the names it uses. The rest is
tried: once through its own code, whose parts are fused, and once as one operation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastft.nn import decoder
from fastft.nn.decoder import (
    ATTENTION_CHILDREN,
    CHILDREN,
    HEAD_NORMS,
    FusedDecoderLayer,
    Members,
    members_of,
    note_tried,
    served,
)
from fastft.nn.swap import become, original_of, swapped_class
from fastft.patch.proofs import difference, site_key, tolerance, verifiable

__all__ = ["fuse_layers"]

# As many rows as a layer in one operation has at least: its parts run the same kernels from there
# on, and the two differ by sums of siblings alone. Of other kernels' rounding a trained model's
# scores, far apart, would make a fifth.
_BATCH, _TOKENS = 2, 256
# Such sums: of gate and up, which attention's backward reads, and of q, k and v.
_SUMS = 2
_HIDDEN = 70  # padding of the first sample

_OF_LAYERS = frozenset(CHILDREN)
_OF_ATTENTION = frozenset({
    *ATTENTION_CHILDREN, *HEAD_NORMS, "ALL_ATTENTION_FUNCTIONS", "_attn_implementation",
    "attention_dropout", "config", "contiguous", "eager_attention_forward", "get_interface",
    "getattr", "head_dim", "layer_idx", "reshape", "scaling", "shape", "size", "sliding_window",
    "training", "transpose", "update", "view",
})  # fmt: skip


def fuse_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Gives the decoder layers in ``model``, whose parts are fused, their forward in one; those
    that do not get it, and why."""
    refused: dict[nn.Module, str] = {}
    proofs: dict[tuple[Any, ...], str | None] = {}
    for module in list(model.modules()):
        members = members_of(module)
        if members is None or original_of(module) is not type(module):
            continue
        reason = _refusal(module, members)
        if reason is None:
            key = _key(module, members)
            if key not in proofs:
                proofs[key] = _disproof(module, members)
            reason = proofs[key]
        if reason is not None:
            refused[module] = reason
            continue
        note_tried(module)
        original: Any = type(module)
        become(module, swapped_class(FusedDecoderLayer, original))
    return refused


def _refusal(layer: nn.Module, members: Members) -> str | None:
    """Why the layer is not even tried."""
    backend, reason = served(members)
    if backend is None:
        return reason
    if "forward" in vars(layer) or not verifiable(layer):
        return "its parameters are not all in memory, or its forward is not its class's"
    modules = [m for _, m in layer.named_modules(remove_duplicate=False)]
    if len(set(modules)) < len(modules):  # functional_call would not find all its places again
        return "a module stands in two places"
    turns = members.attention.fastft_rope.name
    more = _names(original_of(layer)) - _OF_LAYERS
    more |= _names(original_of(members.attention)) - _OF_ATTENTION - {turns}
    return f"its code says more than Llama's: {', '.join(sorted(more))}" if more else None


def _names(cls: Any) -> set[str]:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return {"?"} if code is None else set(code.co_names)


def _key(layer: nn.Module, members: Members) -> tuple[Any, ...]:
    """Layers of equal keys run the same code on the same shapes."""
    kinds = tuple(type(m) for m in layer.modules())
    values = tuple(
        (name, value)
        for m in (layer, members.attention, members.mlp, *members.norms)
        for name, value in vars(m).items()
        if name != "layer_idx" and isinstance(value, (int, float, str))
    )
    return (*kinds, *values, *site_key(layer))


def _disproof(layer: nn.Module, members: Members) -> str | None:
    """Why one operation does not stand for the layer's own code; None where it gives what that
    does, with a mask and without."""
    bound = _SUMS * tolerance(layer)
    try:
        with _as_any_layer(layer, members):
            for mask in _masks(members):
                run = functools.partial(_results, members, mask)
                found = difference(layer, run, _Whole, trained=True)
                if not found <= bound:
                    return f"verification: relative difference {found:.2e} above {bound:.2e}"
    except Exception as error:  # a layer that is called in another way
        return f"verification failed: {type(error).__name__}: {error}"
    return None


class _Index:
    """In the place of a layer's index, which is for a cache's use alone: whoever looks at it is
    found out, for one trial speaks for layers of every index."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("its code looks at the layer's index")

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __index__ = __int__ = __hash__ = _refuse


@contextmanager
def _as_any_layer(layer: nn.Module, members: Members) -> Iterator[None]:
    """Without the layer's index, and without Transformers' checkpointing, which would run it again
    when its own weights are back."""
    places = [(vars(m), n) for m in (layer, members.attention)
              for n in ("layer_idx", "gradient_checkpointing") if n in vars(m)]  # fmt: skip
    before = [own[name] for own, name in places]
    try:
        for own, name in places:
            own[name] = _Index() if name == "layer_idx" else False
        yield
    finally:
        for (own, name), value in zip(places, before, strict=True):
            own[name] = value


def _masks(members: Members) -> Iterator[Tensor | None]:
    """None, and one of a batch whose first sample is padded on the left."""
    yield None
    mask = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).tril().repeat(_BATCH, 1, 1, 1)
    mask[0, :, :, :_HIDDEN] = False
    yield mask.to(members.norms[0].weight.device)


def _results(
    members: Members, mask: Tensor | None, layer: Any, kind: type[nn.Module]
) -> list[Tensor]:
    """Result and gradients, of x and the adapters, of the layer or, as a ``_Whole``, of it in one
    operation; with random adapters and norms: with weights of one, before a rotation or after it is
    the same for a norm."""
    weight = members.projections[0].base_layer.weight
    device, dtype = weight.device, weight.dtype

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(device, like)

    adapters = {
        name: draw(*p.shape, like=p.dtype).requires_grad_()
        for name, p in layer.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    x = (draw(_BATCH, _TOKENS, weight.shape[1]) * 4).requires_grad_()
    angles = torch.rand(1, _TOKENS, members.attention.head_dim // 2).repeat(1, 1, 2) * 6
    given: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": torch.arange(_TOKENS, device=device)[None],
        "position_embeddings": tuple(t.to(device, dtype) for t in (angles.cos(), angles.sin())),
        "past_key_values": None,
        "use_cache": False,
    }
    whole, prefix = (_Whole(layer), "layer.") if kind is _Whole else (layer, "")
    norms = {
        name: draw(*p.shape) * p.shape[0] ** 0.5
        for name, p in layer.named_parameters()
        if p.dim() == 1 and name.endswith("norm.weight")
    }
    parameters = {prefix + name: p for name, p in (adapters | norms).items()}
    y = functional_call(whole, parameters, (x,), given)
    leaves = [x, *adapters.values()]
    found = torch.autograd.grad(y, leaves, draw(*y.shape), allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if t is None else t for t in found)]


class _Whole(nn.Module):
    """The layer as one operation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = decoder.run(self.layer, args, kwargs, trial=True)
        if y is None:
            raise TypeError("a part of the layer cannot run in one operation")
        return y
