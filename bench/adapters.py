"""Several adapters of one model: a step of each, one after another or all in one mixed batch."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import compare
from .declare import Case, Impl, Measured, Metric, Options, Step, Suite, time_ms

# The sizes of SmolLM2-135M.
MODEL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# Adapters, sequences of each, tokens of a sequence: small batches, where a run alone wastes most.
SIZES = ((4, 1, 64), (4, 1, 128), (8, 1, 64))
RANKS = (16, 8, 32, 16, 64, 8, 16, 16)


def cases(options: Options) -> Sequence[Case]:
    return [
        Case(
            f"{k} adapters, {batch}x{tokens} tokens each",
            {"k": k, "batch": batch, "tokens": tokens, "model": MODEL},
        )
        for k, batch, tokens in (((2, 1, 32),) if options.quick else SIZES)
    ]


@dataclass
class Inputs:
    """The frozen model in the run's dtype and the token ids (k * batch, tokens)."""

    case: Case
    options: Options
    base: Any
    ids: torch.Tensor
    known: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def prepare(case: Case, options: Options) -> Inputs:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        base = LlamaForCausalLM(LlamaConfig(**case["model"], use_cache=False)).to(options.dtype)
    shape = (case["k"] * case["batch"], case["tokens"])
    ids = torch.randint(3, case["model"]["vocab_size"], shape, device=options.device)
    return Inputs(case, options, base, ids, [])


def _with_adapters(inputs: Inputs, which: Sequence[int], wide: bool = False) -> Any:
    """A PeftModel with these adapters, all active, over the shared frozen weights; a copy in
    float64 where ``wide``. An adapter's weights depend on its number alone."""
    from peft import LoraConfig, get_peft_model

    frozen = {id(p): p for p in inputs.base.parameters()}
    base = copy.deepcopy(inputs.base) if wide else copy.deepcopy(inputs.base, frozen)
    model: Any = None
    for i in which:
        config = LoraConfig(r=RANKS[i], lora_alpha=32, target_modules="all-linear")
        if model is None:
            model = get_peft_model(base, config, adapter_name=f"a{i}")
        else:
            model.add_adapter(f"a{i}", config)
        generator = torch.Generator().manual_seed(i)
        for _, p in _trained(model, i):
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    model.base_model.set_adapter([f"a{i}" for i in which])
    return (model.double() if wide else model).train()


def _trained(model: Any, i: int) -> list[tuple[str, torch.nn.Parameter]]:
    return sorted((n, p) for n, p in model.named_parameters() if f".a{i}." in n)


def _ids(inputs: Inputs, i: int) -> torch.Tensor:
    batch = inputs.case["batch"]
    return inputs.ids[i * batch : (i + 1) * batch]


