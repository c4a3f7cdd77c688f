"""Each suite at a toy size: plain torch passes its check, and a wrong implementation does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import adapters, block, experts, factored, layer, lora, loss, optim, qlora
from bench.declare import Case, Impl, Options, Step, Suite
from bench.runner import run_suite

OPTIONS = Options(device=torch.device("cpu"), dtype=torch.float32, rounds=1)
_MODEL = {**adapters.MODEL, "num_hidden_layers": 1, "vocab_size": 200}
SIZES: dict[str, list[dict[str, Any]]] = {
    "layer": [{"hidden": 24, "inner": 40, "keys": 16, "m": 33, "r": 4, "dropout": 0.0}],
    "experts": [{"k": 24, "n": 40, "e": 5, "top": 2, "m": 33}],
    "adapters": [{"k": 3, "batch": 2, "tokens": 9, "model": _MODEL}],
    "qlora": [{"k": 64, "n": 64, "m": 33, "r": 16, "dropout": p} for p in (0.0, 0.3)],
    "lora": [{"k": 48, "n": 40, "m": 33, "r": 16, "dropout": p} for p in (0.0, 0.3)],
    "loss": [
        {"t": 24, "h": 16, "v": 80, "trained": trained, "ignored": ignored}
        for trained in (False, True)
        for ignored in (0.0, 0.5)
    ],
    "block": [
        {"op": "rms_norm", "x": (9, 33)},
        {"op": "layer_norm", "x": (9, 33)},
        {"op": "glu", "x": (9, 33)},
        {"op": "rope", "x": (2, 7, 3, 8), "kv": (2, 7, 1, 8)},
        {"op": "attention", "x": (2, 7, 4, 8), "kv": (2, 7, 2, 8)},
    ],
    "optim": [{"shapes": [(16, 9), (5, 16)], "total": 224, "dtype": "float32"}],
    "factored": [
        {"shapes": [(16, 9), (5, 16)], "total": 224, "dtype": "float32"},
        {"shapes": [(160, 90)], "total": 14400, "dtype": "bfloat16"},
    ],
}
_ALL = (
    lora.SUITE,
    qlora.SUITE,
    layer.SUITE,
    experts.SUITE,
    adapters.SUITE,
    loss.SUITE,
    optim.SUITE,
    block.SUITE,
    factored.SUITE,
)
SUITES = {s.name: s for s in _ALL}


def small(suite: Suite, *more: Impl) -> Suite:
    cases = [Case(f"toy {i}", facts) for i, facts in enumerate(SIZES[suite.name])]
    return dataclasses.replace(
        suite,
        cases=lambda options: cases,
        impls=(*suite.impls, *more),
        measures_memory=False,
    )


@pytest.mark.parametrize("name", SUITES)
def test_everything_installed_gives_a_number(name: str) -> None:
    """fastft and every peer that is here pass float64's check at odd sizes, dropout included."""
    found = run_suite(small(SUITES[name]), OPTIONS, lambda record: None)
    absent = {r.impl: r.reason or "" for r in found if r.value is None}
    for impl, reason in absent.items():
        assert reason.startswith(("missing", "does not apply")), (impl, reason)
    assert not [impl for impl in absent if impl in ("fastft", "fastft-adafactor", "fastft-muon")]
    metrics = {m.name for m in SUITES[name].metrics}
    seen = {r.metric for r in found}
    # Memory is measured in other processes, launches on a GPU.
    assert seen == metrics - {"peak_bytes", "bytes_per_param", "launches", "host_us"}
    assert all(r.value is None or r.value > 0 or r.metric == "extra_over_frozen" for r in found)


def off_by(name: str, output: str, change: Callable[[torch.Tensor], Any]) -> Impl:
    """The plain implementation of a suite with one of its results changed in place."""
    right = {"lora": lora.build_peft, "loss": loss.build_torch, "optim": optim.build_fused}[name]

    def build(inputs: Any) -> Step:
        step = right(inputs)

        def outputs() -> dict[str, torch.Tensor]:
            found = {key: tensor.detach().clone() for key, tensor in step.outputs().items()}
            change(found[output])
            return found

        return dataclasses.replace(step, outputs=outputs)

    return Impl("wrong", build)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("lora", "y"),
        ("lora", "dx"),
        ("lora", "da"),
        ("lora", "db"),
        ("loss", "loss"),
        ("loss", "d_hidden"),
        ("optim", "change"),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.mul_(1.001),
        lambda tensor: tensor.view(-1)[-1:].add_(0.01 * tensor.abs().max()),
    ],
    ids=["scaled", "one element"],
)
def test_a_wrong_result_prints_no_number(
    name: str, output: str, change: Callable[[torch.Tensor], Any]
) -> None:
    suite = small(SUITES[name], off_by(name, output, change))
    suite = dataclasses.replace(suite, impls=suite.impls[-1:])
    found = run_suite(suite, OPTIONS, lambda record: None)
    assert len(found) == len(SIZES[name])
    for record in found:
        assert record.value is None
        assert f"{output} is wrong" in (record.reason or "")


def test_a_dropout_that_forgets_its_mask_prints_no_number() -> None:
    """Another mask backward than forward, and a wrong share of dropped inputs."""

    def forgetful(inputs: Any) -> Step:
        step = lora.build_peft(inputs)

        def outputs() -> dict[str, torch.Tensor]:
            first, second = step.outputs(), step.outputs()
            return {**first, "da": second["da"]}

        return dataclasses.replace(step, outputs=outputs)

    def generous(inputs: Any) -> Step:
        more = Case(inputs.case.name, {**inputs.case.facts, "dropout": 0.5})
        step = lora.build_peft(dataclasses.replace(inputs, case=more))
        return dataclasses.replace(step)

    suite = small(lora.SUITE)
    suite = dataclasses.replace(
        suite,
        cases=lambda options: [Case("dropout", SIZES["lora"][1])],
        impls=(Impl("forgetful", forgetful), Impl("generous", generous)),
    )
    found = {r.impl: r for r in run_suite(suite, OPTIONS, lambda record: None)}
    assert "da is wrong" in (found["forgetful"].reason or "")
    assert "wrong share" in (found["generous"].reason or "")


def test_a_layer_that_falls_back_is_no_fastft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Green on fallback proves nothing: the number would be PEFT's under our name."""
    from fastft.nn import lora as fused

    off = fused.Rule("switched off by the test", lambda plan: True)
    monkeypatch.setattr(fused, "plain_plan", lambda *_: None)
    monkeypatch.setattr(fused, "PLAN_RULES", (off,))
    suite = small(lora.SUITE)
    found = run_suite(suite, OPTIONS, lambda record: None)
    ours = [record for record in found if record.impl == "fastft"]
    assert all(record.value is None for record in ours)
    assert all("did not run fused" in (record.reason or "") for record in ours)


def test_optim_cases_are_those_of_smollm2() -> None:
    shapes = optim.lora_shapes(optim.SMOLLM2)
    assert len(shapes) == 420
    assert sum(rows * columns for rows, columns in shapes) == 4_884_480
