"""What hooks see and do, and what changes between two calls, is as in the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fastft
from tests.integration import tiny

BATCH = tiny.inputs("llama")


def twins(trained: int = 2, **config: Any) -> tuple[Any, Any]:
    """The same model plain and accelerated, whose siblings are known after some steps."""
    plain = tiny.peft_model("llama", **config)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        for seed in range(trained):
            tiny.step(model, tiny.inputs("llama", seed=seed))
        model.zero_grad()
    return plain, fused


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


def assert_as(got: tiny.Result, expected: tiny.Result) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-5)


def rescale(layer: Any) -> Callable[..., None]:
    return lambda *_: layer.set_scale("default", 5.0)


def double_b(layer: Any) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * 2

    return hook


HOOKS: dict[str, Callable[[Any], Any]] = {
    "activation": lambda block: block.mlp.act_fn.register_forward_hook(lambda m, i, o: 2 * o),
    "no dropout": lambda block: block.mlp.up_proj.lora_dropout["default"].register_forward_hook(
        lambda m, i, o: 2 * o
    ),
    "sibling's scale": lambda block: block.self_attn.q_proj.register_forward_hook(
        rescale(block.self_attn.k_proj)
    ),
    "own scale": lambda block: block.self_attn.k_proj.register_forward_pre_hook(
        rescale(block.self_attn.k_proj)
    ),
    "sibling's B": lambda block: block.self_attn.q_proj.register_forward_hook(
        double_b(block.self_attn.v_proj)
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_hook_changes(name: str) -> None:
    plain, fused = twins()
    unhooked = tiny.step(copy.deepcopy(plain), BATCH)[0]
    for model in (plain, fused):
        HOOKS[name](layer_of(model))
    got, expected = tiny.step(fused, BATCH), tiny.step(plain, BATCH)
    assert_as(got, expected)
    assert not torch.isclose(expected[0], unhooked, rtol=1e-4), "the hook changes nothing"


def test_hooks_of_all_modules() -> None:
    plain, fused = twins()
    handle = register_module_forward_hook(
        lambda m, i, o: 1.1 * o if isinstance(m, nn.Linear) else None
    )
    try:
        assert_as(tiny.step(fused, BATCH), tiny.step(plain, BATCH))
    finally:
        handle.remove()
    before = sum(m.fused_calls for m in fastft.explain(fused).modules if m.kind == "lora")
    tiny.step(fused, BATCH)
    after = sum(m.fused_calls for m in fastft.explain(fused).modules if m.kind == "lora")
    assert after - before == len(tiny.lora_layers(fused))


def test_siblings_called_by_hand() -> None:
    _, fused = twins()
    attention = layer_of(fused).self_attn
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        attention.q_proj.train()
        attention.q_proj(x)
        attention.k_proj.lora_B["default"].weight.mul_(3)
        got = attention.k_proj(x)
        (want,) = attention.k_proj.fused_call([attention.k_proj.plan(x)], x)
    torch.testing.assert_close(got, want)


def test_siblings_after_a_forward_of_the_base_model() -> None:
    """A reference's pass, adapters disabled, has nothing to learn from."""
    _, fused = twins(trained=0)
    with torch.no_grad(), fused.disable_adapter():
        fused(**BATCH)
    for _ in range(2):
        tiny.step(fused, BATCH)
    assert fastft.explain(fused).modules[0].siblings == 3


def test_verification_runs_no_hooks() -> None:
    model = tiny.peft_model("llama")
    seen: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: seen.append(m))
    fastft.accelerate(model)
    assert seen == []
    model(**BATCH)
    assert len(set(seen)) > 20


def test_restore_of_what_is_left_of_an_accelerated_model() -> None:
    for left in ("unload", "merge_and_unload"):
        plain, fused = twins()
        base = getattr(fused, left)()
        types = [type(m) for m in getattr(plain, left)().modules()]
        fastft.restore(base)
        assert [type(m) for m in base.modules()] == types
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("first", ["base", "merged"])
def test_adapters_on_a_base_that_is_accelerated(first: str) -> None:
    if first == "base":
        base = fastft.accelerate(tiny.ARCHITECTURES["llama"].build())
    else:
        base = twins()[1].merge_and_unload()
    plain = copy.deepcopy(base)
    fastft.restore(plain)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    models = []
    for model in (base, plain):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    fused, plain = models
    fastft.accelerate(fused)
    for seed in range(2):
        batch = tiny.inputs("llama", seed=seed)
        assert_as(tiny.step(fused, batch), tiny.step(plain, batch))
    fastft.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_norms_of_a_weight_whose_storage_is_another() -> None:
    """Freed memory is handed out again at the same address."""
    plain, fused = twins(use_dora=True)
    for _ in range(3):
        for model in (plain, fused):
            for name, parameter in model.named_parameters():
                if "base_layer.weight" in name:
                    parameter.data = parameter.data * 1.5
                    parameter.data = (parameter.data * 8).round() / 8
        assert_as(tiny.step(fused, BATCH), tiny.step(plain, BATCH))


def test_weights_trained_while_merged_stay_trained() -> None:
    plain, fused = twins()
    for model in (plain.bfloat16(), fused.bfloat16()):
        model.merge_adapter()
        for layer in tiny.lora_layers(model).values():
            weight = layer.base_layer.weight.data
            weight += 0.01 * weight.abs().max()
        model.unmerge_adapter()
    for name, layer in tiny.lora_layers(fused).items():
        assert torch.equal(layer.base_layer.weight, plain.get_submodule(name).base_layer.weight)


def test_traces_record_peft() -> None:
    plain, fused = twins()
    x = torch.randn(3, 32)
    layer, other = layer_of(fused).mlp.up_proj, layer_of(plain).mlp.up_proj
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        for found in (traced, graph):
            torch.testing.assert_close(found(2 * x), other(2 * x))


def test_forward_mode() -> None:
    plain, fused = twins()
    x, tangent = torch.randn(2, 3, 32)
    found = []
    for model in (plain, fused):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            y = layer_of(model).mlp(layer_of(model).input_layernorm(dual))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found)
