"""``fastft plan``: memory and time of a fine-tuning run before its first step.

The model is built from its configuration on torch's meta device, adapted by PEFT, fused, put under
a policy, and one step of it is simulated (:mod:`fastft.memory.simulate`): what is alive at the peak
is what the run will hold. Time is a roofline over the same operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastft.errors import ConfigError, FastftError
from fastft.memory import POLICIES
from fastft.memory._layers import find_layers
from fastft.memory.ceilings import Ceilings
from fastft.memory.devices import Device
from fastft.optim._ring import RING_BYTES, SLOTS
from fastft.train.models import first_line
from fastft.train.plan_model import (
    Request,
    as_stored,
    dtype_of,
    largest_dequantised,
    largest_gradients,
    linear_numel,
    load_config,
    meta_model,
    step_bytes,
    trained_bytes,
    weight_bytes,
)

__all__ = ["Planner", "Prediction"]

# What a process on a CPU takes beside its tensors once it trains: scratch of attention and of
# oneDNN, graphs, code (measured: 50 to 60 MB from SmolLM2-135M to Llama-3.2-1B).
_PROCESS = 55 << 20
# Names of operations whose time is that of arithmetic on elements, not of moving them.
_ARITHMETIC = ("glu.", "linear_cross_entropy.rows", "dora_scale.", "lora_linear.dropout")


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device, and seconds of an optimizer step's micro-batch.

    Attributes:
        activations: kept for the backward when the forward ends.
        workspace: one layer's temporaries, slabs of logits, on a CPU what a process takes beside
            its tensors.
        peak: the sum; less where gradients come as activations go.
        host: bytes in host memory (offload, optimizer states).
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
        self.device, self.ceilings = device, ceilings
        self.config = load_config(request.cfg.model)
        request, self.notes = as_stored(request, self.config)
        self.request = request
        self.dtype = dtype_of(request.cfg, device)
        # In the second step layers that share an input are known.
        self._steps = 2
        self.model = meta_model(request, self.config, self.dtype, device)

    @property
    def policies(self) -> tuple[str, ...]:
        """Those that differ: without repeated layers there are none, and offload frees nothing
        where the host is the device."""
        if not find_layers(self.model):
            return POLICIES[:1]
        return POLICIES if self.device.type == "cuda" else POLICIES[:-1]

    def predict(
        self, policy: str | None = None, batch: int | None = None, length: int | None = None
    ) -> Prediction:
        """Memory and time with what is given in place of the request's, and of all its adapters'.
        Those of one job run as one batch, as long as the longest."""
        request = self.request
        policy = policy or request.policy
        batches = [batch or c.per_device_train_batch_size for c in request.cfgs]
        length = length or max(c.max_length for c in request.cfgs)
        step = _simulate(
            self.model, self.device.type, policy, batches, length, request, self._steps
        )
        # With accumulation the second forward finds gradients.
        self._steps = 2 if request.accumulates else 1
        weights, largest, outside = weight_bytes(self.model, request)
        gradients, each = trained_bytes(self.model, request)
        states = sum(each)
        gpus = request.gpus
        # FSDP: shares of everything, and whole what is in no layer and two layers: this one and
        # the next. Of the same two the gradients are whole until they are reduced.
        gathered = 2 * largest + outside if gpus > 1 else 0
        held = gradients if request.accumulates else 0
        workspace = max(0, step.peak - step.kept + held - gradients)
        kept = min(step.kept - held, step.peak - gradients)
        if gpus > 1:
            workspace += 2 * largest_gradients(self.model)
        # When the optimizer steps, activations are gone.
        workspace += max(0, step_bytes(self.model, request) - kept - workspace)
        if self.device.type == "cpu":
            workspace += _PROCESS
        parts = self._parts(step.work)
        parts["optimizer"] = (2 * (gradients + states) + gradients) / self._copies() / gpus
        places = [
            (size // gpus, c.optim_states if self.device.type == "cuda" else "device")
            for size, c in zip(each, request.cfgs, strict=True)
        ]
        away = sum(size for size, place in places if place != "device")
        visiting = [size for size, place in places if place == "host"]
        if visiting:  # both directions at once; reading and writing a piece
            over_the_bus = sum(visiting) / (self.device.pcie * 1e9)
            parts["optimizer"] = max(parts["optimizer"], over_the_bus)
        if self.ceilings is not None and self.ceilings.fresh:
            parts["mapping memory"] = step.taken * self.ceilings.fresh
        if self.request.method == "qlora":
            parts["dequantize"] = 2.5 * linear_numel(self.model) * 2 / self._copies()
            workspace += largest_dequantised(self.model)
        weights, gradients, states = (
            weights // gpus + gathered,
            gradients // gpus,
            states // gpus - away,
        )
        states += sum(min(SLOTS * size, RING_BYTES) for size in visiting)
        return Prediction(
            policy=policy,
            batch=sum(batches),
            length=length,
            weights=weights,
            gradients=gradients,
            optimizer=states,
            activations=kept,
            workspace=workspace,
            peak=weights + gradients + states + kept + workspace,
            host=step.parked + away,
            seconds=sum(parts.values()),
            trainable=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            parameters=sum(p.numel() for p in self.model.parameters()),
            parts=parts,
        )

    def _copies(self) -> float:
        """Bytes a second; any number where only memory is asked for."""
        return self.ceilings.copies if self.ceilings else (self.device.bandwidth or 1.0) * 1e12

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
        if known is None and not self.device.tflops:
            return 0.0  # only memory is asked for
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
        ``memory``, to a fiftieth; None where not even the smallest is."""
        unit = 1 if what == "batch" else 64
        known: dict[int, Prediction] = {}

        def at(number: int) -> Prediction:
            if number not in known:
                known[number] = self.predict(policy, **{what: number * unit})
            return known[number]

        if at(1).peak > memory:
            return None
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) if unit == 64 else None
        end = max(1, limit // 64) if limit else 1 << 16
        best, guess, width = 1, min(3, end), end
        # Memory is close to affine in either, so a line through what is known says where to look,
        # or the middle where that did not help, until what fits and what does not are near.
        for _ in range(24):
            if at(guess).peak <= memory:
                best = max(best, guess)
            over = min((n for n in known if known[n].peak > memory), default=end + 1)
            step = max(1, best // 50)
            if over - best <= step:
                break
            other = over if over in known else max((n for n in known if n < best), default=best)
            rise = (known[other].peak - known[best].peak) / (other - best or 1)
            guess = best + int((memory - known[best].peak) / rise) if rise > 0 else 8 * best
            if over in known and 2 * (over - best) > width:
                guess = int((best * over) ** 0.5)
            guess, width = min(max(guess, best + step), over - 1), over - best
        return known[best]


@dataclass(frozen=True)
class _Step:
    kept: int
    parked: int
    peak: int
    taken: int
    work: list[Any]


def _simulate(
    model: Any,
    device_type: str,
    policy: str,
    batches: list[int],
    length: int,
    request: Request,
    steps: int,
) -> _Step:
    """The last of so many steps; ``batches``: samples of each adapter."""
    import torch

    from fastft import memory
    from fastft.memory._layers import ring_of
    from fastft.memory.simulate import Meter, metered
    from fastft.train.losses_apart import adapters_apart

    if policy != "none":
        memory.checkpoint(model, policy)
    meter = Meter()
    ids = torch.zeros(sum(batches), length, dtype=torch.int64, device="meta")
    try:
        samples = list(zip(request.names, batches, strict=True))
        with metered(meter, device_type), adapters_apart(model, samples):
            meter.ignore([*model.parameters(), *model.buffers(), ids])
            for _ in range(steps):
                model.zero_grad(set_to_none=not request.accumulates)
                meter.start()
                loss = model(input_ids=ids, labels=ids).loss
                kept = meter.live
                parked = ring_of(ids.device).host_bytes
                loss.backward()
                del loss
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        if isinstance(error, FastftError):
            raise
        raise ConfigError(
            "fastft plan",
            "model",
            expected="a model whose step can be simulated without its data",
            got=f"{type(model).__name__}: {first_line(error)}",
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
        memory.restore(model)
    peak = meter.resident if device_type == "cpu" else meter.peak
    return _Step(kept, parked, peak, meter.taken, list(meter.work))
