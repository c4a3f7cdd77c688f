"""The ways a LoRA product can take on a GPU, each timed at the layers of real models.

    python -m bench ways --device cuda --json OUT.jsonl
    python -m bench.ways OUT.jsonl        writes kernels/fastft_kernels/ways.json from it

``fastft_kernels.ways`` reads that table when it chooses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, time_ms
from .layer import MODELS
from .ledger import now, write_atomically

WAYS = ("expand", "border", "gemm")
SCALING = 2.0
# A measurement speaks for sizes up to twice and down to half of its own.
TOKENS = (2048, 8192)
TABLE = Path(__file__).resolve().parent.parent / "kernels" / "fastft_kernels" / "ways.json"


def _groups(model: str) -> list[tuple[int, tuple[int, ...]]]:
    """(width of x, widths of the layers that share it) of the four groups of a block."""
    hidden, inner, keys = MODELS[model]
    return [
        (hidden, (hidden, keys, keys)),
        (hidden, (hidden,)),
        (hidden, (inner, inner)),
        (inner, (hidden,)),
    ]


def cases(options: Options) -> Sequence[Case]:
    """Both directions of the groups of Llama-3-8B's and Qwen2.5-32B's blocks; none on a CPU, where
    there is one way."""
    if options.device.type != "cuda":
        return []
    models, ranks = ("Llama-3-8B", "Qwen2.5-32B"), (16, 64)
    if options.quick:
        models, ranks = ("Llama-3-8B",), (16,)
    found = []
    for model in models:
        for features, widths in _groups(model):
            for tokens in TOKENS:
                for r in ranks:
                    for direction in ("fwd", "bwd"):
                        # Forward, the mask is in S already: dropout is no other case.
                        for p in (0.0,) if direction == "fwd" else (0.0, 0.1):
                            found.append(_case(direction, tokens, features, widths, r, p))
    return found


def _case(
    direction: str, tokens: int, features: int, widths: Sequence[int], r: int, p: float
) -> Case:
    shape = {"direction": direction, "tokens": tokens, "features": features}
    shape |= {"widths": list(widths), "r": r, "dropout": p > 0}
    text = "+".join(map(str, widths))
    name = f"{direction} {tokens}x{features}x{text} r={r} dropout={p:g}"
    return Case(name, {**shape, "p": p})


@dataclass
class Inputs:
    """Tensors of one group of layers and what the launcher writes to."""

    case: Case
    options: Options
    x: torch.Tensor
    weights: list[torch.Tensor]
    lora_as: list[torch.Tensor]
    lora_bs: list[torch.Tensor]
    dys: list[torch.Tensor]
    ss: list[torch.Tensor]
    masks: list[Any]
    known: list[dict[str, torch.Tensor]]


def _launcher(options: Options) -> Any:
    from fastft import backends

    facts = {"dtype": options.dtype, "adapter_dtype": torch.float32, "r": 16}
    return backends.select("lora_linear", "triton", device_type=options.device.type, **facts)[1]


def prepare(case: Case, options: Options) -> Inputs:
    device, dtype = options.device, options.dtype
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(kind)

    m, k, r, widths = case["tokens"], case["features"], case["r"], case["widths"]
    masks: list[Any] = [None] * len(widths)
    if case["p"]:
        masks = [torch.empty((m, (k + 7) // 8), dtype=torch.uint8, device=device) for _ in widths]
        for i, mask in enumerate(masks):
            _launcher(options).dropout_mask(mask, torch.tensor([i], device=device), case["p"])
    return Inputs(
        case,
        options,
        x=draw(m, k),
        weights=[draw(n, k, scale=k**-0.5) for n in widths],
        lora_as=[draw(r, k, scale=k**-0.5, kind=torch.float32) for _ in widths],
        lora_bs=[draw(n, r, scale=r**-0.5, kind=torch.float32) for n in widths],
        dys=[draw(m, n) for n in widths] if case["direction"] == "bwd" else [],
        ss=[draw(m, r) for _ in widths],
        masks=masks,
        known=[],
    )


def _plain(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The group in plain torch, all in ``dtype``."""
    from fastft.reference.lora_linear import drop

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype)

    found: dict[str, torch.Tensor] = {}
    x, p = wide(inputs.x), inputs.case["p"]
    layers = list(zip(map(wide, inputs.weights), map(wide, inputs.lora_as),
                      map(wide, inputs.lora_bs), inputs.masks, strict=True))  # fmt: skip
    if inputs.case["direction"] == "fwd":
        for i, (w, a, b, mask) in enumerate(layers):
            found[f"y{i}"] = x @ w.t() + SCALING * (drop(x, mask, p) @ a.t() @ b.t())
        return found
    dx = torch.zeros_like(x)
    for i, (w, a, b, mask) in enumerate(layers):
        dy, s = wide(inputs.dys[i]), wide(inputs.ss[i])
        ds = SCALING * (dy @ b)
        dx = dx + dy @ w + drop(ds @ a, mask, p)
        found[f"da{i}"], found[f"db{i}"] = ds.t() @ drop(x, mask, p), SCALING * (dy.t() @ s)
    return {"dx": dx, **found}


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares the outputs or every gradient with float64."""
    if not inputs.known:
        inputs.known += [_plain(inputs, torch.float64), _plain(inputs, inputs.options.dtype)]
    return compare(step.outputs(), *inputs.known)


def build(way: str) -> Callable[[Inputs], Step]:
    """The launcher, made to take this way; it must have been taken."""

    def built(inputs: Inputs) -> Step:
        from fastft_kernels import ways

        launcher, n = _launcher(inputs.options), len(inputs.weights)
        weights, copies, held = inputs.weights, 0, None
        if way == "border":
            held = launcher.lay_out(weights, [inputs.case["r"]] * n)
            weights, copies = held.weights, held.buffer.numel() * held.buffer.element_size()
        rows = inputs.x.shape[0]
        constants = ([SCALING] * n, inputs.masks, [inputs.case["p"]] * n, list(range(n)))
        tail = (weights, inputs.lora_as, inputs.lora_bs, *constants, [(0, rows)] * n)
        forward = inputs.case["direction"] == "fwd"
        ys = [inputs.x.new_empty(rows, w.shape[0]) for w in weights] if forward else []
        ss = [torch.empty_like(s) for s in inputs.ss]
        dx = torch.empty_like(inputs.x)
        das, dbs = ([torch.empty_like(t) for t in ts] for ts in (inputs.lora_as, inputs.lora_bs))

        def run() -> None:
            with ways.force(way):
                if forward:
                    launcher.fwd(ys, ss, inputs.x, weights, [None] * n, *tail[1:])
                else:
                    launcher.bwd(dx, das, dbs, inputs.dys, inputs.x, inputs.ss, *tail)
            _ = held  # keeps the bordered buffer for as long as the step lives

        def outputs() -> dict[str, torch.Tensor]:
            taken: list[str] = []
            pick = ways.pick
            ways.pick = lambda *a: taken.append(pick(*a)) or taken[-1]  # type: ignore[func-returns-value]
            try:
                run()
            finally:
                ways.pick = pick
            if taken != [way]:
                raise RuntimeError(f"took {taken}, not {way}")
            if forward:
                return {f"y{i}": y for i, y in enumerate(ys)}
            found = {"dx": dx}
            found |= {f"da{i}": d for i, d in enumerate(das)}
            return found | {f"db{i}": d for i, d in enumerate(dbs)}

        return Step(run, outputs, copies=copies)

    return built


def tflop_s(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float:
    """Operations of the frozen products over the median time."""
    return 2.0 * case["tokens"] * case["features"] * sum(case["widths"]) / own.median / 1e12


def build_frozen(inputs: Inputs) -> Step:
    """The frozen products alone, without the sums of dx that siblings need."""
    ys = [torch.empty(0)]

    def run() -> None:
        if inputs.case["direction"] == "fwd":
            ys[:] = [inputs.x @ w.t() for w in inputs.weights]
        else:
            ys[:] = [dy @ w for dy, w in zip(inputs.dys, inputs.weights, strict=True)]

    def outputs() -> dict[str, torch.Tensor]:
        return {}

    return Step(run, outputs)


SUITE = Suite(
    name="ways",
    cases=cases,
    impls=(Impl("frozen", build_frozen), *(Impl(way, build(way)) for way in WAYS)),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("tflop_s", "TFLOP/s", True, tflop_s),
    ),
    prepare=prepare,
    check=check,
)


def table(lines: Sequence[str], arch: str) -> list[dict[str, Any]]:
    """Rows of ways.json from the lines of a run of this suite."""
    device = torch.device("cuda")
    every = {c.name: c for c in cases(Options(device=device, dtype=torch.bfloat16, rounds=1))}
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        record = json.loads(line)
        if record["suite"] != SUITE.name or record["impl"] not in WAYS:
            continue
        if record["metric"] != "time_ms" or record["value"] is None:
            continue
        case = every[record["case"]]
        shape = {k: v for k, v in case.facts.items() if k != "p"}
        about = {"device": record["device"], "date": now()[:10], "commit": record["commit"]}
        row = rows.setdefault(case.name, {"arch": arch, **shape, "time_ms": {}, **about})
        row["time_ms"][record["impl"]] = record["value"]
        if shape["direction"] == "fwd":  # with dropout the same products are made
            twin = rows.setdefault(f"{case.name} dropped", {**row, "dropout": True})
            twin["time_ms"] = row["time_ms"]
    # Of the case at which a run was stopped some ways are missing.
    most = max((len(row["time_ms"]) for row in rows.values()), default=0)
    return [row for row in rows.values() if len(row["time_ms"]) == most]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    names = ("arch", "direction", "tokens", "features", "r", "dropout")
    return (*(row[name] for name in names), *row["widths"])


def main(arguments: Sequence[str]) -> int:
    """Replaces the rows of this GPU's architecture in the table that were measured anew."""
    if len(arguments) != 1:
        print("usage: python -m bench.ways RESULTS.jsonl", file=sys.stderr)
        return 2
    from fastft_kernels import config

    arch = config.for_device(torch.device("cuda")).name
    rows = table(Path(arguments[0]).read_text(encoding="utf-8").splitlines(), arch)
    if not rows:
        print(f"bench.ways: no measured way in {arguments[0]}", file=sys.stderr)
        return 1
    measured = {_key(row) for row in rows}
    others = [row for row in json.loads(TABLE.read_text()) if _key(row) not in measured]
    text = ",\n".join(json.dumps(row) for row in [*others, *rows])
    write_atomically(TABLE, f"[\n{text}\n]\n")
    print(f"{len(rows)} rows for {arch} in {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
