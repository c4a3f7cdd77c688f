"""``fastft plan``: what it predicts, what it refuses, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastft.optim
from bench.plan import MODELS, table
from fastft.commands import app
from fastft.errors import ArgumentError, ConfigError
from fastft.memory import ceilings
from fastft.memory.devices import DEVICES, find_device
from fastft.train.config import TrainConfig
from fastft.train.plan import Planner
from fastft.train.plan_model import OPTIMIZERS, Request, check_request, state_bytes
from fastft.train.plan_report import changes, room

ROOT = Path(__file__).resolve().parents[2]
H100 = find_device("H100")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = str(folder)
    return found


def planner(folder: str, method: str = "lora", gpus: int = 1, **settings) -> Planner:
    given = {"per_device_train_batch_size": 1, "max_length": 2048, **settings}
    return Planner(Request(TrainConfig(model=folder, **given), method, gpus=gpus), H100)


def test_weights_and_states_of_an_8b_model_by_hand(folders):
    lora = planner(folders["Llama-3.1-8B"]).predict("full")
    h, i, v, layers, vocabulary, r = 4096, 14336, 1024, 32, 128256, 16
    base = layers * (2 * h * h + 2 * h * v + 3 * h * i + 2 * h) + 2 * vocabulary * h + h
    sides = 2 * (h + h) + 2 * (h + v) + 3 * (h + i)
    adapters = layers * r * sides
    assert lora.parameters == base + adapters
    assert lora.trainable == adapters
    assert abs(lora.weights - (2 * base + 4 * adapters)) < 1 << 20
    assert (lora.gradients, lora.optimizer) == (4 * adapters, 8 * adapters)
    full = planner(folders["Llama-3.1-8B"], "full", optim="AdamW8bit").predict("full")
    assert full.gradients == 2 * base
    assert full.optimizer == pytest.approx(2.03 * base, rel=2e-3)
    hosted = planner(folders["Llama-3.1-8B"], "full", optim="AdamW8bit", optim_states="host")
    away = hosted.predict("full")
    assert away.host - full.host == full.optimizer
    assert away.optimizer == 3 * 64 << 20
    assert full.peak - away.peak == full.optimizer - away.optimizer
    # An H100's bus carries 50 GB a second each way.
    assert away.parts["optimizer"] == pytest.approx(full.optimizer / 50e9)
    assert away.parts["optimizer"] > full.parts["optimizer"]
    paged = planner(folders["Llama-3.1-8B"], "full", optim="AdamW8bit", optim_states="paged")
    assert paged.predict("full").optimizer == 0
    # 7 of 8 billion weights at half a byte and an eighth of one in 32.
    qlora = planner(folders["Llama-3.1-8B"], "qlora").predict("full")
    linear = layers * (2 * h * h + 2 * h * v + 3 * h * i)
    saved = linear * (2 - (4 + 8 / 64 + 32 / 16384) / 8)
    assert lora.weights - qlora.weights == pytest.approx(saved, rel=1e-6)
    # Fused as LoRA is: x is in no second dtype; gate and up are made whole in one call.
    assert qlora.activations == lora.activations
    assert qlora.workspace - lora.workspace == 2 * (2 * h * i)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_as_large_as_those_of_the_optimizer_itself(optim, dtype):
    shapes = [(96, 64), (64, 4096), (4096,), (7,), (3, 32, 48)]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    groups = [("Muon", 2)] if optim == "Muon" else [(optim, None)]
    groups += [("AdamW", None)] if optim == "Muon" else []
    left = list(zip(shapes, params, strict=True))
    for name, dim in groups:  # a Muon takes matrices, AdamW the others
        taken = [(s, p) for s, p in left if dim is None or len(s) == dim]
        left = [(s, p) for s, p in left if not (dim is None or len(s) == dim)]
        options = {"momentum": 0.9} if name == "SGD" else {}
        made = getattr(fastft.optim, name)([p for _, p in taken], lr=1e-3, **options)
        for _, p in taken:
            p.grad = torch.randn_like(p)
        made.step()
        for shape, p in taken:
            held = {key: t for key, t in made.state[p].items() if key != "step"}
            found = sum(t.nbytes for t in held.values() if isinstance(t, torch.Tensor))
            assert found == state_bytes(shape, optim), (name, shape, list(held))


def test_the_planner_knows_every_optimizer():
    known = {name for name in fastft.optim.__all__ if hasattr(getattr(fastft.optim, name), "step")}
    assert known - {"FusedOptimizer", "StepInBackward"} == set(OPTIMIZERS)
    assert set(get_args(get_type_hints(TrainConfig)["optim"])) <= set(OPTIMIZERS)


def test_a_step_of_muon_has_room(folders):
    """In float32 an update of each matrix; AdamW's step needs none."""
    path = folders["SmolLM2-135M"]
    cfg = TrainConfig(model=path, per_device_train_batch_size=1, max_length=64)
    found = {}
    for optim in ("AdamWBF16", "Muon"):
        made = Planner(check_request(cfg, "full", optim=optim), H100)
        found[optim] = made.predict("full")
    muon, other = found["Muon"], found["AdamWBF16"]
    assert muon.optimizer == pytest.approx(other.optimizer, rel=1e-3)  # but for the vectors
    assert muon.peak - muon.optimizer > other.peak - other.optimizer
    assert muon.activations + muon.workspace > 4 * 134e6


