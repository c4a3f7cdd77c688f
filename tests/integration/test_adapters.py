"""Several adapters of one model: all active at once, or each on its own samples of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

import fastft
from tests.integration import tiny
from tests.integration.test_peft_api import fused_and_not

# A sample of each, one twice, one of the base model alone.
NAMES = ["default", "second", "second", "__base__", "default"]
BATCH = {k: torch.cat([v, v.flip(0), v[:1].roll(1, 1)]) for k, v in tiny.inputs("llama").items()}


def two_adapters(name: str = "llama", **options: Any) -> Any:
    """An adapter on every linear layer and one of another rank and scale on some; both active."""
    model = tiny.peft_model(name, **options)
    dropout = options.get("dropout", 0.0)
    second = LoraConfig(
        r=2, lora_alpha=6, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model.add_adapter("second", second)
    tiny.fill_adapters(model)
    model.base_model.set_adapter(["default", "second"])
    return model


def mixed_step(model: Any, batch: dict[str, torch.Tensor] = BATCH) -> tiny.Result:
    with fastft.mixed_batch(model, NAMES):
        return tiny.step(model, batch)


def test_several_active_adapters_add_up() -> None:
    """Three steps: from the second on, siblings run as one call."""
    plain = two_adapters()
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for seed in range(3):
        batch = tiny.inputs("llama", seed=seed)
        got = tiny.step(fused, batch)
        tiny.assert_as_exact(got, tiny.step(plain, batch), tiny.step(exact, batch))
    assert {n.split(".")[-2] for n in got[1]} == {"default", "second"}
    assert fused_and_not(fused) == (3 * len(tiny.lora_layers(fused)), {})


def test_a_mixed_batch_inside_another_leaves_it_as_it_was() -> None:
    fused = fastft.accelerate(two_adapters())
    want = mixed_step(fused)[0]
    with fastft.mixed_batch(fused, NAMES):
        with fastft.mixed_batch(fused, ["second"] * len(NAMES)):
            other = fused(**BATCH).loss
        got = fused(**BATCH).loss
    assert torch.equal(got, want)
    assert not torch.equal(other, want)
    assert not torch.equal(fused(**BATCH).loss, want)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_mixed_batch_trains_each_adapter_on_its_samples(name: str) -> None:
    plain = two_adapters(name)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    for _ in range(3):
        got = mixed_step(fused)
        tiny.assert_as_exact(got, mixed_step(plain), mixed_step(exact))
    assert fused_and_not(fused) == (3 * len(tiny.lora_layers(fused)), {})
    queries = [m for m in fastft.explain(fused).modules if m.name.endswith("q_proj")]
    assert [m.siblings for m in queries] == [3, 3]

    # The gradient of one adapter is that of a batch of its samples alone.
    rows = [i for i, n in enumerate(NAMES) if n == "second"]
    masked = {**BATCH, "labels": BATCH["labels"].clone()}
    masked["labels"][[i for i in range(len(NAMES)) if i not in rows]] = -100
    fused.base_model.set_adapter("second")
    alone = tiny.step(fused, {k: v[rows] for k, v in BATCH.items()})
    fused.base_model.set_adapter(["default", "second"])
    together = mixed_step(fused, masked)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=1e-6)
    for key, gradient in alone[1].items():
        torch.testing.assert_close(together[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_mixed_batch_under_checkpointing_with_dropout_repeats_bit_for_bit(reentrant: bool) -> None:
    model = fastft.accelerate(two_adapters(dropout=0.2))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for _ in range(2):  # the first step learns the siblings
            torch.manual_seed(11)
            result = mixed_step(model)
        results.append(result)
    tiny.assert_equal(results[1], results[0])


def test_adapter_names_at_inference() -> None:
    """PEFT's own argument, and what PEFT gives for it."""
    plain = two_adapters().eval()
    fused = fastft.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        theirs, ours = (
            m(input_ids=BATCH["input_ids"], adapter_names=NAMES).logits for m in (plain, fused)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    layers = len(tiny.lora_layers(fused))
    assert fused_and_not(fused) == (layers, {})
    with pytest.raises(ValueError, match="non-existing"):
        fused(input_ids=BATCH["input_ids"], adapter_names=["other"] * len(NAMES))
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        fused(input_ids=BATCH["input_ids"], adapter_names=NAMES[:2])


def test_mixed_batch_leaves_nothing_behind() -> None:
    model = two_adapters()
    before = [dict(m.__dict__) for m in model.modules()]
    fastft.accelerate(model)
    with pytest.raises(RuntimeError, match="stop"), fastft.mixed_batch(model, NAMES):
        raise RuntimeError("stop")
    fastft.restore(model)
    with fastft.mixed_batch(model, NAMES):
        model(**BATCH)
    assert [m.__dict__.keys() for m in model.modules()] == [b.keys() for b in before]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, {"lora_bias in a mixed batch": 2}),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    ],
    ids=str,
)
def test_what_runs_through_peft_in_a_mixed_batch_is_right_and_counted(
    options: dict[str, Any], reasons: dict[str, int]
) -> None:
    plain = two_adapters(**options)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain))
    tiny.assert_as_exact(mixed_step(fused), mixed_step(plain), mixed_step(exact))
    assert fused_and_not(fused)[1] == reasons


def test_mixed_batch_refuses_what_it_cannot_route() -> None:
    model = two_adapters()
    for names, word in ((["other"], "'other'"), ([], "none")):
        with pytest.raises(fastft.errors.ArgumentError) as caught:
            fastft.mixed_batch(model, names).__enter__()
        assert word in str(caught.value)
        assert "default, second" in str(caught.value)
