"""Decoder layers whose parts are all fused, run as one node of autograd.

A layer is taken for ``x + attention(norm(x))`` and an MLP after it in the same way, with LoRA on
all seven projections, if its parts are there and nothing else; whether it computes that is tried
before it gets this forward (``fastft.patch.decoders``). A call in which anything is out of the
ordinary runs the layer's own code, whose parts are fused one by one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft import backends
from fastft.nn import siblings
from fastft.nn.attention import NAME, OPTIONS, FusedAttention, attention_forward
from fastft.nn.calls import count
from fastft.nn.lora import FusedLoraLinear
from fastft.nn.mixed import adapter_names_of
from fastft.nn.mlp import TILE, FusedGatedMLP, activation_of
from fastft.nn.norm import FusedRMSNorm, epsilon
from fastft.nn.plans import Parts, fits, plain_parts, suits
from fastft.nn.rope import FusedRope, RopeFacts, current_facts, names_of
from fastft.nn.rules import hooked, hooked_everywhere, parameter
from fastft.nn.swap import Swapped, original_of
from fastft.ops._checks import autocast_dtype
from fastft.ops._decoder_layer import GROUPS, Facts, Norm, decoder_layer
from fastft.ops._differentiable import transform
from fastft.ops._saving import noted, registered, saves_first

__all__ = [
    "ATTENTION_CHILDREN",
    "CHILDREN",
    "HEAD_NORMS",
    "FusedDecoderLayer",
    "Members",
    "backend_of",
    "members_of",
    "note_tried",
    "run",
    "served",
    "state_refusal",
]

CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
ATTENTION_CHILDREN = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTENTION = set(ATTENTION_CHILDREN)
HEAD_NORMS = ("q_norm", "k_norm")
# Arguments that make a call another one. What else there is, the layer's code passes on to its
# attention's, and that to fastft's, which does not look at it.
_OPTIONS = (*OPTIONS, "past_key_values", "dropout", "scaling")
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_PLAIN = (Tensor, nn.Parameter)
# Whose results o and down read: the heads of q, and the unit's.
_READS = {3: 0, 6: 5}


class Members(NamedTuple):
    """The parts of a decoder layer; norms: its two, and those of q's and k's heads where there are
    any; projections: q, k, v, o, gate, up, down."""

    norms: tuple[Any, ...]
    attention: Any
    mlp: Any
    projections: tuple[Any, ...]


def members_of(layer: nn.Module) -> Members | None:
    """The parts of a layer that has these and no others, each of a fused class."""
    children = layer._modules
    if layer._parameters or layer._buffers or children.keys() != set(CHILDREN):
        return None
    norm, attention, norm_2, mlp = (children[name] for name in CHILDREN)
    rotary = isinstance(attention, FusedRope) and isinstance(attention, FusedAttention)
    if not rotary or not isinstance(mlp, FusedGatedMLP):
        return None
    own, layout = attention._modules, mlp.fastft_layout
    if attention._parameters or attention._buffers or layout.up is None or layout.dropout:
        return None
    if own.keys() not in (_ATTENTION, _ATTENTION | set(HEAD_NORMS)):
        return None
    norms = (norm, norm_2, *[own[name] for name in HEAD_NORMS if name in own])
    if not all(isinstance(m, FusedRMSNorm) and not m.fastft_centred for m in norms):
        return None
    projections = [own[name] for name in ATTENTION_CHILDREN]
    projections += [mlp._modules[name] for name in (layout.gate, layout.up, layout.down)]
    if not all(isinstance(projection, FusedLoraLinear) for projection in projections):
        return None
    return Members(norms, attention, mlp, tuple(projections))


class FusedDecoderLayer(Swapped):
    """The forward of a decoder layer in one operation, where a call allows it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """:func:`fastft.ops._decoder_layer.decoder_layer`, or the layer's own code."""
        y = None if torch.compiler.is_compiling() else run(self, args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]


def run(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, trial: bool = False
) -> Tensor | None:
    """The layer's result in one operation; None where this call needs its own code.

    trial: whether layers that share an input run together yet, or not; else only from then on, so
    that one forward and its recompute are of one kind.
    """
    call = _call_of(args, kwargs)
    if call is None:
        return None
    x, tables, mask = call
    members = members_of(layer)
    if members is None or not (trial or _learnt(members)) or state_refusal(members) is not None:
        return None
    if not trial and not (_as_tried(layer) and _as_tried(members.attention)):
        return None
    found = _facts(members, x, tables, mask)
    if found is None:
        return None
    y = decoder_layer(*found)
    _count(layer, members)
    return y


