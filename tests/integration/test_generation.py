"""Few rows without gradients: generation and evaluation are PEFT's to rounding, by few calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel

import fastft
from fastft import ops
from fastft.nn import lora
from tests.integration import tiny
from tests.integration.test_adapters import BATCH, NAMES, two_adapters
from tests.integration.test_peft_api import fused_and_not

MODELS: dict[str, Callable[[], PeftModel]] = {
    "llama": lambda: tiny.peft_model("llama"),
    "conv1d": lambda: tiny.peft_model("gpt2"),
    "base bias": lambda: tiny.peft_model("qwen2"),
    "adapter bias": lambda: tiny.peft_model("qwen2", lora_bias=True),
    "DoRA": lambda: tiny.peft_model("qwen2", use_dora=True),
    "two adapters": two_adapters,
}


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each fused call from here on."""
    calls: list[int] = []

    def watch(module: Any, name: str) -> None:
        fused = getattr(module, name)

        def watched(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(weights))
            return fused(x, weights, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(ops, "lora_linear_siblings")
    watch(lora, "vouched_siblings")
    return calls


def assert_as_exact(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Logits err at most 4 times as much as plain PEFT's."""
    own = max(tiny.relative(plain, truth), torch.finfo(torch.float32).eps)
    assert tiny.relative(got, truth) <= tiny.ERROR_FACTOR * own


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_one_token_a_sample(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MODELS[name]()
    exact = tiny.in_float64(plain)
    fused = fastft.accelerate(copy.deepcopy(plain), attention=False)
    calls = watch_calls(monkeypatch)
    ids = BATCH["input_ids"][:, :1]
    results = [m.train(mode == "train")(input_ids=ids).logits for m in (fused, plain, exact)]
    assert_as_exact(*results)
    assert calls == []
    assert fused_and_not(fused) == (len(tiny.lora_layers(fused)), {})


@torch.no_grad()
def test_one_token_in_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = two_adapters().eval()
    exact = tiny.in_float64(plain).eval()
    fused = fastft.accelerate(copy.deepcopy(plain))
    calls = watch_calls(monkeypatch)
    ids = BATCH["input_ids"][:, :1]
    results = [m(input_ids=ids, adapter_names=NAMES).logits for m in (fused, plain, exact)]
    assert_as_exact(*results)
    assert calls == []


@pytest.mark.parametrize("case", ["gradients", "dropout", "autocast", "many rows", "training"])
def test_other_calls_are_fused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training mode with several tokens may be a reentrant checkpoint, whose recompute must round
    as its forward did."""
    model = fastft.accelerate(tiny.peft_model("llama", dropout=0.5 if case == "dropout" else 0.0))
    model.train(case in ("dropout", "training"))
    ids = BATCH["input_ids"]
    ids = {"many rows": ids.repeat(6, 4), "training": ids}.get(case, ids[:, :1])
    calls = watch_calls(monkeypatch)
    autocast = torch.autocast("cpu", torch.bfloat16) if case == "autocast" else nullcontext()
    with torch.set_grad_enabled(case == "gradients"), autocast:
        model(input_ids=ids)
    assert len(calls) == len(tiny.lora_layers(model))


def test_siblings_are_learnt_from_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastft.accelerate(tiny.peft_model("llama")).eval()
    with torch.no_grad():
        model(**tiny.inputs("llama"))
    calls = watch_calls(monkeypatch)
    tiny.step(model, tiny.inputs("llama"))
    assert sorted(calls) == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generates_what_peft_generates(name: str) -> None:
    plain = tiny.peft_model(name).eval()
    fused = fastft.accelerate(copy.deepcopy(plain))
    ids = tiny.inputs(name)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        fused.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options)
    )
