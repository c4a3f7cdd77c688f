"""What can be fused, as data: by what a module is and has, never by a model's name.

A rule finds its sites in a model and says of each which class it would get, or why none. Rules are
applied by ``accelerate`` and read by ``explain``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from fastft import backends
from fastft.nn import attention
from fastft.nn.conv import FUSED_CONVS, conv_refusal
from fastft.nn.embedding import (
    FusedEmbedding,
    FusedLoraEmbedding,
    embedding_refusal,
    table_refusal,
)
from fastft.nn.experts import FusedLoraExperts, experts_of, experts_refusal
from fastft.nn.head import FusedHead, FusedLoraHead, heads_in
from fastft.nn.lora import FusedLora, FusedLoraLinear
from fastft.nn.lora_product import FusedLoraProduct, fused_over
from fastft.nn.mlp import FusedGatedMLP, activation_of, layout_of
from fastft.nn.norm import (
    FusedLayerNorm,
    FusedRMSNorm,
    epsilon,
    layer_norm_offset,
    norm_facts,
)
from fastft.nn.quantized import dtype_of, is_4bit
from fastft.nn.rope import FusedRope, rope_facts, rotary_function
from fastft.nn.rules import hooked, unhooked
from fastft.nn.swap import Swapped, original_of, site_refusal, swapped_class
from fastft.patch import proofs

__all__ = ["RULES", "Rule", "Site", "language_model_of"]


@dataclass(frozen=True)
class Site:
    """A module a rule speaks of.

    Attributes:
        refusal: why it cannot be fused; None when it can.
        fused: the class it has, or would have, fused; None where there is none for it.
        by_state: the refusal is about its present state (merged, disabled, another adapter), so
            it gets the fused class, which asks again at every call.
    """

    name: str
    module: nn.Module
    refusal: str | None
    fused: type[nn.Module] | None = None
    by_state: bool = False


@dataclass(frozen=True)
class Rule:
    """One kind of fusion.

    Attributes:
        kind: its name, also the switch of ``accelerate``.
        sites: the modules of a model it speaks of, fused already or not.
        run: the module as a given class on a small random input: outputs and gradients.
        backend: who serves the module in the dtype of its weights.
        trained: verify in training mode; what a module draws is then the same on both sides.
    """

    kind: str
    sites: Callable[[nn.Module], Iterator[Site]]
    run: Callable[[Any, type[nn.Module]], list[Tensor]]
    backend: Callable[[Any], str]
    trained: bool = True


def _lora_sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
            continue
        fused = _fused_lora(module)
        if fused is not None:
            yield Site(name, module, fused.refusal(module), fused, by_state=True)
        elif not isinstance(module, ParamWrapper) and original_of(module) not in _OTHER_LAYERS:
            yield Site(name, module, f"{type(module).__name__} layers are not fused")


_OTHER_LAYERS = {*FUSED_CONVS, PeftEmbedding}


def _fused_lora(module: nn.Module) -> type[FusedLora] | None:
    """The fused class of PEFT's LoRA layer over a linear one, dense or quantized."""
    original = original_of(module)
    if original is PeftLinear:
        return FusedLoraLinear
    if (original.__module__, original.__name__) != ("peft.tuners.lora.bnb", "Linear4bit"):
        return fused_over(original)
    from fastft.nn.lora_4bit import FusedLora4bit  # PEFT's class imports bitsandbytes

    return FusedLora4bit


def _conv_sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        fused = FUSED_CONVS.get(original_of(module))
        if fused is not None:
            yield Site(name, module, conv_refusal(module), fused, by_state=True)


def _embedding_sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if original_of(module) is PeftEmbedding:
            refusal = embedding_refusal(module)
            yield Site(name, module, refusal, FusedLoraEmbedding, by_state=True)


def _table_sites(model: nn.Module) -> Iterator[Site]:
    """Embeddings that are trained themselves."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not module.weight.requires_grad:
            continue
        table: Any = module
        if original_of(module) is not nn.Embedding:  # one that scales its rows, or moves its ids
            yield Site(name, module, f"{type(module).__name__} is not nn.Embedding itself")
            continue
        reason = table_refusal(table) or site_refusal("embedding", table.weight)
        yield _swapped_site(name, table, FusedEmbedding, (), reason)


def _table_backend(module: Any) -> str:
    return _select("embedding", module.weight)


def _library(module: Any) -> str:
    """These are made of the library's own products, whatever the device."""
    return "torch"


