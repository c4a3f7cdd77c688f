"""TrainConfig: what is refused, with which words, and what is taken."""

import dataclasses
import re
from pathlib import Path

import pytest

from fastft.errors import ConfigError
from fastft.train.config import TrainConfig, config_from_dict, load_config


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_survives_yaml(tmp_path):
    import yaml

    cfg = TrainConfig(target_modules=["q_proj", "v_proj"], max_steps=7, lora_dropout=0.05)
    assert load_config(write(tmp_path, yaml.safe_dump(cfg.to_dict()))) == cfg


def test_defaults_need_no_key(tmp_path):
    assert load_config(write(tmp_path, "r: 8")) == TrainConfig(r=8)


@pytest.mark.parametrize("text", ["2e-4", "0.0002", "2.0e-04"])
def test_learning_rate_in_any_notation(tmp_path, text):
    # YAML 1.1 reads 2e-4 as a text.
    assert load_config(write(tmp_path, f"learning_rate: {text}")).learning_rate == 2e-4


@pytest.mark.parametrize(
    ("key", "near"),
    [("lora_r", "lora_alpha"), ("learning_rat", "learning_rate"), ("max_step", "max_steps")],
)
def test_unknown_key_names_the_nearest(tmp_path, key, near):
    with pytest.raises(ConfigError, match="did you mean") as caught:
        load_config(write(tmp_path, f"{key}: 1"))
    assert near in str(caught.value)
    assert key in str(caught.value)


def test_unknown_key_that_is_near_nothing_lists_all(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "zzzzqqqq: 1"))
    for field in dataclasses.fields(TrainConfig):
        assert field.name in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("r", 0, "above 0"),
        ("r", -4, "above 0"),
        ("r", 4.5, "a whole number"),
        ("r", True, "a whole number"),
        ("r", "16", "a whole number"),
        ("lora_alpha", 0, "above 0"),
        ("lora_dropout", 1.0, r"\[0, 1\)"),
        ("lora_dropout", -0.1, r"\[0, 1\)"),
        ("learning_rate", "fast", "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", 0, "above 0"),
        ("max_steps", 0, "-1 to go by num_train_epochs"),
        ("max_length", 0, "above 0"),
        ("num_train_epochs", 0, "above 0"),
        ("per_device_train_batch_size", 0, "above 0"),
        ("eval_fraction", 1, r"\[0, 1\)"),
        ("dtype", "bf16", "one of auto, bfloat16"),
        ("overlong", "cut", "one of truncate, drop"),
        ("lr_scheduler_type", "cosin", "did you mean 'cosine'"),
        ("target_modules", [], "at least one module name"),
        ("target_modules", [1], "a list of texts"),
        ("target_modules", None, "a text or a list of texts"),
        ("fused", "sometimes", "true or false"),
        ("fused", 1, "true or false"),
        ("seed", -1, "2\\*\\*32"),
        ("model", "  ", "a non-empty text"),
        ("max_train_samples", 0, "or null"),
        ("warmup_steps", -1, "0 or more"),
        ("rank_pattern", [8], "a mapping of texts, each to a whole number"),
        ("rank_pattern", {"q_proj": 1.5}, "each to a whole number"),
        ("rank_pattern", {"q_proj": 0}, "above 0"),
        ("alpha_pattern", {"q_proj": "x"}, "each to a finite number"),
        ("alpha_pattern", {1: 2}, "a mapping of texts"),
        ("loraplus_lr_ratio", 0.5, "1 or more"),
    ],
)
def test_bad_value(key, value, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        config_from_dict({key: value})
    assert caught.value.argument == key


def test_a_key_given_twice(tmp_path):
    with pytest.raises(ConfigError, match="it again on line 3"):
        load_config(write(tmp_path, "r: 8\nmodel: x\nr: 16\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a mapping"),
        ("- r\n", "a mapping"),
        ("r: [1\n", "valid YAML"),
        ("\tr: 1\n", "valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="a readable YAML file"):
        load_config(tmp_path / "none.yaml")


def test_yaml_runs_no_code(tmp_path):
    with pytest.raises(ConfigError, match="valid YAML"):
        load_config(write(tmp_path, "model: !!python/object/apply:os.getcwd []"))


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    # Transformers reads output_dir so: checkpoints would lie there and the adapter elsewhere.
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("model", "data", "eval_data", "output_dir", "resume_from_checkpoint")
    cfg = TrainConfig(**dict.fromkeys(keys, "~/x"))
    assert {getattr(cfg, key) for key in keys} == {str(tmp_path / "x")}
    assert TrainConfig(model="a/b~c").model == "a/b~c"


def test_is_frozen_and_replace_checks():
    cfg = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.r = 4
    assert cfg.replace(r=4).r == 4
    with pytest.raises(ConfigError):
        cfg.replace(r=0)


def test_the_page_on_training_lists_every_key_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    keys = page[page.index("### Keys") : page.index("### Data")]
    rows = [line.split("|")[1] for line in keys.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(TrainConfig))
