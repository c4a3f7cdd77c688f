"""LoRA on the expert weights of one mixture-of-experts block, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import compare
from .declare import Case, Impl, Metric, Options, Step, Suite, peak_bytes, time_ms
from .lora import extra_over_frozen

R = 16
# hidden, intermediate, experts, experts a token, tokens; the first two a CPU runs in a second
SIZES = ((1024, 512, 32, 4, 1024), (2048, 768, 64, 8, 512))
CUDA_SIZES = ((2048, 768, 128, 8, 8192), (4096, 14336, 8, 2, 8192))


def cases(options: Options) -> Sequence[Case]:
    """Shapes like Qwen3-MoE's; on a GPU Qwen3-30B-A3B's and Mixtral-8x7B's own."""
    sizes = CUDA_SIZES if options.device.type == "cuda" else SIZES
    return [
        Case(
            f"{e} experts {k}x{n}, {top} of them a token, {m} tokens, r={R}",
            {"k": k, "n": n, "e": e, "top": top, "m": m},
        )
        for k, n, e, top, m in (((256, 128, 8, 2, 128),) if options.quick else sizes)
    ]


@dataclass
class Inputs:
    """x: (m, k); index, weights: (m, top), the experts of each token; dy: (m, k)."""

    case: Case
    options: Options
    experts: Any
    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    dy: torch.Tensor
    known: dict[bool, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


class Block(nn.Module):
    """A model of one experts module, for `get_peft_model` to find."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)


def prepare(case: Case, options: Options) -> Inputs:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    k, m, top = case["k"], case["m"], case["top"]
    config = Qwen3MoeConfig(hidden_size=k, moe_intermediate_size=case["n"], num_experts=case["e"])
    config._experts_implementation = "grouped_mm"
    with torch.device(options.device):
        experts = Qwen3MoeExperts(config)
        for parameter in experts.parameters():
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        weights, index = torch.rand(m, case["e"]).softmax(-1).topk(top)
        x, dy = torch.randn(m, k), torch.randn(m, k)
    experts = experts.to(options.dtype).requires_grad_(False)
    x, dy, weights = (t.to(options.dtype) for t in (x, dy, weights))
    return Inputs(case, options, experts, x, index, weights, dy, {})


def _step(inputs: Inputs, module: Any, trained: Sequence[nn.Parameter], dtype: Any = None) -> Step:
    """Forward and backward to the input and to what is trained."""
    x = inputs.x.detach().to(dtype or inputs.x.dtype).requires_grad_()
    weights, dy = inputs.weights.to(x.dtype), inputs.dy.to(x.dtype)

    def outputs() -> dict[str, torch.Tensor]:
        y = module(x, inputs.index, weights)
        gradients = torch.autograd.grad(y, [x, *trained], dy)
        return {"y": y.detach(), **{f"d{i}": g for i, g in enumerate(gradients)}}

    def run() -> None:
        outputs()

    return Step(run, outputs)


def _peft_model(inputs: Inputs, *, wide: bool = False) -> tuple[Any, list[nn.Parameter]]:
    import copy

    from peft import LoraConfig, get_peft_model

    frozen = {id(p): p for p in inputs.experts.parameters()}
    block: Any = Block(copy.deepcopy(inputs.experts, None if wide else frozen))
    experts = block.experts
    config = LoraConfig(
        r=R, lora_alpha=2 * R, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(block, config)
    trained = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)
    generator = torch.Generator().manual_seed(1)
    for _, p in trained:
        p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    if wide:
        model.double()
        experts.config._experts_implementation = "eager"  # no grouped product in float64
    return model, [p for _, p in trained]


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares y, dx and the adapters' gradients with float64, one expert after another."""
    got = step.outputs()
    adapters = len(got) > 2
    if adapters not in inputs.known:
        both = []
        for wide in (True, False):
            model, trained = _peft_model(inputs, wide=wide)
            if not adapters:
                model, trained = model.get_base_model().experts.get_base_layer(), []
            dtype = torch.float64 if wide else None
            both.append(_step(inputs, model, trained, dtype).outputs())
        inputs.known[adapters] = (both[0], both[1])
    return compare(got, *inputs.known[adapters])


def build_frozen(inputs: Inputs) -> Step:
    """The experts alone, through torch's grouped product."""
    return _step(inputs, inputs.experts, [])


def build_peft(inputs: Inputs) -> Step:
    """PEFT's `target_parameters`: the adapted stack of weights is made at each forward."""
    return _step(inputs, *_peft_model(inputs))


def build_fastft(inputs: Inputs) -> Step:
    """The same after `fastft.accelerate`; it must not have fallen back."""
    import fastft

    model, trained = _peft_model(inputs)
    fastft.accelerate(model, strict=True, verify=False)
    step = _step(inputs, model, trained)
    step.run()
    calls = fastft.explain(model).to_dict()["calls"]
    if not calls["fused"] or calls["fallback"]:
        raise RuntimeError(f"the experts did not run fused: {calls}")
    return step


def tiny(case: Case) -> Case:
    return Case(case.name, {"k": 64, "n": 64, "e": 4, "top": 2, "m": 32})


SUITE = Suite(
    name="experts",
    cases=cases,
    impls=(
        Impl("frozen", build_frozen),
        Impl("peft", build_peft, package="peft"),
        Impl("fastft", build_fastft, package="peft"),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("extra_over_frozen", "fraction", False, extra_over_frozen),
        Metric("peak_bytes", "bytes", False, peak_bytes),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("fastft", "peft", "transformers.models.qwen3_moe.modeling_qwen3_moe"),
)
