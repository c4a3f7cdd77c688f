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
# name -> (configuration beside SMALL, fused norms, fused gated MLPs, fused attentions)
FAMILIES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "Apertus": ({}, 9, 0, 2),
    "Arcee": ({}, 5, 0, 2),
    "Cohere": ({}, 0, 2, 2),
    "Ernie4_5": ({"head_dim": 8}, 5, 2, 2),
    "Exaone4": ({}, 9, 2, 2),
    "Falcon": ({}, 0, 0, 0),
    "Gemma": ({"head_dim": 8}, 5, 2, 2),
    "Gemma2": ({"head_dim": 8, "sliding_window": 4}, 9, 2, 0),  # eager: it caps its scores
    "Glm": ({"head_dim": 8}, 5, 2, 2),
    "GPTNeoX": ({}, 0, 0, 2),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, 5, 0, 0),
    "Granite": ({}, 5, 2, 2),
    "Helium": ({"head_dim": 8}, 5, 2, 2),
    "Nemotron": ({}, 0, 0, 2),
    "Olmo": ({}, 0, 2, 2),
    "Olmo2": ({}, 9, 2, 2),
    "Persimmon": ({}, 0, 0, 2),
    "Phi": ({}, 0, 0, 2),
    "Qwen3Moe": (MOE, 9, 0, 2),
    "SeedOss": ({"head_dim": 8}, 5, 0, 2),  # its MLP drops in training: refused by its proof
    "SmolLM3": ({}, 5, 2, 2),
    "StableLm": ({}, 0, 2, 2),
    "Starcoder2": ({}, 0, 0, 2),
}


def test_the_page_says_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
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
    values, norms, mlps, attentions = FAMILIES[name]
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
        sum(m.fused for m in reports if m.kind == kind) for kind in ("norm", "glu", "attention")
    ]
    assert counts[:2] == [norms, mlps]
    # Which families go through the attention interface changed with Transformers, and an older one
    # may pass it what only torch's own takes: such calls are counted with their reason.
    known = Version(transformers.__version__) >= Version("5.23")
    assert not known or counts[2] == attentions
    for m in reports:
        if m.fused and m.kind != "loss":
            assert m.fused_calls >= 2 or (not known and m.kind == "attention" and m.fallback_calls)
    assert all(m.reason for m in reports if not m.fused)
    ids = batches()[0]["input_ids"][:1, :5]
    facts = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fused.generate(ids, **facts), plain.generate(ids, **facts))
