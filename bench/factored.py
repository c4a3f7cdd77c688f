"""Steps of optimizers of whole matrices, Adafactor and Muon: time and memory for each parameter.

Float32 adapters are clipped in the step, a model in bfloat16 is not, as in the suite ``optim``,
whose shapes these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .declare import Case, Impl, Metric, Options, Step, Suite
from .optim import (
    CHECKED_STEPS,
    LLAMA_8B,
    MAX_NORM,
    SMOLLM2,
    Inputs,
    bytes_per_param,
    case_of,
    clips,
    launches,
    lora_shapes,
    model_shapes,
    ns_per_param,
    prepare,
    tiny,
)

LR, WEIGHT_DECAY = 1e-3, 0.01


def cases(options: Options) -> Sequence[Case]:
    """Adapters in float32, and a model in bfloat16: of SmolLM2 on a CPU, else of Llama-3-8B."""
    quick = 2 if options.quick else None
    model = model_shapes(options)
    count = f"{sum(torch.Size(s).numel() for s in model) / 1e9:.2f}B"
    return [
        case_of(f"lora {name} {len(shapes)} tensors", shapes, "float32")
        for name, shapes in (
            ("SmolLM2", lora_shapes(SMOLLM2, quick)),
            ("Llama-3-8B", lora_shapes(LLAMA_8B, quick)),
        )
    ] + [case_of(f"model {count} bfloat16", model, "bfloat16")]


Make = Callable[[list[torch.Tensor]], Callable[[], object]]


def _moved(inputs: Inputs, make: Make, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The change of all parameters after three steps."""
    values = [v.to(dtype or v.dtype).clone().requires_grad_() for v in inputs.values]
    step = make(values)
    for _ in range(CHECKED_STEPS):
        # A clip may scale the gradients where they lie.
        for value, gradient in zip(values, inputs.gradients, strict=True):
            value.grad = gradient.to(value.dtype).clone()
        step()
    pairs = zip(values, inputs.values, strict=True)
    return torch.cat([(p.detach() - v.to(p.dtype)).flatten() for p, v in pairs])


def _torch(name: str, case: Case) -> Make:
    """torch's optimizer of this name, after clip_grad_norm_ in float32."""

    def make(parameters: list[torch.Tensor]) -> Callable[[], object]:
        kind = getattr(torch.optim, name)
        optimizer = kind(parameters, lr=LR, weight_decay=WEIGHT_DECAY)

        def step() -> None:
            if clips(case):
                torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

        return step

    return make


def _fastft(name: str, case: Case) -> Make:
    """fastft's, which clips in its own call; bfloat16 is rounded at random."""
    from fastft import optim

    kind = getattr(optim, name)
    clip = MAX_NORM if clips(case) else None
    rounding = "nearest" if clips(case) else "stochastic"
    more = {"max_grad_norm": clip, "skip_nonfinite": clip is not None, "rounding": rounding}
    return lambda p: kind(p, lr=LR, weight_decay=WEIGHT_DECAY, **more).step  # type: ignore[no-any-return]


def _build(name: str, of: Callable[[str, Case], Make]) -> Callable[[Inputs], Step]:
    def build(inputs: Inputs) -> Step:
        make = of(name, inputs.case)
        values = [v.clone().requires_grad_() for v in inputs.values]
        for value, gradient in zip(values, inputs.gradients, strict=True):
            value.grad = gradient.clone()
        run = make(values)
        size = inputs.values[0].element_size()
        return Step(
            run, lambda: {name: _moved(inputs, make)}, copies=2 * size * inputs.case["total"]
        )

    return build


# By how much of the way three float32 steps may differ from torch's in float64: Muon's iteration
# runs in bfloat16 in torch, which amplifies its rounding.
ALLOWED = {"Adafactor": 1e-3, "Muon": 0.05}


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares how three steps change float32 parameters with torch's own in float64; in bfloat16,
    where steps are of the size of a rounding, the way is held to it on the whole."""
    ((name, change),) = step.outputs().items()
    exact = _moved(inputs, _torch(name, inputs.case), torch.float64)
    if not clips(inputs.case):
        along = float((change.double() * exact).sum() / exact.square().sum())
        return None if 0.5 < along < 1.5 else f"moves {along:.2f} times as far as torch's"
    off = float((change.double() - exact).norm() / exact.norm())
    return None if off < ALLOWED[name] else f"steps are {off:.1%} off torch's in float64"


SUITE = Suite(
    name="factored",
    cases=cases,
    impls=(
        Impl("torch-adafactor", _build("Adafactor", _torch)),
        Impl("fastft-adafactor", _build("Adafactor", _fastft)),
        Impl("torch-muon", _build("Muon", _torch)),
        Impl("fastft-muon", _build("Muon", _fastft)),
    ),
    metrics=(
        Metric("ns_per_param", "ns", False, ns_per_param),
        Metric("bytes_per_param", "bytes", False, bytes_per_param),
        Metric("launches", "launches", False, launches),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
    measures_memory=True,
    counts_launches=True,
    preload=("fastft.optim",),
)
