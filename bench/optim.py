"""AdamW with the clip of the gradients' norm: a step's time and memory for each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite
from .loss import needs_cuda

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 2e-4, (0.9, 0.999), 1e-8, 0.01, 1.0
CHECKED_STEPS = 3
R = 16
# SmolLM2-135M: 30 layers of q, k, v, o, gate, up, down as (in_features, out_features).
LAYERS = 30
LINEARS = (
    (576, 576),
    (576, 192),
    (576, 192),
    (576, 576),
    (576, 1536),
    (576, 1536),
    (1536, 576),
)


def lora_shapes(layers: int) -> list[tuple[int, ...]]:
    """Shapes of the A and B of every linear of SmolLM2 at rank 16: 14 tensors a layer."""
    shapes = [shape for k, n in LINEARS for shape in ((R, k), (n, R))]
    return shapes * layers


def cases(options: Options) -> Sequence[Case]:
    """The adapters of SmolLM2, as they come and as one flat tensor of as many elements."""
    shapes = lora_shapes(2 if options.quick else LAYERS)
    total = sum(rows * columns for rows, columns in shapes)
    return [
        Case(f"lora {len(shapes)} tensors", {"shapes": shapes, "total": total, "dtype": "float32"}),
        Case("flat 1 tensor", {"shapes": [(total,)], "total": total, "dtype": "float32"}),
    ]


@dataclass
class Inputs:
    """values, gradients: float32 tensors of the case's shapes (adapters train in float32)."""

    case: Case
    options: Options
    values: list[torch.Tensor]
    gradients: list[torch.Tensor]


def prepare(case: Case, options: Options) -> Inputs:
    generator = torch.Generator().manual_seed(case["total"])

    def draw(scale: float) -> list[torch.Tensor]:
        return [
            (torch.randn(shape, generator=generator) * scale).to(options.device)
            for shape in case["shapes"]
        ]

    return Inputs(case, options, values=draw(0.05), gradients=draw(0.01))


def plain(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The change of all parameters after three steps, from the formula, in `dtype`."""
    values = torch.cat([v.flatten() for v in inputs.values]).to(dtype)
    gradient = torch.cat([g.flatten() for g in inputs.gradients]).to(dtype)
    gradient = gradient * min(1.0, MAX_NORM / (float(gradient.double().norm()) + 1e-6))
    start = values.clone()
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, CHECKED_STEPS + 1):
        values = values * (1 - LR * WEIGHT_DECAY)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        values = values - LR * (first / (1 - BETAS[0] ** step)) / root
    return {"change": values - start}


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares how three steps change the parameters with the formula in float64."""
    return compare(step.outputs(), plain(inputs, torch.float64), plain(inputs, torch.float32))


def _step(inputs: Inputs, make: Callable[[list[torch.Tensor]], Callable[[], None]]) -> Step:
    """make: parameters -> the whole step, clip included."""

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
        return {"change": torch.cat([c.flatten() for c in change])}

    # Parameters and gradients of its own: 4 bytes of each for every element.
    return Step(fresh()[1], outputs, copies=8 * inputs.case["total"])


def _torch_adamw(inputs: Inputs, **kind: bool) -> Step:
    def make(parameters: list[torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **kind
        )

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

        return step

    return _step(inputs, make)


def build_fused(inputs: Inputs) -> Step:
    """torch.optim.AdamW(fused=True) after clip_grad_norm_."""
    return _torch_adamw(inputs, fused=True)


def build_foreach(inputs: Inputs) -> Step:
    """torch.optim.AdamW(foreach=True) after clip_grad_norm_."""
    return _torch_adamw(inputs, foreach=True)


def build_bitsandbytes(inputs: Inputs) -> Step:
    """bitsandbytes' AdamW with 32-bit states after clip_grad_norm_."""
    import bitsandbytes

    def make(parameters: list[torch.Tensor]) -> Callable[[], None]:
        optimizer = bitsandbytes.optim.AdamW32bit(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

        return step

    return _step(inputs, make)


def build_fastft(inputs: Inputs) -> Step:
    """fastft.optim.AdamW, which clips in the same call."""
    from fastft.optim import AdamW

    def make(parameters: list[torch.Tensor]) -> Callable[[], Any]:
        return AdamW(
            parameters,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
        ).step

    return _step(inputs, make)


def ns_per_param(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Median time of a step over the number of parameters."""
    return own.median * 1e9 / case["total"]


def bytes_per_param(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Peak memory of the first step over the number of parameters.

    The optimizer's state (8 bytes in float32) and whatever else an implementation allocates; the
    parameters and gradients it is given are not counted.
    """
    return None if own.peak_bytes is None else own.peak_bytes / case["total"]


def tiny(case: Case) -> Case:
    return Case(case.name, {**case.facts, "shapes": [(R, 64), (64, R)], "total": 2 * R * 64})


SUITE = Suite(
    name="optim",
    cases=cases,
    impls=(
        Impl("torch-fused", build_fused),
        Impl("torch-foreach", build_foreach),
        Impl("bitsandbytes", build_bitsandbytes, package="bitsandbytes", not_here=needs_cuda),
        Impl("fastft", build_fastft),
    ),
    metrics=(
        Metric("ns_per_param", "ns", False, ns_per_param),
        Metric("bytes_per_param", "bytes", False, bytes_per_param),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    preload=("fastft.optim",),
)