def _results(models: Sequence[Any], losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss of each adapter and all its gradients in one vector, which are then dropped."""
    found = {"losses": torch.stack([loss.detach() for loss in losses])}
    for i, model in enumerate(models):
        gradients = [p.grad.flatten() for _, p in _trained(model, i)]
        found[f"gradients{i}"] = torch.cat(gradients)
    for model in models:
        model.zero_grad(set_to_none=True)
    return found


def _one_by_one(inputs: Inputs, models: Sequence[Any]) -> list[torch.Tensor]:
    losses = []
    for i, model in enumerate(models):
        ids = _ids(inputs, i)
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    return losses


def check(inputs: Inputs, step: Step) -> str | None:
    """Compares every adapter's loss and gradients with float64, adapter by adapter."""
    if not inputs.known:
        both = []
        for wide in (True, False):
            found: dict[str, torch.Tensor] = {}
            losses = []
            for i in range(inputs.case["k"]):
                model, ids = _with_adapters(inputs, [i], wide), _ids(inputs, i)
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                losses.append(loss.detach())
                gradients = [p.grad.flatten() for _, p in _trained(model, i)]
                found[f"gradients{i}"] = torch.cat(gradients)
            both.append({"losses": torch.stack(losses), **found})
        inputs.known.append((both[0], both[1]))
    return compare(step.outputs(), *inputs.known[0])


def _separate(inputs: Inputs, models: list[Any], optimizers: list[Any], clip: bool) -> Step:
    def run() -> None:
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            ids = _ids(inputs, i)
            model(input_ids=ids, labels=ids).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([p for _, p in _trained(model, i)], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return Step(run, lambda: _results(models, _one_by_one(inputs, models)))


def build_peft(inputs: Inputs) -> Step:
    """Plain PEFT and torch's fused AdamW, a model for each adapter, one after another."""
    models = [_with_adapters(inputs, [i]) for i in range(inputs.case["k"])]
    optimizers = [
        torch.optim.AdamW([p for _, p in _trained(m, i)], lr=0.0, weight_decay=0.0, fused=True)
        for i, m in enumerate(models)
    ]
    return _separate(inputs, models, optimizers, clip=True)


def _optimizer(model: Any, i: int) -> Any:
    import fastft

    # A rate of zero does all the work and leaves the weights as they are for the next round.
    parameters = [p for _, p in _trained(model, i)]
    return fastft.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, max_grad_norm=1.0)


def build_separate(inputs: Inputs) -> Step:
    """fastft, a model for each adapter, one after another."""
    import fastft

    k = inputs.case["k"]
    models = [fastft.accelerate(_with_adapters(inputs, [i])) for i in range(k)]
    return _separate(inputs, models, [_optimizer(m, i) for i, m in enumerate(models)], clip=False)


def build_together(inputs: Inputs) -> Step:
    """fastft, all adapters on one model in one mixed batch, as `fastft train a.yaml b.yaml`."""
    import fastft
    from fastft.train.losses_apart import losses_apart

    k, batch = inputs.case["k"], inputs.case["batch"]
    model = fastft.accelerate(_with_adapters(inputs, range(k)))
    optimizers = [_optimizer(model, i) for i in range(k)]
    names = [f"a{i}" for i in range(k) for _ in range(batch)]

    def losses() -> list[torch.Tensor]:
        with losses_apart(model) as apart, fastft.mixed_batch(model, names):
            apart.expect([(f"a{i}", batch, None, 1) for i in range(k)])
            model(input_ids=inputs.ids, labels=inputs.ids).loss.backward()
            return list(apart.take().values())

    def run() -> None:
        losses()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step = Step(run, lambda: _results([model] * k, losses()))
    run()
    calls = fastft.explain(model).to_dict()["calls"]
    if not calls["fused"] or calls["fallback"]:
        raise RuntimeError(f"not all calls ran fused: {calls}")
    return step


def tokens_per_s(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float:
    """Tokens of all adapters over the median time of a step of each."""
    tokens: int = case["k"] * case["batch"] * case["tokens"]
    return tokens / own.median


def over(name: str) -> Callable[..., float | None]:
    """Median over the rounds of the time of ``name`` over the own time in the same round."""

    def ratio(own: Measured, by_impl: Mapping[str, Measured], case: Case) -> float | None:
        other = by_impl.get(name)
        if other is None or other is own:
            return None
        return statistics.median(o / t for o, t in zip(other.times, own.times, strict=True))

    return ratio


def tiny(case: Case) -> Case:
    model = {**MODEL, "num_hidden_layers": 1, "vocab_size": 512}
    return Case(case.name, {**case.facts, "tokens": 16, "model": model})


SUITE = Suite(
    name="adapters",
    cases=cases,
    impls=(
        Impl("peft-separate", build_peft, package="peft"),
        Impl("fastft-separate", build_separate, package="peft"),
        Impl("fastft", build_together, package="peft"),
    ),
    metrics=(
        Metric("time_ms", "ms", False, time_ms),
        Metric("tokens_per_s", "tokens/s", True, tokens_per_s),
        Metric("over_fastft_separate", "x", True, over("fastft-separate")),
        Metric("over_peft_separate", "x", True, over("peft-separate")),
    ),
    prepare=prepare,
    check=check,
    tiny=tiny,
)