def test_what_an_optimizer_cannot_is_refused(folders):
    cfg = TrainConfig(model=folders["SmolLM2-135M"])
    with pytest.raises(ConfigError, match="gpus: expected 1 with Adafactor or Muon, got 2"):
        check_request(cfg, "full", 2, optim="Muon")
    with pytest.raises(ConfigError, match="optim_states: expected 'device' with Adafactor or Muon"):
        check_request(cfg.replace(optim_states="host"), "full", optim="Adafactor")
    with pytest.raises(ConfigError, match="fused is false"):
        check_request(cfg.replace(fused=False), optim="Muon")
    big = Request(TrainConfig(model=folders["Llama-3.1-8B"]), "full", optim="Adafactor")
    remedies = [what for what, _ in changes(big, H100, 1 << 50)]
    assert not any("8bit" in r or "optim_states" in r or "GPUs" in r for r in remedies)


def test_policies_keep_less_and_take_longer(folders):
    made = planner(folders["Llama-3.1-8B"])
    found = {policy: made.predict(policy) for policy in ("none", "lora", "attention", "full")}
    kept = [row.activations for row in found.values()]
    assert kept == sorted(kept, reverse=True)
    seconds = [row.seconds for row in found.values()]
    assert seconds == sorted(seconds)
    tokens, h, i, v = 2048, 4096, 14336, 1024
    per_layer = 2 * tokens * (6 * h + 2 * v + 3 * i)
    assert found["none"].activations == pytest.approx(32 * per_layer, rel=0.02)
    offload = made.predict("offload")
    # All but two layers: the input and the result of attention.
    assert offload.host == pytest.approx(30 * 2 * 2 * tokens * h, rel=0.02)
    assert offload.activations < found["full"].activations


def test_more_gpus_share_what_can_be_shared(folders):
    one = planner(folders["Llama-3.1-8B"]).predict("full")
    eight = planner(folders["Llama-3.1-8B"], gpus=8).predict("full")
    assert eight.gradients == one.gradients // 8
    # And whole: the embedding, the head and two layers.
    outside, layers = 2 * 2 * 128256 * 4096, 2 * 0.45e9
    assert eight.weights - one.weights / 8 == pytest.approx(outside + layers, rel=0.05)
    assert eight.activations == one.activations


def test_13b_on_an_a100_takes_the_hours_people_report(folders):
    """Five hours for 52,000 examples three times on one 80 GB card: within a third."""
    from fastft.train.plan_report import report

    cfg = TrainConfig(
        model=folders["Llama-2-13B"], per_device_train_batch_size=8, max_length=512, r=16
    )
    found = report(Request(cfg), find_device("A100"), examples=52_000, epochs=3)
    assert found.chosen is not None
    assert found.hours == pytest.approx(5.0, rel=0.33)


def test_the_largest_batch_fits_and_the_next_does_not(folders):
    made = planner(folders["Llama-3.1-8B"])
    allowed = room(H100)
    most = made.largest(allowed, "full", "batch")
    assert most is not None
    assert most.peak <= allowed
    assert made.predict("full", batch=most.batch + most.batch // 50 + 1).peak > allowed
    assert made.largest(1 << 30, "full", "batch") is None


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 1000 + 10 * n,
        lambda n: 1000 + 200 * min(n, 5) + 10 * n,  # steeper at first
        lambda n: 1000 + 10 * n + 40 * max(0, n - 100),  # steeper later
        lambda n: 1000 + n * n / 50,
        lambda n: 9000,
    ],
)
def test_the_largest_is_a_fiftieth_short_at_most(peak):
    """Whatever the curve, in a few predictions, and never past the model's positions."""
    from transformers import LlamaConfig

    made = Planner.__new__(Planner)  # of a model there is no need
    made.config = LlamaConfig(max_position_embeddings=2048)
    asked = []

    def predict(policy, batch=None, length=None):
        asked.append(batch or length)
        size = batch or length // 64
        return SimpleNamespace(peak=peak(size), batch=size, length=length)

    made.predict = predict
    exact = max(n for n in range(1, (1 << 16) + 1) if peak(n) <= 10_000)
    most = made.largest(10_000, "none", "batch")
    assert 0.98 * exact - 1 <= most.batch <= exact
    assert len(asked) <= 16
    asked.clear()
    assert made.largest(10_000, "none", "length").length == 64 * min(exact, 32)
    assert max(asked) <= 2048


