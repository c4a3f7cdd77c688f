"""One process of the host suite: a tiny model, its steps timed.

Called by bench.host with a JSON object as its only argument; its last line is a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A layer is what the deeper of two models takes more, by their difference: the loss is in neither.
DEPTHS = (2, 10)
TOKENS, REPEATS = 32, 60
# Products of these take a CPU as long as a GPU's launch.
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def load(job: dict[str, Any], layers: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).to(torch.bfloat16)
    model.config.use_cache = False
    model.requires_grad_(False)
    if job["adapters"] == "none":
        model.enable_input_require_grads()
        return model.train()
    config = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=job["dropout"], target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(
        model, config, autocast_adapter_dtype=job["adapters"] == "float32"
    ).train()


# Operations of torch that make room only.
_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}


class _Operations(TorchDispatchMode):
    """Counts the operations that a GPU would be launched for: all but views and room."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not views and function.__name__.partition(".")[0] not in _ROOM:
            self.count += 1
        return function(*args, **(kwargs or {}))


def count(forward: Callable[[], torch.Tensor]) -> int:
    """Operations of torch in a step, forward and backward."""
    with _Operations() as operations:
        forward().backward()
    return operations.count


def time_steps(forward: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Microseconds, forward and backward: the quarter of the fastest ends there."""
    times: dict[str, list[float]] = {"forward_us": [], "backward_us": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        loss = forward()
        middle = time.perf_counter()
        loss.backward()
        times["forward_us"].append(middle - start)
        times["backward_us"].append(time.perf_counter() - middle)
    return {name: sorted(own)[len(own) // 4] * 1e6 for name, own in times.items()}


def run(job: dict[str, Any]) -> dict[str, float]:
    """Microseconds and launches of one layer."""
    torch.set_num_threads(1)
    shallow, deep = (run_model(job, layers) for layers in DEPTHS)
    layers = DEPTHS[1] - DEPTHS[0]
    return {name: (deep[name] - shallow[name]) / layers for name in deep}


def run_model(job: dict[str, Any], layers: int) -> dict[str, float]:
    model = load(job, layers)
    ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS))

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    if not job["fused"]:
        for _ in range(3):
            forward().backward()
        return time_steps(forward) | {"launches": count(forward)}
    return run_fused(model, forward)


def run_fused(model: Any, forward: Callable[[], torch.Tensor]) -> dict[str, float]:
    """fastft's way on a GPU. It is proved, and learns which layers share an input, on the CPU."""
    from fastft_kernels import OPS

    import fastft
    from fastft import backends
    from fastft.nn import attention, calls
    from fastft.ops._room import use_pool

    from .stand_in import stand_in

    attention.librarys = lambda _: True
    fastft.accelerate(model)
    use_pool(False)
    for _ in range(3):
        forward().backward()
    select = backends.select

    def select_triton(op: str, backend: str | None = None, **facts: Any) -> tuple[str, Any]:
        if op in OPS:
            return "triton", backends.launcher(op, "triton")
        return select(op, backend, **facts)

    backends.select = select_triton
    try:
        with stand_in() as launches:
            for _ in range(3):
                forward().backward()
            calls.reset_call_counts()
            launches.count = 0
            found = time_steps(forward)
            if launches.count == 0 or calls.call_counts().fallback:
                raise RuntimeError("not all of it ran fused")
            launches.count = 0
            operations = count(forward)
            return found | {"launches": operations + launches.count}
    finally:
        backends.select = select


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
