"""Adapters on expert weights (PEFT's ``target_parameters``): whole models beside plain PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import fastft
from tests.integration import tiny

_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Gated; gated with many small experts; transposed weights, biases and a gate of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOss", {"intermediate_size": 48, "num_local_experts": 4, "head_dim": 8}),
}
BATCH = tiny.inputs("llama")


def peft_model(name: str, parameters: tuple[str, ...] = ("gate_up_proj", "down_proj")) -> Any:
    torch.manual_seed(0)
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES, **sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and sinks start at zero
        if not parameter.any() or not parameter.isfinite().all():
            parameter.data.normal_(0, 0.1)
    for key, parameter in model.named_parameters():
        if key.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.data.mul_(8)  # rounding must not send a token to another expert
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=[f"mlp.experts.{p}" for p in parameters],
    )
    model = get_peft_model(model, lora)
    tiny.fill_adapters(model)
    return model.train()


def reports(model: Any) -> list[dict[str, Any]]:
    return [m for m in fastft.explain(model).to_dict()["modules"] if m["kind"] == "experts"]


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, parameters: tuple[str, ...]) -> None:
    plain = peft_model(name, parameters)
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain), attention=False, strict=True)
    steps = []
    for seed in range(3):
        batch = tiny.inputs("llama", seed=seed)
        steps.append(tuple(tiny.step(m, batch) for m in (fused, plain, exact)))
    tiny.assert_as_exact_over(steps)
    assert sum("experts" in key for key in steps[0][0][1]) == 4 * len(parameters)
    found = reports(fused)
    assert [(m["fused"], m["fused_calls"], m["fallback_calls"]) for m in found] == [
        (True, 3, {}),
        (True, 3, {}),
    ]
    fastft.restore(fused)
    tiny.assert_equal(tiny.step(fused, BATCH), tiny.step(plain, BATCH))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_and_checkpointing(name: str) -> None:
    plain = peft_model(name).to(torch.bfloat16)
    for key, parameter in plain.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain), **tiny.LORA_ONLY)
    batches = [BATCH, *(tiny.inputs("llama", seed=seed) for seed in range(4))]
    steps = [tuple(tiny.step(m, batch) for m in (fused, plain, exact)) for batch in batches]
    tiny.assert_as_exact_over(steps)
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    first = tiny.step(fused, BATCH)
    tiny.assert_equal(tiny.step(fused, BATCH), first)
    tiny.assert_equal(first, steps[0][0])


def test_states_that_are_not_fused_run_as_peft_and_are_counted() -> None:
    plain = peft_model("mixtral")
    fused = fastft.accelerate(copy.deepcopy(plain), **tiny.LORA_ONLY)
    with torch.no_grad():
        for model in (plain, fused):
            model.eval()
        with plain.disable_adapter(), fused.disable_adapter():
            expected = plain(input_ids=BATCH["input_ids"]).logits
            got = fused(input_ids=BATCH["input_ids"]).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for model in (plain, fused):
            model.merge_adapter()
        got, expected = (m(input_ids=BATCH["input_ids"]).logits for m in (fused, plain))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        fused.unmerge_adapter()
        fused(input_ids=BATCH["input_ids"])
    counted = reports(fused)[0]
    assert counted["fallback_calls"] == {"adapters disabled": 1, "adapter merged into the base": 1}
    assert counted["fused_calls"] == 1


def test_a_mixed_batch_is_refused_in_peft_s_words() -> None:
    """Before it was a wrong answer: every sample went through the active adapter."""
    plain = peft_model("mixtral")
    plain.add_adapter("other", plain.peft_config["default"])
    plain.base_model.set_adapter("default")
    fused = fastft.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        with (
            pytest.raises(ValueError, match="mixed adapter batches"),
            torch.no_grad(),
            fastft.mixed_batch(model, ["default", "other"]),
        ):
            model(input_ids=BATCH["input_ids"])
    assert [m["fallback_calls"] for m in reports(fused)] == [{"mixed batch": 1}, {}]
    with torch.no_grad():
        ids = {"input_ids": BATCH["input_ids"]}
        torch.testing.assert_close(fused(**ids).logits, plain(**ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name: str) -> None:
    fused = fastft.accelerate(peft_model(name), attention=False, strict=True)
    (wrapper, *_) = (m for m in fused.modules() if isinstance(m, ParamWrapper))
    x = torch.zeros(0, 32, requires_grad=True)
    y = wrapper(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad.shape == (0, 32)
    trained = [p.grad for n, p in wrapper.named_parameters() if "lora_" in n]
    assert len(trained) == 4
    assert not any(g.any() for g in trained)


def test_other_parameters_stay_peft_s() -> None:
    """A router's weight is no stack of experts."""
    torch.manual_seed(0)
    family, sizes = MODELS["mixtral"]
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**_SIZES, **sizes)
    )
    plain = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    fused = fastft.accelerate(plain)
    assert [m["reason"] for m in reports(fused)] == [
        "the parameter is not one of Transformers' stacked expert weights"
    ] * 2
    assert {type(m) for m in fused.modules() if isinstance(m, ParamWrapper)} == {ParamWrapper}


def test_compiles_without_a_graph_break() -> None:
    model = fastft.accelerate(peft_model("mixtral"))
    expected = tiny.step(model, BATCH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**BATCH).loss
    loss.backward()
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-5)


def test_compiles_where_a_weight_has_no_adapter() -> None:
    """torch traces its own grouped product in bfloat16 only: such a model runs as PEFT's."""
    model = fastft.accelerate(peft_model("mixtral", ("down_proj",)))
    expected = tiny.step(model, BATCH)
    got = tiny.step(torch.compile(model, backend="aot_eager"), BATCH)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
