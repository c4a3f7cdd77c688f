"""LoRA over bitsandbytes' 8-bit layers, torchao's and HQQ's: PEFT's results; those of absent
packages are skipped."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft import memory
from fastft.nn import call_counts
from tests.patch.quantized import BF16, F16, F32, Two, all_fused, assert_merged_as_peft, run


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def of_8_bits(model: nn.Module, threshold: float = 6.0) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name == "lm_head":
                continue
            sizes = child.in_features, child.out_features, child.bias is not None
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
            weight = child.weight.detach().clone()
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            made.bias = child.bias
            setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_8bit = True  # what PEFT asks for
    return model


def of_torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def of_hqq(model: nn.Module) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    dtype = next(model.parameters()).dtype
    for name, child in list(model.named_children()):
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
        made = hqq.HQQLinear(child, config, compute_dtype=dtype, device="cpu")
        setattr(model, name, made)
    return model


PACKAGES = {"8bit": of_8_bits, "torchao": of_torchao, "hqq": of_hqq}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("package", PACKAGES)
def test_layers_of_packages(package: str, dtype: torch.dtype) -> None:
    """Against PEFT over the same layer: the products have errors of their own, the same on both."""
    base = PACKAGES[package](Two().to(dtype))
    options = {"r": 4, "target_modules": ["q", "k", "o"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**options))
    x = torch.randn(3, 50, 64)
    want = run(model, x, dtype)
    fastft.accelerate(model, strict=True)
    got = run(model, x, dtype)
    # As in test_results_and_gradients, but products of 8 bits after a rounding jump by a code.
    bound = 16 * torch.finfo(dtype).eps
    if (package, dtype) == ("8bit", F32):
        bound = 16 * torch.finfo(F16).eps
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()
    assert all_fused(model)
    assert {r.siblings for r in fastft.explain(model).modules if r.kind == "lora"} == {1, 2}
    fastft.restore(model)
    assert all(map(torch.equal, run(model, x, dtype), want))


IDS = torch.arange(4, 84).view(2, 40)


def tiny_llama(**config: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    model = of_8_bits(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(BF16))
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False))


def steps(model: Any) -> list[Tensor]:
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_a_model_in_8_bits() -> None:
    plain = tiny_llama()
    fused = fastft.accelerate(copy.deepcopy(plain), strict=True)
    found = [m(input_ids=IDS, labels=IDS).loss for m in (fused, plain)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    # What a loss of random logits hardly shows: without its adapters the model is off by 1.4.
    got, want = (m(input_ids=IDS).logits.double() for m in (fused, plain))
    assert (got - want).norm() <= 16 * torch.finfo(BF16).eps * want.norm()
    assert all_fused(fused)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = [m.eval().generate(input_ids=IDS[:1, :6], **options) for m in (fused, plain)]
    assert torch.equal(*tokens)
    assert all_fused(fused)
    held = io.BytesIO()
    torch.save(fused, held)
    held.seek(0)
    want = fused(input_ids=IDS, labels=IDS).loss
    assert torch.equal(torch.load(held, weights_only=False)(input_ids=IDS, labels=IDS).loss, want)
    classes = [type(m) for m in plain.modules()]
    assert_merged_as_peft(fused, plain)
    assert [type(m) for m in fastft.restore(fused).modules()] == classes


@pytest.mark.parametrize("policy", ["lora", "attention", "full", "offload"])
def test_policies_change_no_bit(policy: str) -> None:
    want = steps(fastft.accelerate(tiny_llama(lora_dropout=0.3)).train())
    model = fastft.accelerate(tiny_llama(lora_dropout=0.3)).train()
    got = steps(memory.checkpoint(model, policy))
    assert all(map(torch.equal, got, want))
    assert all_fused(model)


def test_variants_are_pefts() -> None:
    model = of_8_bits(Two())
    options = {"r": 4, "target_modules": ["q", "k", "o"], "use_dora": True}
    plain = get_peft_model(model, LoraConfig(**options))
    fused = fastft.accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 50, 64)
    assert torch.equal(fused(x), plain(x))
    reason = "LoRA variant over another package's product"
    assert dict(call_counts(fused.base_model.model.q).fallback) == {reason: 1}
    assert {r.reason for r in fastft.explain(fused).modules if r.kind == "lora"} == {reason}


def test_patch_peft_makes_fused_layers() -> None:
    fastft.patch_peft()
    try:
        model = tiny_llama()
    finally:
        fastft.unpatch_peft()
    model(input_ids=IDS, labels=IDS)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert call_counts(layer).fused == 1
    plain = type(tiny_llama().base_model.model.model.layers[0].mlp.up_proj)
    assert (plain.__module__, plain.__name__) == ("peft.tuners.lora.bnb", "Linear8bitLt")
    assert type(layer) is not plain
