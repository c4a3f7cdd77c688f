"""Norms, gated MLPs and attention: found by structure, proved, switched, counted, undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastft
from fastft.nn import call_counts
from fastft.nn.attention import FusedAttention
from fastft.nn.mlp import FusedGatedMLP
from fastft.nn.norm import FusedRMSNorm, norm_facts
from fastft.nn.swap import swapped_class

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(name: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **values})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def kinds(model: nn.Module, kind: str) -> list[Any]:
    return [m for m in fastft.explain(model).modules if m.kind == kind]


def trained(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("module", "offset", "round_first"),
    [
        ("llama.modeling_llama.LlamaRMSNorm", 0.0, True),
        ("gemma3.modeling_gemma3.Gemma3RMSNorm", 1.0, False),
        ("olmo2.modeling_olmo2.Olmo2RMSNorm", 0.0, False),
        ("t5.modeling_t5.T5LayerNorm", 0.0, True),
        ("qwen3.modeling_qwen3.Qwen3RMSNorm", 0.0, True),
    ],
)
def test_conventions_are_found_by_trying(module: str, offset: float, round_first: bool) -> None:
    path, name = module.rsplit(".", 1)
    norm = getattr(__import__(f"transformers.models.{path}", fromlist=[name]), name)(48)
    norm.to(torch.bfloat16)
    found = {"fastft_centred": False, "fastft_offset": offset, "fastft_narrow": None}
    found["fastft_round_first"] = round_first
    assert dict(norm_facts(norm)) == found
    x = torch.randn(4, 48).bfloat16()
    norm.float()
    norm.weight.data.normal_()
    expected = norm(x)
    found = dict(norm_facts(norm))
    assert (found["fastft_offset"], found["fastft_round_first"]) == (offset, round_first)
    assert found["fastft_narrow"] == ("wide" if expected.dtype == torch.float32 else "input")
    norm.__class__ = swapped_class(FusedRMSNorm, type(norm), tuple(found.items()))
    y = norm(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert not call_counts(norm).fallback


class _Shifted(nn.Module):
    """Looks like an RMS norm, is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.var(-1, keepdim=True) + self.eps)


class _Gated(nn.Module):
    """An RMS norm with a second input: it cannot be run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


class _Noisy(nn.Module):
    """A gated MLP's parts with something more between them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj, self.act_fn = nn.Linear(48, 32), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(hidden, 0.5, self.training))


def test_what_only_looks_like_it_is_left_alone_with_its_reason() -> None:
    model = build("Llama")
    model.model.norm = _Shifted()
    model.gated = _Gated()
    model.model.layers[1].mlp = _Noisy()
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    fastft.accelerate(model)
    reasons = {m.name: m.reason for m in fastft.explain(model).modules if not m.fused}
    assert set(reasons) == {"gated", "model.norm", "model.layers.1.mlp", "model.layers.0.mlp"}
    assert reasons["gated"] == "_Gated computes no RMS norm we know"
    assert reasons["model.norm"] == "_Shifted computes no RMS norm we know"
    assert reasons["model.layers.0.mlp"] == "activation is ReLU"
    # Its dropout draws in training only: proofs run in training mode.
    assert reasons["model.layers.1.mlp"].startswith("verification: relative difference")


def padded() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "Mistral", "Phi3", "Olmo2"])
def test_full_training_on_padded_batches_is_the_model_s_own(name: str) -> None:
    """Every parameter trained: norm weights get their gradients; masks come from the padding."""
    values: dict[str, Any] = {}
    if name == "Gemma3":
        name, values = "Gemma3", {"head_dim": 8, "sliding_window": 4}
        config = transformers.Gemma3TextConfig(**{**SMALL, **values})
        torch.manual_seed(0)
        model = transformers.Gemma3ForCausalLM(config)
    else:
        model = build(name)
    expected = trained(model, padded())
    fastft.accelerate(model, lora=False, loss=False)
    got = trained(model, padded())
    assert_close(got, expected)
    assert all(m.fused and m.fused_calls == 1 for m in fastft.explain(model).modules if
               m.kind in ("norm", "glu", "attention"))  # fmt: skip
    assert [len(kinds(model, kind)) for kind in ("glu", "attention")] == [2, 2]
    assert len(kinds(model, "norm")) >= 5


