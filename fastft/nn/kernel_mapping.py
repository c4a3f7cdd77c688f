"""fastft's norms and rotary embeddings through Hugging Face's own door, the ``kernels`` package."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.nn.norm import Convention, epsilon, norm_facts, normed
from fastft.nn.rope import facts_of, fused_rope
from fastft.nn.swap import call_refusal

__all__ = ["kernel_mapping"]


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """A mapping for ``kernels.use_kernel_mapping``: RMS norms and rotary embeddings of any
    Transformers model, with or without adapters, on CUDA devices and CPUs::

        from kernels import Mode, kernelize, use_kernel_mapping

        with use_kernel_mapping(fastft.nn.kernel_mapping()):
            kernelize(model, mode=Mode.TRAINING)

    What a model's class computes is found by trying it, as in :func:`fastft.accelerate`; a call
    that no backend serves runs the class's own code, and so does a model that is kernelized for
    torch.compile. ``model.set_use_kernels`` would put Transformers' own mapping over this one.
    ``fastft.accelerate`` fuses more, and needs no other package.

    Returns:
        {layer: {device type: repository}}, of kernels 0.16 and newer.
    """
    layers = {"RMSNorm": RMSNorm, "rotary_pos_emb": RotaryEmbedding}
    return {
        name: dict.fromkeys(("cuda", "cpu"), _Repository(layer)) for name, layer in layers.items()
    }


@dataclass(frozen=True)
class _Repository:
    """Of one layer, which is here already."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """What ``kernels`` asks for."""
        return self.layer


class RMSNorm(nn.Module):
    """The forward of a model's RMS norm, whose parameters ``self`` has."""

    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """:func:`fastft.ops.rms_norm` by the convention of the class, or the class's own."""
        return _norm(self, hidden_states)


class RotaryEmbedding(nn.Module):
    """A model's ``apply_rotary_pos_emb``."""

    has_backward = True
    can_torch_compile = False

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        """:func:`fastft.ops.rope` by the convention of the function, or the function itself."""
        cls: Any = type(self)
        return _rotary_of(cls)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def _norm(module: Any, x: Tensor) -> Tensor:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not torch.compiler.is_compiling():
        # Asked first: a trial is no work for fake tensors.
        facts = _facts(module) if call_refusal("rms_norm", x, weight) is None else None
        # A norm that centres is another operation.
        if facts is not None and (not facts[0] or call_refusal("layer_norm", x, weight) is None):
            return normed(x, weight, epsilon(module) or 0.0, facts)
    y: Tensor = type(module).forward(module, x)
    return y


def _facts(module: Any) -> Convention | None:
    key = (type(module), module.weight.dtype, epsilon(module))
    if key not in _NORMS:
        _NORMS[key] = _convention(module)
    return _NORMS[key]


# What norms of a class, a dtype and an epsilon compute; None: nothing known.
_NORMS: dict[tuple[Any, ...], Convention | None] = {}


def _convention(module: nn.Module) -> Convention | None:
    probe = copy.copy(module)
    probe.__dict__.pop("forward", None)  # this module's; the class's own is what is tried
    probe._parameters = dict(module._parameters)
    for name, value in vars(module).items():  # nobody's hooks see what is tried
        if name.endswith("_hooks"):
            probe.__dict__[name] = type(value)()
    facts = norm_facts(probe)
    if facts is None:
        return None
    known = dict(facts)
    return known["fastft_centred"], known["fastft_offset"], known["fastft_round_first"]


@functools.lru_cache(maxsize=256)
def _rotary_of(cls: Any) -> Callable[..., Any]:
    """The rotary function that ``kernels`` made a module's class of, fused where it is known."""

    def original(*args: Any, **kwargs: Any) -> Any:
        return cls.forward(None, *args, **kwargs)

    facts = facts_of(cls.__name__, original)
    return original if facts is None else fused_rope(original, facts)
