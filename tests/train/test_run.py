"""Whole runs of a tiny model: what comes out, and what is refused before and during training."""

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Trainer,
    TrainerCallback,
)

import fastft.optim
from fastft.errors import AdapterError, ConfigError, FastftError
from fastft.train import checkpoints
from fastft.train.adapters import load_adapter
from fastft.train.callbacks import StopAfter
from fastft.train.config import TrainConfig
from fastft.train.run import prepare, train
from tests.train.tiny import make_model

both = pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])


def weights(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


class TestWholeRun:
    @both
    def test_trains_saves_and_reads_back(self, settings, fused):
        events, notices = [], []
        cfg = TrainConfig(**settings, fused=fused)
        result = train(cfg, report=events.append, notice=notices.append)
        assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
        assert events[-1].loss < events[0].loss
        assert all(event.tokens > 0 and event.seconds > 0 for event in events)
        assert result.steps == 6
        assert math.isfinite(result.eval_loss)
        assert result.adapter_reload_max_diff == 0.0
        loaded = load_adapter(make_model(), result.adapter)
        assert any(p.abs().sum() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)
        if fused:
            modules = result.explanation["modules"]
            assert sum(module["fused"] for module in modules if module["kind"] == "lora") == 14
            assert result.explanation["calls"]["fused"] > 0
        else:
            assert result.explanation is None

    def test_fused_and_plain_see_the_same_batches_and_agree(self, settings, tmp_path):
        runs = []
        for fused in (False, True):
            events = []
            out = str(tmp_path / f"fused-{fused}")
            cfg = TrainConfig(**settings | {"output_dir": out, "fused": fused})
            train(cfg, report=events.append)
            runs.append(events)
        plain, fused = runs
        assert [e.batch_sha256 for e in plain] == [e.batch_sha256 for e in fused]
        for a, b in zip(plain, fused):
            assert b.loss == pytest.approx(a.loss, rel=1e-4)

    def test_every_form_of_lora_agrees_with_peft(self, settings, tmp_path):
        """DoRA, ranks and alphas by pattern, LoRA+: the same losses, fused and plain."""
        forms = {
            "use_dora": True,
            "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 8},
            "alpha_pattern": {"v_proj": 3},
            "loraplus_lr_ratio": 4.0,
            "weight_decay": 0.1,
        }
        losses = []
        for fused in (False, True):
            events = []
            out = str(tmp_path / f"fused-{fused}")
            cfg = TrainConfig(**settings | forms | {"output_dir": out, "fused": fused})
            train(cfg, report=events.append)
            losses.append([e.loss for e in events])
            shapes = {k: v.shape[0] for k, v in weights(out).items() if k.endswith("lora_A.weight")}
            assert {r for k, r in shapes.items() if "q_proj" in k} == {2}
            assert {r for k, r in shapes.items() if "1.mlp.down_proj" in k} == {8}
            assert {r for k, r in shapes.items() if "0.mlp.down_proj" in k} == {4}
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert losses[1][-1] < losses[1][0]

    def test_lora_plus_gives_b_its_own_rate(self, settings):
        for optim in ("AdamW8bit", "Lion8bit"):  # of names that PEFT takes for another library's
            made = prepare(TrainConfig(**settings, loraplus_lr_ratio=4.0, optim=optim))
            optimizer, seen = made.trainer.create_optimizer(), []
            assert type(optimizer) is getattr(fastft.optim, optim)
            optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
            for p in made.model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer.step()
            assert seen == [1]
        prepared = prepare(TrainConfig(**settings, loraplus_lr_ratio=4.0))
        optimizer = prepared.trainer.create_optimizer()
        assert type(optimizer).__module__.startswith("fastft.optim")
        names = {id(p): n for n, p in prepared.model.named_parameters()}
        rates = {
            names[id(p)].split(".")[-3]: group["lr"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert rates == {"lora_A": pytest.approx(1e-2), "lora_B": pytest.approx(4e-2)}

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"rank_pattern": {"q_porj": 2}}, ["rank_pattern", "q_porj", "q_proj"]),
            ({"rank_pattern": {"k_proj": 500}}, ["at most", "k_proj", "500"]),
            ({"rank_pattern": {"(": 2}}, ["rank_pattern", "a regular expression"]),
            ({"report_to": "nonsense"}, ["report_to", "nonsense is not supported"]),
            ({"use_dora": True, "target_modules": ["norm"]}, ["PEFT can put together"]),
        ],
        ids=str,
    )
    def test_patterns_that_fit_nothing_or_are_too_large(self, settings, changes, words):
        with pytest.raises(ConfigError) as caught:
            prepare(TrainConfig(**settings | changes))
        assert all(word in str(caught.value) for word in words), str(caught.value)

    @both
    def test_accumulation_and_checkpointing_change_no_loss(self, settings, tmp_path, fused):
        losses = []
        for i, more in enumerate(
            (
                {},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
                {"gradient_checkpointing": True},
            )
        ):
            events = []
            out = str(tmp_path / f"out-{i}")
            cfg = TrainConfig(
                **settings | {"output_dir": out, "fused": fused, "max_steps": 3} | more
            )
            train(cfg, report=events.append)
            losses.append([event.loss for event in events])
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert losses[2] == pytest.approx(losses[0], rel=1e-4)

    @pytest.mark.parametrize("more", [{"autocast": True}, {"dtype": "bfloat16"}, {"strict": True}])
    def test_numerics(self, settings, tmp_path, more):
        losses = []
        for fused in (False, True):
            events = []
            out = str(tmp_path / f"out-{fused}")
            cfg = TrainConfig(
                **settings | {"output_dir": out, "fused": fused, "max_steps": 3} | more
            )
            result = train(cfg, report=events.append)
            losses.append([event.loss for event in events])
        assert losses[1] == pytest.approx(losses[0], rel=2e-2)
        assert result.adapter_reload_max_diff == 0.0

    def test_evaluates_on_the_way(self, settings):
        logs = []

        class Keep(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                logs.append((state.global_step, metrics["eval_loss"]))

        result = train(TrainConfig(**settings | {"eval_steps": 3}), callbacks=[Keep()])
        assert [step for step, _ in logs] == [3, 6, 6]
        assert logs[-1][1] == result.eval_loss

    @pytest.mark.parametrize(
        ("stop", "steps"),
        [(StopAfter(4, None, 1), 4), (StopAfter(None, 0.0, 3), 3), (StopAfter(None, 1e9, 3), 6)],
    )
    def test_ends_early_on_the_same_schedule(self, settings, stop, steps):
        events = []
        train(TrainConfig(**settings | {"save_steps": 0}), callbacks=[stop], report=events.append)
        assert len(events) == steps
        assert all(event.max_steps == 6 for event in events)

    def test_group_by_length_and_epochs(self, settings):
        cfg = TrainConfig(
            **settings | {"group_by_length": True, "max_steps": -1, "num_train_epochs": 1}
        )
        assert train(cfg).steps == math.ceil(43 / 4)

    def test_groups_by_length_are_those_of_seed_and_epoch(self, settings):
        """Whatever the global random state is: a resumed run has another one."""
        orders = []
        for state in (1, 2):
            trainer = prepare(TrainConfig(**settings, group_by_length=True)).trainer
            torch.manual_seed(state)
            loader = trainer.get_train_dataloader()
            for epoch in (0, 1):
                loader.set_epoch(epoch)
                orders.append([batch["input_ids"].tolist() for batch in loader])
        assert orders[:2] == orders[2:]
        assert orders[0] != orders[1]

    def test_clipping_is_in_the_fused_step(self, settings, tmp_path):
        ends = []
        for norm in (0.0, 1e-3):
            out = str(tmp_path / f"clip-{norm}")
            cfg = TrainConfig(
                **settings
                | {"output_dir": out, "max_grad_norm": norm, "adam_epsilon": 1e-2, "max_steps": 2}
            )
            train(cfg)
            ends.append(weights(out))
        moved = [sum(t.abs().sum() for k, t in end.items() if "lora_B" in k) for end in ends]
        # With epsilon far above the clipped gradients, their size shows in the update.
        assert moved[1] < moved[0] / 2


class TestRefusedBeforeTraining:
    @pytest.mark.parametrize("targets", [["q_proj", "v_prj"], ["v_prj"]])
    def test_unknown_target_modules(self, settings, targets):
        with pytest.raises(ConfigError, match="did you mean 'v_proj'") as caught:
            prepare(TrainConfig(**settings, target_modules=targets))
        for name in ("q_proj", "k_proj", "o_proj", "gate_proj", "lm_head"):
            assert name in str(caught.value)

    def test_pattern_that_matches_nothing_or_is_none(self, settings):
        with pytest.raises(ConfigError, match="names of modules"):
            prepare(TrainConfig(**settings, target_modules=r".*\.attention"))
        with pytest.raises(ConfigError, match="a regular expression"):
            prepare(TrainConfig(**settings, target_modules="(q_proj"))
        with pytest.raises(ConfigError, match=r"got 'q_proj'. Write it as a list: \[q_proj\]"):
            prepare(TrainConfig(**settings, target_modules="q_proj"))

    def test_rank_above_the_features(self, settings):
        with pytest.raises(ConfigError, match="at most 32, the smaller side of"):
            prepare(TrainConfig(**settings | {"r": 64}))
        named = {"r": 20, "target_modules": ["k_proj", "down_proj"]}
        with pytest.raises(ConfigError, match=r"at most 16, the smaller side of.*k_proj"):
            prepare(TrainConfig(**settings | named))

    def test_rank_above_a_router_s_experts(self):
        from transformers import MixtralConfig, MixtralForCausalLM

        from fastft.train.lora_setup import check_targets

        config = MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
        )
        with torch.device("meta"):
            model = MixtralForCausalLM(config)
        check_targets(model, TrainConfig(r=8))
        with pytest.raises(ConfigError, match="smaller side of"):
            check_targets(model, TrainConfig(r=40))

    def gpt2(self, tokenizer, folder, **config):
        """Of 36 positions, in a table."""
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"vocab_size": 260, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 36}
        GPT2LMHeadModel(GPT2Config(**small | config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def test_more_tokens_than_positions_or_than_rows(self, settings, tokenizer, tmp_path):
        settings |= {"model": self.gpt2(tokenizer, tmp_path / "gpt2"), "max_steps": 1}
        with pytest.raises(ConfigError, match=r"at most 36, the positions .* examples of (39|4\d)"):
            train(TrainConfig(**settings))
        # Examples of 36 tokens: no padding to a multiple of 8 goes past the last position.
        assert train(TrainConfig(**settings | {"max_length": 36})).steps == 1
        small = self.gpt2(tokenizer, tmp_path / "small", vocab_size=100)
        with pytest.raises(ConfigError, match="at most 100 tokens, the rows"):
            prepare(TrainConfig(**settings | {"model": small, "output_dir": str(tmp_path / "b")}))

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
    def test_read_only_folder(self, settings, monkeypatch, number):
        def refuse(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        # Permission bits do not stop root, so the system call is made to fail.
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
        with pytest.raises(ConfigError, match="a folder that can be written"):
            train(TrainConfig(**settings))
        assert not Path(settings["output_dir"]).exists()

    def test_output_dir_is_a_file(self, settings, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match="a folder that can be written"):
            train(TrainConfig(**settings | {"output_dir": str(tmp_path / "file")}))

    def test_no_such_model(self, settings):
        with pytest.raises(ConfigError, match="the hub id or the folder"):
            train(TrainConfig(**settings | {"model": "/no/such/model"}))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="float16 trains on CUDA")
    def test_float16_without_a_gpu(self, settings):
        with pytest.raises(ConfigError, match="loss scaling"):
            train(TrainConfig(**settings | {"dtype": "float16"}))


class TestFailuresDuringTraining:
    @pytest.mark.parametrize(
        "kind", ["oserror", "safetensors", "torch", "short", "small", "tokenizer", "handled"]
    )
    def test_full_disk_at_a_checkpoint(self, settings, monkeypatch, kind):
        from safetensors import SafetensorError

        errors = {
            "oserror": OSError(errno.ENOSPC, "No space left on device"),
            "safetensors": SafetensorError("I/O error: No space left on device"),
            "torch": RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "short": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"),
            "small": RuntimeError("basic_ios::clear: iostream error"),
            "tokenizer": Exception("No space left on device (os error 28)"),
            "handled": ValueError("while the first was handled"),
        }
        errors["handled"].__context__ = errors["oserror"]
        real = Trainer._save_optimizer_and_scheduler

        def full(self, output_dir):
            if self.state.global_step == 4:
                raise errors[kind]
            real(self, output_dir)

        monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(FastftError, match="checkpoint-2 is whole: make room"):
            train(TrainConfig(**settings))
        found = checkpoints.checkpoints(settings["output_dir"])
        assert [path.name for path in found] == ["checkpoint-2"]
        assert checkpoints.is_whole(found[0])
        monkeypatch.undo()
        cfg = TrainConfig(**settings | {"resume_from_checkpoint": "last"})
        assert train(cfg).steps == 6

    def test_full_disk_with_nothing_saved_before(self, settings, monkeypatch):
        def full(self, output_dir):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(FastftError, match="Make room and start again"):
            train(TrainConfig(**settings))
        assert not checkpoints.checkpoints(settings["output_dir"])

    def test_full_disk_at_the_adapter_keeps_the_previous_one(self, settings, monkeypatch):
        from peft import PeftModel

        train(TrainConfig(**settings | {"max_steps": 2}))
        before = weights(settings["output_dir"])

        real = PeftModel.save_pretrained

        def full(self, folder, *args, **kwargs):
            if "checkpoint" not in str(folder):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, folder, *args, **kwargs)

        monkeypatch.setattr(PeftModel, "save_pretrained", full)
        with pytest.raises(AdapterError, match=r"No space left.*untouched"):
            train(TrainConfig(**settings | {"resume_from_checkpoint": "last"}))
        after = weights(settings["output_dir"])
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    @both
    def test_a_loss_that_is_nan_ends_the_run(self, settings, fused):
        cfg = TrainConfig(**settings, fused=fused)

        class Poison(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    with torch.no_grad():
                        model.get_input_embeddings().weight.fill_(float("nan"))

        with pytest.raises(FastftError, match="a finite value, got nan at step 3"):
            train(cfg, callbacks=[Poison()])


def test_run_writes_the_configuration_it_ran_with(settings):
    import yaml

    cfg = TrainConfig(**settings | {"max_steps": 1})
    train(cfg)
    written = Path(settings["output_dir"]) / "train_config.yaml"
    assert yaml.safe_load(written.read_text()) == json.loads(json.dumps(cfg.to_dict()))
