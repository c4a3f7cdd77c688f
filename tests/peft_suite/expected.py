"""What is run of PEFT's tests, and how it is expected to end: data only.

A failure not listed here fails the run, and so does a listed one that passes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """A test file of PEFT's.

    select:     regular expression for the ids to run; empty for all.
    min_fused:  fewest calls that must run fused; below it the run is green on fallback only.
    full:       only with --full.
    """

    name: str
    select: str = ""
    min_fused: int = 0
    full: bool = False


# Ids like "...-LoraConfig-config_kwargs0" and "[LoraConfig-...", not AdaLoraConfig and its like.
_LORA = r"[-\[]LoraConfig-"

FILES: tuple[File, ...] = (
    File("test_custom_models.py", select=_LORA, min_fused=600),
    File("test_decoder_models.py", select=_LORA, min_fused=14_000),
    File("test_encoder_decoder_models.py", select=_LORA, min_fused=10_000),
    File("test_feature_extraction_models.py", select=_LORA, min_fused=2_500),
    File("test_seq_classifier.py", select=_LORA, min_fused=45),
    # Ranks above the width of its toy layers: all of it runs through PEFT.
    File("test_low_level_api.py"),
    # Mostly aLoRA and its like, which are not fused: they must go on working.
    File("test_lora_variants.py"),
    File("test_target_parameters.py", min_fused=900, full=True),
    File("test_initialization.py", min_fused=275, full=True),
    File("test_tuners_utils.py", full=True),
    File("test_trainable_tokens.py", min_fused=25, full=True),
)

_HUB = "files of the hub"
_TOKENIZER = "a tokenizer of the hub"
_WIDTH = "opt-125m in its real width; ours is 64 wide"

# Fail in plain PEFT too: regular expression over ids -> what is missing.
OFFLINE: dict[str, str] = {
    "::test_load_checkpoint_offline_non_default_cache_dir$": _HUB,
    "::test_load_from_hub_then_offline_model$": _HUB,
    "::test_lora_incompatible_mamba_modules$": _HUB,
    "::test_nemotron_h_has_defaults_and_blocks_mamba_modules$": _HUB,
    "::test_inject_from_state_dict_low_cpu_mem_usage_with_weight_conversion$": _HUB,
    "::test_inject_from_state_dict_model_with_weight_conversion$": _HUB,
    "::test_inject_from_state_dict_stable_diffusion$": _HUB,
    "::test_prefix_removal_is_undone$": _HUB,
    "::test_base_model_type_transformers_automodel$": _HUB,
    "::test_transformer_model_without_adapter_raises$": _HUB,
    "::TestModelAndLayerStatus::test_transformers_model$": _HUB,
    "::test_maybe_include_all_linear_layers_diffusion$": _HUB,
    "::TestTrainableTokens::test_stand_alone_usage$": _TOKENIZER,
    "::TestTrainableTokens::test_basic_training$": _TOKENIZER,
    r"::test_combined_with_peft_method_usage\[peft_config0\]$": _TOKENIZER,
    r"::test_disable_adapters_with_merging\[peft_config0\]$": _TOKENIZER,
    r"::test_no_embeddings_in_save_with_combined_usage\[peft_config0\]$": _TOKENIZER,
    r"::test_safe_merge_with_adapter\[peft_config0\]$": _TOKENIZER,
    r"::test_weight_tying_applied_when_model_is_tied\[peft_config0-list\]$": _WIDTH,
    r"::test_weight_tying_applied_when_model_is_tied\[peft_config1-mapping\]$": _WIDTH,
    r"::test_weight_tying_applied_when_model_is_tied_standalone\[list\]$": _WIDTH,
    r"::test_weight_tying_applied_when_model_is_tied_standalone\[mapping\]$": _WIDTH,
}

# Pass in plain PEFT and cannot pass with fused layers: regular expression over ids -> why.
DIFFERENT: dict[str, str] = {
    "::test_modules_to_save_targets_lora_layer_raises$": "matches the repr of PEFT's own class",
    "::test_trainable_token_indices_targets_lora_layer_raises$": "the same, of its Embedding",
    # 4 of 10,000 outputs near zero differ by 2e-7: the bias is added after the magnitude.
    "::test_lora_use_dora_linear$": "asks for 1e-5 of every element, also where terms cancel",
}