def _lora_backend(module: Any) -> str:
    adapter = next(module.lora_A[n].weight for n in module.active_adapters if n in module.lora_A)
    dtype, device = adapter.dtype, adapter.device
    if not isinstance(module, FusedLoraProduct):
        dtype, device = dtype_of(module.base_layer), module.base_layer.weight.device
    if device.type == "meta":
        return "reference"
    return backends.select(
        "lora_linear",
        device_type=device.type,
        dtype=dtype if dtype.is_floating_point else torch.float32,
        adapter_dtype=adapter.dtype,
        r=adapter.shape[0],
    )[0]


def _experts_sites(model: nn.Module) -> Iterator[Site]:
    """The outermost wrapper of each module whose parameters have adapters."""
    inner = {id(m.base_layer) for m in model.modules() if isinstance(m, ParamWrapper)}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and id(module) not in inner:
            experts, _ = experts_of(module)
            known = hasattr(experts, "has_gate")  # another parameter never becomes one of these
            yield Site(name, module, experts_refusal(module), FusedLoraExperts, by_state=known)


def _experts_backend(module: Any) -> str:
    weight = proofs.float_parameter(experts_of(module)[0])
    adapter = next(module.lora_A[n].weight for n in module.active_adapters if n in module.lora_A)
    if weight is None or weight.device.type == "meta":
        return "reference"
    return backends.select(
        "lora_grouped_linear",
        device_type=weight.device.type,
        dtype=weight.dtype,
        adapter_dtype=adapter.dtype,
        r=adapter.shape[0] // module.num_experts,
    )[0]


