"""QLoRA after a generation, for which bitsandbytes packs weights on a CPU that multiplies
bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

import fastft
from fastft.nn import quantized
from fastft.nn.quantized import Dense
from tests.integration.test_qlora import BF16, F32, IDS, adapted, bnb, quantize, tiny_llama


def generate(model: Any) -> None:
    """Which packs every weight, on a CPU that multiplies bfloat16."""
    with torch.no_grad():
        model.eval()(input_ids=IDS[:1, :3])
    model.train()


def gradients(model: Any, between: Any = lambda model: None) -> list[Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    between(model)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("nested", [False, True])
def test_what_follows_a_generation(nested: bool, tmp_path: Path) -> None:
    """On a CPU that multiplies bfloat16 bitsandbytes packs weights in evaluation, for good: from
    then on its products have no gradient, and its merging and saving read the scales wrong."""
    plain = tiny_llama(how={"compress_statistics": nested})
    fused = fastft.accelerate(copy.deepcopy(plain)).train()
    for _ in range(2):  # siblings are known from the second on
        want = gradients(fused)

    def same(other: Any, between: Any = lambda model: None) -> bool:
        got = gradients(other, between)
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    generate(fused)
    assert same(fused)
    assert same(fused, generate)
    generate(fused)
    fused.save_pretrained(tmp_path)
    assert same(fused)
    for leave in ("merge_adapter", "unmerge_adapter"):
        generate(fused)
        states = []
        for model in (fused, plain):
            getattr(model, leave)()
            states.append(model.state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])

    late = copy.deepcopy(plain)
    generate(late)  # PEFT's own: its scales stay rounded to bfloat16
    for a, b in zip(
        gradients(fastft.accelerate(late)), gradients(fastft.accelerate(plain)), strict=True
    ):
        assert (a - b).norm() <= 0.1 * b.norm()


def test_dora_evaluates() -> None:
    """PEFT takes DoRA's norm of a weight that bitsandbytes has just packed."""
    model = fastft.accelerate(adapted(BF16, {"quant_type": "nf4"}, use_dora=True))
    model.base_model.model.o.lora_magnitude_vector["default"].weight.data *= 1.5
    x = torch.randn(1, 3, 64, dtype=BF16)
    want = model(x)
    bound = 4 * torch.finfo(BF16).eps * want.norm()
    model.eval()
    with torch.no_grad():
        for given in (x, x.float()):  # the second is PEFT's
            for _ in range(2):
                assert (model(given) - want).norm() <= bound


@pytest.mark.parametrize("nested", [False, True])
def test_gradients_go_through_layers_without_an_adapter(nested: bool, tmp_path: Path) -> None:
    """After a generation and a save, too."""
    how = {"compress_statistics": nested}
    model = fastft.accelerate(tiny_llama(how, target_modules=["q_proj"])).train()
    want = gradients(model)
    generate(model)
    found = [gradients(model)]
    generate(model)
    model.save_pretrained(tmp_path)
    for got in (*found, gradients(model)):
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 0.1 * b.norm()  # their scales have been rounded


def test_restoring_after_a_generation() -> None:
    plain = tiny_llama()
    fused = fastft.accelerate(copy.deepcopy(plain))
    generate(fused)
    fastft.restore(fused)
    for a, b in zip(gradients(fused), gradients(plain.train()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nested", [False, True])
def test_values_of_a_packed_weight(nested: bool) -> None:
    pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this bitsandbytes does not")
    layer = nn.ModuleDict({"of": nn.Linear(128, 64, bias=False)})
    base = quantize(layer, F32, quant_type="nf4", compress_statistics=nested).of
    before = Dense(base)
    weight = base.weight
    want = before()
    quantized.remember(weight)
    weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    assert Dense(base).packed()
    assert torch.equal(before(), want)
    quantized.unpack(weight)
    assert torch.equal(Dense(base)(), want)


def test_a_weight_packed_for_inference() -> None:
    """On a CPU that multiplies bfloat16 an evaluation packs it where it lies: before a backward
    and the next step."""
    pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this bitsandbytes does not")
    model, grads = fastft.accelerate(tiny_llama()), []
    for packs in (False, False, True, False):  # the first step learns the siblings
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        for layer in model.modules() if packs else ():
            if hasattr(layer, "base_layer"):
                weight = layer.base_layer.weight
                weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads[1:3], strict=True))
    for a, b in zip(grads[3], grads[2], strict=True):  # its scales were rounded to bfloat16
        assert (a - b).norm() <= 0.1 * b.norm()
    assert not any(m.fallback_calls for m in fastft.explain(model).modules)
