"""Attention that says when it begins: the policies that keep its results look at it alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastft
from fastft import memory
from fastft.memory import _attention
from fastft.memory._layers import find_layers, state_of
from tests.memory.models import llama, same, steps

LAYERS = 4


@contextmanager
def looked_at() -> Iterator[dict[str, int]]:
    """How many operations the mode of the forward saw, and that of the recompute."""
    counts = {"_Keep": 0, "_Replay": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            kind: Any = getattr(_attention, name)

            def see(
                self: Any, *args: Any, name: str = name, own: Any = kind.__torch_dispatch__
            ) -> Any:
                counts[name] += 1
                return own(self, *args)

            patch.setattr(kind, "__torch_dispatch__", see)
        yield counts


def apart(model: nn.Module) -> set[bool | None]:
    states = [state_of(layer) for layer in find_layers(model)]
    return {state.attention.apart for state in states if state is not None}


@pytest.mark.parametrize("policy", ["attention", "offload"])
def test_from_the_second_forward_on_a_mode_sees_attention_alone(policy: str) -> None:
    model = memory.checkpoint(llama(), policy)
    assert apart(model) == {None}
    for least, most in ((100, 1000), (1, 15)):
        with looked_at() as counts:
            steps(model, 1)
        assert all(least * LAYERS <= n <= most * LAYERS for n in counts.values()), counts
        assert apart(model) == {True}
    twin = copy.deepcopy(model)
    assert same(steps(twin), steps(llama()))
    assert apart(twin) == {True}


def test_other_attention_is_looked_for_everywhere() -> None:
    def torchs() -> Any:
        return fastft.accelerate(llama(fused=False), attention=False)

    for build in (lambda: llama(fused=False), torchs):
        model = memory.checkpoint(build(), "attention")
        assert same(steps(model, 3), steps(build(), 3))
        assert apart(model) == {False}


def test_a_layer_with_more_attention_than_fastfts_is_watched_as_a_whole() -> None:
    class Twice(torch.nn.Module):
        """A part whose own attention is nobody's site."""

        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.view(*x.shape[:2], 4, 16).transpose(1, 2)
            more = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return self.own(x) + 0.1 * more.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]

    def build(policy: str) -> Any:
        model = llama()
        for layer in find_layers(model):
            layer.mlp = Twice(layer.mlp)  # type: ignore[arg-type]
        return memory.checkpoint(model, policy)

    model = build("attention")
    with looked_at() as counts:
        found = steps(model, 3)
    assert apart(model) == {False}
    assert counts["_Keep"] > 300 * LAYERS
    assert same(found, steps(build("none"), 3))


def test_attention_that_becomes_somebody_elses_is_kept_all_the_same() -> None:
    calls = []

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("other", other)
    model = memory.checkpoint(llama(), "attention")
    steps(model)
    assert apart(model) == {True}
    model.set_attn_implementation("other")
    steps(model, 1)  # found out
    assert apart(model) == {None}
    plain = llama()
    steps(plain)  # layers that share an input are known
    plain.set_attn_implementation("other")
    assert same(steps(model), steps(plain))
    assert apart(model) == {False}
    assert calls
