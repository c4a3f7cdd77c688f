"""LoRA over one linear layer: what it costs on top of the frozen layer, forward + backward."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, peak_bytes, time_ms
from .unsloth_style import BetaOneLora

SCALING = 2.0
# (in_features, out_features, tokens)
CPU_SHAPES = (
    (576, 576, 2048),
    (576, 1536, 2048),
    (2048, 2048, 1024),
    (2048, 8192, 1024),
    (4096, 4096, 512),
)
QUICK_SHAPES = ((576, 576, 512), (1024, 1024, 256))
# The tokens that goals are stated for come first: a run that is stopped has them.
CUDA_SHAPES = tuple(
    (k, n, m)
    for m in (8192, 2048, 4096, 16384)
    for k, n in ((4096, 4096), (4096, 14336), (14336, 4096))
)


def cases(options: Options) -> Sequence[Case]:
    """Shapes of SmolLM2 and of 1B to 8B models on a CPU, dropout off and at TRL's default of 0.05;
    of an 8B model on a GPU, two ranks, dropout off and at 0.1."""
    shapes, ranks, dropouts = CPU_SHAPES, (16,), (0.0, 0.05)
    if options.device.type == "cuda":
        shapes, ranks, dropouts = CUDA_SHAPES, (16, 64), (0.0, 0.1)
    if options.quick:
        shapes, ranks = QUICK_SHAPES, (16,)
    runs = [(p, k, n, m, r) for p in dropouts for k, n, m in shapes for r in ranks]
    if options.device.type == "cuda":
        runs.sort(key=lambda run: [m for _, _, m in shapes].index(run[3]))
    return [
        Case(f"{k}x{n}x{m} r={r} dropout={p:g}", {"k": k, "n": n, "m": m, "r": r, "dropout": p})
        for p, k, n, m, r in runs
    ]


@dataclass
class Inputs:
    """x: (m, k), weight: (n, k), dy: (m, n) in the run's dtype; a: (r, k), b: (n, r) float32."""

    case: Case
    options: Options
    x: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    known: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]

    def linear(self) -> nn.Module:
        """The frozen layer."""
        n, k = self.weight.shape
        with torch.device("meta"):
            made = nn.Linear(k, n, bias=False)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        return made


def prepare(case: Case, options: Options) -> Inputs:
    k, n, m, r = (case[name] for name in ("k", "n", "m", "r"))
    generator = torch.Generator(options.device).manual_seed(k + n + m)

    def draw(*shape: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=options.device)
        return (values * scale).to(dtype)

    return Inputs(
        case,
        options,
        x=draw(m, k, scale=1.0, dtype=options.dtype),
        weight=draw(n, k, scale=k**-0.5, dtype=options.dtype),
        dy=draw(m, n, scale=1.0, dtype=options.dtype),
        # The adapter's part is as large as the layer's: an error in it cannot hide.
        a=draw(r, k, scale=k**-0.5, dtype=torch.float32),
        b=draw(n, r, scale=r**-0.5, dtype=torch.float32),
        known={},
    )