class TestOtherConfigurations:
    def report(self, tmp_path, config, method="lora", **more):
        from fastft.train.plan_report import report

        config.save_pretrained(tmp_path)
        options = {"r": 2, "max_length": 64, "per_device_train_batch_size": 1, **more}
        cfg = TrainConfig(model=str(tmp_path), **options)
        return report(Request(cfg, method), find_device("L4"))

    def llama(self, **changes):
        from transformers import LlamaConfig

        small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaConfig(**small | heads | {"max_position_embeddings": 256} | changes)

    def test_the_text_s_positions_end_a_sequence(self, tmp_path):
        from transformers import Gemma3Config, Gemma3TextConfig

        text = {k: v for k, v in self.llama().to_dict().items() if k not in ("model_type", "dtype")}
        config = Gemma3Config(text_config=Gemma3TextConfig(**text | {"head_dim": 16}))
        assert self.report(tmp_path, config).largest_length == 256

    def test_one_layer(self, tmp_path):
        found = self.report(tmp_path, self.llama(num_hidden_layers=1))
        assert [row.policy for row in found.rows] == ["none"]

    def test_quantised_weights(self, tmp_path):
        plain = self.report(tmp_path, self.llama(), "qlora")
        loaded = self.report(tmp_path, self.llama(), load_in_4bit=True)
        assert loaded.request.method == "qlora"
        assert loaded.rows[0].weights == plain.rows[0].weights
        bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        stored = self.report(tmp_path, self.llama(quantization_config=bits))
        assert stored.request.method == "qlora"
        assert stored.rows[0].weights == plain.rows[0].weights
        assert not stored.notes
        other = self.report(tmp_path, self.llama(quantization_config={"quant_method": "gptq"}))
        assert other.rows[0].weights > plain.rows[0].weights
        assert "gptq; here they are counted unquantised" in other.notes[0]


def test_every_device_of_the_table_is_found_by_any_spelling():
    for name in DEVICES:
        assert find_device(name.lower().replace(" ", "")).name == name
    assert find_device("4090").name == "RTX 4090"
    with pytest.raises(ArgumentError, match="H100"):
        find_device("H1000")


def test_measured_rates_are_kept_by_device_and_dtype(tmp_path):
    path = tmp_path / "deep" / "ceilings.json"
    facts = {"products": ((8, 8, 8, 1e12),), "copies": 1e10, "elementwise": 1e9, "attention": 1e11}
    for device, dtype in (("a", "bfloat16"), ("a", "float32"), ("a", "bfloat16")):
        ceilings.save(path, ceilings.Ceilings(device, dtype, **facts, fresh=0.0, launch=1e-6))
    assert len(json.loads(path.read_text())) == 2
    found = ceilings.load(path, "a", "float32")
    assert found is not None
    assert found.product(9, 9, 9) == 1e12
    assert ceilings.load(path, "b", "float32") is None
    path.write_text("{broken")
    assert ceilings.load(path, "a", "float32") is None


