"""One process of the memory suite: a model, a few steps, their time and peak above the model.

Called by bench.memory with a JSON object as its only argument; its last line is a JSON object.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch

from .e2e_worker import WARM_UP, adapter_gradient, add_adapters, batches
from .measure import limit_to_free, peak_resident_bytes, reset_peak, resident_bytes, trim

CHECK_TOKENS = 96


def build(job: dict[str, Any], device: torch.device) -> Any:
    """The model of the job, adapted, under its policy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(job["config"])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    model.config.use_cache = False
    model.requires_grad_(False)
    model = add_adapters(model.train(), "float32")
    if job["fused"]:
        import fastft

        fastft.accelerate(model)
        if job["policy"] is not None:
            fastft.memory.checkpoint(model, job["policy"])
    if job["way"] == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job["way"] == "liger":
        raise RuntimeError("Liger's tiled MLP replaces MLPs without adapters: no LoRA to compare")
    return model


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    cuda = device.type == "cuda"
    if not cuda:
        limit_to_free()  # what does not fit fails by itself, and takes nobody with it
    model = build(job, device)
    parked: Any = contextlib.nullcontext()
    if job["way"] == "offload":
        from trl.models.activation_offloading import OffloadActivations

        parked = OffloadActivations()
    vocabulary = model.config.vocab_size
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(ids: torch.Tensor) -> None:
        with parked:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    # Layers that share an input are learnt on the short batch, for every implementation alike.
    short = batches(vocabulary, 1, CHECK_TOKENS, 2, device)
    for ids in short:
        model.zero_grad(set_to_none=True)
        step(ids)
    if job["gradient"]:
        torch.save(adapter_gradient(model), job["gradient"])
    model.zero_grad(set_to_none=True)
    trim()
    held = torch.cuda.memory_allocated(device) if cuda else resident_bytes() or 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    seconds = []
    ids_of = batches(vocabulary, job["batch"], job["tokens"], WARM_UP + job["steps"], device)
    for number, ids in enumerate(ids_of):
        for parameter in trained:
            parameter.grad = None
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step(ids)
        if cuda:
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes() or 0
    print(json.dumps({"step_seconds": seconds, "peak_bytes": peak - held}))


if __name__ == "__main__":
    main()
