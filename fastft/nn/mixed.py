"""Mixed batches: each sample of a batch through an adapter of its own, in training too.

PEFT takes ``adapter_names=`` at inference only. :func:`mixed_batch` routes a whole model for as
long as it is open, so the loss, its backward and a recompute under activation checkpointing all
see the same adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from fastft.errors import ArgumentError
from fastft.nn.swap import original_of

__all__ = ["BASE", "adapter_names_of", "mixed_batch"]

# PEFT's name for "no adapter".
BASE = "__base__"
_ATTRIBUTE = "fastft_adapter_names"


def adapter_names_of(layer: nn.Module, kwargs: dict[str, Any]) -> Sequence[str] | None:
    """The adapter of each sample: PEFT's argument, else that of the open :func:`mixed_batch`."""
    given: Sequence[str] | None = kwargs.get("adapter_names")
    return layer.__dict__.get(_ATTRIBUTE) if given is None else given


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside, sample i of every batch goes through the adapter ``adapter_names[i]``.

    Args:
        model: a model with PEFT LoRA layers, accelerated or not, in training or not. Adapters
            that are to be trained must be active, for PEFT freezes the others:
            ``model.base_model.set_adapter([...])``.
        adapter_names: one name a sample, as long as the batch; "__base__" for the base model
            alone. Samples of one adapter that lie together run as one.

    Under activation checkpointing the backward belongs inside as well.

    Raises:
        ArgumentError: no names, or an adapter the model does not have.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown or not adapter_names:
        raise ArgumentError(
            "fastft.mixed_batch",
            "adapter_names",
            expected=f"names of the model's adapters: {', '.join(sorted(known)) or 'it has none'}",
            got=", ".join(map(repr, unknown)) or "none",
        )
    names = list(adapter_names)
    hook = partial(_pass_names, names=names)
    handles, before = [], []
    for module in model.modules():
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            if original_of(module) is not type(module):  # fused: the layer itself asks
                before.append((module, module.__dict__.get(_ATTRIBUTE)))
                module.__dict__[_ATTRIBUTE] = names
            else:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, outer in before:
            if outer is None:
                module.__dict__.pop(_ATTRIBUTE, None)
            else:
                module.__dict__[_ATTRIBUTE] = outer


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], *, names: list[str]) -> Any:
    kwargs["adapter_names"] = names
    return args, kwargs
