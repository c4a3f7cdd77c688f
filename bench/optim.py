"""Optimizer steps: time, memory and launches for each parameter, beside what a copy reaches.

Float32 parameters are clipped in the step: that is what people run on adapters. Parameters in
bfloat16 are whole models, stepped without a clip, by 8-bit or bfloat16 states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 2e-4, (0.9, 0.999), 1e-8, 0.01, 1.0
CHECKED_STEPS = 3
R = 16
# Layers, and q, k, v, o, gate, up, down as (in_features, out_features).
SMOLLM2 = (
    30,
    ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)),
)
LLAMA_8B = 32, (
    (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336),
    (14336, 4096),
)  # fmt: skip
# Bytes of a GPU that a parameter takes: implementations lie beside each other, each with its own
# parameters, gradients and states. As many layers as fit, and as take no minutes to check.
BYTES_OF_A_MODEL = 48
LAYERS = 8


def lora_shapes(model: Any, layers: int | None = None) -> list[tuple[int, ...]]:
    """Shapes of the A and B of every linear at rank 16: 14 tensors a layer."""
    count, linears = model
    return [s for k, n in linears for s in ((R, k), (n, R))] * (layers or count)


def model_shapes(options: Options) -> list[tuple[int, ...]]:
    """Weights of layers of Llama-3-8B; of SmolLM2 on a CPU."""
    if options.device.type != "cuda":
        count, linears = SMOLLM2
        return [(n, k) for k, n in linears] * (1 if options.quick else count)
    count, linears = LLAMA_8B
    layer = [(n, k) for k, n in linears]
    fits = int(torch.cuda.mem_get_info()[0] * 0.9 / BYTES_OF_A_MODEL) // _size(layer)
    return layer * (1 if options.quick else max(1, min(fits, LAYERS, count)))


def _size(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(s).numel() for s in shapes)


def cases(options: Options) -> Sequence[Case]:
    """Adapters in float32 as they come and as one tensor, many small ones, a model in bfloat16."""
    quick = 2 if options.quick else None
    adapters = lora_shapes(SMOLLM2, quick)
    large = lora_shapes(LLAMA_8B, quick)
    small = [(1024,)] * (100 if options.quick else 10_000)
    model = model_shapes(options)
    count = f"{_size(model) / 1e9:.2f}B"
    return [
        case_of(f"lora Llama-3-8B {len(large)} tensors", large, "float32"),
        case_of(f"model {count} bfloat16", model, "bfloat16"),
        case_of(f"lora SmolLM2 {len(adapters)} tensors", adapters, "float32"),
        case_of("flat 1 tensor", [(_size(adapters),)], "float32"),
        case_of(f"{len(small)} tensors of 1024", small, "float32"),
    ]


def case_of(name: str, shapes: Sequence[tuple[int, ...]], dtype: str) -> Case:
    """Tensors of these shapes and this dtype."""
    return Case(name, {"shapes": shapes, "total": _size(shapes), "dtype": dtype})


@dataclass
class Inputs:
    """values, gradients: tensors of the case's shapes and dtype."""

    case: Case
    options: Options
    values: list[torch.Tensor]
    gradients: list[torch.Tensor]


def prepare(case: Case, options: Options) -> Inputs:
    generator = torch.Generator(options.device).manual_seed(case["total"] % 2**31)
    dtype = getattr(torch, case["dtype"])

    def draw(scale: float) -> list[torch.Tensor]:
        return [
            (torch.randn(shape, generator=generator, device=options.device) * scale).to(dtype)
            for shape in case["shapes"]
        ]

    return Inputs(case, options, values=draw(0.05), gradients=draw(0.01))


