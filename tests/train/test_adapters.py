"""Adapter folders: what a broken, foreign or newer one says, and that a failed save leaves the
previous adapter."""

import errno
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fastft.errors import AdapterError
from fastft.train import adapters
from fastft.train.adapters import load_adapter, reload_max_diff, save_adapter
from tests.train.tiny import make_model

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_peft(seed=0, **kwargs):
    base = make_model()  # the same one each time
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(base, config)
    # B starts at zero, where a lost adapter would not be noticed.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


@pytest.fixture
def model():
    return make_peft()


@pytest.fixture
def folder(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestRoundTrip:
    def test_loads_into_a_fresh_model(self, model, folder):
        assert torch.equal(logits(load_adapter(make_model(), folder)), logits(model))

    def test_is_what_peft_itself_reads(self, model, folder):
        loaded = PeftModel.from_pretrained(make_model(), folder)
        assert torch.equal(logits(loaded), logits(model))

    def test_overwrites_and_leaves_nothing_behind(self, folder):
        other = make_peft(seed=1)
        save_adapter(other, folder)
        assert torch.equal(logits(load_adapter(make_model(), folder)), logits(other))
        assert not torch.equal(logits(other), logits(make_peft()))
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]

    def test_keeps_what_a_user_put_there(self, folder):
        (folder / "notes.txt").write_text("mine")
        (folder / "more").mkdir()
        (folder / "more" / "a").write_text("mine too")
        save_adapter(make_peft(seed=1), folder)
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "more" / "a").read_text() == "mine too"

    @pytest.mark.parametrize("at", [1, 2])
    def test_interrupted_between_the_renames(self, folder, monkeypatch, at):
        before, real, calls = contents(folder), os.replace, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(make_peft(seed=1), folder)
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]

    def test_an_adapter_of_another_name(self, model, tmp_path):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        path = save_adapter(model, tmp_path / "b", adapter_name="second")
        assert load_adapter(make_model(), path).peft_config["default"].r == 2

    def test_reload_difference_is_zero(self, model, folder):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        inputs = {"input_ids": torch.arange(3, 20)[None]}
        assert reload_max_diff(model, folder, inputs) == 0.0
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    def test_reload_difference_sees_other_weights(self, model, tmp_path):
        other = save_adapter(make_peft(seed=1), tmp_path / "other")
        inputs = {"input_ids": torch.arange(3, 20)[None]}
        expected = (logits(make_peft(seed=1)) - logits(model)).abs().max().item()
        assert reload_max_diff(model, other, inputs) == pytest.approx(expected)
        assert expected > 0.01

    def test_reload_difference_sees_a_missing_tensor(self, model, folder):
        weights = load_file(folder / "adapter_model.safetensors")
        weights.pop(next(key for key in weights if "lora_B" in key))
        save_file(weights, folder / "adapter_model.safetensors")
        diff = reload_max_diff(model, folder, {"input_ids": torch.arange(3, 20)[None]})
        assert diff != diff  # NaN
        assert torch.isfinite(logits(model)).all()


class TestBrokenFolders:
    def refused(self, folder, *parts):
        with pytest.raises(AdapterError) as caught:
            load_adapter(make_model(), folder)
        for part in parts:
            assert part in str(caught.value), str(caught.value)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "none", "no such folder")

    def test_empty(self, tmp_path):
        self.refused(tmp_path, "adapter_config.json", "nothing")

    def test_no_weights(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        self.refused(folder, "adapter_model.safetensors", "no such file")

    def test_a_pickle_is_not_loaded(self, folder):
        os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
        self.refused(folder, "pickle")

    @pytest.mark.parametrize("keep", [0, 4, 200, -1])
    def test_truncated(self, folder, keep):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, "truncated or corrupt", "Copy the adapter again")

    def test_corrupt_header(self, folder):
        path = folder / "adapter_model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[8:40] = b"\xff" * 32
        path.write_bytes(raw)
        self.refused(folder, "truncated or corrupt")

    def test_broken_config(self, folder):
        path = folder / "adapter_config.json"
        path.write_text(path.read_text()[:50])
        self.refused(folder, "valid JSON")

    def test_config_that_is_no_object(self, folder):
        (folder / "adapter_config.json").write_text("[]")
        self.refused(folder, "a list at the top")

    def test_partial(self, folder):
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        lost = sorted(weights)[0]
        save_file({k: v for k, v in weights.items() if k != lost}, path)
        self.refused(folder, f"all {len(weights)} tensors", lost)

    def test_empty_weights(self, folder):
        save_file({}, folder / "adapter_model.safetensors")
        self.refused(folder, "at least one tensor")

    def test_another_architecture(self, tmp_path):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260))
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        folder = save_adapter(get_peft_model(gpt2, config), tmp_path / "gpt2")
        self.refused(folder, "an adapter of this model", "transformer.h.0.attn.c_attn")

    def test_another_size(self, folder):
        with pytest.raises(AdapterError, match="other shapes") as caught:
            load_adapter(make_model(hidden_size=64), folder)
        assert "32 against (64, 64)" in str(caught.value)

    def test_more_layers_than_the_model(self, folder):
        with pytest.raises(AdapterError, match=r"lacks: model\.layers\.1\."):
            load_adapter(make_model(layers=1), folder)

    def test_fewer_layers_than_the_model(self, folder):
        with pytest.raises(AdapterError, match="tensors its adapter_config"):
            load_adapter(make_model(layers=3), folder)


