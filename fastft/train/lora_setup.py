"""From ``TrainConfig`` to a PeftModel, plain or fused, with target names checked first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError, nearest
from fastft.train.config import TrainConfig
from fastft.train.models import refusing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

__all__ = [
    "adapter_names",
    "add_adapters",
    "add_lora",
    "apply_memory_policy",
    "check_targets",
    "lora_config",
]

ALL_LINEAR = "all-linear"
# What PEFT raises where it cannot adapt a model as asked, and what was expected.
PEFT_REFUSALS = (ValueError, TypeError, NotImplementedError)
PEFT_TAKES = "a model and adapters that PEFT can put together"


def lora_config(cfg: TrainConfig) -> LoraConfig:
    """PEFT's own configuration."""
    from peft import LoraConfig

    alpha = int(cfg.lora_alpha) if float(cfg.lora_alpha).is_integer() else cfg.lora_alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.r,
        lora_alpha=alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=cfg.target_modules,
        modules_to_save=cfg.modules_to_save,
        use_rslora=cfg.use_rslora,
        use_dora=cfg.use_dora,
        rank_pattern=cfg.rank_pattern or {},
        alpha_pattern=cfg.alpha_pattern or {},
    )


def adapter_names(count: int) -> list[str]:
    """Of the adapters of one job."""
    return [f"adapter{i}" for i in range(count)]


def add_adapters(model: nn.Module, cfgs: Sequence[TrainConfig]) -> PeftModel:
    """An adapter for each configuration, with the weights that a run of its own would start from;
    the first is active."""
    from peft import get_peft_model
    from transformers import set_seed

    names = adapter_names(len(cfgs))
    adapted: Any = None
    for name, cfg in zip(names, cfgs, strict=True):
        set_seed(cfg.seed)
        with refusing("train_together", PEFT_TAKES, *PEFT_REFUSALS):
            if adapted is None:
                adapted = get_peft_model(model, lora_config(cfg), adapter_name=name)
            else:
                adapted.add_adapter(name, lora_config(cfg))
    return adapted  # type: ignore[no-any-return]


def check_targets(model: nn.Module, cfg: TrainConfig) -> None:
    """Refuses names no module of ``model`` has (PEFT passes over them when another one matches)
    and a rank above the smaller side of a target that is named, or, where all linear layers are,
    of every one: the router of a mixture of experts may be small."""
    names = [name for name, _ in model.named_modules() if name]
    last = sorted({name.rpartition(".")[2] for name, module in _matrices(model)})
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(cfg, key)
        if wanted is None or wanted == ALL_LINEAR:
            continue
        for target in [wanted] if isinstance(wanted, str) else wanted:
            if not any(_matches(target, name, isinstance(wanted, str)) for name in names):
                raise ConfigError(
                    "TrainConfig",
                    key,
                    expected=f"names of modules of {type(model).__name__}: {', '.join(last)}",
                    got=repr(target),
                    # A text is a pattern for whole names, as in PEFT.
                    remedy=f"Write it as a list: [{target}]."
                    if any(_matches(target, name, False) for name in names)
                    else nearest(target, last) or None,
                )
    for pattern in (*(cfg.rank_pattern or ()), *(cfg.alpha_pattern or ())):
        if not any(_is_target(name, cfg) and _fits(pattern, name) for name, _ in _matrices(model)):
            raise ConfigError(
                "TrainConfig",
                "rank_pattern, alpha_pattern",
                expected=f"patterns for names of target modules: {', '.join(last)}",
                got=repr(pattern),
                remedy=nearest(pattern, last) or None,
            )
    from fastft.nn.quantized import shape_of

    every = cfg.target_modules == ALL_LINEAR
    sides = {
        name: min(shape_of(module.weight))
        for name, module in _matrices(model)
        if _is_target(name, cfg) and (not every or _is_linear(module))
    }
    too_small = [name for name, most in sides.items() if _rank(name, cfg) > most]
    named = [name for name in too_small if not every or _pattern_of(name, cfg) is not None]
    if named or (too_small and len(too_small) == len(sides)):
        name = min(named, key=sides.__getitem__) if named else max(sides, key=sides.__getitem__)
        raise ConfigError(
            "TrainConfig",
            "r",
            expected=f"at most {sides[name]}, the smaller side of {name}",
            got=str(_rank(name, cfg)),
            remedy="Lower r, or its own in rank_pattern, or leave it out of target_modules.",
        )


def _fits(pattern: str, name: str) -> bool:
    # PEFT's rule for the keys of rank_pattern and alpha_pattern: the end of a name.
    return _regex("rank_pattern, alpha_pattern", rf"(.*\.)?({pattern})", name)


def _regex(key: str, pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            "TrainConfig", key, expected="a regular expression", got=str(error)
        ) from error


def _pattern_of(name: str, cfg: TrainConfig) -> int | None:
    """The rank that rank_pattern has for a module."""
    found = (r for pattern, r in (cfg.rank_pattern or {}).items() if _fits(pattern, name))
    return next(found, None)


def _rank(name: str, cfg: TrainConfig) -> int:
    found = _pattern_of(name, cfg)
    return cfg.r if found is None else found


def _matrices(model: nn.Module) -> list[tuple[str, Any]]:
    """Modules with one weight matrix (Linear, Conv1D, Embedding), plain or in 4 bits, by name."""
    from fastft.nn.quantized import dtype_of

    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name and weight is not None and weight.dim() == 2 and dtype_of(module).is_floating_point:
            found.append((name, module))
    return found


def _is_linear(module: nn.Module) -> bool:
    """What PEFT takes for "all-linear"."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _matches(target: str, name: str, pattern: bool) -> bool:
    # PEFT's rule: a text is a pattern for the whole name, list entries are names or endings.
    if pattern:
        return _regex("target_modules", target, name)
    return name == target or name.endswith(f".{target}")


def _is_target(name: str, cfg: TrainConfig) -> bool:
    wanted = cfg.target_modules
    if wanted == ALL_LINEAR:
        return not name.endswith(("lm_head", "embed_tokens", "embeddings"))
    if isinstance(wanted, str):
        return _matches(wanted, name, True)
    return any(_matches(target, name, False) for target in wanted)


def add_lora(model: nn.Module, cfg: TrainConfig) -> PeftModel:
    """``model`` with new adapters; fused if ``cfg.fused``. Adapter weights depend on ``cfg.seed``
    only, so plain and fused start alike."""
    from transformers import set_seed

    check_targets(model, cfg)
    set_seed(cfg.seed)
    from peft import get_peft_model

    with refusing("train", PEFT_TAKES, *PEFT_REFUSALS):
        if not cfg.fused:
            return get_peft_model(model, lora_config(cfg))
        import fastft

        return fastft.lora(model, lora_config(cfg), strict=cfg.strict)


def apply_memory_policy(model: nn.Module, cfg: TrainConfig) -> None:
    """Puts the model's layers under ``cfg.memory_policy``."""
    if cfg.memory_policy != "none":
        from fastft import memory

        memory.checkpoint(model, cfg.memory_policy)
