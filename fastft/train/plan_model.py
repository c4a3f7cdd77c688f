"""The model that is planned: built from its configuration on torch's meta device, adapted and fused
as it would be trained."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError, nearest
from fastft.memory.devices import Device
from fastft.train.config import TrainConfig

if TYPE_CHECKING:
    import torch

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Request",
    "as_stored",
    "check_request",
    "dtype_of",
    "largest_dequantised",
    "linear_numel",
    "load_config",
    "meta_model",
    "step_bytes",
    "trained_bytes",
    "weight_bytes",
]

METHODS = ("lora", "qlora", "full")
# Bytes of optimizer state an element of a trained tensor: the two moments of Adam, Lion's one;
# SGD's with momentum; of Adafactor, a tensor's that is no matrix; of Muon, a matrix's.
_STATES = {
    "AdamW": 8.0,
    "AdamW8bit": 2 + 8 / 256,
    "AdamWBF16": 4.0,
    "Lion": 4.0,
    "Lion8bit": 1 + 4 / 256,
    "SGD": 4.0,
    "ScheduleFreeAdamW": 8.0,
    "Adafactor": 4.0,
    "Muon": 4.0,
}
OPTIMIZERS = tuple(_STATES)
# These take whole matrices, whose states are beside them.
_OF_MATRICES = ("Adafactor", "Muon")
# Tensors below this size keep float32 states in the 8-bit optimizers.
_LEAST_8BIT = 4096
# NF4 with its block scales quantised again: 4 bits, 8 a block of 64, 32 a 256 of those.
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Request:
    """What is planned: ``cfg`` as it would be trained, and what a configuration does not say.

    Attributes:
        method: "lora", "qlora" (frozen linear layers in 4 bits) or "full".
        policy: of ``fastft.memory.checkpoint``.
        gpus: devices that share weights, gradients and states (FSDP).
        others: the runs of further adapters in the same job (``train_together``).
        optim: of ``fastft.optim``, in place of what the configurations have.
    """

    cfg: TrainConfig
    method: str = "lora"
    policy: str = "none"
    gpus: int = 1
    others: tuple[TrainConfig, ...] = ()
    optim: str | None = None

    def optim_of(self, cfg: TrainConfig) -> str:
        """The optimizer of one of the configurations."""
        return self.optim or cfg.optim

    @property
    def keeps_matrices_whole(self) -> bool:
        """Whether an optimizer has neither shards nor states elsewhere."""
        return any(self.optim_of(c) in _OF_MATRICES for c in self.cfgs)

    @property
    def cfgs(self) -> tuple[TrainConfig, ...]:
        """Of every adapter."""
        return (self.cfg, *self.others)

    @property
    def accumulates(self) -> bool:
        """Whether a micro-batch finds gradients of another."""
        return any(c.gradient_accumulation_steps > 1 for c in self.cfgs)

    @property
    def names(self) -> list[str]:
        """Of the adapters of a job of several."""
        from fastft.train.lora_setup import adapter_names

        return adapter_names(len(self.cfgs))

    def each(self, new: Callable[[TrainConfig], dict[str, Any]]) -> Request:
        """The same with what ``new`` says of every configuration in place of what it had."""
        cfg, *others = (cfg.replace(**new(cfg)) for cfg in self.cfgs)
        return dataclasses.replace(self, cfg=cfg, others=tuple(others))


def check_request(
    cfg: TrainConfig,
    method: str = "lora",
    gpus: int = 1,
    others: Sequence[TrainConfig] = (),
    optim: str | None = None,
) -> Request:
    """A request, or what is wrong with it.

    Raises:
        ConfigError: an unknown method or optimizer, one that cannot be shared or moved where that
            is asked for, or configurations that are no one job.
    """
    for option, given, known in (("method", method, METHODS), ("optim", optim, OPTIMIZERS)):
        if given is not None and given not in known:
            raise ConfigError(
                "fastft plan",
                option,
                expected=f"one of {', '.join(known)}",
                got=repr(given),
                remedy=nearest(given, known) or None,
            )
    request = Request(cfg, method, gpus=gpus, others=tuple(others), optim=optim)
    if not cfg.fused and request.optim_of(cfg) != "AdamW":
        raise ConfigError(
            "fastft plan", "optim", expected="AdamW where fused is false: torch's own",
            got=repr(optim),
        )  # fmt: skip
    for key, asked, whole in (("gpus", gpus, 1), ("optim_states", cfg.optim_states, "device")):
        if request.keeps_matrices_whole and asked != whole:
            raise ConfigError(
                "fastft plan", key, expected=f"{whole!r} with {' or '.join(_OF_MATRICES)}",
                got=repr(asked), remedy="They take whole matrices; AdamW takes parts.",
            )  # fmt: skip
    if gpus > 1 and cfg.optim_states == "host":
        raise ConfigError(
            "fastft plan", "optim_states", expected="device or paged with several GPUs",
            got="'host'", remedy="States of shards are not moved to the host.",
        )  # fmt: skip
    if others:
        from fastft.train.together import check_together

        check_together([cfg, *others])
        for name, value, only in (("method", method, "lora"), ("gpus", gpus, 1)):
            if value != only:
                raise ConfigError(
                    "fastft plan", name, expected=f"{only!r} with several adapters in one job",
                    got=repr(value),
                )  # fmt: skip
    return request


def load_config(model: str) -> Any:
    """The configuration of ``model``: a hub id, a folder, or a ``config.json``.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    from fastft.train.models import clear_model_errors, model_place, quiet_transformers

    path = Path(model)
    place = str(path.parent) if path.name == "config.json" else model_place(model)
    with clear_model_errors(model), quiet_transformers():
        return AutoConfig.from_pretrained(place)