def _call_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None] | None:
    """Hidden states, tables and mask of a call with nothing else in it, that records gradients and
    whose saved tensors nobody asks for."""
    x = args[0] if len(args) == 1 else None
    if type(x) is not Tensor or not torch.is_grad_enabled() or x.dim() != 3:
        return None
    if any(kwargs.get(name) is not None for name in _OPTIONS) or kwargs.get("output_attentions"):
        return None
    if transform() is not None or autocast_dtype(x.device.type) is not None:
        return None
    # A policy of activations, or a checkpoint, keeps and makes again what the parts save.
    if noted() or saves_first() or registered():
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    tables, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
    if not isinstance(tables, tuple) or len(tables) != 2 or not x.is_contiguous():
        return None
    batch, tokens, _ = x.shape
    if batch == 0 or tokens < 2 or not all(_is_table(t, x) for t in tables):
        return None
    forms = [(t.shape, t.stride(), t.dtype) for t in tables]
    if forms[0] != forms[1]:
        return None
    if mask is not None and not _is_mask(mask, x):
        return None
    return x, tables, mask


def _is_table(table: Any, x: Tensor) -> bool:
    return (
        type(table) is Tensor
        and table.dim() == 3
        and table.shape[0] in (1, x.shape[0])
        and table.shape[1] == x.shape[1]
        and table.stride(2) == 1
        and table.device == x.device
        and table.dtype in (x.dtype, torch.float32)
        and not table.requires_grad
    )


def _is_mask(mask: Any, x: Tensor) -> bool:
    batch, tokens, _ = x.shape
    return (
        type(mask) is Tensor
        and mask.dtype == torch.bool
        and mask.device == x.device
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2:] == (tokens, tokens)
        and mask.stride(3) == 1
    )


def _learnt(members: Members) -> bool:
    """Whether q, k and v run together by now, and gate and up."""
    for of in (GROUPS[0], GROUPS[2]):
        layers = members.projections[of]
        group = siblings.group_of(layers[0])
        if group is None or group.layers() != list(layers):
            return False
    return True


# The forwards of the classes that were tried, or for copies from elsewhere, first called.
_tried: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def _as_tried(module: nn.Module) -> bool:
    """Whether the forward of the module's own class is the one that was tried: others may have
    replaced it since."""
    own: Any = original_of(module)
    return _tried.setdefault(own, own.forward) is own.forward


def note_tried(layer: Any) -> None:
    """The forwards that a trial of ``layer`` ran gave what one operation gives."""
    for module in (layer, layer.self_attn):
        own: Any = original_of(module)
        _tried[own] = own.forward


def state_refusal(members: Members) -> str | None:
    """What in the state of the parts keeps one operation from standing for them, by now; None:
    nothing that is known before a call."""
    norms, attention, mlp, projections = members
    if not attention.training:  # a trial is of a layer in training
        return "it is not in training"
    if TILE in mlp.__dict__:
        return "its MLP runs in tiles"
    if hooked_everywhere(attention) or any(
        hooked(m) for m in (*norms, attention, mlp, *projections)
    ):
        return "a part has a hook"
    if any(adapter_names_of(m, {}) is not None for m in projections):
        return "adapters differ by sample"
    return None


