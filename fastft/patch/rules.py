"""What can be fused, as data: by what a module is and has, never by a model's name.

A rule finds its sites in a model and says of each why it cannot be fused, or None. ``accelerate``
applies rules, ``explain`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastft.nn.head import CausalLMLoss, FusedHead
from fastft.nn.lora import FusedLoraLinear, module_refusal

__all__ = ["RULES", "Rule", "Site", "causal_lm_of"]


@dataclass(frozen=True)
class Site:
    """A module a rule speaks of.

    Attributes:
        refusal: why it cannot be fused; None when it can.
        by_state: the refusal is about its present state (merged, disabled, another adapter), so
            it gets the fused class, which asks again at every call.
    """

    name: str
    module: nn.Module
    refusal: str | None
    by_state: bool = False


@dataclass(frozen=True)
class Rule:
    """One kind of fusion.

    Attributes:
        kind: its name, also the switch of ``accelerate``.
        fused: the class that fused modules have.
        original: the class they had.
        sites: the modules of a model it speaks of, fused already or not.
    """

    kind: str
    fused: type[nn.Module]
    original: type[nn.Module]
    sites: Callable[[nn.Module], Iterator[Site]]


def _lora_sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
            continue
        if type(module) in (PeftLinear, FusedLoraLinear):
            yield Site(name, module, module_refusal(module), by_state=True)
        else:
            yield Site(name, module, f"{type(module).__name__} layers are not fused")


def causal_lm_of(model: Any) -> Any:
    """The Transformers model with a head and a loss inside ``model``, or None."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    has_parts = hasattr(inner, "loss_function") and hasattr(inner, "get_output_embeddings")
    return inner if has_parts and inner.get_output_embeddings() is not None else None


def _head_refusal(owner: Any, head: nn.Module) -> str | None:
    loss = owner.loss_function
    if isinstance(head, LoraLayer):
        return "an adapter on the head needs the logits for its gradient"
    if type(head) not in (nn.Linear, FusedHead):
        return f"the head is a {type(head).__name__}, not nn.Linear"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "hooks on the head"
    if head.bias is not None and head.bias.requires_grad:
        return "the head's bias is trained"
    if getattr(owner.config, "is_encoder_decoder", False):
        return "encoder-decoder models compute their own loss"
    if loss is not ForCausalLMLoss and not isinstance(loss, CausalLMLoss):
        return f"the loss is {getattr(loss, '__name__', type(loss).__name__)}"
    scaled = [
        key
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if getattr(owner.config, key, None) not in (None, 1, 1.0)
    ]
    return f"the logits are transformed ({', '.join(scaled)})" if scaled else None


def _loss_sites(model: nn.Module) -> Iterator[Site]:
    owner = causal_lm_of(model)
    if owner is None:
        return
    head = owner.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), "lm_head")
    yield Site(name, head, _head_refusal(owner, head))


RULES: dict[str, Rule] = {
    rule.kind: rule
    for rule in (
        Rule("lora", FusedLoraLinear, PeftLinear, _lora_sites),
        Rule("loss", FusedHead, nn.Linear, _loss_sites),
    )
}
