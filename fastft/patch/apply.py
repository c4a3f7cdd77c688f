"""``accelerate`` and ``restore``: fused forwards into a model and out again, in place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from fastft import memory, native
from fastft.errors import ArgumentError, DtypeError, VerificationError, nearest
from fastft.nn import head as head_module
from fastft.nn import packing, positions, siblings
from fastft.nn.calls import strict_modules
from fastft.nn.experts import FusedLoraExperts, InnerLoraExperts, experts_of
from fastft.nn.head import FusedHead, FusedLoraHead
from fastft.nn.lora import FusedLora, forget_norms
from fastft.nn.quantized import unpack_all
from fastft.nn.swap import Swapped, become, combined_class, original_of
from fastft.nn.unmerged import UNMERGED
from fastft.ops import _room
from fastft.patch.decoders import fuse_layers
from fastft.patch.proofs import difference, site_key, tolerance, verifiable
from fastft.patch.rules import RULES, Rule, Site, language_model_of

__all__ = ["accelerate", "lora", "restore"]

_HOOKS = (
    siblings.begin_forward,
    siblings.end_forward,
    head_module.begin_forward,
    head_module.end_forward,
    positions.begin_forward,
    positions.end_forward,
)


# Kinds that are switched together with another.
_SWITCHES = {"conv": "lora", "experts": "lora", "table": "embedding"}

# Why a rule left a module of an accelerated model alone, by its kind, for explain().
refusals: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def is_accelerated(model: nn.Module) -> bool:
    """Whether :func:`accelerate` was called on this model (or on the one it was copied from)."""
    return siblings.begin_forward in model._forward_pre_hooks.values()


def accelerate(
    model: nn.Module,
    lora: bool = True,
    loss: bool = True,
    norm: bool = True,
    glu: bool = True,
    attention: bool = True,
    rope: bool = True,
    embedding: bool = True,
    layer: bool = True,
    *,
    pack_weights: bool = False,
    strict: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Gives the modules of ``model`` fused forwards, in place; the model stays what it is.

    Args:
        model: a PeftModel, or any torch model with PEFT LoRA layers in it.
        lora: fuse LoRA layers over ``nn.Linear`` (:func:`fastft.ops.lora_linear`), over weights
            that another package multiplies with (:func:`fastft.ops.lora_add`), over the expert
            weights of a mixture (:func:`fastft.ops.lora_grouped_linear`) and over convolutions.
        loss: fuse a Transformers language model's head and the loss over it
            (:func:`fastft.ops.linear_cross_entropy`), that of TRL's trainers too; logits are
            computed only if read.
        norm: fuse RMS and layer norms, whose convention is found by running them
            (:func:`fastft.ops.rms_norm`, :func:`fastft.ops.layer_norm`).
        glu: fuse gated MLPs between their projections (:func:`fastft.ops.glu`).
        attention: in Transformers models that use sdpa, fuse attention on the CPU
            (:func:`fastft.ops.scaled_dot_product_attention`), and on GPUs run torch's for each
            sequence by itself where a batch without padding has several.
        rope: fuse the rotary embedding of queries and keys (:func:`fastft.ops.rope`), whose
            convention is found by running it.
        embedding: fuse LoRA layers over embeddings, and embeddings that are trained themselves
            (:func:`fastft.ops.embedding`).
        layer: on CPUs that multiply bfloat16 in vectors, run a decoder layer whose parts are all
            fused as one operation, with the bits of its parts, from the second step on. Each kind
            of layer is tried first, whatever ``verify``.
        pack_weights: on GPUs, before the second step, copy the frozen weights of layers that share
            an input (q/k/v, gate/up) into one buffer with room for their adapters, so that a layer
            and its adapter can be one library product. The parameters become views of it, its rows
            padded to 128 bytes: 2.4% more memory for q/k/v of Llama-3-8B at rank 16. ``restore``,
            merging and moving the model undo it; call ``restore`` before saving the base model,
            sharding it or taking PEFT's layers out without merging. Compiled models are not packed.
        strict: raise where a module or a call cannot be fused, instead of running PEFT's own code.
        verify: run each distinct site once on a small random input, output and gradients, beside
            what it replaces; one that differs by more than rounding is not replaced.

    Returns:
        ``model`` itself.

    Parameters (but for ``pack_weights``), buffers, state-dict keys, hooks and saving are untouched.
    On the CPU large results of fused operations come from a pool, which hands a block out again
    when it comes back, and with glibc the process is told to keep freed memory (mallopt): both
    spare a page fault for every 4 KiB of every large tensor. :func:`restore` empties the pool.
    :func:`fastft.explain` says what was done.

    Raises:
        DtypeError: ``model`` is no torch module.
        ArgumentError: it was accelerated already.
        VerificationError: with ``strict``, a site that cannot be fused or did not verify.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(
            "fastft.accelerate", "model", expected="a torch.nn.Module", got=type(model).__name__
        )
    if is_accelerated(model):
        raise ArgumentError(
            "fastft.accelerate",
            "model",
            expected="a model that is not accelerated",
            got="one that is",
            remedy="Call fastft.restore(model) first.",
        )
    switches = {
        "lora": lora,
        "conv": lora,
        "embedding": lora and embedding,
        "table": embedding,
        "experts": lora,
        "loss": loss,
        "norm": norm,
        "glu": glu,
        "attention": attention,
        "rope": rope,
    }
    unpack_all(model)  # what is verified has gradients
    planned: list[Site] = []
    refused: dict[nn.Module, dict[str, str]] = {}
    proofs: dict[tuple[Any, ...], str | None] = {}
    for kind, rule in RULES.items():
        for site in rule.sites(model) if switches[kind] else ():
            reason = site.refusal
            if reason is None and verify and verifiable(site.module):
                key = (kind, site.fused, *site_key(site.module))
                if key not in proofs:
                    proofs[key] = _disproof(site, rule)
                reason = proofs[key]
            if reason is not None and strict:
                raise VerificationError(
                    "fastft.accelerate (strict=True)",
                    site.name,
                    expected="a module that can be fused",
                    got=reason,
                    remedy="Use strict=False to leave it as it is, or "
                    f"{_SWITCHES.get(kind, kind)}=False.",
                )
            if reason is None or (site.refusal is not None and site.by_state):
                planned.append(site)
            else:
                refused.setdefault(site.module, {})[kind] = reason

    # Everything above only looked; from here on nothing can fail half way.
    refusals.update(refused)
    for site in planned:
        if site.fused is None:
            continue
        become(site.module, _joined(site))
        if strict:
            strict_modules.add(site.module)
        if issubclass(site.fused, FusedLoraExperts):
            for wrapper in experts_of(site.module)[1].values():
                if wrapper is not site.module:
                    become(wrapper, InnerLoraExperts)
        if issubclass(site.fused, (FusedHead, FusedLoraHead)):
            _attach_head(language_model_of(model))
    if layer:
        for module, reason in fuse_layers(model).items():
            refusals.setdefault(module, {})["layer"] = reason
    if pack_weights:
        packing.wanted.add(model)
    model.register_forward_pre_hook(siblings.begin_forward, prepend=True)
    model.register_forward_hook(siblings.end_forward, always_call=True)
    positions.install()
    model.register_forward_pre_hook(positions.begin_forward, with_kwargs=True)
    model.register_forward_hook(positions.end_forward, always_call=True)
    if native.available() and any(p.device.type == "cpu" for p in model.parameters()):
        native.module().keep_heap()
        _room.use_pool(True)
    return model


def _joined(site: Site) -> type[nn.Module]:
    """The class a site gets: what another rule gave the module (attention and its rotary function)
    stays in force."""
    present: Any = type(site.module)
    fused: Any = site.fused or present
    if issubclass(present, fused):  # of a base that was accelerated before it got its adapters
        return present  # type: ignore[no-any-return]
    if issubclass(fused, Swapped) and issubclass(present, Swapped):
        return combined_class(present, fused)
    return fused  # type: ignore[no-any-return]


def _disproof(site: Site, rule: Rule) -> str | None:
    """Why the fused module must not replace this one; None when it may."""
    module = site.module
    try:
        found = difference(module, rule.run, site.fused or type(module), trained=rule.trained)
    except Exception as error:
        return f"verification failed: {type(error).__name__}: {error}"
    bound = tolerance(module)
    if found <= bound:
        return None
    return f"verification: relative difference {found:.2e} above {bound:.2e}"


def _attach_head(owner: Any) -> None:
    """The hooks that make a language model's head defer: once, whatever copies the head has."""
    if head_module.begin_forward in owner._forward_pre_hooks.values():
        return
    owner.register_forward_pre_hook(head_module.begin_forward, with_kwargs=True)
    owner.register_forward_hook(head_module.end_forward, always_call=True)


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`accelerate`: classes and hooks are what they were, bit for bit.

    It reads the model, not a record of it, so a deep copy of an accelerated model restores too, and
    what PEFT's ``unload`` or ``merge_and_unload`` left of one.

    Raises:
        ArgumentError: the model is not accelerated.
    """
    if not any(_touched(module) for module in model.modules()):
        raise ArgumentError(
            "fastft.restore",
            "model",
            expected="a model that fastft.accelerate was called on",
            got="one that is not accelerated",
        )
    siblings.forget(model)
    memory.restore(model)
    unpack_all(model)
    for module in model.modules():
        original = original_of(module)
        if type(module) is not original:
            if isinstance(module, FusedLora):
                forget_norms([module])
            become(module, original)
            module.__dict__.pop(UNMERGED, None)
            strict_modules.discard(module)
        refusals.pop(module, None)
        _remove_hooks(module)
    _room.trim()
    return model


def _touched(module: nn.Module) -> bool:
    """Whether a module has a fused class, or a hook of ours."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return type(module) is not original_of(module) or any(hook in _HOOKS for hook in hooks)


