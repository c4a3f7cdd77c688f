"""Several adapters in one job: the losses, the adapters and the held-out loss of separate runs."""

import dataclasses
import math
import os
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastft.commands import app
from fastft.errors import ConfigError, FastftError
from fastft.train.adapters import load_adapter
from fastft.train.callbacks import Interrupted
from fastft.train.config import TrainConfig
from fastft.train.losses_apart import losses_apart
from fastft.train.run import train
from fastft.train.together import train_together
from tests.train.tiny import make_model


@pytest.fixture
def cfgs(settings, tmp_path):
    """Three runs: of another rank, seed, order, length, batch, schedule and accumulation."""
    settings = settings | {"save_steps": 0}
    changes = (
        {},
        {
            "r": 8,
            "lora_alpha": 4,
            "seed": 7,
            "max_steps": 9,
            "learning_rate": 3e-3,
            "max_length": 40,
            "group_by_length": True,
        },
        {
            "target_modules": ["q_proj", "down_proj"],
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "max_steps": -1,
            "num_train_epochs": 0.5,
            "lr_scheduler_type": "linear",
            "use_rslora": True,
            "rank_pattern": {"layers.0.mlp.down_proj": 3},
            "loraplus_lr_ratio": 4.0,
        },
    )
    return [
        TrainConfig(**settings | change | {"output_dir": str(tmp_path / f"run{i}")})
        for i, change in enumerate(changes)
    ]


def weights(cfg):
    return load_file(Path(cfg.output_dir) / "adapter" / "adapter_model.safetensors")


def test_losses_and_adapters_are_those_of_separate_runs(cfgs, tmp_path):
    together = []
    results = train_together(cfgs, report=together.append)
    for i, (cfg, result) in enumerate(zip(cfgs, results)):
        events = []
        own = cfg.replace(output_dir=str(tmp_path / f"alone{i}"))
        alone = train(own, report=events.append)
        assert result.steps == alone.steps == len(events)
        for event, both in zip(events, together):
            assert both.losses[i] == pytest.approx(event.loss, rel=2e-4)
        assert all(math.isnan(e.losses[i]) for e in together[len(events) :])
        assert result.train_loss == pytest.approx(alone.train_loss, rel=2e-4)
        assert result.eval_loss == pytest.approx(alone.eval_loss, rel=2e-4)
        assert result.adapter_reload_max_diff == 0.0
        mine, its = weights(cfg), weights(own)
        assert mine.keys() == its.keys()
        for key, tensor in its.items():
            # AdamW turns a gradient that is rounding noise into a step of its full size.
            assert (mine[key] - tensor).norm() <= 0.02 * tensor.norm(), key
    assert together[-1].step == together[-1].max_steps == max(r.steps for r in results)
    assert all(event.tokens > 0 and event.seconds > 0 for event in together)
    modules = [m for m in results[0].explanation["modules"] if m["kind"] == "lora"]
    # Layers the third run does not target see batches of its samples alone.
    assert {reason for m in modules for reason in m["fallback_calls"]} == {"no active adapter"}
    assert all(m["fused_calls"] >= 9 for m in modules)


def test_batches_without_padding_and_with(cfgs, tmp_path):
    """What has no padding has no mask; beside a longer batch it is padded, and needs one."""
    lengths = (40, 48)
    pair = [c.replace(max_length=n, max_steps=3) for c, n in zip(cfgs, lengths)]
    together = []
    train_together(pair, report=together.append)
    for i, cfg in enumerate(pair):
        events = []
        train(cfg.replace(output_dir=str(tmp_path / f"alone{i}")), report=events.append)
        for event, both in zip(events, together):
            assert both.losses[i] == pytest.approx(event.loss, rel=2e-4)


def test_an_adapter_loads_in_peft_by_itself(cfgs):
    result = train_together(cfgs[:2])[1]
    assert sorted(p.name for p in Path(cfgs[1].output_dir).iterdir()) == [
        "adapter",
        "train_config.yaml",
    ]
    loaded = load_adapter(make_model(), result.adapter)
    assert {config.r for config in loaded.peft_config.values()} == {8}


