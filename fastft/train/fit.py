"""Does it fit? Before the first step the planner says; during a step that runs out of memory, the
micro-batch is halved and the step goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fastft.errors import ConfigError
from fastft.train.config import TrainConfig
from fastft.train.data import IGNORE_INDEX

__all__ = ["Halving", "check_fit", "is_out_of_memory"]


def check_fit(
    cfgs: Sequence[TrainConfig],
    longest: Sequence[int],
    notice: Callable[[str], None],
    force: bool = False,
) -> None:
    """Refuses a run that cannot fit the free memory of this machine's device.

    Args:
        cfgs: the run, or those of the adapters of one job.
        longest: tokens of the longest example of each.
        force: only say so.

    Raises:
        ConfigError: with what would make it fit.
    """
    from fastft.memory._auto import free_memory
    from fastft.train.machine import working_device
    from fastft.train.plan import Planner
    from fastft.train.plan_device import device_of
    from fastft.train.plan_model import Request

    device = working_device()
    if device.type not in ("cpu", "cuda"):
        return
    cfg, *others = (
        c.replace(max_length=max(1, c.max_length if c.padding == "max_length" else tokens))
        for c, tokens in zip(cfgs, longest, strict=True)
    )
    allowed = free_memory(device)
    policy = cfg.memory_policy
    if policy == "auto" or cfg.gradient_checkpointing:
        policy = "full"  # what it comes to at worst
    known = dataclasses.replace(device_of(device.type), memory=allowed)
    try:
        planner = Planner(Request(cfg, policy=policy, others=tuple(others)), known)
        peak = planner.predict().peak
        if peak <= allowed:
            return
        remedies = _remedies(planner, policy, allowed)
    except Exception as error:  # a prediction that fails must not stop a run that would not
        notice(f"memory was not planned: {_first_line(error)}")
        return
    text = f"{peak / 1e9:.2f} GB at the peak, {allowed / 1e9:.2f} GB are free"
    if force:
        notice(f"the plan says this does not fit: {text}; going on (--force)")
        return
    raise ConfigError(
        "train",
        "memory",
        expected="a run that fits the device",
        got=text,
        remedy=f"It fits with {' or '.join(remedies[:3])}. --force trains all the same."
        if remedies
        else "No single change makes it fit; `fastft plan` shows what takes the memory.",
    )


def _remedies(planner: Any, policy: str, allowed: int) -> list[str]:
    from fastft.train.plan_report import changes

    known = planner.policies
    less = known[known.index(policy) + 1 :] if policy in known else ()
    if not planner.request.cfg.fused or planner.request.cfg.gradient_checkpointing:
        less = ()
    found = [f"memory_policy: {name}" for name in less if planner.predict(name).peak <= allowed]
    # What `fastft train` has no key for is left out.
    others = changes(planner.request, planner.device, allowed, policy)
    return found[:1] + [what for what, _ in others if ":" in what]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a GPU or on the CPU."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(said in text for said in _SAID)


# What torch and CUDA's libraries say beside torch's own error.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Halving:
    """Runs micro-batches in as many parts as memory needs. Of several processes each has its own
    number: nothing is exchanged within ``step``, and the sums are those of whole micro-batches.

    Attributes:
        parts: of a micro-batch; doubled each time memory runs out.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.parts = 1
        self._notice = notice

    def run(self, model: Any, inputs: dict[str, Any], step: Callable[[Any, float], Any]) -> Any:
        """``step(part, share)`` of each part of ``inputs``, its tokens with a label 1 / share of
        all; the sum of the losses.

        Gradients that were there before are kept as they were if a part runs out of memory.

        Raises:
            ConfigError: a single sequence runs out of memory.
        """
        import torch

        while True:
            before = [
                (p, None if p.grad is None else p.grad.clone())
                for p in model.parameters()
                if p.requires_grad
            ]
            random = _random_states()
            try:
                return self._in_parts(inputs, step)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                for p, gradient in before:
                    p.grad = gradient
                _set_random_states(random)
                size = len(inputs["input_ids"])
                if self.parts >= size:
                    raise ConfigError(
                        "train",
                        "memory",
                        expected="a device on which one sequence fits",
                        got=f"out of memory with sequences one at a time: {_first_line(error)}",
                        remedy="Lower max_length (with padding: none, the batch size), or set "
                        "memory_policy: full.",
                    ) from error
            # Outside the handler: the error's traceback holds the failed step's tensors.
            self.parts *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._notice(
                f"out of memory: micro-batches of {size} now run in {self.parts} parts, their "
                "gradients accumulated; the step goes on"
            )

    def _in_parts(self, inputs: dict[str, Any], step: Callable[[Any, float], Any]) -> Any:
        import torch

        if self.parts == 1:
            return step(inputs, 1.0)
        rows, tokens = len(inputs["input_ids"]), _label_tokens(inputs)
        size = -(-rows // self.parts)
        total = torch.zeros((), device=inputs["labels"].device)
        for begin in range(0, rows, size):
            part = {
                name: value[begin : begin + size] if hasattr(value, "shape") else value
                for name, value in inputs.items()
            }
            if found := _label_tokens(part):  # the mean over none would be NaN
                total = total + step(part, tokens / found)
        return total


def _label_tokens(inputs: dict[str, Any]) -> int:
    """Those that a causal model's loss, whose labels are one behind, is over."""
    return int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())


def _random_states() -> Any:
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def _set_random_states(states: Any) -> None:
    import torch

    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state_all(states[1])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
