"""``accelerate(pack_weights=True)``: the whole way of a model whose frozen weights are packed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fastft_kernels import ways
from peft import LoraConfig, get_peft_model
from torch import nn

import fastft
from fastft.nn import packing
from fastft.ops.lora_linear import lay_out_weights, lora_linear_siblings


class Block(nn.Module):
    """Three layers that share x, then one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
        self.o = nn.Linear(32, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v], -1).tanh())


def build(**config: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "qkvo", "lora_alpha": 12, **config}
    model = get_peft_model(Block(), LoraConfig(**{**config, "target_modules": list("qkvo")}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model.train()


def step(model: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(2, 7, 24, requires_grad=True)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **found}


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of float32 sums of at most 64 terms, a few of them in a row."""
    bound = 8 * torch.finfo(torch.float32).eps * 64**0.5
    for name, value in expected.items():
        assert (got[name] - value).norm() <= bound * value.norm(), name


def layers(model: Any) -> dict[str, Any]:
    block = model.get_base_model()
    return {name: getattr(block, name) for name in "qkvo"}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_packed_model_trains_as_another(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fastft.accelerate(build(lora_dropout=dropout))
    model = fastft.accelerate(build(lora_dropout=dropout), pack_weights=True)
    weights = {name: layer.base_layer.weight for name, layer in layers(model).items()}
    values = {name: w.detach().clone() for name, w in weights.items()}
    keys = list(model.state_dict())
    taken: list[str] = []
    pick = ways.pick
    monkeypatch.setattr(ways, "pick", lambda *a: taken.append(pick(*a)) or taken[-1])
    with ways.force("border"):
        for number in range(3):
            expected = step(plain)
            del taken[:]
            got = step(model)
            same(got, expected)
            packed = {name for name, layer in layers(model).items() if packing.packed(layer)}
            assert packed == (set() if number == 0 else set("qkvo"))
            # Two groups, forward and backward; the first step watches, layer by layer.
            assert taken == (["expand"] * 8 if number == 0 else ["border"] * 4)
    for name, layer in layers(model).items():
        assert layer.base_layer.weight is weights[name], "the parameter is the same object"
        assert torch.equal(layer.base_layer.weight, values[name])
    assert list(model.state_dict()) == keys
    fastft.restore(model)
    for name, layer in layers(model).items():
        assert layer.base_layer.weight.is_contiguous()
        assert torch.equal(layer.base_layer.weight, values[name])
        assert not packing.packed(layer)
    assert not packing._held


def _trained_twice(**config: Any) -> Any:
    model = fastft.accelerate(build(**config), pack_weights=True)
    step(model)
    step(model)
    return model


def test_adapters_that_change_are_the_ones_used() -> None:
    """The border is written at each call: an optimizer step, another adapter."""
    model, plain = _trained_twice(), fastft.accelerate(build())
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if "lora_" in name:
                p.mul_(1.5)
                q.mul_(1.5)
    with ways.force("border"):
        same(step(model), step(plain))


def test_what_calls_write_beside_the_weights_is_no_change_of_them() -> None:
    """Autograd, which counts changes in place, lets a graph be gone through twice, after others."""
    x, w, a, b = (torch.randn(s) for s in ((5, 16), (8, 16), (4, 16), (8, 4)))
    held = lay_out_weights([w], [4], torch.float32)
    x.requires_grad_()
    with ways.force("border"):
        given: Any = (x, held.weights, [a], [b])
        ys = [lora_linear_siblings(*given, scalings=[1.0], backend="triton")[0] for _ in range(2)]
        found = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (*ys, *ys)]
    want = (w + b @ a).sum(0).expand(5, 16)
    for got in found:
        torch.testing.assert_close(got, want)


def test_another_rank_takes_another_way() -> None:
    model = _trained_twice()
    model.add_adapter("wide", LoraConfig(r=8, target_modules=list("qkvo")))
    model.set_adapter("wide")
    with ways.force("border"):
        step(model)
    assert fastft.explain(model).to_dict()["calls"]["fallback"] == {}


def test_merging_takes_the_weights_out() -> None:
    model = _trained_twice()
    torch.manual_seed(2)
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = model.eval()(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    assert all(p.is_contiguous() for p in merged.parameters())
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in merged.parameters())


def test_a_copy_has_weights_of_its_own() -> None:
    model = _trained_twice()
    other = copy.deepcopy(model)
    assert not any(packing.packed(layer) for layer in layers(other).values())
    with torch.no_grad():
        for layer in layers(other).values():
            layer.base_layer.weight.zero_()
    assert all(layer.base_layer.weight.abs().sum() > 0 for layer in layers(model).values())
    step(other)


def test_a_packed_model_that_moves_or_is_run_in_inference_mode() -> None:
    model = fastft.accelerate(build(), pack_weights=True)
    step(model)
    with torch.inference_mode():
        model(torch.randn(2, 7, 24))
    step(model)
    assert all(packing.packed(layer) for layer in layers(model).values())
    assert not any(p.is_inference() for p in model.parameters())
    model.double()
    assert not packing._held, "the buffer is gone with the dtype"
    model.float()
    step(model)


def test_layers_taken_out_are_unpacked_by_restore() -> None:
    model = _trained_twice()
    base = layers(model)["q"].base_layer
    fastft.restore(model)
    assert base.weight.is_contiguous()


def test_layers_that_cannot_be_packed_are_left_alone() -> None:
    model = build()
    shared = layers(model)["k"].base_layer.weight
    layers(model)["v"].base_layer.weight = nn.Parameter(shared.data[:], requires_grad=False)
    layers(model)["o"].base_layer.weight.requires_grad_()
    fastft.accelerate(model, pack_weights=True)
    step(model)
    step(model)
    assert not any(packing.packed(layer) for layer in layers(model).values())
    half = fastft.accelerate(build(use_dora=True), pack_weights=True)
    step(half)
    step(half)
    assert not any(packing.packed(layer) for layer in layers(half).values())