def plain(
    inputs: Inputs, dtype: torch.dtype, keep: torch.Tensor | None, adapter: bool
) -> dict[str, torch.Tensor]:
    """The layer in plain torch, everything in `dtype`; in float64 it is the truth.

    keep: (m, k) factors of dropout, 0 or 1 / (1 - p), or None.
    """
    x, weight, dy = (t.to(dtype) for t in (inputs.x, inputs.weight, inputs.dy))
    if not adapter:
        return {"y": x @ weight.t(), "dx": dy @ weight}
    a, b = inputs.a.to(dtype), inputs.b.to(dtype)
    dropped = x if keep is None else x * keep.to(dtype)
    s = dropped @ a.t()
    ds = SCALING * (dy @ b)
    dx = ds @ a
    return {
        "y": x @ weight.t() + SCALING * (s @ b.t()),
        "dx": dy @ weight + (dx if keep is None else dx * keep.to(dtype)),
        "da": ds.t() @ dropped,
        "db": SCALING * (dy.t() @ s),
    }


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares y, dx, dA and dB with float64, given the dropout mask the implementation drew."""
    seed = 7
    keep = step.mask(seed) if step.mask else None
    torch.manual_seed(seed)
    got = step.outputs()
    adapter = "da" in got
    key = f"adapter={adapter}"
    if keep is not None:
        p = inputs.case["dropout"]
        share = float((keep == 0).float().mean())
        deviation = (p * (1 - p) / keep.numel()) ** 0.5
        if abs(share - p) > 6 * deviation:
            return (
                f"dropout has the wrong share: dropped {share:.4f}, "
                f"expected {p} +- {6 * deviation:.4f}"
            )
    if keep is not None or key not in inputs.known:
        inputs.known[key] = (
            plain(inputs, torch.float64, keep, adapter),
            plain(inputs, inputs.options.dtype, keep, adapter),
        )
    truth, yardstick = inputs.known[key]
    if keep is not None:
        del inputs.known[key]
    return compare(got, truth, yardstick)


class Host(nn.Module):
    """A model of one layer, for `get_peft_model` and `fastft.accelerate` to work on."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.linear: nn.Module = inputs.linear()
        # What PEFT asks before it takes bitsandbytes' layers for such.
        self.is_loaded_in_4bit = type(self.linear) is not nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _step(
    inputs: Inputs,
    layer: Callable[[torch.Tensor], torch.Tensor],
    trained: Any,
    magnitude: Any = None,
) -> Step:
    """Forward and backward of `layer`; trained: None, or the two adapter weights; magnitude:
    DoRA's, kept where it makes the scale one."""
    x = inputs.x.detach().clone().requires_grad_()
    parameters = {} if trained is None else dict(zip(("da", "db"), trained, strict=True))

    def run() -> None:
        x.grad = None
        for parameter in parameters.values():
            parameter.grad = None
        layer(x).backward(inputs.dy)

    def outputs() -> dict[str, torch.Tensor]:
        x.grad = None
        for parameter in parameters.values():
            parameter.grad = None
        y = layer(x)
        y.backward(inputs.dy)
        return {"y": y, "dx": x.grad, **{name: p.grad for name, p in parameters.items()}}

    def mask(seed: int) -> torch.Tensor:
        """Draws the mask of `seed` into view: with A = B = dY = 1, dx is large where x was kept."""
        p = inputs.case["dropout"]
        changed = [*parameters.values(), *([] if magnitude is None else [magnitude])]
        saved = [q.detach().clone() for q in changed]
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(1.0)
            if magnitude is not None:
                adapted = inputs.weight.double() + SCALING * inputs.case["r"]
                magnitude.copy_(adapted.norm(dim=1))
        x.grad = None
        torch.manual_seed(seed)
        layer(x).backward(torch.ones_like(inputs.dy))
        base = inputs.weight.double().sum(0)
        kept = (x.grad.double() - base) > 0.5 * SCALING * inputs.case["n"] * inputs.case["r"]
        with torch.no_grad():
            for parameter, old in zip(changed, saved, strict=True):
                parameter.copy_(old)
        return kept.double() / (1 - p)

    dropout = bool(parameters) and inputs.case["dropout"] > 0
    return Step(run, outputs, mask if dropout else None)


def build_frozen(inputs: Inputs) -> Step:
    """The layer alone, forward and backward to its input."""
    return _step(inputs, Host(inputs).linear, None)


def _adapted_norms(inputs: Inputs) -> torch.Tensor:
    """The magnitudes of the adapted matrix itself: a scale of one, so that plain LoRA's outputs and
    gradients are DoRA's truth too. Some rows at a time: the implementation is charged for them."""
    a = inputs.a.double()
    rows = zip(inputs.weight.split(128), inputs.b.split(128), strict=True)
    return torch.cat([(w.double() + SCALING * (b.double() @ a)).norm(dim=1) for w, b in rows])


def _peft_model(inputs: Inputs, *, float32_adapters: bool, dora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=inputs.case["r"],
        lora_alpha=int(inputs.case["r"] * SCALING),
        lora_dropout=inputs.case["dropout"],
        target_modules=["linear"],
        use_dora=dora,
    )
    model = get_peft_model(Host(inputs), config, autocast_adapter_dtype=float32_adapters)
    model.to(inputs.options.device)
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.a)
        layer.lora_B["default"].weight.copy_(inputs.b)
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(_adapted_norms(inputs))
    return model.train()


