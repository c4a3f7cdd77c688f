"""A folder of tiny random models under the names PEFT's tests ask the hub for.

Only what the tests look at is kept: the architecture, the names of its modules, a few sizes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

Spec = tuple[str, str, dict[str, Any]]

_LLAMA_LIKE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_BERT_LIKE = {
    "vocab_size": 1124,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
_SPECIAL_98 = {"bos_token_id": 98, "eos_token_id": 98}

_OPT: Spec = (
    "OPTForCausalLM",
    "OPTConfig",
    {
        "vocab_size": 50265,
        "hidden_size": 16,
        "ffn_dim": 4,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 100,
    },
)
_OPT_125M: Spec = (
    "OPTForCausalLM",
    "OPTConfig",
    {
        "vocab_size": 50272,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 512,
    },
)
# As many key/value heads as heads: the tests of prefix tuning count on it.
_LLAMA: Spec = ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA_LIKE, "num_key_value_heads": 4})
_GPT2: Spec = (
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": 1000,
        "n_positions": 512,
        "n_embd": 32,
        "n_layer": 5,
        "n_head": 4,
        "pad_token_id": 98,
        **_SPECIAL_98,
    },
)
_T5: Spec = (
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": 1103,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 5,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
)
_QWEN3_MOE: Spec = (
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    {
        **_LLAMA_LIKE,
        "head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
)

MODELS: dict[str, Spec] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/opt-125m": _OPT_125M,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": 1000,
            "n_positions": 512,
            "n_embd": 32,
            "n_layer": 5,
            "n_head": 4,
            "rotary_dim": 4,
            **_SPECIAL_98,
        },
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA_LIKE),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_LLAMA_LIKE, "head_dim": 4},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM",
        "MistralConfig",
        _LLAMA_LIKE,
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA_LIKE, "head_dim": 4},
    ),
    "hf-internal-testing/Mixtral-tiny": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA_LIKE, "num_local_experts": 4},
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": _QWEN3_MOE,
    "hf-internal-testing/tiny-qwen3-moe": _QWEN3_MOE,
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 4,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "moe_layers": [0, 1],
            "interleave_moe_layer_step": 1,
        },
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA_LIKE, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT_LIKE),
    "peft-internal-testing/tiny-random-RobertaModel": (
        "RobertaModel",
        "RobertaConfig",
        _BERT_LIKE,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        _BERT_LIKE,
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        _BERT_LIKE,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT_LIKE,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT_LIKE,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _LLAMA_LIKE,
    ),
    "peft-internal-testing/tiny-random-t5": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 1024,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "max_position_embeddings": 100,
        },
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BERT_LIKE, "vocab_size": 1024},
    ),
}
DONE = "complete"


def make(folder: Path) -> Path:
    """Saves every model under `folder` once; a folder left half made is made again."""
    if (folder / DONE).exists() and (folder / DONE).read_text() == _fingerprint():
        return folder
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    making = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    for name, (model, config, values) in MODELS.items():
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**values))
        made.save_pretrained(making / name)
    (making / DONE).write_text(_fingerprint())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(making, folder)
    return folder


def _fingerprint() -> str:
    import transformers

    return f"{transformers.__version__} {MODELS!r}"
