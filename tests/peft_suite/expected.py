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
    File("test_custom_models.py", select=_LORA),
    File("test_decoder_models.py", select=_LORA),
    File("test_encoder_decoder_models.py", select=_LORA),
    File("test_feature_extraction_models.py", select=_LORA),
    File("test_seq_classifier.py", select=_LORA),
    File("test_low_level_api.py"),
    File("test_lora_variants.py"),
    File("test_target_parameters.py", full=True),
    File("test_initialization.py", full=True),
    File("test_tuners_utils.py", full=True),
    File("test_trainable_tokens.py", full=True),
)

# Fail without fastft too, for want of the network: regular expression over ids -> what is missing.
OFFLINE: dict[str, str] = {}

# Pass in plain PEFT and cannot pass with fused layers: regular expression over ids -> why.
DIFFERENT: dict[str, str] = {
    r"test_modules_to_save_targets_lora_layer_raises": "matches the repr of PEFT's own class",
}