def as_stored(request: Request, config: Any) -> tuple[Request, list[str]]:
    """The request for the weights as they are stored, or loaded: of bitsandbytes' 4 bits LoRA is
    QLoRA. Other kinds are counted as if they were not quantised, and a note says so."""
    if request.cfg.load_in_4bit and request.method == "lora":
        request = dataclasses.replace(request, method="qlora")
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return request, []
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind = stored.get("quant_method", "quantised")
    if kind == "bitsandbytes" and stored.get("load_in_4bit") and request.method != "full":
        return dataclasses.replace(request, method="qlora"), []
    return request, [f"The weights are stored as {kind}; here they are counted unquantised."]


def dtype_of(cfg: TrainConfig, device: Device) -> torch.dtype:
    import torch

    if cfg.dtype != "auto":
        found: torch.dtype = getattr(torch, cfg.dtype)
        return found
    from fastft.train.machine import resolve_dtype

    if device.type == "cuda":
        return torch.bfloat16 if device.bfloat16 else torch.float32
    return resolve_dtype("auto")


def meta_model(request: Request, config: Any, dtype: torch.dtype, device: Device) -> Any:
    """The model as it would be trained, without a byte of it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import fastft
    from fastft import backends
    from fastft.memory.simulate import Launchers, Meter
    from fastft.train.lora_setup import (
        PEFT_REFUSALS,
        PEFT_TAKES,
        add_adapters,
        check_targets,
        lora_config,
    )
    from fastft.train.models import check_decoder, clear_model_errors, refusing

    with torch.device("meta"):
        with clear_model_errors(request.cfg.model):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        check_decoder(model.config, request.cfg.model)
        model.config.use_cache = False
        if request.method == "full":
            model.requires_grad_(True)
        else:
            for cfg in request.cfgs:
                check_targets(model, cfg)
            if request.others:
                model = add_adapters(model, request.cfgs)
            else:
                with refusing("fastft plan", PEFT_TAKES, *PEFT_REFUSALS):
                    model = get_peft_model(model, lora_config(request.cfg))
    model.train()
    fused = {} if request.cfg.fused else {"loss": False, "norm": False, "glu": False, "rope": False}
    # Attention is flash attention whoever computes it; on meta torch would take its own apart.
    fused["lora"] = request.cfg.fused
    with backends.planning(Launchers(Meter(), device.type)):
        fastft.accelerate(model, **fused)
    if request.others:
        model.base_model.set_adapter(request.names)
    return model


def _linears(model: Any) -> list[Any]:
    """Frozen matrices of linear layers, the head aside: what QLoRA quantises."""
    from torch import nn

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    found = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    return [m.weight for m in found if not m.weight.requires_grad]


def linear_numel(model: Any) -> int:
    return sum(w.numel() for w in _linears(model))


def largest_dequantised(model: Any) -> int:
    """Bytes of the most dequantised matrices that a call makes: a layer's, or those of layers that
    share an input, once a simulated step has found them."""
    from fastft.nn.siblings import group_of

    quantised = {id(w) for w in _linears(model)}

    def size(layer: Any) -> int:
        weight = getattr(layer, "base_layer", layer).weight
        return int(weight.nbytes) if id(weight) in quantised else 0

    layers = [m for m in model.modules() if hasattr(getattr(m, "base_layer", m), "weight")]
    groups = [group_of(layer) for layer in layers]
    calls = [[x] if group is None else group.layers() for x, group in zip(layers, groups)]
    return max((sum(size(layer) for layer in call) for call in calls), default=0)


def largest_gradients(model: Any) -> int:
    """Bytes of the gradients of the repeated layer that has the most."""
    from fastft.memory._layers import find_layers

    sizes = [
        sum(p.nbytes for p in layer.parameters() if p.requires_grad) for layer in find_layers(model)
    ]
    return max(sizes, default=0)


def weight_bytes(model: Any, request: Request) -> tuple[int, int, int]:
    """Bytes of parameters and buffers, of the largest repeated layer, and of what is in none."""
    from fastft.memory._layers import find_layers

    quantised = {id(w) for w in _linears(model)} if request.method == "qlora" else set()

    def size(module: Any) -> int:
        held = {id(t): t for t in (*module.parameters(), *module.buffers())}
        return int(
            sum(t.numel() * _NF4_BYTES if key in quantised else t.nbytes for key, t in held.items())
        )

    total, layers = size(model), [size(module) for module in find_layers(model)]
    return total, max(layers, default=0), total - sum(layers)


def trained_bytes(model: Any, request: Request) -> tuple[int, list[int]]:
    """Bytes of what is trained, and of the optimizer's states of each configuration."""
    gradients, states = 0, [0.0] * len(request.cfgs)
    index = {name: i for i, name in enumerate(request.names)} if request.others else {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradients += p.nbytes
            own = next((index[part] for part in name.split(".") if part in index), 0)
            states[own] += state_bytes(p.shape, request.optim_of(request.cfgs[own]))
    return gradients, [int(size) for size in states]


def state_bytes(shape: Sequence[int], optim: str) -> float:
    """Of the states of one trained tensor, float32 or narrower whatever the tensor's dtype."""
    numel = math.prod(shape)
    if optim == "Adafactor" and len(shape) > 1:  # a row and a column of each matrix
        return 4.0 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    if optim == "Muon" and len(shape) != 2:
        optim = "AdamW"  # for what is no matrix
    if optim.endswith("8bit") and numel < _LEAST_8BIT:
        optim = optim.removesuffix("8bit")
    return _STATES[optim] * numel


def step_bytes(model: Any, request: Request) -> int:
    """Bytes that a step of the optimizer holds beside the states. Muon's are the updates of all
    matrices in float32, and of those of one shape up to four copies in bfloat16."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for p in model.parameters():
        if request.optim_of(request.cfg) == "Muon" and p.requires_grad and p.dim() == 2:
            shapes[tuple(p.shape)] += p.numel()
    return 4 * shapes.total() + 8 * max(shapes.values(), default=0)