class TestCommand:
    def run(self, *arguments: str):
        return CliRunner().invoke(app, ["plan", *arguments])

    def test_table_picture_and_json(self, model_folder, tmp_path):
        picture = tmp_path / "pictures" / "plan.svg"
        options = ("--device", "L4", "--length", "64", "--rank", "4")
        said = self.run(str(model_folder), *options, "--picture", str(picture))
        assert said.exit_code == 0, said.output
        assert "Fastest that fits: none" in said.output
        assert "<svg" in picture.read_text()
        done = self.run(str(model_folder / "config.json"), *options, "--json")
        found = json.loads(done.output[done.output.index("{") :])
        assert found["chosen"] == "none"
        assert {row["policy"] for row in found["policies"]} == {
            "none", "lora", "attention", "full", "offload",
        }  # fmt: skip
        for row in found["policies"]:
            parts = ("weights", "gradients", "optimizer", "activations", "workspace")
            assert row["peak"] == sum(row[part] for part in parts)

    def test_an_optimizer_that_train_does_not_have(self, model_folder):
        options = ("--method", "full", "--optim", "AdamWBF16", "--device", "L4", "--length", "64")
        said = self.run(str(model_folder), *options, "--json")
        assert said.exit_code == 0, said.output
        found = json.loads(said.output[said.output.index("{") :])
        assert found["optim"] == "AdamWBF16"
        row = found["policies"][0]
        assert row["optimizer"] == 4 * row["trainable"]

    def test_what_does_not_fit_comes_with_what_does(self, folders):
        said = self.run(folders["Llama-2-13B"], "--device", "T4", "--length", "512", "--batch", "1")
        assert said.exit_code == 0, said.output
        assert "Nothing fits" in said.output
        assert "It fits with load_in_4bit: true" in said.output

    def test_a_training_file_is_planned_as_it_is(self, settings, tmp_path):
        import yaml

        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        said = self.run(str(path), "--device", "H100")
        assert said.exit_code == 0, said.output
        assert "r=4" in said.output

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("--device", "H1000"), "one of A100"),
            (("--method", "lorra"), "did you mean 'lora'"),
            (("--optim", "adamw"), "did you mean 'AdamW'"),
            (("/nowhere/at/all",), "the hub id or the folder"),
            (("--rank", "0"), "a value above 0"),
            (("--epochs", "nan", "--device", "L4"), "epochs: expected a number above 0"),
            (("--epochs", "-1", "--device", "L4"), "epochs: expected a number above 0"),
        ],
    )
    def test_bad_input(self, model_folder, arguments, text):
        arguments = arguments if arguments[0].startswith("/") else (str(model_folder), *arguments)
        said = self.run(*arguments)
        assert said.exit_code == 2
        assert text in said.output + (said.stderr if said.stderr_bytes else "")

    def test_no_causal_language_model(self, tmp_path):
        from transformers import ViTConfig

        ViTConfig().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="causal language model"):
            Planner(Request(TrainConfig(model=str(tmp_path))), H100)


def test_the_page_holds_the_table_of_the_committed_measurements():
    results = ROOT / "bench" / "results" / "amd-zen5-2core-plan.json"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    page = (ROOT / "docs" / "plan.md").read_text()
    assert table(lines) in page
    rows = table(lines).splitlines()[2:]
    errors = [abs(float(row.split("|")[4].strip().rstrip("%"))) for row in rows]
    assert sum(error <= 5 for error in errors) >= 12


class TestAJobOfSeveralAdapters:
    def test_it_is_one_batch_of_all_and_each_has_its_states(self, folders):
        def cfg(r: int, optim: str = "AdamW") -> TrainConfig:
            return TrainConfig(
                model=folders["SmolLM2-135M"], r=r, optim=optim, max_length=512,
                per_device_train_batch_size=2,
            )  # fmt: skip

        def predict(*cfgs: TrainConfig):
            request = Request(cfgs[0], others=cfgs[1:])
            return Planner(request, H100).predict("none")

        one, other = predict(cfg(16)), predict(cfg(4, "Lion"))
        both = predict(cfg(16), cfg(4, "Lion"))
        assert (both.batch, both.length) == (4, 512)
        assert both.trainable == one.trainable + other.trainable
        assert both.gradients == one.gradients + other.gradients
        assert both.optimizer == 8 * one.trainable + 4 * other.trainable
        assert both.weights == one.weights + 4 * other.trainable
        # What is kept is that of so many samples, whatever adapter they go through.
        samples = predict(cfg(16).replace(per_device_train_batch_size=4))
        alike = predict(cfg(16), cfg(16))
        assert alike.activations == pytest.approx(samples.activations, rel=0.02)

    def test_the_command_takes_their_files(self, folders, tmp_path):
        files = []
        for i, r in enumerate((4, 8)):
            files.append(tmp_path / f"{i}.yaml")
            files[-1].write_text(
                f"model: {folders['SmolLM2-135M']}\nr: {r}\noutput_dir: out{i}\nmax_length: 64\n"
                "per_device_train_batch_size: 1\n"
            )
        names = [str(file) for file in files]
        result = CliRunner().invoke(app, ["plan", *names, "--device", "H100"])
        assert result.exit_code == 0, result.output
        assert "lora r=4, 8" in result.output
        assert "2 x 64 tokens" in result.output
        found = CliRunner().invoke(app, ["plan", *names, "--device", "H100", "--json"])
        assert json.loads(found.output)["adapters"] == 2
        for more, said in ((["--method", "full"], "several adapters"), (["gpt2"], "YAML files")):
            refused = CliRunner().invoke(app, ["plan", *names, *more])
            assert refused.exit_code != 0
            assert said in refused.output
