"""``fastft plan``: memory and time of a fine-tuning run before its first step.

The model is built from its configuration on torch's meta device, adapted by PEFT, fused, put under
a policy, and one step of it is simulated (:mod:`fastft.memory.simulate`): what is alive at the peak
is what the run will hold. Time is a roofline over the same operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError
from fastft.memory.ceilings import Ceilings
from fastft.memory.devices import Device
from fastft.train.config import TrainConfig

if TYPE_CHECKING:
    import torch

__all__ = [
    "METHODS",
    "POLICIES",
    "Planner",
    "Prediction",
    "Request",
    "device_of",
    "load_config",
]

METHODS = ("lora", "qlora", "full")
POLICIES = ("none", "lora", "attention", "full", "offload")
# Bytes of optimizer state an element of a trained tensor: the two moments of Adam, Lion's one.
_STATES = {"AdamW": 8.0, "AdamW8bit": 2 + 8 / 256, "Lion": 4.0, "Lion8bit": 1 + 4 / 256}
# Tensors below this size keep float32 states in the 8-bit optimizers.
_LEAST_8BIT = 4096
# NF4 with its block scales quantised again: 4 bits, 8 a block of 64, 32 a 256 of those.
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# What a process on a CPU takes beside its tensors once it trains: scratch of attention and of
# oneDNN, graphs, code (measured: 50 to 60 MB from SmolLM2-135M to Llama-3.2-1B).
_PROCESS = 55 << 20
# Names of operations whose time is that of arithmetic on elements, not of moving them.
_ARITHMETIC = ("glu.", "linear_cross_entropy.rows", "dora_scale.", "lora_linear.dropout")


@dataclass(frozen=True)
class Request:
    """What is planned: ``cfg`` as it would be trained, and what a configuration does not say.

    Attributes:
        method: "lora", "qlora" (frozen linear layers in 4 bits) or "full".
        policy: of ``fastft.memory.checkpoint``.
        gpus: devices that share weights, gradients and states (FSDP).
    """

    cfg: TrainConfig
    method: str = "lora"
    policy: str = "none"
    gpus: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device, padding included."""
        return self.cfg.per_device_train_batch_size * self.cfg.max_length


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device, and seconds of an optimizer step's micro-batch.

    Attributes:
        activations: kept for the backward when the forward ends.
        workspace: one layer's temporaries, slabs of logits, on a CPU what a process takes beside
            its tensors.
        peak: the sum; less where gradients come as activations go.
        host: bytes in host memory (offload).
        parts: seconds by kind of operation.
    """

    policy: str
    batch: int
    length: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    peak: int
    host: int
    seconds: float
    trainable: int
    parameters: int
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.length / self.seconds


class Planner:
    """Predictions for one model and method; each simulates a step, which takes a second or so.

    Args:
        request: the model, its adapters and optimizer.
        device: what it is planned for.
        ceilings: measured rates of that device, in place of the table's.

    Raises:
        ConfigError: no configuration of a causal language model, or targets it does not have.
    """

    def __init__(self, request: Request, device: Device, ceilings: Ceilings | None = None) -> None:
        self.request, self.device, self.ceilings = request, device, ceilings
        self.config = load_config(request.cfg.model)
        self.dtype = _dtype(request.cfg, device)
        self.model = _meta_model(request, self.config, self.dtype, device)

    def predict(
        self, policy: str | None = None, batch: int | None = None, length: int | None = None
    ) -> Prediction:
        """Memory and time with what is given in place of the request's."""
        cfg = self.request.cfg
        policy = policy or self.request.policy
        batch = batch or cfg.per_device_train_batch_size
        length = length or cfg.max_length
        step = _simulate(self.model, self.device.type, policy, batch, length, cfg)
        weights, largest = _weight_bytes(self.model, self.request)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        states = sum(_state_bytes(p.numel(), cfg) for p in trained)
        gpus = self.request.gpus
        # FSDP: shares of everything, and two layers whole: this one and the next.
        gathered = 2 * largest if gpus > 1 else 0
        workspace = max(0, step.peak - step.kept - gradients)
        kept = min(step.kept, step.peak - gradients)
        if self.device.type == "cpu":
            workspace += _PROCESS
        parts = self._parts(step.work)
        parts["optimizer"] = (2 * (gradients + states) + gradients) / self._copies() / gpus
        if self.ceilings is not None and self.ceilings.fresh:
            parts["mapping memory"] = step.taken * self.ceilings.fresh
        if self.request.method == "qlora":
            parts["dequantize"] = 2.5 * _linear_bytes(self.model) * 2 / self._copies()
            workspace += _largest_linear(self.model)
        weights, gradients, states = (
            weights // gpus + gathered,
            gradients // gpus,
            int(states) // gpus,
        )
        return Prediction(
            policy=policy,
            batch=batch,
            length=length,
            weights=weights,
            gradients=gradients,
            optimizer=states,
            activations=kept,
            workspace=workspace,
            peak=weights + gradients + states + kept + workspace,
            host=step.parked,
            seconds=sum(parts.values()),
            trainable=sum(p.numel() for p in trained),
            parameters=sum(p.numel() for p in self.model.parameters()),
            parts=parts,
        )

    def _copies(self) -> float:
        return self.ceilings.copies if self.ceilings else self.device.bandwidth * 1e12

    def _parts(self, work: list[Any]) -> dict[str, float]:
        """Seconds of each kind of operation, by the roofline."""
        found: dict[str, float] = {}
        for item in work:
            seconds = max(self._seconds(item), self._launch())
            found[item.name] = found.get(item.name, 0.0) + seconds
        return found

    def _launch(self) -> float:
        return self.ceilings.launch if self.ceilings else self.device.launch

    def _seconds(self, item: Any) -> float:
        known, attention = self.ceilings, item.name.startswith("attention.")
        if known is None:
            rate = self.device.tflops if item.itemsize == 2 else self.device.tflops32
            rate *= 1e12 * (self.device.scores if attention else 1.0)
            return max(item.flops / rate, item.bytes / (self.device.bandwidth * 1e12))
        if attention:
            return float(item.flops / known.attention)
        moving = known.elementwise if item.name.startswith(_ARITHMETIC) else known.copies
        return max(item.flops / known.product(*item.product), item.bytes / moving)

    def largest(self, memory: int, policy: str, what: str) -> Prediction | None:
        """The largest batch ("batch") or sequence ("length", in steps of 64) whose peak is within
        ``memory``; None where not even the smallest is."""
        unit = 1 if what == "batch" else 64

        def at(number: int) -> Prediction:
            return self.predict(policy, **{what: number * unit})

        low = at(1)
        if low.peak > memory:
            return None
        # Memory is close to affine in either: a guess, then bisection around it.
        slope = max(1, (at(3).peak - low.peak) // 2)
        guess = max(1, 1 + int((memory - low.peak) // slope))
        limit = getattr(self.config, "max_position_embeddings", None) if unit == 64 else None
        guess = min(guess, (limit // 64) if limit else 1 << 16)
        best, step = low, max(1, guess // 32)
        while guess >= 1:
            found = at(guess)
            if found.peak <= memory:
                return found if found.peak > best.peak else best
            guess -= step
        return best


@dataclass(frozen=True)
class _Step:
    kept: int
    parked: int
    peak: int
    taken: int
    work: list[Any]


def _simulate(
    model: Any, device_type: str, policy: str, batch: int, length: int, cfg: TrainConfig
) -> _Step:
    """The second step, in which layers that share an input are known."""
    import torch

    from fastft import memory
    from fastft.memory._layers import ring_of
    from fastft.memory.simulate import Meter, metered

    memory.checkpoint(model, policy)
    meter = Meter()
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    parked = 0
    try:
        with metered(meter, device_type):
            meter.ignore([*model.parameters(), *model.buffers(), ids])
            for _ in range(2):
                model.zero_grad(set_to_none=cfg.gradient_accumulation_steps == 1)
                meter.start()
                loss = model(input_ids=ids, labels=ids).loss
                kept = meter.live
                parked = ring_of(ids.device).host_bytes
                loss.backward()
                del loss
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "fastft plan",
            "model",
            expected="a model whose step can be simulated without its data",
            got=f"{type(model.get_base_model()).__name__}: {first}",
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
        memory.restore(model)
    return _Step(kept, parked, meter.peak, meter.taken, list(meter.work))


def device_of(name: str) -> Device:
    """The device that ``name`` stands for: "cpu" and "cuda" are this machine's, another is one of
    the table.

    Raises:
        ConfigError: "cuda" without a CUDA GPU.
        ArgumentError: no such device.
    """
    import torch

    from fastft.memory.devices import DEVICES, find_device
    from fastft.train.machine import cpu_name, total_memory

    if name == "cpu":
        # Its rates are measured: a table of processors would be wrong on most.
        return Device(cpu_name(), "cpu", total_memory(), 0.0, 0.0, 0.0, source="measured")
    if name != "cuda":
        return find_device(name)
    if not torch.cuda.is_available():
        expected = f"a name of the table where there is no GPU: {', '.join(DEVICES)}"
        raise ConfigError("fastft plan", "device", expected=expected, got="cuda, without a GPU")
    properties = torch.cuda.get_device_properties(0)
    known = [d for d in DEVICES.values() if d.name.split("-")[0] in properties.name]
    near = min(known, key=lambda d: abs(d.memory - properties.total_memory), default=None)
    if near is None:
        return Device(properties.name, "cuda", properties.total_memory, 0, 0, 0, source="measured")
    return replace(near, name=properties.name, memory=properties.total_memory)


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


def _dtype(cfg: TrainConfig, device: Device) -> torch.dtype:
    import torch

    if cfg.dtype != "auto":
        found: torch.dtype = getattr(torch, cfg.dtype)
        return found
    from fastft.train.machine import resolve_dtype

    return torch.bfloat16 if device.type == "cuda" else resolve_dtype("auto")


def _meta_model(request: Request, config: Any, dtype: torch.dtype, device: Device) -> Any:
    """The model as it would be trained, without a byte of it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import fastft
    from fastft import backends
    from fastft.memory.simulate import Launchers, Meter
    from fastft.train.lora_setup import check_targets, lora_config

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                "fastft plan",
                "model",
                expected="the configuration of a causal language model",
                got=str(error).splitlines()[0][:200],
            ) from error
        model.config.use_cache = False
        if request.method == "full":
            model.requires_grad_(True)
        else:
            check_targets(model, request.cfg)
            model = get_peft_model(model, lora_config(request.cfg))
    model.train()
    if request.cfg.fused:
        # bitsandbytes' layers are PEFT's own business: their adapters are not fused.
        fused = {"lora": request.method == "lora"}
        with backends.planning(Launchers(Meter(), device.type)):
            fastft.accelerate(model, **fused)
    return model


def _linears(model: Any) -> list[Any]:
    """Frozen matrices of linear layers, the head aside: what QLoRA quantises."""
    from torch import nn

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    found = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    return [m.weight for m in found if not m.weight.requires_grad]


def _linear_bytes(model: Any) -> int:
    return sum(w.numel() for w in _linears(model))


def _largest_linear(model: Any) -> int:
    """Bytes of the largest dequantised matrix."""
    return max((w.numel() * w.element_size() for w in _linears(model)), default=0)


def _weight_bytes(model: Any, request: Request) -> tuple[int, int]:
    """Bytes of parameters and buffers, and of the largest repeated layer's."""
    from fastft.memory._layers import find_layers

    seen = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = float(sum(t.numel() * t.element_size() for t in seen.values()))
    layers = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in find_layers(model)]
    if request.method == "qlora":
        linears = _linears(model)
        total -= sum(w.numel() * (w.element_size() - _NF4_BYTES) for w in linears)
    return int(total), max(layers, default=0)


def _state_bytes(numel: int, cfg: TrainConfig) -> float:
    per = _STATES[cfg.optim]
    if cfg.optim.endswith("8bit") and numel < _LEAST_8BIT:
        per = _STATES[cfg.optim.removesuffix("8bit")]
    return per * numel
