"""One process of the e2e suite: loads the model, proves its gradients, times its steps.

Called by bench.e2e with a JSON object as its only argument; its last line is a JSON object.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .e2e import SHAPED
from .measure import peak_resident_bytes, reset_peak, resident_bytes, trim
from .plan import MODELS

R = 16
CHECK_TOKENS = 96
# The first step fills the heap; fastft finds layers that share an input in it and runs them
# together from the second on.
WARM_UP = 2
LR = 2e-4
# The model of "random".
SHAPE = MODELS["SmolLM2-135M"]


def shaped(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights, in bfloat16 whatever the dtype, drawn where they are used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = int(name.removeprefix(SHAPED))
    config = LlamaConfig(**{**MODELS["Llama-3.1-8B"], "num_hidden_layers": layers})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    # Of the width of a unit, not of a new model's 0.02: activations stay of a size.
    for p in model.parameters():
        if p.dim() == 2 and p.shape[0] != config.vocab_size:
            p.data.normal_(0, p.shape[1] ** -0.5)
    return model.to(dtype)


def load(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in `dtype`, ready to train, every page of it in memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder == "random":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)
    elif folder.startswith(SHAPED):
        model = shaped(folder, dtype, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    model.to(device).train()
    for parameter in model.parameters():
        # A file mapped into memory counts as resident only once it is read.
        parameter.requires_grad_(False).sum()
    return model


def add_adapters(model: Any, adapters: str) -> Any:
    """PEFT on all linears, B drawn at random: with B = 0 half of the adapter would go unproved."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            fan_in = parameter.shape[1]
            scale = 0.02 if "lora_B" in name else fan_in**-0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            # Rounded once, so that every precision trains the same adapter.
            parameter.data.copy_(values.to(torch.bfloat16))
    return model


