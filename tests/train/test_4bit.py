"""Runs over a model that bitsandbytes holds in 4 bits (QLoRA)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from fastft.errors import ConfigError
from fastft.train.adapters import load_adapter
from fastft.train.callbacks import Interrupted
from fastft.train.config import TrainConfig
from fastft.train.models import load_model
from fastft.train.run import train
from fastft.train.together import train_together
from tests.train.test_resume import At, ctrl_c

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def in_4bit(settings):
    return settings | {"load_in_4bit": True, "dtype": "bfloat16", "eval_steps": 2}


def trained(settings, folder, **changed):
    events = []
    cfg = TrainConfig(**settings | {"output_dir": str(folder), **changed})
    return train(cfg, report=events.append), [event.loss for event in events]


def test_a_run_fuses_every_layer_and_learns_as_peft_does(in_4bit, tmp_path):
    result, losses = trained(in_4bit, tmp_path / "fused")
    assert result.explanation["calls"]["fallback"] == {}
    lora = [m for m in result.explanation["modules"] if m["kind"] == "lora"]
    assert len(lora) == sum(m["fused"] for m in lora) == 14
    _, theirs = trained(in_4bit, tmp_path / "plain", fused=False)
    assert losses == pytest.approx(theirs, rel=0.02)
    assert losses[-1] < losses[0]
    model = load_model(TrainConfig(**in_4bit))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.numel() == 32 * 64 // 2
    assert model.lm_head.weight.dtype == torch.bfloat16
    load_adapter(model, result.adapter)
    assert result.adapter_reload_max_diff == 0.0


def test_a_resumed_run_has_the_bits_of_one_that_went_on(in_4bit, tmp_path):
    """An evaluation in between leaves the weights as they are."""
    whole, _ = trained(in_4bit, tmp_path / "whole")
    cfg = TrainConfig(**in_4bit | {"output_dir": str(tmp_path / "parts")})
    with pytest.raises(Interrupted):
        train(cfg, callbacks=[At(3, ctrl_c)])
    again = train(cfg.replace(resume_from_checkpoint="last"))
    want, got = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, again))
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_several_adapters(in_4bit, tmp_path):
    cfgs = [
        TrainConfig(**in_4bit | {"output_dir": str(tmp_path / name), "eval_steps": 0, "seed": seed})
        for name, seed in (("a", 1), ("b", 2))
    ]
    for result in train_together(cfgs):
        assert result.explanation["calls"]["fallback"] == {}
    with pytest.raises(ConfigError, match="load_in_4bit"):
        train_together([cfgs[0], cfgs[1].replace(load_in_4bit=False)])


def test_what_is_refused_before_anything_is_written(in_4bit, tmp_path, monkeypatch):
    cfg = TrainConfig(**in_4bit | {"r": 40})
    with pytest.raises(ConfigError, match="at most 32, the smaller side"):
        train(cfg)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        train(TrainConfig(**in_4bit))
    assert not any(tmp_path.iterdir())