class TestNewerPeft:
    def test_a_setting_that_is_on(self, folder):
        edit_config(folder, peft_version="99.0.0", use_hyperlora=True)
        with pytest.raises(AdapterError) as caught:
            load_adapter(make_model(), folder)
        for part in ("use_hyperlora=True", "PEFT 99.0.0", "pip install --upgrade peft"):
            assert part in str(caught.value)

    def test_settings_that_are_off_change_nothing(self, model, folder):
        edit_config(folder, peft_version="99.0.0", use_hyperlora=False, hyper_config=None)
        assert torch.equal(logits(load_adapter(make_model(), folder)), logits(model))

    def test_a_kind_that_is_not_known(self, folder):
        edit_config(folder, peft_type="HYPERLORA", peft_version="99.0.0")
        with pytest.raises(AdapterError, match=r"one of .*LORA.*'HYPERLORA'.*upgrade peft"):
            load_adapter(make_model(), folder)


class TestFailedSaves:
    def check_survives(self, folder, before):
        with pytest.raises(AdapterError, match="untouched"):
            save_adapter(make_peft(seed=1), folder)
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]

    def test_full_disk_while_writing(self, folder, monkeypatch):
        before = contents(folder)
        real = PeftModel.save_pretrained

        def full(self, path, **kwargs):
            real(self, path, **kwargs)
            target = path / "adapter_model.safetensors"
            target.write_bytes(target.read_bytes()[:100])  # what got onto the disk
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(PeftModel, "save_pretrained", full)
        self.check_survives(folder, before)

    def test_full_disk_reported_by_safetensors(self, folder, monkeypatch):
        from safetensors import SafetensorError

        before = contents(folder)

        def full(self, path, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device")

        monkeypatch.setattr(PeftModel, "save_pretrained", full)
        self.check_survives(folder, before)

    def test_full_disk_noticed_at_fsync(self, folder, monkeypatch):
        before = contents(folder)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(adapters.os, "fsync", full)
        self.check_survives(folder, before)

    def test_second_rename_fails(self, folder, monkeypatch):
        before = contents(folder)
        real = os.replace
        calls = []

        def replace(source, target):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.EIO, "Input/output error")
            real(source, target)

        monkeypatch.setattr(adapters.os, "replace", replace)
        self.check_survives(folder, before)
        assert len(calls) == 3  # aside, refused, back

    def test_what_was_written_is_not_what_was_meant(self, folder, monkeypatch):
        before = contents(folder)
        real = PeftModel.save_pretrained

        def flipped(self, path, **kwargs):
            real(self, path, **kwargs)
            target = path / "adapter_model.safetensors"
            raw = bytearray(target.read_bytes())
            raw[-1] ^= 1
            target.write_bytes(raw)

        monkeypatch.setattr(PeftModel, "save_pretrained", flipped)
        with pytest.raises(AdapterError, match="the tensor that was saved"):
            save_adapter(make_peft(seed=1), folder)
        assert contents(folder) == before

    def test_a_file_in_the_way(self, model, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(AdapterError, match="a folder that can be written"):
            save_adapter(model, tmp_path / "file" / "adapter")