def batches(vocabulary: int, batch: int, tokens: int, count: int, device: torch.device) -> list:
    """Token ids (batch, tokens) drawn from a seed, the same for every implementation."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(vocabulary, (batch, tokens), generator=generator).to(device)
        for _ in range(count)
    ]


def loss_frozen(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the frozen model, its embeddings requiring gradients so that every layer makes dX."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model(inputs_embeds=embeddings, labels=ids).loss, embeddings


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_gradient(model: Any) -> torch.Tensor:
    """All adapter gradients as one float64 vector, in the order of their names."""
    found = sorted(trained(model).items())
    return torch.cat([p.grad.double().flatten().cpu() for _, p in found])


def write_truth(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """PEFT in float64 on the check batch: loss and gradient, with adapters and without."""
    model = load(job["model"], torch.float64, device)
    ids = batches(model.config.vocab_size, 1, CHECK_TOKENS, 1, device)[0]
    loss, embeddings = loss_frozen(model, ids)
    loss.backward()
    found = {
        "frozen.loss": loss.detach().cpu().reshape(1),
        "frozen.gradient": embeddings.grad.cpu(),
    }
    model = add_adapters(model, "model").eval()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found["adapters.loss"] = loss.detach().cpu().reshape(1)
    found["adapters.gradient"] = adapter_gradient(model)
    save_file(found, job["truth"])
    return {}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def check_short(job: dict[str, Any], model: Any, device: torch.device) -> dict[str, float]:
    """Relative errors of the loss and of the gradient on the short batch, against float64."""
    truth = load_file(job["truth"])
    ids = batches(model.config.vocab_size, 1, CHECK_TOKENS, 1, device)[0]
    if job["adapters"] == "none":
        loss, embeddings = loss_frozen(model, ids)
        loss.backward()
        gradient, key = embeddings.grad.double().cpu(), "frozen"
    else:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradient, key = adapter_gradient(model), "adapters"
        model.zero_grad(set_to_none=True)
    return {
        "loss": relative(loss.detach().double().cpu(), truth[f"{key}.loss"][0]),
        "gradient": relative(gradient, truth[f"{key}.gradient"]),
    }


def check_whole(job: dict[str, Any], model: Any, ids: torch.Tensor) -> dict[str, float]:
    """The same on a batch as it is timed, against plain PEFT, which float64 has vouched for.

    Plain PEFT writes what the others are compared with.
    """
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach().double().cpu().reshape(1), "gradient": adapter_gradient(model)}
    model.zero_grad(set_to_none=True)
    if job["writes_whole"]:
        save_file(found, job["whole"])
        return {}
    expected = load_file(job["whole"])
    return {f"{name} beside peft": relative(found[name], expected[name]) for name in found}


def make_step(job: dict[str, Any], model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """token ids -> loss, after one whole training step."""
    if job["adapters"] == "none":

        def frozen_step(ids: torch.Tensor) -> torch.Tensor:
            loss, _ = loss_frozen(model, ids)
            loss.backward()
            return loss.detach()

        return frozen_step
    parameters = list(trained(model).values())
    optimize: Callable[[], Any] | None = None
    if job["optimizer"] and job["fused"]:
        from fastft.optim import AdamW

        optimize = AdamW(parameters, lr=LR, max_grad_norm=1.0).step
    elif job["optimizer"]:
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

        def optimize() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def step(ids: torch.Tensor) -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimize is not None:
            optimize()
        return loss.detach()

    return step


def run(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Loads, checks, warms up, times; sizes in bytes, times in seconds."""
    cuda = device.type == "cuda"
    model = load(job["model"], getattr(torch, job["dtype"]), device)
    if job["adapters"] != "none":
        model = add_adapters(model, job["adapters"])
    if job["fused"]:
        import fastft

        model = fastft.accelerate(model, pack_weights=cuda)
        if job["checkpointing"]:
            fastft.memory.checkpoint(model, "full")
    elif job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if job["liger"]:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.get_base_model())
    eager = model
    if job["compile"]:
        # Sizes are fixed here; a graph for any size would be another, slower one.
        model = torch.compile(model, dynamic=False)
    trim()
    held = torch.cuda.memory_allocated(device) if cuda else resident_bytes()

    ids = batches(
        eager.config.vocab_size, job["batch"], job["tokens"], WARM_UP + job["steps"], device
    )
    errors = {}
    if job["check"] and not job["compile"]:
        # A graph compiled for the short batch would cost minutes and prove little of the other.
        errors.update(check_short(job, model, device))
    if job["check"] and job["adapters"] != "none":
        errors.update(check_whole(job, model, ids[0]))
    step = make_step(job, model)
    losses, seconds = [step(batch) for batch in ids[:WARM_UP]], []
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    # Not trimmed: what the warm-up left in the process is memory the step needs.
    resettable = cuda or reset_peak()
    # On a GPU nobody waits between steps, as in training.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(job["steps"] + 1) if cuda]
    for i, batch in enumerate(ids[WARM_UP:]):
        start = time.perf_counter()
        if cuda:
            marks[i].record()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    if cuda:
        marks[-1].record()
        torch.cuda.synchronize(device)
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes()
    extra = None
    if resettable and held is not None and peak is not None:
        extra = peak - held
    detail: dict[str, Any] = {}
    if job["fused"]:
        found = fastft.explain(eager).to_dict()
        detail = {
            "fused_modules": sum(bool(m["fused"]) for m in found["modules"]),
            "fallback_modules": sum(not m["fused"] for m in found["modules"]),
            "fused_layers": sum(bool(m["fused"]) for m in found["layers"]),
            "fused_calls": found["calls"]["fused"],
            "fallback_calls": found["calls"]["fallback"],
        }
    return {
        "step_seconds": seconds,
        "peak_extra_bytes": extra,
        "losses": [float(loss) for loss in losses],
        "errors": errors,
        "detail": detail,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    result = write_truth(job, device) if job["role"] == "truth" else run(job, device)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
