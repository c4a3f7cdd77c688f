"""Tiny random models of every architecture the integration tests use, as data.

Nothing is downloaded: configurations of a few thousand weights, drawn from a seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

VOCABULARY = 64
BATCH, TOKENS = 2, 9
ERROR_FACTOR = 4.0
# Switches of accelerate that leave the rest of a block, and so its very bits, alone.
LORA_ONLY = {"norm": False, "glu": False, "attention": False, "rope": False}

_DECODER = {
    "vocab_size": VOCABULARY,
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


@dataclass(frozen=True)
class Tiny:
    """An architecture.

    plain: a regular expression for the names of LoRA layers that are expected to stay PEFT's.
    """

    build: Callable[[], nn.Module]
    plain: str = "$never"
    task: str = "CAUSAL_LM"


def _of(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(transformers, config)(**values)
        return getattr(transformers, model)(made)

    return build


ARCHITECTURES: dict[str, Tiny] = {
    "llama": Tiny(_of("LlamaForCausalLM", "LlamaConfig", **_DECODER)),
    "qwen2": Tiny(_of("Qwen2ForCausalLM", "Qwen2Config", **_DECODER)),
    "qwen3": Tiny(_of("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=8)),
    "gemma3": Tiny(
        _of(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_DECODER,
            head_dim=8,
            sliding_window=4,
            final_logit_softcapping=5.0,
        ),
    ),
    "mistral": Tiny(_of("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=4)),
    "phi3": Tiny(_of("Phi3ForCausalLM", "Phi3Config", **_DECODER)),
    "gpt2": Tiny(
        _of(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    "opt": Tiny(
        _of(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
        )
    ),
    "bert": Tiny(
        _of(
            "BertForMaskedLM",
            "BertConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        task="TOKEN_CLS",
    ),
    "t5": Tiny(
        _of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        task="SEQ_2_SEQ_LM",
    ),
    "mixtral": Tiny(
        _of("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4),
        plain=r"\.mlp\.gate$",  # the router's weight: a parameter, no layer
    ),
}


def peft_model(name: str, *, dropout: float = 0.0, **config: Any) -> Any:
    """Plain PEFT on all linears of the architecture, float32, B drawn at random, in train mode."""
    torch.manual_seed(0)
    tiny = ARCHITECTURES[name]
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": dropout,
        "target_modules": "all-linear",
        "task_type": tiny.task if tiny.task != "TOKEN_CLS" else None,
        **config,
    }
    if name == "gpt2":
        options["fan_in_fan_out"] = True
    model = get_peft_model(tiny.build(), LoraConfig(**options))
    fill_adapters(model)
    return model.train()


def fill_adapters(model: nn.Module, seed: int = 1) -> None:
    """B starts at zero, which hides half of the work: every adapter weight is drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)


def inputs(name: str, seed: int = 2, ignored: int = 3) -> dict[str, Tensor]:
    """ids, labels: (2, 9); the first `ignored` labels of each row do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every trained parameter."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach().clone(), gradients


def in_float64(model: nn.Module) -> nn.Module:
    """The truth: a copy of the plain model with every weight in float64."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = (
                "eager"  # torch's grouped product has no float64
            )
    return exact


def relative(got: Tensor, truth: Tensor) -> float:
    """Relative error in the 2-norm, infinite for anything that is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    truth = truth.double()
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-300))


Result = tuple[Tensor, dict[str, Tensor]]


def assert_as_exact(
    got: Result, plain: Result, truth: Result, loss_error: float | None = None
) -> None:
    """Against float64, loss and gradients err at most 4 times as much as plain PEFT's worst.

    loss_error: plain PEFT's worst over several batches; a single loss may be right by chance.
    """
    assert set(got[1]) == set(plain[1]) == set(truth[1])
    assert got[1], "nothing was trained"
    eps = torch.finfo(torch.float32).eps
    if loss_error is None:
        loss_error = relative(plain[0], truth[0])
    assert relative(got[0], truth[0]) <= ERROR_FACTOR * max(loss_error, eps)
    worst = max(relative(plain[1][name], truth[1][name]) for name in truth[1])
    bound = ERROR_FACTOR * max(worst, eps)
    wrong = {
        name: error
        for name in truth[1]
        if (error := relative(got[1][name], truth[1][name])) > bound
    }
    assert not wrong, f"allowed {bound:.1e}: {wrong}"


def assert_as_exact_over(steps: list[tuple[Result, Result, Result]]) -> None:
    """The same for (got, plain, truth) of several batches, the loss by plain PEFT's worst."""
    worst = max(relative(plain[0], truth[0]) for _, plain, truth in steps)
    for got, plain, truth in steps:
        assert_as_exact(got, plain, truth, worst)


def assert_equal(got: Result, expected: Result) -> None:
    """The same bits."""
    assert torch.equal(got[0], expected[0])
    assert set(got[1]) == set(expected[1])
    different = [name for name in got[1] if not torch.equal(got[1][name], expected[1][name])]
    assert not different


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every LoRA layer by its name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
