from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastft import optim


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 4)}) for _ in range(blocks)
        )
        self.head = nn.Linear(4, 10)


def _rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


def test_decay_spares_biases_and_norms() -> None:
    groups = optim.param_groups(Model(), 1e-3, weight_decay=0.1)
    decay = {name: g["weight_decay"] for g in groups for name, _ in g["params"]}
    assert {name for name, value in decay.items() if value} == {
        "embed.weight", "head.weight", *(f"layers.{i}.up.weight" for i in range(3)),
    }  # fmt: skip
    all_of_them = optim.param_groups(Model(), 1e-3, weight_decay=0.1, no_decay=False)
    assert [g["weight_decay"] for g in all_of_them] == [0.1]
    some = optim.param_groups(Model(), 1e-3, weight_decay=0.1, no_decay=["embed*"])
    assert {n for g in some if not g["weight_decay"] for n, _ in g["params"]} == {"embed.weight"}


def test_layers_learn_at_their_own_rate() -> None:
    rates = _rates(optim.param_groups(Model(), 1.0, layer_decay=0.5))
    assert rates["head.weight"] == 1.0
    assert [rates[f"layers.{i}.up.weight"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert rates["embed.weight"] == 0.125


def test_lora_plus_and_frozen_parts() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["up"]))
    rates = _rates(optim.param_groups(model, 1e-3, loraplus_ratio=16, freeze=["*layers.0*"]))
    assert len(rates) == 4
    assert {n.split(".")[-3]: r for n, r in rates.items()} == {"lora_A": 1e-3, "lora_B": 16e-3}
    assert not model.base_model.model.layers[0].up.lora_A.default.weight.requires_grad


def test_a_step_with_all_of_it() -> None:
    torch.manual_seed(0)
    model = Model()
    groups = optim.param_groups(
        model, 1e-2, weight_decay=0.1, layer_decay=0.5, embeddings_32bit=True
    )
    optimizer = optim.AdamW8bit(groups, min_8bit_size=1)
    model.head(model.layers[0]["up"](model.embed(torch.arange(10)))).sum().backward()
    optimizer.step()
    assert optimizer.state[model.embed.weight]["state1"].dtype == torch.float32
    assert optimizer.state[model.head.weight]["state1"].dtype == torch.uint8
    assert "head.weight" in str(optimizer.state_dict()["param_groups"])


def test_a_rate_in_a_tensor_makes_the_groups_that_a_number_makes() -> None:
    options: dict[str, Any] = {"weight_decay": 0.1, "layer_decay": 0.5}
    plain = optim.param_groups(Model(), 1e-3, **options)
    groups = optim.param_groups(Model(), torch.tensor(1e-3), **options)
    assert [[n for n, _ in g["params"]] for g in groups] == [
        [n for n, _ in g["params"]] for g in plain
    ]
    assert all(isinstance(group["lr"], Tensor) for group in groups)
    rates = _rates(plain)
    assert {name: float(lr) for name, lr in _rates(groups).items()} == pytest.approx(rates)
    assert len({id(group["lr"]) for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze": ["nothing*"]}, ["freeze", "nothing"]),
        ({"freeze": "head*"}, ["freeze", "list"]),
        ({"no_decay": ["nothing"]}, ["no_decay", "nothing"]),
        ({"freeze": ["*"]}, ["parameters to train", "none"]),
        ({"freeze": ["head*"], "no_decay": ["nothing"]}, ["no_decay", "nothing"]),
        ({"weight_decay": -1.0}, ["weight_decay", "-1.0"]),
    ],
)
def test_rejected(options: dict[str, Any], words: list[str]) -> None:
    model = Model()
    with pytest.raises(ValueError, match="param_groups") as caught:
        optim.param_groups(model, 1e-3, **options)
    assert all(word in str(caught.value) for word in words)
    assert all(p.requires_grad for p in model.parameters())


def test_layer_decay_needs_blocks() -> None:
    with pytest.raises(ValueError, match="layer_decay"):
        optim.param_groups(nn.Linear(2, 2), 1e-3, layer_decay=0.9)
