"""Ctrl-C, a killed run and what goes on from its checkpoints; whose an output folder is."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastft.errors import ConfigError, DataError, FastftError
from fastft.train import checkpoints
from fastft.train.callbacks import Interrupted
from fastft.train.config import TrainConfig
from fastft.train.output import output_folder
from fastft.train.run import prepare, train

both = pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])


def weights(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class TestInterrupt:
    @both
    def test_ctrl_c_then_resume_equals_the_uninterrupted_run(self, settings, tmp_path, fused):
        # With dropout, the random state has to come back too.
        settings |= {"fused": fused, "lora_dropout": 0.1}
        straight = str(tmp_path / "straight")
        train(TrainConfig(**settings | {"output_dir": straight}))

        with pytest.raises(Interrupted) as caught:
            train(TrainConfig(**settings), callbacks=[At(3, ctrl_c)])
        assert caught.value.step == 3
        last = Path(settings["output_dir"]) / "checkpoint-3"
        assert caught.value.checkpoint == str(last)
        assert checkpoints.is_whole(last)
        assert not (Path(settings["output_dir"]) / "adapter").exists()

        events = []
        train(TrainConfig(**settings | {"resume_from_checkpoint": "last"}), report=events.append)
        assert [event.step for event in events] == [4, 5, 6]
        resumed, whole = weights(settings["output_dir"]), weights(straight)
        assert resumed.keys() == whole.keys()
        for key, tensor in whole.items():
            assert torch.equal(resumed[key], tensor), key

    def test_handlers_come_back(self, settings):
        before = signal.getsignal(signal.SIGINT)
        train(TrainConfig(**settings | {"max_steps": 1}))
        assert signal.getsignal(signal.SIGINT) is before

    def test_second_ctrl_c_stops_at_once_and_the_last_checkpoint_is_whole(self, settings):
        def twice():
            ctrl_c()
            ctrl_c()

        with pytest.raises(KeyboardInterrupt) as caught:
            train(TrainConfig(**settings), callbacks=[At(4, twice)])
        assert not isinstance(caught.value, Interrupted)
        found = checkpoints.checkpoints(settings["output_dir"])
        assert [path.name for path in found] == ["checkpoint-2"]
        assert checkpoints.is_whole(found[0])

    def test_a_checkpoint_that_was_cut_off_is_passed_over(self, settings):
        with pytest.raises(Interrupted):
            train(TrainConfig(**settings), callbacks=[At(5, ctrl_c)])
        newest = Path(settings["output_dir"]) / "checkpoint-5"
        optimizer = newest / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:-10])
        cfg = TrainConfig(**settings | {"resume_from_checkpoint": "last"})
        assert prepare(cfg).resume.name == "checkpoint-4"
        with pytest.raises(ConfigError, match=r"not whole\. Whole ones are: .*checkpoint-4"):
            prepare(TrainConfig(**settings | {"resume_from_checkpoint": str(newest)}))

    def test_resume_with_nothing_to_resume(self, settings):
        with pytest.raises(ConfigError, match="a whole checkpoint under"):
            train(TrainConfig(**settings | {"resume_from_checkpoint": "last"}))
        with pytest.raises(ConfigError, match="no folder"):
            train(TrainConfig(**settings | {"resume_from_checkpoint": "/none"}))

    def test_resume_as_another_run(self, settings):
        train(TrainConfig(**settings | {"max_steps": 2}))
        with pytest.raises(ConfigError, match="as in the run that is resumed") as caught:
            prepare(TrainConfig(**settings | {"resume_from_checkpoint": "last", "r": 8}))
        other = {"resume_from_checkpoint": "last", "optim": "AdamW8bit"}
        with pytest.raises(ConfigError, match="optim"):
            prepare(TrainConfig(**settings | other))
        assert caught.value.argument == "r"

    def test_resume_for_longer(self, settings):
        train(TrainConfig(**settings | {"max_steps": 2}))
        cfg = TrainConfig(**settings | {"resume_from_checkpoint": "last", "max_steps": 4})
        assert train(cfg).steps == 4

    def test_resume_with_fewer_steps_or_other_rows(self, settings, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text(Path(settings["data"]).read_text())
        settings["data"] = str(data)
        train(TrainConfig(**settings | {"max_steps": 4}))
        again = settings | {"resume_from_checkpoint": "last"}
        with pytest.raises(ConfigError, match="at least 4, the step of"):
            prepare(TrainConfig(**again | {"max_steps": 3}))
        data.write_text(data.read_text().replace("what is", "which is"))
        with pytest.raises(ConfigError, match="the examples of the run that is resumed"):
            prepare(TrainConfig(**again))

    @pytest.mark.parametrize(
        "name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"]
    )
    def test_a_corrupt_file_of_the_right_size_is_named(self, settings, name):
        train(TrainConfig(**settings | {"max_steps": 4}))
        file = Path(settings["output_dir"]) / "checkpoint-4" / name
        file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))
        with pytest.raises(ConfigError, match=rf"checkpoint-4/{name}: .*checkpoint-2\.") as caught:
            train(TrainConfig(**settings | {"resume_from_checkpoint": "last"}))
        assert caught.value.argument == "resume_from_checkpoint"

    @pytest.mark.parametrize("left", ["weights", "all but the mark"])
    def test_killed_inside_the_first_save(self, settings, monkeypatch, left):
        """What is left is no checkpoint to go on from, and none that stands in a new run's way; one
        that has all its files may be another program's, and is taken by its name."""

        def killed(*args):
            raise KeyboardInterrupt

        if left == "weights":
            monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
        else:
            monkeypatch.setattr(checkpoints, "mark", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings))
        monkeypatch.undo()
        (partial,) = checkpoints.checkpoints(settings["output_dir"])
        (partial / "old").write_text("of the first run")
        last = TrainConfig(**settings | {"resume_from_checkpoint": "last"})
        if left == "weights":
            with pytest.raises(ConfigError, match="Leave resume_from_checkpoint out"):
                train(last)
            assert train(TrainConfig(**settings | {"max_steps": 2})).steps == 2
            assert checkpoints.is_whole(partial)
            assert not (partial / "old").exists()
            return
        named = f"resume_from_checkpoint: {partial}"
        for cfg in (last, TrainConfig(**settings)):
            with pytest.raises(ConfigError, match=named):
                train(cfg)
        assert train(last.replace(resume_from_checkpoint=str(partial))).steps == 6

    def test_what_another_program_left_stays(self, settings):
        foreign = Path(settings["output_dir"]) / "checkpoint-9"
        foreign.mkdir(parents=True)
        train(TrainConfig(**settings | {"max_steps": 1, "save_steps": 0}))
        assert foreign.is_dir()

    def test_a_run_that_was_killed_behind_its_last_checkpoint(self, settings):
        """It has no step left to take: what was trained is saved."""
        train(TrainConfig(**settings))
        before, folder = weights(settings["output_dir"]), Path(settings["output_dir"])
        shutil.rmtree(folder / "adapter")
        result = train(TrainConfig(**settings | {"resume_from_checkpoint": "last"}))
        assert result.steps == 6
        assert not (folder / "checkpoint-7").exists()
        after = weights(folder)
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    def test_ctrl_c_in_the_last_step_changes_nothing(self, settings):
        result = train(TrainConfig(**settings), callbacks=[At(6, ctrl_c)])
        assert result.steps == 6
        assert result.adapter.is_dir()

    def test_a_fresh_run_over_old_checkpoints(self, settings):
        train(TrainConfig(**settings | {"max_steps": 2}))
        with pytest.raises(ConfigError, match="resume_from_checkpoint: last"):
            train(TrainConfig(**settings))

    def test_a_fresh_run_over_an_adapter(self, settings):
        adapter = Path(settings["output_dir"]) / "adapter"
        adapter.mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"run/adapter\. Choose another folder, or move it"):
            train(TrainConfig(**settings))

    def test_two_runs_in_one_folder(self, settings, monkeypatch):
        """The second is refused while the first goes on; one that was refused leaves no folder."""

        def second():
            with pytest.raises(ConfigError, match="in which one is running"):
                train(TrainConfig(**settings))

        train(TrainConfig(**settings | {"max_steps": 1}), callbacks=[At(1, second)])
        with output_folder(Path(settings["output_dir"])):
            monkeypatch.setenv("RANK", "1")  # another process of the same run
            monkeypatch.setenv("WORLD_SIZE", "2")
            with output_folder(Path(settings["output_dir"])):
                pass
        nested = Path(settings["output_dir"]) / "deep" / "er"
        with pytest.raises(DataError):
            train(TrainConfig(**settings | {"output_dir": str(nested), "data": "/none.jsonl"}))
        assert not nested.parent.exists()


