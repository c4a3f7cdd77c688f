"""The rest of a transformer block: norms, rotary embedding, gated units and attention, forward and
backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, peak_bytes, time_ms

# On a GPU what is read must not lie in its cache.
TOKENS = {"cpu": 2048, "cuda": 8192}
# name -> hidden, intermediate, heads, key heads, width of a head
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Gemma-2-2B": (2304, 9216, 8, 4, 256),
    "Llama-3-8B": (4096, 14336, 32, 8, 128),
}
SEQUENCE = 512
EPS = 1e-5
# Tensors that get a gradient: a frozen model's norms stay.
TRAINED = {"rms_norm": 1, "layer_norm": 1, "glu": 2, "rope": 2, "attention": 3}
# Tensors of x's size that must be read or written, forward and backward; rope: of q and k together.
PASSES = {"rms_norm": 5, "layer_norm": 5, "glu": 8, "rope": 4}


def cases(options: Options) -> Sequence[Case]:
    """Each operation at the sizes of three models, the largest first; attention over 512 tokens."""
    found = []
    for model, (hidden, inner, heads, kv_heads, width) in reversed(MODELS.items()):
        if options.quick and hidden > 1024:
            continue
        tokens = 512 if options.quick else TOKENS[options.device.type]
        batch = tokens // SEQUENCE
        pair = {"x": (batch, SEQUENCE, heads, width), "kv": (batch, SEQUENCE, kv_heads, width)}
        found += [
            Case(f"rms_norm {model} {tokens}x{hidden}", {"op": "rms_norm", "x": (tokens, hidden)}),
            Case(
                f"layer_norm {model} {tokens}x{hidden}", {"op": "layer_norm", "x": (tokens, hidden)}
            ),
            Case(f"swiglu {model} {tokens}x{inner}", {"op": "glu", "x": (tokens, inner)}),
            Case(f"rope {model} {batch}x{SEQUENCE}", {"op": "rope", **pair}),
        ]
        if options.device.type == "cpu":  # on a GPU fastft leaves attention to torch's own
            name = f"causal attention {model} {batch}x{SEQUENCE}"
            found.append(Case(name, {"op": "attention", **pair}))
    return found


@dataclass
class Inputs:
    """Tensors in the run's dtype that the operation reads, and the gradients of its results."""

    case: Case
    options: Options
    tensors: tuple[torch.Tensor, ...]
    pulls: tuple[torch.Tensor, ...]
    known: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def prepare(case: Case, options: Options) -> Inputs:
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=options.device)
        return values.to(options.dtype)

    shape = case["x"]
    if case["op"] == "rms_norm":
        tensors = (draw(*shape), draw(shape[-1]))
    elif case["op"] == "layer_norm":
        tensors = (draw(*shape), draw(shape[-1]), draw(shape[-1]))
    elif case["op"] == "glu":
        tensors = (draw(*shape), draw(*shape))
    elif case["op"] == "rope":
        angles = torch.outer(torch.arange(shape[1]), 1e4 ** -torch.linspace(0, 1, shape[-1] // 2))
        angles = torch.cat([angles, angles], -1)[None].to(options.device)
        tables = tuple(t.to(options.dtype) for t in (angles.cos(), angles.sin()))
        tensors = (*(draw(*case[name]).transpose(1, 2) for name in ("x", "kv")), *tables)
    else:
        tensors = tuple(draw(*case[name]).transpose(1, 2) for name in ("x", "kv", "kv"))
    pulls = [draw(*shape).view(tensors[0].shape)]
    if case["op"] == "rope":
        pulls = [torch.randn_like(t) for t in tensors[:2]]
    return Inputs(case, options, tensors, tuple(pulls), [])


def llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Transformers' Llama has it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As torch has it."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def llama_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As Transformers' Llama has it."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


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


PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": llama_norm,
    "layer_norm": layer_norm,
    "rope": llama_rope,
    "glu": swiglu,
    "attention": sdpa,
}


def results(
    run: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    pulls: Sequence[torch.Tensor],
    op: str,
) -> dict[str, torch.Tensor]:
    leaves = [t.detach() for t in tensors]
    trained = [t.requires_grad_() for t in leaves[: TRAINED[op]]]
    y = run(*leaves)
    ys = list(y) if isinstance(y, (tuple, list)) else [y]
    gradients = torch.autograd.grad(ys, trained, list(pulls))
    found = {f"y{i}": t.detach() for i, t in enumerate(ys)}
    return {**found, **{f"d{i}": g for i, g in enumerate(gradients)}}


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares the result and every gradient with float64."""
    op = inputs.case["op"]
    plain = eager_attention if op == "attention" else PLAIN[op]
    if not inputs.known:
        wide = [t.double() for t in inputs.tensors]
        inputs.known.append(
            (
                results(plain, wide, [t.double() for t in inputs.pulls], op),
                results(plain, inputs.tensors, inputs.pulls, op),
            )
        )
    return compare(step.outputs(), *inputs.known[0])


def _step(inputs: Inputs, run: Callable[..., torch.Tensor]) -> Step:
    op = inputs.case["op"]

    def outputs() -> dict[str, torch.Tensor]:
        return results(run, inputs.tensors, inputs.pulls, op)

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
        "layer_norm": lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS),
        "glu": ops.glu,
        "rope": ops.rope,
        "attention": lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    return _step(inputs, run[op])


def build_liger(inputs: Inputs) -> Step:
    """Liger's autograd functions, called as its patched modules call them. Some write over what
    they are given: they get tensors of their own, rotary's at each call."""
    from liger_kernel.ops import layer_norm, rms_norm, rope, swiglu

    run: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", True),
        "layer_norm": lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, EPS),
        "glu": swiglu.LigerSiLUMulFunction.apply,
        "rope": lambda q, k, cos, sin: rope.LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin),
    }

    def step() -> Step:
        own = [tuple(t.clone() for t in ts) for ts in (inputs.tensors, inputs.pulls)]
        return _step(
            dataclasses.replace(inputs, tensors=own[0], pulls=own[1]), run[inputs.case["op"]]
        )

    given = (*inputs.tensors, *inputs.pulls)
    size = sum(t.numel() * t.element_size() for t in given)
    return Step(step().run, lambda: step().outputs(), copies=size)