def test_more_than_dropout_free_runs(cfgs):
    """Dropout, activation checkpointing and autocast: it trains."""
    options = {"lora_dropout": 0.1, "gradient_checkpointing": True, "autocast": True}
    events = []
    results = train_together([c.replace(**options) for c in cfgs[:2]], report=events.append)
    for i, result in enumerate(results):
        assert events[result.steps - 1].losses[i] < events[0].losses[i]


def test_saves_each_so_many_steps(cfgs, monkeypatch):
    from fastft.train import together

    saved = []
    real = together.save_adapter
    monkeypatch.setattr(
        together, "save_adapter", lambda m, p, n: saved.append(p.parent.name) or real(m, p, n)
    )
    train_together([cfgs[0].replace(save_steps=2), cfgs[1].replace(save_steps=4)])
    assert saved == ["run0", "run0", "run1", "run1", "run0", "run1"]


def test_ctrl_c_saves_every_adapter(cfgs):
    def stop(event):
        if event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train_together(cfgs, report=stop)
    assert caught.value.step == 2
    assert all(weights(cfg) for cfg in cfgs)
    with pytest.raises(ConfigError, match="without an adapter of another run"):
        train_together(cfgs)


def test_a_loss_that_is_no_number_names_its_run(cfgs):
    wild = [cfgs[0], cfgs[1].replace(learning_rate=1e30, max_grad_norm=0.0)]
    with pytest.raises(FastftError, match="run1"):
        train_together(wild)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "bfloat16"}, ["dtype", "'float32', as in", "run0"]),
        ({"output_dir": "SAME"}, ["output_dir", "a folder of its own"]),
        ({"fused": False}, ["fused", "mixed batches"]),
        ({"resume_from_checkpoint": "last"}, ["resume_from_checkpoint", "no checkpoints"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "only LoRA layers"]),
        ({"use_dora": True}, ["use_dora", "no DoRA in mixed batches"]),
        ({"eval_steps": 3}, ["eval_steps", "evaluated at the end"]),
    ],
    ids=str,
)
def test_refused_before_anything_is_written(cfgs, changes, words):
    if changes.get("output_dir"):
        changes = {"output_dir": cfgs[0].output_dir}
    with pytest.raises(ConfigError) as caught:
        train_together([cfgs[0], cfgs[1].replace(**changes)])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not any(Path(cfg.output_dir).exists() for cfg in cfgs)
    with pytest.raises(ConfigError, match="one configuration or more"):
        train_together([])


def test_layers_that_take_no_mixed_batch(cfgs, tokenizer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    job = [c.replace(model=str(tmp_path / "mixtral"), r=4) for c in cfgs[:2]]
    with pytest.raises(ConfigError, match="mixed batches can go through"):
        train_together(job)
    assert not any(Path(cfg.output_dir).exists() for cfg in job)


def test_the_loss_function_of_the_model_comes_back():
    model = make_model()
    before = model.loss_function
    with losses_apart(model) as losses:
        with pytest.raises(FastftError, match="does not call it"):
            losses.take()
        assert model.loss_function is losses
    assert model.loss_function is before
    assert "_loss_function" not in model.__dict__


def test_command_line(cfgs, tmp_path):
    paths = []
    for i, cfg in enumerate(cfgs[:2]):
        paths.append(tmp_path / f"{i}.yaml")
        paths[-1].write_text(yaml.safe_dump(dataclasses.asdict(cfg)))
    result = CliRunner().invoke(app, ["train", *map(str, paths)])
    assert result.exit_code == 0, result.output
    assert "step 9/9  losses done " in result.output
    assert "eval_loss" not in result.output  # as the Trainer prints it
    for cfg in cfgs[:2]:
        assert f"{cfg.output_dir}:" in result.output
        assert weights(cfg)
    refused = CliRunner().invoke(app, ["train", *map(str, paths), "--resume", "last"])
    assert refused.exit_code == 2
    assert "no checkpoints" in refused.output


def test_a_job_that_does_not_fit_is_refused_before_it_starts(cfgs, monkeypatch):
    from fastft.memory import _auto

    monkeypatch.setattr(_auto, "free_memory", lambda device: 10 << 20)
    with pytest.raises(ConfigError, match=r"GB at the peak.*GB are free"):
        train_together(cfgs[:2])
    notices = []
    results = train_together(cfgs[:2], notice=notices.append, force=True)
    assert len(results) == 2
    assert any("does not fit" in notice for notice in notices)