def _facts(
    members: Members,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> tuple[Any, ...] | None:
    """The arguments of the operation, held against the rules of its parts; None where one of them
    applies."""
    turn = current_facts(type(members.attention))
    if turn is None or not (turn.narrow or tables[0].dtype == x.dtype):
        return None
    if not _asks_fastft(type(members.attention)):
        return None
    if turn.tables == "first half":
        tables = tuple(t[..., : t.shape[-1] // 2] for t in tables)  # type: ignore[assignment]
    attention = _attention(members.attention, turn, tables[0])
    activation = activation_of(members.mlp, members.mlp.fastft_layout)
    if attention is None or activation is None:
        return None
    width, scale, causal = attention
    norms = _norms(members, x, width)
    operands = _operands(members.projections, x, width)
    if norms is None or operands is None:
        return None
    parts, biases = operands
    weights, lora_as, lora_bs = zip(*[p.tensors() for p in parts], strict=True)
    backend = backend_of(x, lora_as[0].dtype)
    if backend is None:
        return None
    launcher: Any = backends.launcher("decoder_layer", backend)
    q, k, inner = (weights[i].shape[0] for i in (0, 1, 4))
    sizes = (*x.shape, q // width, k // width, width, inner)
    ps = tuple([p.dropout_p() for p in parts])
    ranks = [a.shape[0] for a in lora_as]
    groups, drops = [ranks[of] for of in GROUPS], [[p > 0 for p in ps[of]] for of in GROUPS]
    if not launcher.takes(sizes, groups, drops):
        return None
    facts = Facts(
        sizes, norms[0], scale, causal and mask is None, turn.interleaved, turn.tables != "whole",
        activation, tuple([float(p.scaling) for p in parts]), ps, launcher,
    )  # fmt: skip
    return facts, x, *tables, mask, norms[1], weights, biases, lora_as, lora_bs


def _asks_fastft(cls: Any) -> bool:
    """Whether the attention's code still gets fastft's from Transformers' interface."""
    interface = names_of(cls).get(_INTERFACE)
    found = getattr(interface, "get_interface", None)
    return found is not None and found(NAME, None) is attention_forward


def _attention(attention: Any, turn: RopeFacts, table: Tensor) -> tuple[int, float, bool] | None:
    """The width of its heads, the scale of its scores, and whether it is causal without a mask."""
    own = attention.__dict__
    width, scale, causal = own.get("head_dim"), own.get("scaling"), own.get("is_causal", True)
    if type(width) is not int or type(scale) is not float or type(causal) is not bool:
        return None
    if own["config"]._attn_implementation != "sdpa" or "attention_dropout" not in own:
        return None
    if attention.training and own["attention_dropout"]:
        return None
    rotary = table.shape[-1] * (1 if turn.tables == "whole" else 2)
    if rotary > width or rotary % 2 or (rotary < width and not turn.partial):
        return None
    return width, scale, causal


def _norms(members: Members, x: Tensor, width: int) -> tuple[tuple[Norm, ...], list[Tensor]] | None:
    constants, weights = [], []
    for i, norm in enumerate(members.norms):
        weight = parameter(norm, "weight")
        same = type(weight) in _PLAIN and weight.dtype == x.dtype and weight.device == x.device
        if not same or weight.requires_grad or not weight.is_contiguous():
            return None
        if weight.shape != (x.shape[-1] if i < 2 else width,):
            return None
        weights.append(weight)
        constants.append(Norm(epsilon(norm) or 0.0, norm.fastft_offset, norm.fastft_round_first))
    return tuple(constants), weights


def _operands(
    projections: Sequence[Any], x: Tensor, width: int
) -> tuple[list[Parts], list[Tensor | None]] | None:
    """The parts and biases of the projections, which fit each other."""
    found: list[Parts] = []
    biases = []
    for i, projection in enumerate(projections):
        plain = plain_parts(projection)
        if plain is None:
            return None
        parts = plain[1]
        weight = parts.tensors()[0]
        if not all(t.is_contiguous() for t in parts.tensors()):
            return None
        if type(parts.base) is not nn.Linear or not suits(x, parts, None):
            return None
        read = _READS.get(i)
        features = x.shape[-1] if read is None else found[read].tensors()[0].shape[0]
        bias = parameter(parts.base, "bias")
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        if not fits(x, parts, None, features):
            return None
        found.append(parts)
        biases.append(bias)
    if len({p.adapter()[0].dtype for p in found}) > 1:
        return None
    sizes = [p.tensors()[0].shape[0] for p in found]
    q, k, v, o, gate, up, down = sizes
    heads_fit = k > 0 and k == v and q % k == 0 and k % width == 0
    if not heads_fit or o != x.shape[-1] or down != o or gate != up:
        return None
    return found, biases


def backend_of(x: Tensor, adapter_dtype: torch.dtype) -> str | None:
    """Who runs layers of such tensors; None where nobody does."""
    return _backend(x.device.type, x.dtype, adapter_dtype)


def served(members: Members) -> tuple[str | None, str | None]:
    """Who runs layers of such parts; and where nobody does, None and why."""
    weight = members.projections[0].base_layer.weight
    adapter = next(members.projections[0].lora_A.parameters(), None)
    backend = None if adapter is None else backend_of(weight, adapter.dtype)
    if backend is not None:
        return backend, None
    return None, f"no backend runs {weight.dtype} on {weight.device.type} in one operation"


@functools.cache
def _backend(device_type: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    facts = {"device_type": device_type, "dtype": dtype, "adapter_dtype": adapter_dtype}
    reasons = dict(backends.explain_op("decoder_layer", **facts))
    # Whoever comes first on the device runs the parts: where that is Triton, interpreted, it is not
    # for another to run the whole.
    for name, backend in backends.BACKENDS.items():
        if backend.refuses_device(device_type) is None:
            return None if reasons[name] else name
    return None


def _count(layer: nn.Module, members: Members) -> None:
    """The calls of the parts, as if each had been made, and beside them the layer's."""
    count(layer, None, total=False)
    for module in (*members.norms, members.attention, *members.projections):
        count(module, None)
    count(members.attention, None, "rope")
    count(members.mlp, None)