def needs_liger(case: Case, options: Options) -> str | None:
    """Its kernels run on GPUs, and none of them is attention."""
    if options.device.type != "cuda":
        return "does not apply: it runs on GPUs only"
    return not_attention(case, options)


def not_attention(case: Case, options: Options) -> str | None:
    """Attention is bound by its products."""
    return "does not apply to attention" if case["op"] == "attention" else None


def build_copy(inputs: Inputs) -> Step:
    """The floor: as many bytes as the operation must move, copied. It has no result to check."""
    op = inputs.case["op"]
    moved = inputs.tensors[: 2 if op == "rope" else 1]
    # A copy reads and writes.
    elements = sum(t.numel() for t in moved) * PASSES[op] // 2
    source = torch.ones(elements, dtype=inputs.options.dtype, device=inputs.options.device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return Step(run, dict)


def of_copy(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Bytes the operation must move over its median time, as a share of what a copy reaches."""
    copy = by_impl.get("copy")
    return None if copy is None or own is copy else copy.median / own.median


def tiny(case: Case) -> Case:
    small: dict[str, Any] = {"x": (8, 64)}
    if case["op"] in ("attention", "rope"):
        small = {"x": (1, 16, 4, 8), "kv": (1, 16, 2, 8)}
    return Case(case.name, {**case.facts, **small})


SUITE = Suite(
    name="block",
    cases=cases,
    impls=(
        Impl("torch", build_torch),
        Impl("torch.compile", build_compile),
        Impl("liger", build_liger, package="liger_kernel", not_here=needs_liger),
        Impl("copy", build_copy, not_here=not_attention),
        Impl("fastft", build_fastft),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("of_copy", "fraction", True, of_copy),
        Metric("peak_bytes", "bytes", False, peak_bytes),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("fastft.ops",),
)
