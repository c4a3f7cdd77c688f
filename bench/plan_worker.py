"""One process of the plan suite: trains a few steps of a request and measures what was predicted.

Called by bench.plan with a JSON object as its only argument; its last line is a JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from .measure import peak_resident_bytes, reset_peak, resident_bytes, trim

# The first step learns which layers share an input; its memory counts, its time does not.
WARM_UP = 2


def model_of(
    config: Any, cfgs: list[Any], method: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """The model of the request with random weights; cfgs: of each adapter."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import fastft
    from fastft.train.lora_setup import adapter_names, add_adapters, lora_config

    cfg = cfgs[0]

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    if len(cfgs) > 1:
        model = add_adapters(model, cfgs)
    elif method == "lora":
        model = get_peft_model(model, lora_config(cfg))
    if cfg.fused:
        fastft.accelerate(model, lora=method == "lora")
    if len(cfgs) > 1:
        model.base_model.set_adapter(adapter_names(len(cfgs)))
    return model.train()


def warm_up(cfg: Any, method: str, dtype: torch.dtype, device: torch.device) -> None:
    """A step of a tiny model: code is loaded and thread pools are made, which are not the run's."""
    from transformers import LlamaConfig

    import fastft

    tiny = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = model_of(tiny, [cfg], method, dtype, device)
    fastft.memory.checkpoint(model, "attention")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(fastft.optim, cfg.optim)(trained, lr=1e-4, max_grad_norm=1.0)
    for _ in range(2):
        ids = torch.zeros(1, 64, dtype=torch.int64, device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    # Whatever will be imported is, before memory is looked at.
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from torch._dynamo import config as _  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import fastft
    from fastft import memory
    from fastft.train.config import config_from_dict
    from fastft.train.lora_setup import adapter_names
    from fastft.train.losses_apart import adapters_apart
    from fastft.train.plan_model import load_config

    cfgs = [config_from_dict(each) for each in job["cfgs"]]
    cfg = cfgs[0]
    config = load_config(cfg.model)
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    cuda = device.type == "cuda"
    warm_up(cfg, job["method"], dtype, device)
    trim()
    base = 0 if cuda else resident_bytes() or 0
    model = model_of(config, cfgs, job["method"], dtype, device)
    if job["policy"] != "keep":
        memory.checkpoint(model, job["policy"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(fastft.optim, cfg.optim)(trained, lr=1e-4, max_grad_norm=1.0)
    names = adapter_names(len(cfgs))
    sizes = [each.per_device_train_batch_size for each in cfgs]
    samples = list(zip(names, sizes, strict=True))
    batch, length = sum(sizes), cfg.max_length
    generator = torch.Generator().manual_seed(1)
    vocabulary = config.get_text_config().vocab_size
    trim()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    seconds = []
    for number in range(WARM_UP + job["steps"]):
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(device)
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with adapters_apart(model, samples):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes() or 0
    found = {"peak_bytes": peak - base, "step_seconds": statistics.median(seconds)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
