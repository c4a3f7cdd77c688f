"""Layers of one call that no gradient reaches, and gradients in batches of what was made again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import poisoned
from peft import LoraConfig, get_peft_model
from torch import nn

import fastft
from fastft.ops.lora_linear import lora_linear_siblings

ROWS, FEATURES, WIDTHS, R = 6, 16, (8, 12, 4), 4


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("reached", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "dropout", "scaled", "bias", "several"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_are_those_of_the_reached_layers_alone(
    backend: str, kind: str, reached: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "scaled" and backend == "cpu" else torch.float32
    owners = [0, 0, 1, 2] if kind == "several" else [0, 1, 2]
    x = leaf(ROWS, FEATURES, dtype=dtype)
    weights = [torch.randn(n, FEATURES).to(dtype) for n in WIDTHS]
    lora_as = [leaf(R, FEATURES) for _ in owners]
    lora_bs = [leaf(WIDTHS[owner], R) for owner in owners]
    biases = [leaf(n) if kind == "bias" else None for n in WIDTHS]
    scales = [leaf(n) for n in WIDTHS] if kind == "scaled" else None
    options: dict[str, Any] = {"dropout_ps": [0.4] * len(owners)} if kind == "dropout" else {}

    def call(layers: tuple[int, ...]) -> list[torch.Tensor]:
        members = [j for j, owner in enumerate(owners) if owner in layers]
        torch.manual_seed(1)  # the masks of the first adapter are the same; of others see below
        return list(
            lora_linear_siblings(
                x,
                [weights[i] for i in layers],
                [lora_as[j] for j in members],
                [lora_bs[j] for j in members],
                scalings=[0.5] * len(members),
                biases=[biases[i] for i in layers],
                owners=[layers.index(owners[j]) for j in members],
                scales=None if scales is None else [scales[i] for i in layers],
                backend=backend,
                **{name: values[: len(members)] for name, values in options.items()},
            )
        )

    every = [x, *lora_as, *lora_bs, *(b for b in biases if b is not None), *(scales or ())]
    ys = call((0, 1, 2))
    dys = [torch.randn_like(y) for y in ys]
    got = torch.autograd.grad(
        [ys[i] for i in reached], every, [dys[i] for i in reached], allow_unused=True
    )
    for gradient, owner in zip(got[1:], [*owners, *owners]):
        assert (gradient is None) == (owner not in reached)
    if kind == "dropout" and reached != (0,):
        return  # alone, they would draw other masks
    alone = call(reached)
    expected = torch.autograd.grad(alone, every, [dys[i] for i in reached], allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_reached_layer_without_an_adapter(backend: str) -> None:
    torch.manual_seed(0)
    x = leaf(600, FEATURES, dtype=torch.bfloat16)
    weights = [torch.randn(n, FEATURES).bfloat16() for n in (8, 12)]
    a, b = leaf(R, FEATURES), leaf(12, R)
    frozen, _ = lora_linear_siblings(
        x, weights, [a], [b], scalings=[0.5], owners=[1], backend=backend
    )
    dy = torch.randn_like(frozen)
    dx, da, db = torch.autograd.grad(frozen, [x, a, b], dy, allow_unused=True)
    assert da is None
    assert db is None
    torch.testing.assert_close(dx, dy @ weights[0])


class _Three(nn.Module):
    """q, k, v, of which k's and v's results are not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        y = self.q(x) + self.v(x).detach()
        return y if skip else y + self.k(x)


@pytest.mark.parametrize("dora", [False, True])
def test_an_optimizer_leaves_an_unreached_sibling_alone(dora: bool) -> None:
    config = LoraConfig(r=R, target_modules=["q", "k", "v"], use_dora=dora, init_lora_weights=False)
    torch.manual_seed(0)
    plain = get_peft_model(_Three(), config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, FEATURES)
    for skip in (False, False, True):  # siblings are learnt in the first
        for model in (plain, fused):
            model.zero_grad()
            model(x, skip).pow(2).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


class _Stop(torch.autograd.Function):
    """Gives its input no gradient; autograd then asks what made it for gradients of nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        return None


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.q(x)
        return hidden.sum() + _Stop.apply(self.k(hidden)).sum()


@pytest.mark.parametrize("dora", [False, True])
def test_what_no_gradient_at_all_reaches_gives_none(dora: bool) -> None:
    config = LoraConfig(r=R, target_modules=["q", "k"], use_dora=dora, init_lora_weights=False)
    torch.manual_seed(0)
    plain = get_peft_model(_Chain(), config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(256, 64)
    for model in (plain, fused):
        with poisoned():
            model(x).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-4, atol=1e-3)


def test_a_batch_of_gradients_through_a_gated_unit() -> None:
    """The unit's product is not kept for down_proj, which makes it again without a graph."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    config = LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(model, config)
    fused = fastft.accelerate(copy.deepcopy(plain), attention=False)
    ids = torch.arange(12).view(1, 12)
    upstream = torch.tensor([1.0, 3.0])
    found = []
    for model in (plain, fused):
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model(input_ids=ids, labels=ids).loss
        found.append(torch.autograd.grad(loss, trained, upstream, is_grads_batched=True))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
