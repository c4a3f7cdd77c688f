"""Families whose code nobody here wrote: every one trained whole, beside itself unaccelerated, on a
plain and on a padded batch, and what of each is fused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import fastft

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
# name -> (configuration beside SMALL, fused norms, gated MLPs, attentions, rotary functions)
FAMILIES: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "Apertus": ({}, 9, 0, 2, 2),
    "Arcee": ({}, 5, 0, 2, 2),
    "Cohere": ({}, 3, 2, 2, 2),
    "Ernie4_5": ({"head_dim": 8}, 5, 2, 2, 2),
    "Exaone4": ({}, 9, 2, 2, 2),
    "Falcon": ({}, 3, 0, 0, 2),
    "Gemma": ({"head_dim": 8}, 5, 2, 2, 2),
    "Gemma2": ({"head_dim": 8, "sliding_window": 4}, 9, 2, 0, 2),  # eager: it caps its scores
    "Glm": ({"head_dim": 8}, 5, 2, 2, 2),
    "GPTNeoX": ({}, 5, 0, 2, 2),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, 5, 0, 0, 2),
    "Granite": ({}, 5, 2, 2, 2),
    "Helium": ({"head_dim": 8}, 5, 2, 2, 2),
    "Llama": ({}, 5, 2, 2, 2),
    "Mistral": ({"sliding_window": 4}, 5, 2, 2, 2),
    "Mixtral": ({"num_local_experts": 4}, 5, 0, 2, 2),
    "Nemotron": ({}, 5, 0, 2, 2),
    "Olmo": ({}, 0, 2, 2, 2),
    "Olmo2": ({}, 9, 2, 2, 2),
    "Persimmon": ({}, 9, 0, 2, 2),
    "Phi": ({}, 3, 0, 2, 2),
    "Phi3": ({}, 5, 2, 2, 2),
    "Qwen2": ({}, 5, 2, 2, 2),
    "Qwen3": ({"head_dim": 8}, 9, 2, 2, 2),
    "Qwen3Moe": (MOE, 9, 0, 2, 2),
    "SeedOss": ({"head_dim": 8}, 5, 0, 2, 2),  # its MLP drops in training: refused by its proof
    "SmolLM3": ({}, 5, 2, 2, 2),
    "StableLm": ({}, 5, 2, 2, 2),
    "Starcoder2": ({}, 5, 0, 2, 2),
}


ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
OPT = {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}
GPT2 = {
    "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 3}
# class of model -> (class of configuration, values, fused norms, MLPs, attentions, rotary
# functions, heads with their loss)
OTHERS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int, int]]] = {
    "BertForMaskedLM": ("BertConfig", ENCODER, (6, 0, 2, 0, 1)),
    "RobertaForMaskedLM": ("RobertaConfig", ENCODER, (6, 0, 2, 0, 1)),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", ENCODER, (6, 0, 0, 0, 1)),
    "ViTForImageClassification": ("ViTConfig", {**ENCODER, **IMAGES}, (5, 0, 2, 0, 0)),
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ, (12, 0, 6, 0, 1)),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**SMALL, "num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48},
        (5, 2, 2, 0, 1),
    ),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        {**SMALL, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
        (13, 2, 2, 2, 1),
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, (5, 0, 2, 0, 1)),
    "OPTForCausalLM": ("OPTConfig", OPT, (5, 0, 2, 0, 1)),
    "T5ForConditionalGeneration": ("T5Config", T5, (12, 0, 0, 0, 1)),
    # As T5 v1.1, whose MLP is gated and drops elements between.
    "MT5ForConditionalGeneration": ("MT5Config", T5, (12, 4, 0, 0, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    """Encoders, encoder-decoders, images, decoders without or with another rotary function."""
    config, values, counts = OTHERS[name]
    found = getattr(transformers, config, None)
    if found is None:
        pytest.skip(f"this Transformers has no {config}")
    torch.manual_seed(0)
    plain = getattr(transformers, name)(found(**values)).float().eval()
    fused = fastft.accelerate(copy.deepcopy(plain))
    for batch in batches():
        if "image_size" in values:
            given = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
        else:
            given = batch
        expected, got = trained(plain, given), trained(fused, given)
        assert set(got) == set(expected)
        scale = max(float(t.abs().max()) for t in expected.values())
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * scale, msg=key)
    reports = fastft.explain(fused).modules
    kinds = ("norm", "glu", "attention", "rope", "loss")
    assert tuple(sum(m.fused for m in reports if m.kind == kind) for kind in kinds) == counts
    # T5's halves have tables of their own over the weight of the one they share.
    assert all(m.fused_calls >= 2 for m in reports if m.fused and m.name != "shared")
    assert all(m.reason for m in reports if not m.fused)


def test_the_page_says_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    five = r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$"
    others = re.findall(five, page, re.MULTILINE)
    assert {name: tuple(map(int, counts)) for name, *counts in others} == {
        name: counts for name, (_, _, counts) in OTHERS.items()
    }
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: tuple(map(int, counts)) for name, *counts in rows} == {
        name: counts for name, (_, *rest) in FAMILIES.items() for counts in [tuple(rest)]
    }


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 13:] = mask[1, 6:] = 0
    padded = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return [{"input_ids": ids, "labels": ids}, {"input_ids": ids, **padded}]


def trained(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    values, norms, mlps, attentions, ropes = FAMILIES[name]
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"this Transformers has no {name}")
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}ForCausalLM")(config(**{**SMALL, **values}))
    plain = made.float().eval()  # some have dropout by default
    fused = fastft.accelerate(copy.deepcopy(plain))
    for batch in batches():
        expected, got = trained(plain, batch), trained(fused, batch)
        assert set(got) == set(expected)
        # Of the largest gradient: a key's bias has none but rounding, softmax does not see it.
        scale = max(float(t.abs().max()) for t in expected.values())
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * scale, msg=key)
    reports = fastft.explain(fused).modules
    counts = [
        sum(m.fused for m in reports if m.kind == kind)
        for kind in ("norm", "glu", "attention", "rope")
    ]
    assert [*counts[:2], counts[3]] == [norms, mlps, ropes]
    # Which families go through the attention interface changed with Transformers, and an older one
    # may pass it what only torch's own takes: such calls are counted with their reason.
    known = Version(transformers.__version__) >= Version("5.23")
    assert not known or counts[2] == attentions
    for m in reports:
        if m.fused:
            assert m.fused_calls >= 2 or (not known and m.kind == "attention" and m.fallback_calls)
    assert all(m.reason for m in reports if not m.fused)
    ids = batches()[0]["input_ids"][:1, :5]
    facts = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fused.generate(ids, **facts), plain.generate(ids, **facts))
