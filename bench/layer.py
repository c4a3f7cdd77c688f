"""LoRA over the seven linear layers of a transformer block: its cost over the frozen products."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, peak_bytes, time_ms
from .lora import extra_over_frozen, needs_bf16, without_dropout
from .unsloth_style import BetaOneLora

SCALING = 2.0
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
# name -> hidden, intermediate, width of the keys
MODELS = {
    "SmolLM2-135M": (576, 1536, 192),
    "Llama-3.2-1B": (2048, 8192, 512),
    "Llama-3-8B": (4096, 14336, 1024),
    "Qwen2.5-32B": (5120, 27648, 1024),
}
CPU_RUNS = (("SmolLM2-135M", 2048, 16, 0.0), ("SmolLM2-135M", 2048, 16, 0.1),
            ("Llama-3.2-1B", 512, 16, 0.0), ("Llama-3.2-1B", 512, 64, 0.0))  # fmt: skip
# What goals are stated for comes first: a run that is stopped has it.
CUDA_RUNS = tuple(
    (model, tokens, r, p)
    for model in ("Llama-3-8B", "Qwen2.5-32B")
    for tokens in (8192, 2048, 4096, 16384)
    for r in (16, 64)
    for p in (0.0, 0.1)
)


def cases(options: Options) -> Sequence[Case]:
    runs = CUDA_RUNS if options.device.type == "cuda" else CPU_RUNS
    if options.quick:
        runs = (("SmolLM2-135M", 256, 16, 0.0),)
    found = []
    for model, tokens, r, p in runs:
        hidden, inner, keys = MODELS[model]
        facts = {"hidden": hidden, "inner": inner, "keys": keys, "m": tokens, "r": r, "dropout": p}
        found.append(Case(f"{model} layer, {tokens} tokens, r={r} dropout={p:g}", facts))
    return found


class Layer(nn.Module):
    """The seven projections in the order a block has them, and nothing between them."""

    def __init__(self, hidden: int, inner: int, keys: int) -> None:
        super().__init__()
        sizes = {
            "q": (hidden, hidden), "k": (hidden, keys), "v": (hidden, keys), "o": (hidden, hidden),
            "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden),
        }  # fmt: skip
        for name, (k, n) in sizes.items():
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = self.o(q)
        gate, up = self.gate(h), self.up(h)
        return k, v, up, self.down(gate)


@dataclass
class Inputs:
    """The frozen layer and x: (m, hidden) in the run's dtype; dys: a gradient for each output."""

    case: Case
    options: Options
    layer: Layer
    x: torch.Tensor
    dys: list[torch.Tensor]
    known: dict[bool, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def prepare(case: Case, options: Options) -> Inputs:
    torch.manual_seed(0)
    hidden, inner, keys, m = (case[name] for name in ("hidden", "inner", "keys", "m"))
    with torch.device(options.device):
        layer = Layer(hidden, inner, keys)
        for parameter in layer.parameters():
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
        drawn = [torch.randn(m, n).to(options.dtype) for n in (hidden, keys, keys, inner, hidden)]
    layer = layer.to(options.dtype).requires_grad_(False)
    return Inputs(case, options, layer, drawn[0], drawn[1:], {})


def _adapted(inputs: Inputs, *, float32: bool = True, wide: bool = False) -> Any:
    """A PeftModel over the shared frozen weights; all in float64 where ``wide``."""
    from peft import LoraConfig, get_peft_model

    r, frozen = inputs.case["r"], {id(p): p for p in inputs.layer.parameters()}
    config = LoraConfig(
        r=r,
        lora_alpha=int(SCALING * r),
        lora_dropout=inputs.case["dropout"],
        target_modules=list(NAMES),
    )
    layer = copy.deepcopy(inputs.layer, None if wide else frozen)
    model = get_peft_model(layer, config, autocast_adapter_dtype=float32)
    generator = torch.Generator().manual_seed(1)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return model.double() if wide else model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in sorted(model.named_parameters()) if "lora_" in name]


