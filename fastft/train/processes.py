"""Several processes of one run, as ``torchrun`` starts them. Each holds the whole model and
computes micro-batches of its own. Unlike under DDP nothing is exchanged within a forward or a
backward: a process that runs out of memory there repeats its micro-batch in parts, while the others
wait for its gradients behind their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastft.errors import ConfigError, FastftError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "any_process",
    "average_gradients",
    "check_count",
    "check_launcher",
    "end_processes",
    "first_process",
    "process_count",
    "process_prefix",
    "same_parameters",
    "sum_of_processes",
    "wait_for_all",
]

# Bytes of gradients that are reduced at once: a copy of so many is made.
_BUCKET = 32 << 20
# By what `accelerate launch` asks for a model in shards, whose collectives are within the forward
# and the backward.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def process_count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the one that writes and reports."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def process_prefix() -> str:
    """Before what only this one of several processes has to say."""
    return f"process {os.environ.get('RANK', '0')}: " if process_count() > 1 else ""


def check_count(world_size: int) -> None:
    """Refuses processes that do not know of each other (``ConfigError``)."""
    if world_size != process_count():
        raise ConfigError(
            "train",
            "processes",
            expected=f"{process_count()}, as WORLD_SIZE says",
            got=f"{world_size} in torch's process group",
            remedy="Start it with torchrun, which sets RANK and LOCAL_RANK as well.",
        )


def check_launcher() -> None:
    """Refuses a launcher's wish to shard the model (``ConfigError``): a process that runs out of
    memory amid the others' collectives could not repeat anything."""
    for name, what in _SHARDED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise ConfigError(
                "train",
                "processes",
                expected="processes that hold the whole model each",
                got=f"{what} ({name}={os.environ[name]})",
                remedy="Start it with torchrun. A sharded model trains in a Trainer of your own.",
            )


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds in any process."""
    return sum_of_processes(int(flag), device) > 0


def wait_for_all(device: torch.device) -> None:
    """Returns when every process has come here."""
    sum_of_processes(0, device)


def sum_of_processes(number: int, device: torch.device) -> int:
    import torch

    if process_count() == 1:
        return number
    total = torch.tensor(number, device=device)
    with _collective():
        torch.distributed.all_reduce(total)
        return int(total)


def same_parameters(model: nn.Module) -> None:
    """Gives every process the trained parameters of the first."""
    import torch

    if process_count() > 1:
        with _collective(), torch.no_grad():
            for parameter in _trained(model):
                torch.distributed.broadcast(parameter, src=0)


def average_gradients(model: nn.Module) -> None:
    """The gradient of each trained parameter becomes its mean over the processes, the same bits in
    each of them. Where a process has none it counts as 0; where none of them has, it stays None."""
    import torch
    from torch._utils import (
        _flatten_dense_tensors,
        _take_tensors,
        _unflatten_dense_tensors,
    )

    if (processes := process_count()) == 1:
        return
    parameters = _trained(model)
    had = [int(p.grad is not None) for p in parameters]
    counts = torch.tensor(had, device=parameters[0].device)
    with _collective(), torch.no_grad():
        torch.distributed.all_reduce(counts)
        gradients = []
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _take_tensors(gradients, _BUCKET):
            # Divided first, as DDP does: a sum of float16 could overflow.
            means = _flatten_dense_tensors(bucket).div_(processes)
            torch.distributed.all_reduce(means)
            for gradient, mean in zip(bucket, _unflatten_dense_tensors(means, bucket), strict=True):
                gradient.copy_(mean)


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def end_processes() -> None:
    """Takes the process group down when all have come here."""
    import torch

    if process_count() > 1 and torch.distributed.is_initialized():
        with _collective():
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def _collective() -> Iterator[None]:
    """Says what it means where a collective fails."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise FastftError(
            "train",
            "processes",
            expected=f"all {process_count()} of the run",
            got=f"a failed exchange: {(str(error).splitlines() or ['no message'])[0][:160]}",
            remedy="One of them ended, or hangs: what it said is the reason.",
        ) from error