def _peft_step(inputs: Inputs, model: Any) -> Step:
    layer = model.base_model.model.linear
    vectors = layer.lora_magnitude_vector
    magnitude = vectors["default"].weight if "default" in vectors else None
    trained = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _step(inputs, layer, trained, magnitude)


def build_peft(inputs: Inputs) -> Step:
    """PEFT's layer in its default mode: adapters in float32, whatever the layer's dtype."""
    return _peft_step(inputs, _peft_model(inputs, float32_adapters=True))


def build_peft_bf16(inputs: Inputs) -> Step:
    """PEFT's layer with `autocast_adapter_dtype=False`: adapters in the layer's dtype."""
    return _peft_step(inputs, _peft_model(inputs, float32_adapters=False))


def build_unsloth_style(inputs: Inputs) -> Step:
    """`BetaOneLora`, adapters in the layer's dtype."""
    a, b = (t.to(inputs.options.dtype).requires_grad_() for t in (inputs.a, inputs.b))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return BetaOneLora.apply(x, SCALING, 1, inputs.weight, a, b)[0]

    return _step(inputs, layer, (a, b))


def build_peft_dora(inputs: Inputs) -> Step:
    """PEFT's DoRA layer in its default mode."""
    return _peft_step(inputs, _peft_model(inputs, float32_adapters=True, dora=True))


def build_fastft(inputs: Inputs, dora: bool = False) -> Step:
    """PEFT's layer in its default mode after `fastft.accelerate`; it must not have fallen back. On
    a GPU its weight, a copy then, is packed by the second step."""
    import fastft

    on_gpu, copies = inputs.options.device.type == "cuda", 0
    if on_gpu:
        copies = inputs.weight.numel() * inputs.weight.element_size()
        inputs = dataclasses.replace(inputs, weight=inputs.weight.clone())
    model = _peft_model(inputs, float32_adapters=True, dora=dora)
    model = fastft.accelerate(model, pack_weights=on_gpu)
    step = dataclasses.replace(_peft_step(inputs, model), copies=copies)
    step.run()
    step.run()
    calls = fastft.explain(model).to_dict()["calls"]
    if not calls["fused"] or calls["fallback"]:
        raise RuntimeError(f"the layer did not run fused: {calls}")
    return step


def build_fastft_dora(inputs: Inputs) -> Step:
    """PEFT's DoRA layer after `fastft.accelerate`."""
    return build_fastft(inputs, dora=True)


def extra_over_frozen(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
    """Median over the rounds of (time / time of the frozen layer in the same round) - 1."""
    frozen = by_impl.get("frozen")
    if frozen is None or own is frozen:
        return None
    return statistics.median(t / f - 1 for t, f in zip(own.times, frozen.times, strict=True))


def tflop_s(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float:
    """Operations of the frozen products, forward and backward to x, over the median time."""
    return 4.0 * case["m"] * case["k"] * case["n"] / own.median / 1e12


def tiny(case: Case) -> Case:
    return Case(case.name, {**case.facts, "k": 64, "n": 64, "m": 32, "r": 8})


def needs_bf16(case: Case, options: Options) -> str | None:
    """For implementations that differ from their sibling only in a bfloat16 run."""
    if options.dtype == torch.bfloat16:
        return None
    return f"does not apply: in {options.dtype_name} it is the same as peft"


def without_dropout(case: Case, options: Options) -> str | None:
    """The published beta = 1 way has none."""
    return "does not apply: no dropout" if case["dropout"] else needs_bf16(case, options)


SUITE = Suite(
    name="lora",
    cases=cases,
    impls=(
        Impl("frozen", build_frozen),
        Impl("peft", build_peft, package="peft"),
        Impl("peft-bf16", build_peft_bf16, package="peft", not_here=needs_bf16),
        Impl("unsloth-style", build_unsloth_style, not_here=without_dropout),
        Impl("fastft", build_fastft, package="peft"),
        Impl("peft-dora", build_peft_dora, package="peft"),
        Impl("fastft-dora", build_fastft_dora, package="peft"),
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