def _step(inputs: Inputs, model: Any, call: Callable[..., Any] | None = None) -> Step:
    """Forward and backward in training mode; checked without dropout."""
    dtype = next(model.parameters()).dtype
    if dtype != torch.float64:
        dtype = inputs.x.dtype
    x = inputs.x.detach().to(dtype).requires_grad_()
    dys = [dy.to(dtype) for dy in inputs.dys]
    trained, run_layer = _trained(model), call or model

    def run() -> None:
        torch.autograd.backward(run_layer(x), dys)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    def outputs() -> dict[str, torch.Tensor]:
        model.eval()
        ys = run_layer(x)
        gradients = torch.autograd.grad(ys, [x, *trained], dys)
        model.train()
        named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return {**named, **{f"d{i}": g for i, g in enumerate(gradients)}}

    model.train()
    return Step(run, outputs)


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares the outputs and every gradient with float64."""
    got = step.outputs()
    adapters = len(got) > len(inputs.dys) + 1
    if adapters not in inputs.known:
        layers = [_adapted(inputs, wide=True), _adapted(inputs, float32=False)]
        if not adapters:
            layers = [copy.deepcopy(inputs.layer).double(), inputs.layer]
        truth, plain = (_step(inputs, layer).outputs() for layer in layers)
        inputs.known[adapters] = (truth, plain)
    return compare(got, *inputs.known[adapters])


def build_frozen(inputs: Inputs) -> Step:
    """The seven products, forward and backward to x."""
    return _step(inputs, inputs.layer)


def build_peft(inputs: Inputs) -> Step:
    """PEFT's layers in their default mode: adapters in float32."""
    return _step(inputs, _adapted(inputs))


def build_peft_bf16(inputs: Inputs) -> Step:
    """PEFT's layers with `autocast_adapter_dtype=False`."""
    return _step(inputs, _adapted(inputs, float32=False))


def build_unsloth_style(inputs: Inputs) -> Step:
    """`BetaOneLora` on the groups that share an input: q/k/v, o, gate/up, down."""
    model = _adapted(inputs, float32=False)
    layers = {name: getattr(model.get_base_model(), name) for name in NAMES}

    def group(x: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        parts = [layers[name] for name in names]
        weights = [p.base_layer.weight for p in parts]
        pairs = [[getattr(p, s)["default"].weight for p in parts] for s in ("lora_A", "lora_B")]
        return BetaOneLora.apply(x, SCALING, len(parts), *weights, *pairs[0], *pairs[1])

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = group(x, "q", "k", "v")
        (h,) = group(q, "o")
        gate, up = group(h, "gate", "up")
        return k, v, up, *group(gate, "down")

    return _step(inputs, model, call)


def build_fastft(inputs: Inputs) -> Step:
    """PEFT's layers in their default mode after `fastft.accelerate`, siblings learnt; on a GPU the
    weights, copies then, are packed."""
    import fastft

    on_gpu, copies = inputs.options.device.type == "cuda", 0
    if on_gpu:
        inputs = dataclasses.replace(inputs, layer=copy.deepcopy(inputs.layer))
        copies = sum(p.numel() * p.element_size() for p in inputs.layer.parameters())
    model = fastft.accelerate(_adapted(inputs), strict=True, pack_weights=on_gpu)
    step = dataclasses.replace(_step(inputs, model), copies=copies)
    step.run()
    step.run()
    calls = fastft.explain(model).to_dict()["calls"]
    if not calls["fused"] or calls["fallback"]:
        raise RuntimeError(f"not all layers ran fused: {calls}")
    return step


def tflop_s(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float:
    """Operations of the frozen products, forward and backward to x, over the median time."""
    hidden, inner, keys = case["hidden"], case["inner"], case["keys"]
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    operations: float = 4.0 * case["m"] * weights
    return operations / own.median / 1e12


def tiny(case: Case) -> Case:
    return Case(case.name, {**case.facts, "hidden": 64, "inner": 96, "keys": 32, "m": 32, "r": 8})


SUITE = Suite(
    name="layer",
    cases=cases,
    impls=(
        Impl("frozen", build_frozen),
        Impl("peft", build_peft, package="peft"),
        Impl("peft-bf16", build_peft_bf16, package="peft", not_here=needs_bf16),
        Impl("unsloth-style", build_unsloth_style, package="peft", not_here=without_dropout),
        Impl("fastft", build_fastft, package="peft"),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("extra_over_frozen", "fraction", False, extra_over_frozen),
        Metric("tflop_s", "TFLOP/s", True, tflop_s),
        Metric("peak_bytes", "bytes", False, peak_bytes),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("fastft", "peft"),
)