def plain(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The change of all parameters after three steps, from the formula, in `dtype`; of a model
    kept in float32."""
    coefficient = 1.0
    if clips(inputs.case):
        squares = sum(g.double().square().sum() for g in inputs.gradients)
        coefficient = min(1.0, MAX_NORM / (float(squares) ** 0.5 + 1e-6))
    kept = dtype if clips(inputs.case) else torch.float32
    pairs = zip(inputs.values, inputs.gradients, strict=True)
    changes = [_change(v.to(dtype), g.to(dtype) * coefficient).to(kept) for v, g in pairs]
    return {"change": torch.cat([c.flatten() for c in changes])}


def _change(start: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    values, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, CHECKED_STEPS + 1):
        values = values * (1 - LR * WEIGHT_DECAY)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        values = values - LR * (first / (1 - BETAS[0] ** step)) / root
    return values - start


def clips(case: Case) -> bool:
    """Whether the norm of the case's gradients is clipped."""
    return bool(case["dtype"] == "float32")


# By how much of the way three steps with 8-bit states may differ: quanta of the states.
EIGHT_BIT = 0.05


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares how three steps change float32 parameters with the formula in float64; 8-bit states
    may differ by their quanta. In bfloat16 steps are of the size of a rounding: there the way is
    held to the formula's on the whole."""
    truth = plain(inputs, torch.float64)
    ((name, change),) = step.outputs().items()
    if not clips(inputs.case):
        products = norms = 0.0
        for own, exact in zip(change.split(1 << 26), truth["change"].split(1 << 26), strict=True):
            products += float((own.double() * exact).sum())
            norms += float(exact.double().square().sum())
        along = products / norms
        return None if 0.5 < along < 1.5 else f"moves {along:.2f} times as far as the formula"
    if name == "change":
        return compare({name: change}, truth, plain(inputs, torch.float32))
    exact = truth["change"]
    off = float((change.double() - exact).norm() / exact.norm())
    return None if off < EIGHT_BIT else f"8-bit steps are {off:.1%} off the formula's"


def _step(
    inputs: Inputs,
    make: Callable[[list[torch.Tensor]], Callable[[], None]],
    name: str = "change",
) -> Step:
    """make: parameters -> the whole step, clip included; name: of the result."""

    def fresh() -> tuple[list[torch.Tensor], Callable[[], None]]:
        parameters = [value.clone().requires_grad_() for value in inputs.values]
        for parameter, gradient in zip(parameters, inputs.gradients, strict=True):
            parameter.grad = gradient.clone()
        return parameters, make(parameters)

    def outputs() -> dict[str, torch.Tensor]:
        parameters, step = fresh()
        for _ in range(CHECKED_STEPS):
            # A clip may scale the gradients where they lie.
            for parameter, gradient in zip(parameters, inputs.gradients, strict=True):
                parameter.grad.copy_(gradient)
            step()
        change = [p.detach() - v for p, v in zip(parameters, inputs.values, strict=True)]
        return {name: torch.cat([c.flatten() for c in change])}

    # Parameters and gradients of its own.
    size = inputs.values[0].element_size()
    return Step(fresh()[1], outputs, copies=2 * size * inputs.case["total"])


def _clipped(inputs: Inputs, parameters: list[torch.Tensor], optimizer: Any) -> Callable[[], None]:
    """A step after the clip that the optimizer itself does not know."""
    if not clips(inputs.case):
        return optimizer.step  # type: ignore[no-any-return]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return step


OPTIONS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


def _torch_adamw(inputs: Inputs, **kind: bool) -> Step:
    return _step(inputs, lambda p: _clipped(inputs, p, torch.optim.AdamW(p, **OPTIONS, **kind)))


def build_fused(inputs: Inputs) -> Step:
    """torch.optim.AdamW(fused=True), after clip_grad_norm_ in float32."""
    return _torch_adamw(inputs, fused=True)


def build_foreach(inputs: Inputs) -> Step:
    """torch.optim.AdamW(foreach=True), after clip_grad_norm_ in float32."""
    return _torch_adamw(inputs, foreach=True)


def build_bitsandbytes(inputs: Inputs) -> Step:
    """bitsandbytes' AdamW8bit, after clip_grad_norm_ in float32; states of tensors of fewer than
    4,096 elements stay float32."""
    import bitsandbytes

    return _step(
        inputs, lambda p: _clipped(inputs, p, bitsandbytes.optim.AdamW8bit(p, **OPTIONS)), "8-bit"
    )


def build_torchao(inputs: Inputs) -> Step:
    """torchao's AdamW8bit, after clip_grad_norm_ in float32; it compiles at its first step."""
    from torchao.optim import AdamW8bit

    more = {"bf16_stochastic_round": not clips(inputs.case)}
    return _step(inputs, lambda p: _clipped(inputs, p, AdamW8bit(p, **OPTIONS, **more)), "8-bit")


def _fastft(inputs: Inputs, kind: str, **options: Any) -> Step:
    from fastft import optim

    # Without a clip no gradient is summed either: as the others.
    clip = MAX_NORM if clips(inputs.case) else None
    more = {"max_grad_norm": clip, "skip_nonfinite": clip is not None, **options}
    name = "8-bit" if "8bit" in kind else "change"
    return _step(inputs, lambda p: getattr(optim, kind)(p, **OPTIONS, **more).step, name)


def build_fastft(inputs: Inputs) -> Step:
    """fastft.optim.AdamW with float32 states, which clips in the same call; parameters in bfloat16
    are rounded stochastically."""
    return _fastft(inputs, "AdamW" if clips(inputs.case) else "AdamWBF16")


def build_fastft_8bit(inputs: Inputs) -> Step:
    """fastft.optim.AdamW8bit: the same with 8-bit states."""
    return _fastft(inputs, "AdamW8bit")


def build_fastft_host(inputs: Inputs) -> Step:
    """fastft.optim.AdamW8bit with its states in pinned host memory."""
    return _fastft(inputs, "AdamW8bit", states="host")


def gpu_only(case: Case, options: Options) -> str | None:
    """Why states in host memory are no case of their own on a CPU."""
    return None if options.device.type == "cuda" else "does not apply: a CPU's memory is the host's"


def build_copy(inputs: Inputs) -> Step:
    """The floor: parameters, gradients and float32 states (28 bytes) or 8-bit ones (10.06) moved as
    a copy moves them, half read and half written."""
    case = inputs.case
    moved = 28 if case["dtype"] == "float32" else 10.0625
    words = int(case["total"] * moved / 8)
    source = torch.zeros(words, device=inputs.options.device)
    target = torch.empty_like(source)
    return Step(
        lambda: target.copy_(source), lambda: plain(inputs, torch.float32), copies=8 * words
    )


def ns_per_param(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Median time of a step over the number of parameters."""
    return own.median * 1e9 / case["total"]


def bytes_per_param(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Peak memory of the first step over the number of parameters.

    The optimizer's state (8 bytes in float32) and whatever else an implementation allocates; the
    parameters and gradients it is given are not counted.
    """
    return None if own.peak_bytes is None else own.peak_bytes / case["total"]


def launches(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Kernels, copies and fills of a step; on a GPU."""
    return own.launches


def host_us(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Time until a step returns, the GPU having been idle; on a GPU."""
    return None if own.host_seconds is None else own.host_seconds * 1e6


def of_copy(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """How near the floor: the copy's time over the step's."""
    copy = by_impl.get("copy")
    return None if copy is None or own is copy else copy.median / own.median


def tiny(case: Case) -> Case:
    return case_of(case.name, [(R, 64), (64, R)], case["dtype"])


SUITE = Suite(
    name="optim",
    cases=cases,
    impls=(
        Impl("torch-fused", build_fused),
        Impl("torch-foreach", build_foreach),
        Impl("bitsandbytes", build_bitsandbytes, package="bitsandbytes"),
        Impl("torchao", build_torchao, package="torchao"),
        Impl("copy", build_copy),
        Impl("fastft", build_fastft),
        Impl("fastft-8bit", build_fastft_8bit),
        Impl("fastft-host", build_fastft_host, not_here=gpu_only),
    ),
    metrics=(
        Metric("ns_per_param", "ns", False, ns_per_param),
        Metric("of_copy", "fraction", True, of_copy),
        Metric("bytes_per_param", "bytes", False, bytes_per_param),
        Metric("launches", "launches", False, launches),
        Metric("host_us", "us", False, host_us),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    counts_launches=True,
    preload=("fastft.optim",),
)
