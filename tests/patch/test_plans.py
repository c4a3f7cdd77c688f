"""The plan of a plain call, read in one piece, is the one that the rules allow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastft import native
from fastft.errors import DtypeError
from fastft.nn import plans
from fastft.nn.lora import ADAPTER_RULES, CALL_RULES, LAYER_RULES, FusedLoraLinear
from fastft.nn.plans import plain_plan

X = torch.ones(2, 8)


def _layer(**options: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], **options)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    layer = model.base_model.model[0]
    layer.__class__ = FusedLoraLinear
    return layer


class Odd(nn.Linear):
    """No nn.Linear."""


class Subclass(Tensor):
    """No plain tensor."""


def _hook(*_: Any) -> None:
    pass


def _set_adapter(layer: Any, r: int, width: int = 6) -> None:
    layer.lora_A["default"] = nn.Linear(8, r, bias=False)
    layer.lora_B["default"] = nn.Linear(r, width, bias=False)


Change = Callable[[Any], Any]
# By the reason of a rule: what makes it apply. What a change returns takes the place of X.
CHANGES: dict[str, list[Change]] = {
    "forward replaced on the layer itself": [lambda m: setattr(m, "forward", m.forward)],
    "adapters disabled": [lambda m: m.enable_adapters(False)],
    "adapter merged into the base": [lambda m: m.merge()],
    "base layer is no nn.Linear": [lambda m: setattr(m, "base_layer", Odd(8, 6))],
    "hooks on the base layer": [
        lambda m: m.base_layer.register_forward_hook(_hook) and None,
        lambda m: m.base_layer.register_forward_pre_hook(_hook) and None,
        lambda m: m.base_layer.register_full_backward_hook(_hook) and None,
        lambda m: setattr(m.base_layer, "forward", m.base_layer.forward),
    ],
    "adapter layers are not nn.Linear": [
        lambda m: m.lora_A.update({"default": Odd(8, 2)}),
        lambda m: m.lora_B.update({"default": Odd(2, 6)}),
    ],
    "hooks on the adapter": [
        lambda m: m.lora_A["default"].register_forward_hook(_hook) and None,
        lambda m: m.lora_B["default"].register_forward_pre_hook(_hook) and None,
        lambda m: m.lora_dropout["default"].register_forward_hook(_hook) and None,
    ],
    "dropout of another kind": [
        lambda m: m.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
        lambda m: m.lora_dropout.update({"default": nn.Dropout(1.0)}),
        lambda m: m.lora_dropout.update({"default": nn.Dropout(1.0).eval()}),
    ],
    "scaling is not a plain number": [
        lambda m: m.scaling.update(default=torch.ones(2)),
        lambda m: m.scaling.update(default=None),
    ],
    "r larger than the layer's features": [
        lambda m: _set_adapter(m, 7),
        lambda m: _set_adapter(m, 9, 20),
    ],
    "no active adapter": [lambda m: m._active_adapter.clear()],
    "tensor subclass": [
        lambda m: X.as_subclass(Subclass),
        lambda m: setattr(
            m.base_layer, "weight", nn.Parameter(m.base_layer.weight.data.as_subclass(Subclass))
        ),
    ],
    "input has no dimension": [lambda m: torch.ones(())],
    "several devices": [
        lambda m: X.to("meta"),
        *[
            lambda m, name=name: getattr(m, name).to("meta") and None
            for name in ("base_layer", "lora_A", "lora_B")
        ],
    ],
    "mixed dtypes": [
        lambda m: X.double(),
        lambda m: m.lora_A.double() and None,
        lambda m: m.lora_B.double() and None,
        lambda m: m.lora_A.double() and m.lora_B.double() and None,
        lambda m: setattr(m.base_layer.weight, "data", m.base_layer.weight.data.double()),
    ],
    "torch.func, forward-mode AD or a trace": [],  # below
    "hooks of all modules": [],  # below
    # DoRA is planned by the rules alone, refused or not.
    "LoRA variant other than DoRA": [lambda m: m.lora_variant.update(default=object())],
    "DoRA with lora_bias": [],
    "hooks on the magnitude": [],
}


@pytest.fixture(params=["compiled", "python"], autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a layer: the compiled module, and what stands in for it where there is none."""
    if request.param == "python":
        monkeypatch.setattr(plans, "_plain_layer", plans._read_plain_layer)
    elif not native.available():
        pytest.skip(f"no compiled module: {native.load_error()}")


CASES = [(reason, i) for reason, changes in CHANGES.items() for i in range(len(changes))]