def _remove_hooks(module: nn.Module) -> None:
    tables: tuple[tuple[Any, ...], ...] = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ),
    )
    for hooks, *flags in tables:
        for key in [k for k, hook in hooks.items() if hook in _HOOKS]:
            for table in (hooks, *flags):
                table.pop(key, None)


def lora(
    model: nn.Module, config: Any, adapter_name: str = "default", **accelerate_options: bool
) -> Any:
    """``peft.get_peft_model`` and :func:`accelerate` in one call.

    Args:
        model: the base model.
        config: a ``peft.LoraConfig``.
        adapter_name: the adapter's name.
        accelerate_options: arguments of :func:`accelerate`.

    Returns:
        a ``PeftModel`` with fused layers.

    Raises:
        DtypeError: ``config`` is no LoraConfig.
        ArgumentError: r < 1, or target modules the model does not have; the message lists those
            it has and the nearest names.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(config, LoraConfig):
        raise DtypeError(
            "fastft.lora", "config", expected="a peft.LoraConfig", got=type(config).__name__
        )
    if config.r < 1:
        raise ArgumentError("fastft.lora", "r", expected="at least 1", got=str(config.r))
    _check_targets(model, config.target_modules)
    return accelerate(get_peft_model(model, config, adapter_name), **accelerate_options)


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Refuses a list of target modules of which some match nothing."""
    if not isinstance(targets, (list, set, tuple)):
        return  # a regular expression, "all-linear" or PEFT's default for the architecture
    names = [name for name, _ in model.named_modules() if name]
    leaves = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_target(m)})
    for target in sorted(targets):
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        guess = nearest(target, leaves)
        raise ArgumentError(
            "fastft.lora",
            "target_modules",
            expected=f"names of modules in the model: {', '.join(leaves)}",
            got=repr(target),
            remedy=guess[0].upper() + guess[1:] if guess else None,
        )


def _is_target(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() >= 2 and not list(module.children())
