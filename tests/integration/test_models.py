"""Whole models: loss and every adapter gradient beside plain PEFT, and back again bit for bit."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import fastft
from fastft.nn import FusedHead
from tests.integration import tiny

NAMES = list(tiny.ARCHITECTURES)


def test_every_layer_has_its_reason_or_is_fused_and_really_ran() -> None:
    """One look at all architectures: explain() names each LoRA layer once, and the calls agree."""
    for name, facts in tiny.ARCHITECTURES.items():
        model = fastft.accelerate(tiny.peft_model(name))
        tiny.step(model, tiny.inputs(name))
        found = fastft.explain(model).to_dict()
        reports = {m["name"]: m for m in found["modules"] if m["kind"] in ("lora", "experts")}
        # The wrapper of one expert weight may hold that of another: one call computes both.
        layers = {n for n in tiny.lora_layers(model) if not n.endswith(".base_layer")}
        assert set(reports) == layers, name
        assert reports, name
        for layer, report in reports.items():
            expected = re.search(facts.plain, layer) is None
            assert report["fused"] is expected, (name, report)
            assert (report["backend"] is not None) is expected, (name, report)
            assert bool(report["reason"]) is not expected, (name, report)
            assert (report["fused_calls"] > 0) is expected, (name, report)
        losses = [m for m in found["modules"] if m["kind"] == "loss"]
        assert len(losses) == 1, name
        assert losses[0]["fused"], (name, losses)
        assert losses[0]["fused_calls"] >= 1, (name, losses)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name: str) -> None:
    """Three steps, for layers that share an input run together only after the first."""
    plain = tiny.peft_model(name)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for seed in range(3):
        batch = tiny.inputs(name, seed=seed)
        tiny.assert_as_exact(
            tiny.step(fused, batch), tiny.step(plain, batch), tiny.step(exact, batch)
        )


@pytest.mark.parametrize("name", NAMES)
def test_restore_is_bit_for_bit(name: str) -> None:
    model = tiny.peft_model(name)
    batch = tiny.inputs(name)
    before = tiny.step(model, batch)
    keys = list(model.state_dict())
    types = {n: type(m) for n, m in model.named_modules()}
    hooks = _hooks(model)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}

    fastft.accelerate(model)
    assert list(model.state_dict()) == keys
    tiny.step(model, batch)
    tiny.step(model, batch)
    fastft.restore(model)

    assert {n: type(m) for n, m in model.named_modules()} == types
    assert _hooks(model) == hooks
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == keys
    tiny.assert_equal(tiny.step(model, batch), before)


def _hooks(model: nn.Module) -> dict[str, int]:
    return {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_eval_outputs_and_generation(name: str) -> None:
    """Logits are there for who asks, with labels and without; generation says the same."""
    plain = tiny.peft_model(name).eval()
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs(name)
    with torch.no_grad():
        for kept in (batch, {k: v for k, v in batch.items() if k != "labels" or name == "t5"}):
            truth, theirs, ours = (m(**kept).logits for m in (exact, plain, fused))
            bound = tiny.ERROR_FACTOR * tiny.relative(theirs, truth)
            assert tiny.relative(ours, truth) <= bound
            assert tuple(ours.shape) == tuple(theirs.shape)
        ids = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(fused.generate(**ids), plain.generate(**ids))


def test_head_with_an_adapter_trains_it() -> None:
    """An adapter on lm_head gets its gradient although there are no logits."""
    plain = tiny.peft_model("llama", target_modules=["q_proj", "lm_head"])
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("llama")
    got = tiny.step(fused, batch)
    head = [gradient for name, gradient in got[1].items() if "lm_head" in name]
    assert len(head) == 2
    assert all(float(gradient.norm()) > 0 for gradient in head)
    tiny.assert_as_exact(got, tiny.step(plain, batch), tiny.step(exact, batch))
    (loss,) = [m for m in fastft.explain(fused).modules if m.kind == "loss"]
    assert (loss.fused_calls, loss.fallback_calls) == (1, {})


def test_trained_head_and_embeddings() -> None:
    """modules_to_save trains a copy of the head: its gradient is PEFT's."""
    plain = tiny.peft_model("llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("llama")
    got = tiny.step(fused, batch)
    assert any("lm_head" in name for name in got[1])
    tiny.assert_as_exact(got, tiny.step(plain, batch), tiny.step(exact, batch))
    original, copied = [m for m in fastft.explain(fused).modules if m.kind == "loss"]
    assert copied.name.endswith("lm_head.modules_to_save.default")
    assert (copied.fused_calls, copied.fallback_calls) == (1, {})
    assert (original.fused, original.fused_calls) == (True, 0)


def test_trained_heads_of_several_adapters() -> None:
    """Which copy of the head runs is asked at every call: switched, disabled, added and deleted."""
    config = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    plain = tiny.peft_model("llama", **config)
    plain.add_adapter("second", plain.peft_config["default"])
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "modules_to_save.second" in name:
                p.add_(torch.linspace(-1, 1, p.numel()).view(p.shape) / 10)
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch, found = tiny.inputs("llama"), []
    for model in (plain, fused):
        results = []

        def step(model: Any, results: list[Any]) -> None:
            model.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            if loss.requires_grad:
                loss.backward()
            grads = [p.grad for n, p in model.named_parameters() if p.grad is not None]
            results.append([loss.detach(), *grads])

        step(model, results)
        model.set_adapter("second")
        step(model, results)
        with model.disable_adapter():
            step(model, results)
        torch.manual_seed(1)
        model.add_adapter("third", plain.peft_config["default"])  # of the original: as it runs
        model.set_adapter("third")
        step(model, results)
        model.delete_adapter("third")
        model.set_adapter("default")
        step(model, results)
        found.append(results)
    for got, want in zip(found[1], found[0], strict=True):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    reports = {m.name.rsplit(".", 1)[-1]: m for m in fastft.explain(fused).modules
               if m.kind == "loss"}  # fmt: skip
    calls = {name: report.fused_calls for name, report in reports.items()}
    assert calls == {"original_module": 1, "default": 2, "second": 1}
    assert not any(report.fallback_calls for report in reports.values())
    fastft.restore(fused)
    assert all(type(m) is not FusedHead for m in fused.modules())
    assert type(fused(**batch).logits) is torch.Tensor


def test_hooks_on_a_trained_head_run() -> None:
    """On what PEFT wraps around the copies, and on a copy; after ``accelerate``."""
    plain = tiny.peft_model("llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
    batch = tiny.inputs("llama")
    for part in ("", ".modules_to_save.default"):
        models = [copy.deepcopy(plain), fastft.accelerate(copy.deepcopy(plain))]
        losses = []
        for model in models:
            hooked = model.get_submodule(f"base_model.model.lm_head{part}")
            hooked.register_full_backward_hook(lambda module, given, _: (0.5 * given[0],))
            losses.append(model(**batch).loss)
            losses[-1].backward()
        for (name, p), q in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_num_items_in_batch_and_shift_labels(name: str) -> None:
    """The Trainer passes the number of labels of all its micro-batches."""
    plain = tiny.peft_model(name)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for items in (7, torch.tensor(7)):
        batch = {**tiny.inputs(name), "num_items_in_batch": items}
        tiny.assert_as_exact(
            tiny.step(fused, batch), tiny.step(plain, batch), tiny.step(exact, batch)
        )


def test_logits_of_a_training_forward_carry_gradients() -> None:
    """A loss of one's own on outputs.logits, beside labels, trains adapters as in plain PEFT."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("llama")

    def own(model: nn.Module) -> tiny.Result:
        model.zero_grad(set_to_none=True)
        outputs = model(**batch)
        loss = outputs.loss + (outputs.logits[:, -1].softmax(-1) ** 2).sum()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    for _ in range(2):
        tiny.assert_as_exact(own(fused), own(plain), own(exact))


def test_training_after_generation() -> None:
    """Steps, generation and evaluation in turns: what one left behind must not reach the other."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for seed in range(3):
        batch = tiny.inputs("llama", seed=seed)
        with torch.no_grad():
            fused.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False)
            fused(**batch)
        tiny.assert_as_exact(
            tiny.step(fused, batch), tiny.step(plain, batch), tiny.step(exact, batch)
        )


def test_two_forwards_before_one_backward() -> None:
    """Contrastive losses, DPO: both graphs stay whole."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    first, second = tiny.inputs("llama", seed=1), tiny.inputs("llama", seed=2)

    def both(model: nn.Module) -> tiny.Result:
        model.zero_grad(set_to_none=True)
        loss = model(**first).loss - 0.5 * model(**second).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    for _ in range(3):
        tiny.assert_as_exact(both(fused), both(plain), both(exact))


def test_an_exception_in_a_forward_leaves_nothing_behind() -> None:
    plain = tiny.peft_model("llama")
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("llama")
    for _ in range(2):
        tiny.step(fused, batch)
    with pytest.raises(IndexError):
        fused(input_ids=torch.full((1, 3), 10**6), labels=torch.zeros(1, 3, dtype=torch.int64))
    logits = fused(input_ids=batch["input_ids"]).logits
    assert type(logits) is torch.Tensor
    exact = tiny.in_float64(plain)
    tiny.assert_as_exact(tiny.step(fused, batch), tiny.step(plain, batch), tiny.step(exact, batch))


def test_all_labels_ignored_is_what_plain_gives() -> None:
    plain = tiny.peft_model("llama")
    fused = fastft.accelerate(copy.deepcopy(plain))
    batch = tiny.inputs("llama", ignored=tiny.TOKENS)
    got, expected = fused(**batch).loss, plain(**batch).loss
    assert torch.isnan(got) == torch.isnan(expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bfloat16_autocast(name: str) -> None:
    """TRL's way: float32 weights and adapters, every forward under bfloat16 autocast. The norms of
    Qwen3's and Gemma 3's queries then get a bfloat16 input under a float32 weight."""
    plain = tiny.peft_model(name)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain), loss=name != "gemma3")
    steps = []
    for seed in range(6):
        batch = tiny.inputs(name, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = tiny.step(plain, batch), tiny.step(fused, batch)
        steps.append((ours, theirs, tiny.step(exact, batch)))
        assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())
    tiny.assert_as_exact_over(steps)
    calls = fastft.explain(fused).to_dict()["calls"]
    assert calls["fused"] > 0
    assert not calls["fallback"]


@pytest.mark.parametrize("adapters", ["float32", "bfloat16"])
def test_bfloat16_model(adapters: str) -> None:
    """A bfloat16 base under float32 adapters (PEFT's default) and under bfloat16 ones."""
    dtype = getattr(torch, adapters)
    base = tiny.peft_model("llama")
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    fused = fastft.accelerate(copy.deepcopy(base))
    exact = tiny.in_float64(base)
    batches = [tiny.inputs("llama", seed=seed) for seed in range(6)]
    tiny.assert_as_exact_over(
        [tuple(tiny.step(m, b) for m in (fused, base, exact)) for b in batches]
    )
    assert not fastft.explain(fused).to_dict()["calls"]["fallback"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(reentrant: bool, dropout: bool) -> None:
    """The recompute sees what its forward saw, masks included; several steps, so that layers that
    share an input have found each other."""
    whole = fastft.accelerate(tiny.peft_model("llama", dropout=dropout))
    checkpointed = fastft.accelerate(tiny.peft_model("llama", dropout=dropout))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    for seed in range(4):
        batch = tiny.inputs("llama", seed=seed)
        results = []
        for model in (whole, checkpointed):
            torch.manual_seed(seed)
            results.append(tiny.step(model, batch))
        assert len(results[0][1]) == len(results[1][1])
        tiny.assert_equal(results[1], results[0])
        if dropout == 0.0:
            tiny.assert_as_exact(results[1], tiny.step(plain, batch), tiny.step(exact, batch))
    assert not fastft.explain(checkpointed).to_dict()["calls"]["fallback"]


def test_dropout_is_drawn_from_torch_and_switched_by_mode() -> None:
    model = fastft.accelerate(tiny.peft_model("llama", dropout=0.3))
    batch = tiny.inputs("llama")

    def draw(seed: int) -> tiny.Result:
        torch.manual_seed(seed)
        return tiny.step(model, batch)

    draw(0), draw(0)
    tiny.assert_equal(draw(5), draw(5))
    assert not torch.equal(draw(5)[0], draw(6)[0])
    model.eval()
    tiny.assert_equal(draw(5), draw(6))


def test_dropout_has_the_right_mean_and_variance() -> None:
    """Over many draws the output of a layer has PEFT's mean and variance at every element."""
    draws = 2000
    plain = tiny.peft_model("llama", dropout=0.4)
    layer = next(iter(tiny.lora_layers(plain).values()))
    name = next(iter(tiny.lora_layers(plain)))
    fused_model = fastft.accelerate(copy.deepcopy(plain))
    fused = fused_model.get_submodule(name)
    x = torch.randn(3, 32)
    with torch.no_grad():
        exact = layer.eval()(x).double()
        layer.train()
        seen = torch.stack([fused(x) for _ in range(draws)]).double()
        theirs = torch.stack([layer(x) for _ in range(draws)]).double()
    deviation = theirs.std(0) / draws**0.5
    assert float(((seen.mean(0) - exact).abs() / deviation).max()) < 6
    # The variance of a variance: draws of a sum of many terms are nearly normal.
    ratio = seen.var(0) / theirs.var(0)
    assert float((ratio - 1).abs().max()) < 6 * (4 / draws) ** 0.5


def test_compile() -> None:
    """The accelerated model goes through torch.compile, forward and backward."""
    plain = tiny.peft_model("llama")
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    compiled = torch.compile(fused, backend="aot_eager")
    for seed in range(2):
        batch = tiny.inputs("llama", seed=seed)
        fused.zero_grad(set_to_none=True)
        loss = compiled(**batch).loss
        loss.backward()
        got = {n: p.grad.clone() for n, p in fused.named_parameters() if p.grad is not None}
        tiny.assert_as_exact((loss.detach(), got), tiny.step(plain, batch), tiny.step(exact, batch))
    torch._dynamo.reset()


def test_hooks_run() -> None:
    """Hooks on a LoRA layer run around the fused forward; hooks below it send it back to PEFT."""
    model = fastft.accelerate(tiny.peft_model("llama"))
    layers = tiny.lora_layers(model)
    outer = next(layer for name, layer in layers.items() if name.endswith("layers.0.mlp.up_proj"))
    inner = next(layer for name, layer in layers.items() if name.endswith("layers.1.mlp.up_proj"))
    seen: list[str] = []
    outer.register_forward_pre_hook(lambda *_: seen.append("before"))
    outer.register_forward_hook(lambda *_: seen.append("after"))
    outer.register_full_backward_hook(lambda *_: seen.append("backward"))
    inner.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    tiny.step(model, tiny.inputs("llama"))
    assert seen == ["before", "after", "base", "backward"]
    by_name = {m["name"]: m for m in fastft.explain(model).to_dict()["modules"]}
    of_outer = next(v for k, v in by_name.items() if k.endswith("layers.0.mlp.up_proj"))
    of_inner = next(v for k, v in by_name.items() if k.endswith("layers.1.mlp.up_proj"))
    assert of_outer["fused_calls"] == 1
    assert "hooks" in of_inner["reason"]
    assert sum(of_inner["fallback_calls"].values()) == 1
