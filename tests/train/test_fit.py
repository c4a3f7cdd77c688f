"""What does not fit is refused before the first step; what runs out of memory is halved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from fastft.errors import ConfigError
from fastft.memory import _auto
from fastft.train import run as run_module
from fastft.train.config import TrainConfig
from fastft.train.run import train
from fastft.train.trainer import FastftTrainer
from tests.train.tiny import make_model


class TestCheck:
    def test_a_run_that_does_not_fit_is_refused_with_a_remedy(self, settings, monkeypatch):
        monkeypatch.setattr(_auto, "free_memory", lambda device: 10 << 20)
        with pytest.raises(ConfigError, match=r"GB at the peak.*GB are free") as error:
            train(TrainConfig(**settings))
        assert "fastft plan" in str(error.value) or "--force" in str(error.value)

    def test_the_remedy_is_one_that_fits(self, settings, monkeypatch):
        from fastft.train.plan import Planner
        from fastft.train.plan_device import device_of
        from fastft.train.plan_model import Request

        cfg = TrainConfig(
            **{**settings, "per_device_train_batch_size": 64, "padding": "max_length"}
        )
        planner = Planner(Request(cfg), device_of("cpu"))
        between = (planner.predict("none").peak + planner.predict("attention").peak) // 2
        monkeypatch.setattr(_auto, "free_memory", lambda device: between)
        with pytest.raises(ConfigError, match="memory_policy: ") as error:
            train(cfg)
        policy = str(error.value).split("memory_policy: ")[1].split()[0].rstrip(".,")
        train(cfg.replace(memory_policy=policy, max_steps=1))

    def test_force_trains_and_says_so(self, settings, monkeypatch):
        monkeypatch.setattr(_auto, "free_memory", lambda device: 10 << 20)
        notices: list[str] = []
        result = train(TrainConfig(**settings), notice=notices.append, force=True)
        assert result.steps == 6
        assert any("does not fit" in notice for notice in notices)

    @pytest.mark.parametrize("policy", ["lora", "attention", "full", "auto"])
    def test_every_policy_trains_the_same_adapter(self, settings, policy):
        from safetensors.torch import load_file

        found = []
        for name in ("none", policy):
            cfg = TrainConfig(
                **{**settings, "output_dir": f"{settings['output_dir']}-{name}"},
                memory_policy=name,
                lora_dropout=0.1,
            )
            train(cfg)
            found.append(load_file(f"{cfg.output_dir}/adapter/adapter_model.safetensors"))
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])

    def test_two_ways_to_recompute_are_refused(self, settings):
        with pytest.raises(ConfigError, match="recomputes everything"):
            TrainConfig(**settings, memory_policy="full", gradient_checkpointing=True)


def losses(settings: dict[str, Any], **more: Any) -> list[float]:
    events: list[Any] = []
    train(TrainConfig(**{**settings, **more}), report=events.append)
    return [event.loss for event in events]


class TestHalving:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_the_step_goes_on_with_half_the_batch(self, settings, monkeypatch, accumulation):
        """Out of memory in the second half of a backward, above two sequences."""
        options = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
        expected = losses({**settings, "output_dir": settings["output_dir"] + "-a"}, **options)
        usual = Trainer.training_step
        sizes: list[int] = []

        def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
            sizes.append(len(inputs["input_ids"]))
            loss = usual(self, model, inputs, *args, **kw)
            if sizes[-1] > 2 and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return loss

        monkeypatch.setattr(Trainer, "training_step", training_step)
        notices: list[str] = []
        events: list[Any] = []
        cfg = TrainConfig(**{**settings, **options})
        train(cfg, report=events.append, notice=notices.append)
        assert sizes[:4] == [4, 4, 2, 2]
        assert all(size == 2 for size in sizes[2:])
        assert [n for n in notices if "2 parts" in n]
        assert len(events) == 4
        assert [event.loss for event in events] == pytest.approx(expected, rel=1e-4)

    def test_means_over_parts_weigh_by_their_tokens(self, settings, monkeypatch):
        """Of a model whose loss is a mean: answers are not all of one length."""
        usual, failing, found = Trainer.training_step, False, []

        def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
            if failing and len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return usual(self, model, inputs, *args, **kw)

        monkeypatch.setattr(Trainer, "training_step", training_step)
        for failing in (False, True):
            options = {"output_dir": f"{settings['output_dir']}-{failing}", "adam_epsilon": 1.0}
            events: list[Any] = []
            cfg = TrainConfig(**{**settings, **options, "learning_rate": 1.0})
            prepared = run_module.prepare(cfg, report=events.append)
            prepared.trainer.model_accepts_loss_kwargs = False
            run_module.run_trainer(prepared)
            found.append([event.loss for event in events])
        # Sums over some 4 x 64 tokens in another order, through six nearly linear steps.
        assert found[1] == pytest.approx(found[0], rel=6 * 256 * 2.0**-24)

    def test_one_sequence_that_does_not_fit_is_a_clear_error(self, settings, monkeypatch):
        def training_step(self: Any, *args: Any, **kw: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(ConfigError, match=r"one sequence fits.*Lower max_length"):
            train(TrainConfig(**settings))

    def test_other_errors_pass(self, settings, monkeypatch):
        def training_step(self: Any, *args: Any, **kw: Any) -> Any:
            raise RuntimeError("something else")

        monkeypatch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(RuntimeError, match="something else"):
            train(TrainConfig(**settings))


class TestWithoutPadding:
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
    def test_losses_are_those_of_padded_batches(self, settings, fused):
        padded = losses({**settings, "output_dir": settings["output_dir"] + "-p"}, fused=fused)
        flat = losses(settings, fused=fused, padding="none")
        assert flat == pytest.approx(padded, rel=2e-3)

    def test_fewer_tokens_are_computed(self, settings):
        tokens = {}
        for padding in ("longest", "none"):
            events: list[Any] = []
            folder = f"{settings['output_dir']}-{padding}"
            cfg = TrainConfig(**{**settings, "output_dir": folder}, padding=padding)
            prepared = run_module.prepare(cfg, report=events.append)
            assert isinstance(prepared.trainer, FastftTrainer)
            run_module.run_trainer(prepared)
            tokens[padding] = sum(event.tokens for event in events)
        assert tokens["none"] < tokens["longest"]

    def test_a_model_in_which_examples_see_one_another_is_refused(self, settings, tokenizer):
        """Bloom reads no positions, Falcon took no ends once; what is refused draws no numbers."""
        import transformers
        from packaging.version import Version
        from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig

        from fastft.train.data import collator
        from fastft.train.packing import check_packing

        collate = collator(TrainConfig(padding="none"), tokenizer)
        llama = make_model()
        llama.config.use_cache = False  # as in training: with it, Transformers asks for no mask
        check_packing(llama, collate, "cpu")
        small = {"vocab_size": 260, "hidden_size": 32}
        configs = [BloomConfig(**small, n_layer=2, n_head=2)]
        if Version(transformers.__version__) < Version("5.24"):
            configs.append(FalconConfig(**small, num_hidden_layers=2, num_attention_heads=2))
        for config in configs:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            folder = f"{settings['output_dir']}-{config.model_type}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            random = torch.get_rng_state()
            with pytest.raises(ConfigError, match=r"see one another in .*Set padding: longest"):
                check_packing(model.train(), collate, "cpu")
            assert model.training
            assert torch.equal(torch.get_rng_state(), random)
            with pytest.raises(ConfigError, match="see one another"):
                train(TrainConfig(**{**settings, "model": folder}, padding="none"))
