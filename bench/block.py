"""The rest of a transformer block: norms, gated units and attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .checks import compare
from .declare import Case, Impl, Metric, Options, Step, Suite, peak_bytes, time_ms

TOKENS = 2048
# name -> hidden, intermediate, heads, key heads, width of a head
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Llama-3-8B": (4096, 14336, 32, 8, 128),
}
SEQUENCE = 512
EPS = 1e-5


def cases(options: Options) -> Sequence[Case]:
    """Each operation at the sizes of two models; 2048 tokens, attention over 512 at a time."""
    found = []
    for model, (hidden, inner, heads, kv_heads, width) in MODELS.items():
        if options.quick and hidden > 1024:
            continue
        tokens = 512 if options.quick else TOKENS
        batch = tokens // SEQUENCE
        found += [
            Case(f"rms_norm {model} {tokens}x{hidden}", {"op": "rms_norm", "x": (tokens, hidden)}),
            Case(f"swiglu {model} {tokens}x{inner}", {"op": "glu", "x": (tokens, inner)}),
        ]
        if options.device.type == "cpu":  # on a GPU fastft leaves attention to torch's own
            facts = {
                "op": "attention",
                "x": (batch, SEQUENCE, heads, width),
                "kv": (batch, SEQUENCE, kv_heads, width),
            }
            found.append(Case(f"causal attention {model} {batch}x{SEQUENCE}", facts))
    return found


@dataclass
class Inputs:
    """Tensors in the run's dtype that the operation reads, and the gradient of its result."""

    case: Case
    options: Options
    tensors: tuple[torch.Tensor, ...]
    dy: torch.Tensor
    known: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def prepare(case: Case, options: Options) -> Inputs:
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=options.device)
        return values.to(options.dtype)

    shape = case["x"]
    if case["op"] == "rms_norm":
        tensors = (draw(*shape), draw(shape[-1]))
    elif case["op"] == "glu":
        tensors = (draw(*shape), draw(*shape))
    else:
        tensors = tuple(draw(*case[name]).transpose(1, 2) for name in ("x", "kv", "kv"))
    return Inputs(case, options, tensors, draw(*shape).view(tensors[0].shape), [])


def llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Transformers' Llama has it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As Transformers' Llama has it."""
    return functional.silu(gate) * up


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As Transformers calls it."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def eager_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The unfused way, whose rounding sets the bound: scores are a product in the dtype."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    wide = torch.promote_types(query.dtype, torch.float32)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(value.dtype) @ value


PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "rms_norm": llama_norm,
    "glu": swiglu,
    "attention": sdpa,
}


def results(
    run: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dy: torch.Tensor, op: str
) -> dict[str, torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    trained = leaves[:1] if op == "rms_norm" else leaves  # a frozen model's norms stay
    if op == "rms_norm":
        leaves[1].requires_grad_(False)
    y = run(*leaves)
    gradients = torch.autograd.grad(y, trained, dy)
    return {"y": y.detach(), **{f"d{i}": g for i, g in enumerate(gradients)}}


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares the result and every gradient with float64."""
    op = inputs.case["op"]
    plain = eager_attention if op == "attention" else PLAIN[op]
    if not inputs.known:
        wide = [t.double() for t in inputs.tensors]
        inputs.known.append(
            (
                results(plain, wide, inputs.dy.double(), op),
                results(plain, inputs.tensors, inputs.dy, op),
            )
        )
    return compare(step.outputs(), *inputs.known[0])


def _step(inputs: Inputs, run: Callable[..., torch.Tensor]) -> Step:
    op = inputs.case["op"]

    def outputs() -> dict[str, torch.Tensor]:
        return results(run, inputs.tensors, inputs.dy, op)

    return Step(outputs, outputs)


def build_torch(inputs: Inputs) -> Step:
    """What Transformers runs."""
    return _step(inputs, PLAIN[inputs.case["op"]])


def build_compile(inputs: Inputs) -> Step:
    """The same, compiled for these sizes."""
    return _step(inputs, torch.compile(PLAIN[inputs.case["op"]], dynamic=False))


def build_fastft(inputs: Inputs) -> Step:
    """fastft.ops; it must not be the reference."""
    from fastft import backends, ops

    op = inputs.case["op"]
    device_type = inputs.options.device.type
    chosen, _ = backends.select(op, device_type=device_type, dtype=inputs.options.dtype)
    if chosen == "reference":
        raise RuntimeError(f"no fused backend serves {op} in {inputs.options.dtype_name} here")
    run: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, weight: ops.rms_norm(x, weight, EPS),
        "glu": ops.glu,
        "attention": lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    return _step(inputs, run[op])


def tiny(case: Case) -> Case:
    small: dict[str, Any] = {"x": (8, 64)}
    if case["op"] == "attention":
        small = {"x": (1, 16, 4, 8), "kv": (1, 16, 2, 8)}
    return Case(case.name, {**case.facts, **small})


SUITE = Suite(
    name="block",
    cases=cases,
    impls=(
        Impl("torch", build_torch),
        Impl("torch.compile", build_compile),
        Impl("fastft", build_fastft),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("peak_bytes", "bytes", False, peak_bytes),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("fastft.ops",),
)