def language_model_of(model: Any) -> Any:
    """The Transformers model with a head inside ``model``, or None."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings"):
        return None
    return inner if isinstance(inner.get_output_embeddings(), nn.Module) else None


def _head_refusal(head: Any) -> str | None:
    adapted = original_of(head) is PeftLinear
    frozen = head.base_layer if adapted else head
    if is_4bit(frozen) or not (adapted or type(head) in (nn.Linear, FusedHead)):
        refusal: str | None = f"the head is a {type(frozen).__name__}, not nn.Linear"
    else:
        refusal = FusedLora.refusal(head) if adapted else None
    return refusal or ("hooks on the head" if hooked(head) else None)


def _loss_sites(model: nn.Module) -> Iterator[Site]:
    owner = language_model_of(model)
    if owner is None:
        return
    whole = owner.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is whole), "lm_head")
    around = "hooks on the head" if hooked(whole) else None
    for part, head in heads_in(whole).items():
        fused = FusedLoraHead if original_of(head) is PeftLinear else FusedHead
        yield Site(name + part, head, _head_refusal(head) or around, fused)


def _loss_backend(head: Any) -> str:
    weight = head.weight
    return backends.select(
        "linear_cross_entropy", device_type=weight.device.type, dtype=weight.dtype
    )[0]


def _swapped_site(
    name: str,
    module: nn.Module,
    mixin: type[Swapped],
    facts: tuple[tuple[str, Any], ...],
    refusal: str | None,
) -> Site:
    if refusal is None and "forward" in vars(module):
        refusal = "forward replaced on the module itself"
    fused = swapped_class(mixin, original_of(module), facts)  # type: ignore[arg-type]
    return Site(name, module, refusal, fused)


def _is_norm(module: nn.Module) -> bool:
    """One weight vector, an epsilon, nothing else."""
    own = dict(module.named_parameters())
    return (
        set(own) == {"weight"}
        and own["weight"].dim() == 1
        and epsilon(module) is not None
        and not list(module.children())
        and not isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
    )


def _norm_sites(model: nn.Module) -> Iterator[Site]:
    known: dict[tuple[Any, ...], tuple[tuple[str, Any], ...] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            yield from _layer_norm_site(name, module)
        if not _is_norm(module):
            continue
        weight: Any = module.weight
        if issubclass(type(module), FusedRMSNorm):
            yield Site(name, module, None, type(module))
            continue
        if not proofs.verifiable(module) and not weight.is_meta:
            yield Site(name, module, "its weight is not here to try it with (meta, sharded)")
            continue
        refusal = site_refusal("rms_norm", weight)
        if refusal is not None:
            yield Site(name, module, refusal)
            continue
        key = (type(module), weight.shape, weight.dtype, weight.device, epsilon(module))
        if key not in known:
            try:
                with unhooked(module):
                    known[key] = norm_facts(module)
            except Exception:  # it takes more than one tensor: a gated norm
                known[key] = None
        facts = known[key]
        if facts is None:
            yield Site(name, module, f"{type(module).__name__} computes no RMS norm we know")
        else:
            yield _swapped_site(name, module, FusedRMSNorm, facts, None)


def _layer_norm_site(name: str, module: nn.LayerNorm) -> Iterator[Site]:
    """A layer norm over the last dimension, if any of it is here to try it with."""
    if not proofs.verifiable(module) or len(module.normalized_shape) != 1:
        return
    refusal = site_refusal("layer_norm", module.weight)
    with unhooked(module):
        offset = layer_norm_offset(module) if refusal is None else None
    if refusal is None and offset is None:
        refusal = f"{type(module).__name__} computes no layer norm we know"
    yield _swapped_site(name, module, FusedLayerNorm, (("fastft_offset", offset or 0.0),), refusal)


def _norm_backend(module: Any) -> str:
    centred = isinstance(module, nn.LayerNorm) or getattr(module, "fastft_centred", False)
    return _select("layer_norm" if centred else "rms_norm", module.weight)


def _glu_sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is None:
            continue
        refusal = None
        if activation_of(module, layout) is None:
            refusal = f"activation is {type(getattr(module, layout.activation)).__name__}"
        weight = proofs.float_parameter(module)
        if refusal is None and weight is not None:
            refusal = site_refusal("glu", weight)
        yield _swapped_site(name, module, FusedGatedMLP, (("fastft_layout", layout),), refusal)


def _glu_backend(module: Any) -> str:
    weight = proofs.float_parameter(module)
    return "reference" if weight is None else _select("glu", weight)


def _attention_sites(model: nn.Module) -> Iterator[Site]:
    """Modules that call Transformers' attention interface, where fastft has one, or where torch's
    own is the best there is, of one sequence at a time; elsewhere nothing is said."""
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        original: Any = original_of(module)
        code = getattr(inspect.unwrap(original.forward), "__code__", None)
        if config is None or "ALL_ATTENTION_FUNCTIONS" not in getattr(code, "co_names", ()):
            continue
        weight = proofs.float_parameter(module)
        if weight is None:
            continue
        implementation = getattr(config, "_attn_implementation", None)
        asks = attention.asks_for_sdpa(original)
        if attention.librarys(weight.device):
            if implementation == "sdpa" and not asks:
                yield _swapped_site(name, module, attention.FusedAttention, (), None)
            continue
        if site_refusal("attention", weight) is not None:
            continue
        refusal = None
        if implementation != "sdpa":
            refusal = f"attention implementation is {implementation}, not sdpa"
        elif code is not None and "position_bias" in code.co_varnames:  # T5's, in every call
            refusal = "position_bias in attention"
        elif asks:
            refusal = "its code has a way of its own for sdpa"
        yield _swapped_site(name, module, attention.FusedAttention, (), refusal)


def _attention_backend(module: Any) -> str:
    weight = proofs.float_parameter(module)
    if weight is not None and attention.librarys(weight.device):
        return "torch"
    return "reference" if weight is None else _select("attention", weight)


def _rope_sites(model: nn.Module) -> Iterator[Site]:
    """Modules whose forward calls a function of (q, k, cos, sin)."""
    for name, module in model.named_modules():
        cls: Any = original_of(module)
        called = rotary_function(cls)
        weight = proofs.float_parameter(module)
        if called is None or weight is None or site_refusal("rope", weight) is not None:
            continue
        facts = rope_facts(cls)
        if facts is None:
            yield Site(name, module, f"{called} computes no rotary embedding we know")
        else:
            yield _swapped_site(name, module, FusedRope, (("fastft_rope", facts),), None)


def _rope_backend(module: Any) -> str:
    weight = proofs.float_parameter(module)
    return "reference" if weight is None else _select("rope", weight)


def _select(op: str, tensor: Tensor) -> str:
    return backends.select(op, device_type=tensor.device.type, dtype=tensor.dtype)[0]


RULES: dict[str, Rule] = {
    rule.kind: rule
    for rule in (
        # Dropout masks of PEFT and of fastft differ: verified without.
        Rule("lora", _lora_sites, proofs.run_lora, _lora_backend, trained=False),
        Rule("conv", _conv_sites, proofs.run_conv, _library, trained=False),
        Rule("embedding", _embedding_sites, proofs.run_embedding, _library),
        Rule("table", _table_sites, proofs.run_table, _table_backend),
        Rule("experts", _experts_sites, proofs.run_experts, _experts_backend),
        Rule("loss", _loss_sites, proofs.run_head, _loss_backend),
        Rule("norm", _norm_sites, proofs.run_norm, _norm_backend),
        Rule("glu", _glu_sites, proofs.run_mlp, _glu_backend),
        Rule("attention", _attention_sites, proofs.run_attention, _attention_backend),
        Rule("rope", _rope_sites, proofs.run_rope, _rope_backend),
    )
}
