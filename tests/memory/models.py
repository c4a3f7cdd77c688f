"""Small models for the memory tests, and a step's loss and gradients."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastft

VOCABULARY = 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(
    *,
    fused: bool = True,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    use_dora: bool = False,
    **shape: int,
) -> Any:
    """A Llama with LoRA on all linears, B not zero, in training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).to(dtype)
    model.config.use_cache = False
    config = LoraConfig(
        r=4,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=use_dora,
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    if fused:
        fastft.accelerate(model)
    return model


def steps(model: Any, count: int = 2, tokens: int = 24) -> list[list[Tensor]]:
    """Loss and gradients of so many steps; inputs and dropout depend on the step alone."""
    found = []
    for number in range(count):
        torch.manual_seed(100 + number)
        ids = torch.randint(VOCABULARY, (2, tokens))
        mask = torch.ones_like(ids)
        mask[0, tokens - 4 :] = 0
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    return found


def same(got: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    """Bit for bit."""
    return len(got) == len(expected) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(got, expected, strict=True)
    )
