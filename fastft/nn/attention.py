"""Attention of Transformers' models through their own attention interface, fused on the CPU; on
GPUs torch's, of each sequence by itself where a batch has several in a row.

A fused module shows its code a configuration that names fastft's attention where the real one says
"sdpa"; the configuration itself, which models may share, is not touched, and masks stay sdpa's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastft import ops
from fastft.nn.calls import count
from fastft.nn.swap import Swapped, call_refusal
from fastft.ops._checks import autocast_dtype
from fastft.ops._saving import attended

__all__ = ["NAME", "OPTIONS", "FusedAttention", "asks_for_sdpa", "attention_forward", "librarys"]

NAME = "fastft"


# Arguments of the interface that fastft's attention has no part in.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "cache")
# All that it looks at beside the heads, the mask and what the module itself passes.
OPTIONS = (*_UNSUPPORTED, "cu_seq_lens_q", "is_causal", "sliding_window")  # and output_attentions


class _ConfigView:
    """A configuration whose attention implementation is fastft's where it is sdpa."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_config"], name)
        return NAME if name == "_attn_implementation" and value == "sdpa" else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ConfigView, (self.__dict__["_config"],)


class FusedAttention(Swapped):
    """An attention module that asks the interface for :func:`attention_forward`."""

    # Not made from the module's own "config" at each call: torch 2.11 traces a look at that, in the
    # module's dictionary, as a call of the property below.
    fastft_own = ("fastft_config_view",)
    fastft_config_view: _ConfigView

    def fastft_enter(self) -> None:
        """The view of the configuration the module has."""
        self.fastft_config_view = _ConfigView(self.__dict__["config"])

    @property
    def config(self) -> Any:
        """The module's configuration, with fastft's attention in place of sdpa."""
        return self.fastft_config_view

    @config.setter
    def config(self, config: Any) -> None:
        self.__dict__["config"] = config
        self.fastft_enter()


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention interface: (batch, heads, tokens, width) in, (batch, tokens, heads,
    width) out. What :func:`fastft.ops.scaled_dot_product_attention` does not do runs as sdpa and
    is counted."""
    call = (module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    watch = None if torch.compiler.is_compiling() else attended()
    if watch is None:
        return _attend(*call)
    with watch:
        return _attend(*call)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ends = _sequences(query, key, attention_mask, bool(causal), dropout, kwargs)
    if ends is not None:
        if librarys(query.device):
            count(module, None)
        parts = zip(query.split(ends, 2), key.split(ends, 2), value.split(ends, 2), strict=True)
        found = [_attend(module, q, k, v, None, 0.0, scaling, True, {})[0] for q, k, v in parts]
        return torch.cat(found, 1), None
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    # One query is a product of a vector: there is nothing to fuse.
    plain = query.shape[2] == 1 or librarys(query.device)
    reason = None
    if not plain:
        reason = _refusal(query, key, value, attention_mask, dropout, causal, kwargs)
        if not torch.compiler.is_compiling():
            count(module, reason)
    if plain or reason is not None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    out = ops.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2), None


def _sequences(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    kwargs: dict[str, Any],
) -> list[int] | None:
    """Lengths of the sequences that lie one after another in a batch without padding, as the
    collator gave them (``cu_seq_lens_q``); None for any other batch, or where the mask does not say
    that each sees only itself and its past."""
    ends = kwargs.get("cu_seq_lens_q")
    if type(ends) is not Tensor or torch.compiler.is_compiling() or not causal or dropout:
        return None  # a fake tensor has no contents
    whole = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    special = ("sliding_window", *_UNSUPPORTED, "output_attentions")
    given = [kwargs.get(name) for name in special]  # tensors among them: no look at what is in them
    if not whole or any(value is not None and value is not False for value in given):
        return None
    lengths: list[int] = _once(ends, lambda: ends.diff().tolist())
    if sum(lengths) != query.shape[2] or min(lengths, default=0) < 1:
        return None
    if mask is None:  # nothing else keeps them apart, however short they are
        return lengths
    if librarys(query.device) and query.shape[2] < _SHORT * len(lengths):
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return lengths if _once(mask, lambda: int(mask.sum())) == pairs else None


# On a GPU sequences that are shorter on average stay in one call, under a mask: by count, a launch
# each way takes its host as long as the masked part takes the GPU.
_SHORT = 256
# What was read of a tensor, and the version it had: a GPU is waited for once a batch, not in every
# layer that shares it.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: Tensor, read: Callable[[], Any]) -> Any:
    """read(), which reads this tensor alone, unless that is known."""
    if tensor.is_inference():  # it has no version
        return read()
    version, value = _read.get(tensor, (None, None))
    if version != tensor._version:
        value = read()
        _read[tensor] = (tensor._version, value)
    return value


@functools.cache
def asks_for_sdpa(cls: Any) -> bool:
    """Whether the class's own code has the name "sdpa": what it does where that is the attention's
    name, such as a mask of the keys an indexer chose, would not be done for fastft's name."""
    parents = cls.__mro__[: cls.__mro__.index(torch.nn.Module)]
    functions = [f for parent in parents for f in vars(parent).values() if inspect.isfunction(f)]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in functions]
    return any(_names_sdpa(value) for code in codes if code for value in code.co_consts)


def _names_sdpa(value: Any) -> bool:
    return value == "sdpa" or (isinstance(value, tuple | frozenset) and "sdpa" in value)


def librarys(device: torch.device) -> bool:
    """Whether torch's own attention is the best there is."""
    return device.type == "cuda"


def _refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    kwargs: dict[str, Any],
) -> str | None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            return f"{name} in attention"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if dropout:
        return "dropout of attention weights"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4):
        return "attention mask is not bool (batch, heads, queries, keys)"
    if causal and key.shape[2] != query.shape[2]:
        return "causal attention over a cache"
    if mask is not None and mask.shape[3] != key.shape[2]:
        return "attention mask is longer than the keys"
    autocast = autocast_dtype(query.device.type)
    return call_refusal("attention", query, key, value, dtype=autocast)


AttentionInterface.register(NAME, attention_forward)
