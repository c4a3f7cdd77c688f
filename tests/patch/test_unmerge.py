"""Unmerging gives back the very bits, whatever kind of layer the adapter was merged into."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

import fastft
from fastft.nn.unmerged import UNMERGED, Unmerged
from tests.integration import test_experts
from tests.patch.test_conv_embedding import adapted

BF16 = torch.bfloat16


def _experts(name: str) -> Any:
    model = test_experts.peft_model(name)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter("default")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.1)
    return model.to(BF16)


def _layer(layer: nn.Module, **config: Any) -> Any:
    model = adapted(layer, BF16, **config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], **config))
    for key, parameter in model.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            parameter.data.normal_(std=0.1)
    return model


def _channels_last() -> nn.Module:
    return nn.Conv2d(12, 20, 3).to(memory_format=torch.channels_last)


MODELS = {
    "conv1d": lambda: _layer(nn.Conv1d(12, 20, 3)),
    "conv1d of one channel": lambda: _layer(nn.Conv1d(1, 20, 1), lora_bias=True),
    "conv2d": lambda: _layer(nn.Conv2d(12, 20, 3), lora_bias=True),
    "conv2d channels last": lambda: _layer(_channels_last()),
    "conv2d dora": lambda: _layer(nn.Conv2d(12, 20, 3), use_dora=True),
    "conv3d": lambda: _layer(nn.Conv3d(6, 20, 3)),
    "embedding": lambda: _layer(nn.Embedding(30, 16)),
    "embedding dora": lambda: _layer(nn.Embedding(30, 16), use_dora=True),
    **{name: lambda name=name: _experts(name) for name in test_experts.MODELS},
}


def _adapted_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def _weights(layer: Any) -> Any:
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.base_layer.weight


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_back_are_the_same_bits(name: str) -> None:
    plain = MODELS[name]()
    fused = fastft.accelerate(copy.deepcopy(plain))
    kinds = {n: type(m) for n, m in plain.named_modules()}
    before = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    dora = "dora" in name
    for turn in range(12):
        names = (["default"], ["other"], ["default", "other"])[turn % (2 if dora else 3)]
        fused.merge_adapter(adapter_names=names, safe_merge=turn % 2 == 1)
        theirs = copy.deepcopy(plain)
        theirs.merge_adapter(adapter_names=names, safe_merge=turn % 2 == 1)
        merged = theirs.state_dict()
        assert all(torch.equal(t, merged[key]) for key, t in fused.state_dict().items())
        assert any(not torch.equal(t, before[key]) for key, t in merged.items())
        fused.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in fused.state_dict().items())
    assert not any(UNMERGED in vars(m) for m in fused.modules())
    fused.merge_adapter()
    fastft.restore(fused)
    assert not any(UNMERGED in vars(m) for m in fused.modules())
    assert {n: type(m) for n, m in fused.named_modules()} == kinds


@pytest.mark.parametrize("name", MODELS)
def test_one_merged_after_another(name: str) -> None:
    fused = fastft.accelerate(MODELS[name]())
    before = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    for layer in _adapted_layers(fused):
        layer.merge(adapter_names=["default"])
        layer.merge(adapter_names=["other"])
    fused.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in fused.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_weights_trained_while_merged_stay_trained(name: str) -> None:
    plain = MODELS[name]()
    fused = fastft.accelerate(copy.deepcopy(plain))
    for model in (plain, fused):
        model.merge_adapter()
        for layer in _adapted_layers(model):
            weight = _weights(layer).data
            weight += 0.01 * weight.abs().max()
        model.unmerge_adapter()
    for theirs, ours in zip(_adapted_layers(plain), _adapted_layers(fused), strict=True):
        assert torch.equal(_weights(ours), _weights(theirs))


@pytest.mark.parametrize("shape", [(6, 5, 4), (20, 12, 3, 3), (2, 3, 2, 2, 2), (3, 0), (7,), ()])
def test_any_value_that_changes_is_seen(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).bfloat16()
    kept = Unmerged([weight])
    kept.merged([weight])
    assert kept.follows([weight])
    for at in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[at] += 1
        assert not kept.follows([changed])