def _refusal(layer: Any, x: Any) -> str | None:
    ruled = layer._ruled(x, (), {})
    return ruled if isinstance(ruled, str) else None


@pytest.mark.parametrize(("reason", "i"), CASES)
def test_no_call_that_a_rule_applies_to_is_plain(reason: str, i: int) -> None:
    layer = _layer()
    assert plain_plan(layer, X) is not None
    changed = CHANGES[reason][i](layer)
    x = changed if isinstance(changed, Tensor) else X
    assert _refusal(layer, x) == reason
    assert plain_plan(layer, x) is None


def test_every_rule_is_held() -> None:
    rules = itertools.chain(LAYER_RULES, ADAPTER_RULES, CALL_RULES)
    assert {rule.reason for rule in rules} <= set(CHANGES)


def test_nothing_is_plain_under_what_watches_every_call() -> None:
    layer = _layer()
    handle = nn.modules.module.register_module_forward_hook(_hook)
    try:
        assert plain_plan(layer, X) is None
    finally:
        handle.remove()

    def inner(x: Tensor) -> Tensor:
        assert plain_plan(layer, X) is None
        return x

    torch.func.vmap(inner)(X)
    assert plain_plan(layer, X) is not None


def test_whole_numbers_are_no_frozen_weight_under_autocast_either() -> None:
    layer = _layer()
    whole = layer.base_layer.weight.data.to(torch.int32)
    layer.base_layer.weight = nn.Parameter(whole, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert _refusal(layer, X) == "mixed dtypes"
        assert plain_plan(layer, X) is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {}], ids=str)
@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=len)
def test_a_plain_plan_is_the_rules_plan(options: dict[str, Any], active: list[str]) -> None:
    layer = _layer(lora_dropout=0.5, **options)
    if len(active) > 1:
        layer.update_layer("other", 2, lora_alpha=4, config=LoraConfig(r=2))
        layer.set_adapter(active)
    plain, ruled = plain_plan(layer, X), layer._ruled(X, (), {})
    if options.get("use_dora") or len(active) > 1:
        assert plain is None
        return
    assert plain is not None
    assert plain.facts() == ruled.facts()
    assert (plain.names, plain.spans, plain.adapter_names) == (active, None, None)
    assert plain.parts[0].dropout_p() == 0.5
    layer.eval()
    assert plain_plan(layer, X).parts[0].dropout_p() == 0.0  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_plan(layer, X.bfloat16()) is not None


def test_a_tensor_in_a_parameter_s_place_is_the_one_read() -> None:
    """As FSDP's flat views and torch.func.functional_call put them there."""
    layer = _layer()
    own = layer.base_layer.weight
    view = own.detach().clone()
    del layer.base_layer.weight
    layer.base_layer.weight = view
    plan = plain_plan(layer, X)
    assert plan is not None
    assert plan.weight() is view
    del layer.base_layer.weight
    layer.base_layer._parameters["weight"] = own
    layer.base_layer.__dict__["weight"] = view
    assert plain_plan(layer, X).weight() is view  # type: ignore[union-attr]


def test_both_readers_read_the_same() -> None:
    layer = _layer(lora_dropout=0.1)
    assert plans._plain_layer(layer) == plans._read_plain_layer(layer)
    for taken in ("base_layer", "lora_A", "lora_B"):
        layer = _layer()
        module = layer.base_layer if taken == "base_layer" else getattr(layer, taken)["default"]
        own = module.__dict__["weight"] = module.weight.detach()
        read = plans._plain_layer(layer)
        assert read is not None
        assert [t is own for t in read[-3:]].count(True) == 1
        assert list(map(id, read)) == list(map(id, plans._read_plain_layer(layer) or ()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("place", ["x", "adapters"])
def test_what_the_operation_refuses_under_autocast_is_not_vouched_for(
    dtype: torch.dtype, place: str
) -> None:
    layer, x = _layer(), X
    if place == "x":
        x = X.to(dtype)
    else:
        for module in (layer.lora_A["default"], layer.lora_B["default"]):
            module.weight = nn.Parameter(module.weight.data.to(dtype), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        plan = plain_plan(layer, x)
        assert plan is not None
        assert not plan.vouched
        with pytest.raises(DtypeError):
            layer.fused_call([plan], x)


def test_a_dropout_that_is_no_probability_is_not_plain() -> None:
    layer = _layer(lora_dropout=0.5)
    layer.lora_dropout["default"].p = -0.1
    assert plain_plan(layer, X) is None