def test_what_is_patched_into_a_model_s_module_later_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fused code runs over the names of its module as they are, not as they once were."""
    from transformers.models.llama import modeling_llama

    model = fastft.accelerate(build("Llama"))
    trained(model, padded())
    calls = []
    original = modeling_llama.apply_rotary_pos_emb

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", patched)
    trained(model, padded())
    assert len(calls) == 2


def test_left_padding_and_position_ids() -> None:
    model = build("Llama")
    batch = padded()
    batch = {k: v.flip(1) for k, v in batch.items()}
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = trained(model, batch)
    assert_close(trained(fastft.accelerate(model), batch), expected)


def test_copies_and_pickles_stay_fused_and_restore() -> None:
    model = build("Llama")
    original = {n: type(m) for n, m in model.named_modules()}
    fastft.accelerate(model, loss=False)
    batch = padded()
    expected = trained(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(m) for m in copied.modules()} == {type(m) for m in model.modules()}
        assert_close(trained(copied, batch), expected)
        fastft.restore(copied)
        assert {n: type(m) for n, m in copied.named_modules()} == original


def test_a_configuration_that_models_share_is_not_touched() -> None:
    model = build("Llama")
    other = transformers.LlamaForCausalLM(model.config)
    before = model.config.to_dict()
    fastft.accelerate(model)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, FusedAttention)
    assert attention.config._attn_implementation == "fastft"
    assert attention.config.hidden_size == 32
    assert model.config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == before
    assert not any(isinstance(m, FusedAttention) for m in other.modules())
    attention.config.probe = 3
    assert model.config.probe == 3
    attention.config = other.config
    assert attention.__dict__["config"] is other.config


def test_eager_attention_is_left_to_the_model() -> None:
    model = build("Llama", attn_implementation="eager")
    fastft.accelerate(model)
    (reason,) = {m.reason for m in kinds(model, "attention")}
    assert reason == "attention implementation is eager, not sdpa"
    # And switched later: the module follows.
    model = fastft.accelerate(build("Llama"))
    model.set_attn_implementation("eager")
    expected = trained(model, padded())
    assert call_counts(model.model.layers[0].self_attn).fused == 0
    model.set_attn_implementation("sdpa")
    assert_close(trained(model, padded()), expected)
    assert call_counts(model.model.layers[0].self_attn).fused == 1


def test_attention_dropout_runs_as_sdpa_and_is_counted() -> None:
    model = fastft.accelerate(build("Llama", attention_dropout=0.5))
    model.train()
    trained(model, padded())
    counts = call_counts(model.model.layers[0].self_attn)
    assert (counts.fused, dict(counts.fallback)) == (0, {"dropout of attention weights": 1})


def test_generation_with_a_cache_says_the_same() -> None:
    model = build("Llama").eval()
    batch = padded()
    ids, mask = (t.flip(1) for t in (batch["input_ids"], batch["attention_mask"]))
    facts = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **facts)
    fastft.accelerate(model, strict=True)
    assert torch.equal(model.generate(ids, **facts), expected)


def test_classes_keep_their_names_and_kinds() -> None:
    model = build("Llama")
    norm = type(model.model.norm)
    fastft.accelerate(model)
    assert isinstance(model.model.norm, norm)
    assert isinstance(model.model.norm, FusedRMSNorm)
    assert isinstance(model.model.layers[0].mlp, FusedGatedMLP)
    assert type(model.model.norm).__name__ == norm.__name__
    assert type(model.model.norm) is type(model.model.layers[0].input_layernorm)


def test_compiles_without_a_graph_break() -> None:
    model = build("Llama")
    batch = padded()
    del batch["attention_mask"]
    fastft.accelerate(model)
    expected = trained(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(**batch).loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert_close(got, expected[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    model = fastft.accelerate(build("Llama"))
    model.train()
    expected = trained(model, padded())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = trained(model, padded())
    assert all(map(torch.equal, got[1], expected[1]))


def test_under_inference_mode_too() -> None:
    model = build("Llama").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        expected = model(ids).logits
        got = fastft.accelerate(model)(ids).logits
    assert_close(got, expected)