class TestWhatGoes:
    def test_the_last_whole_checkpoint_goes_when_the_next_one_is(self, settings, monkeypatch):
        """The only one that is kept is there until the next is marked; another program's stays."""
        real = checkpoints.write_text

        def full(path, text):
            if path.name == checkpoints.MARK and path.parent.name == "checkpoint-4":
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, text)

        monkeypatch.setattr(checkpoints, "write_text", full)
        output = Path(settings["output_dir"])
        with pytest.raises(FastftError, match="checkpoint-2 is whole: make room"):
            train(TrainConfig(**settings | {"save_total_limit": 1}))
        assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-2"]
        monkeypatch.undo()
        again = {"save_total_limit": 1, "resume_from_checkpoint": "last"}
        assert train(TrainConfig(**settings | again)).steps == 6
        assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-6"]
        foreign = output / "checkpoint-9"
        foreign.mkdir()
        checkpoints.remove_partial(output, 6)
        assert [path.name for path in checkpoints.checkpoints(output)] == [
            "checkpoint-6",
            "checkpoint-9",
        ]

    def test_what_was_just_saved_is_never_the_one_that_goes(self, tmp_path):
        """A run that goes on from an earlier step; the newest folders are no steps of it."""

        def saved(step, whole=True):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "weights").write_text(str(step))
            if whole:
                checkpoints.mark(folder)

        def on_save(step, limit):
            state = TrainerState(global_step=step)
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "weights").write_text("new")
            arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
            checkpoints.MarkComplete(limit).on_save(arguments, state, TrainerControl())
            return {path.name for path in checkpoints.checkpoints(tmp_path)}

        saved(10)
        saved(20, whole=False)
        assert on_save(15, 1) == {"checkpoint-15", "checkpoint-20"}
        assert checkpoints.resolve_resume("last", tmp_path).name == "checkpoint-15"
        saved(30)
        assert on_save(16, 2) == {"checkpoint-16", "checkpoint-20", "checkpoint-30"}
        assert on_save(17, 2) == {"checkpoint-16", "checkpoint-17", "checkpoint-20"}
