"""Several processes of one run: two gloo processes on the CPU, each with the whole model. What the
first spawned pair found is written down by each rank and judged here."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from fastft.errors import ConfigError, FastftError
from fastft.memory import _auto
from fastft.train import checkpoints, processes
from fastft.train import run as run_module
from fastft.train.callbacks import Interrupted
from fastft.train.checkpoints import is_whole
from fastft.train.config import TrainConfig
from fastft.train.machine import working_device
from fastft.train.run import prepare, run_trainer, train
from fastft.train.together import train_together

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"
)

STEPS = 4
# A step of AdamW with such an epsilon is nearly linear in the gradient: rounding stays rounding.
LINEAR = {"adam_epsilon": 1.0, "learning_rate": 1.0, "max_grad_norm": 0.0}
# Per rank: the calls (forward and backward of a micro-batch or a part) that run out of memory.
FAILURES: dict[str, dict[int, tuple[int, ...]]] = {
    "none": {},
    "rank 1, first": {1: (0,)},
    "rank 1, later": {1: (3,)},  # within the second update, which has two micro-batches
    "both": {0: (2,), 1: (2,)},
    "rank 0, twice": {0: (1, 2)},  # down to sequences one at a time
}
# Rounding of a gradient: sums over at most 8 x 64 tokens in another order, each to 2^-24; through
# four steps, each of which begins where the one before ended.
ROUNDING = STEPS * 8 * 64 * 2.0**-24


class _Signal(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def _adapted(cfg: TrainConfig, rank: int, failing: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """A run, in which these calls fail when their backward is done; what this rank saw of it."""
    usual, calls = Trainer.training_step, []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        loss = usual(self, model, inputs, *args, **kw)
        if len(calls) - 1 in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss

    events: list[Any] = []
    notices: list[str] = []
    Trainer.training_step = training_step
    try:
        prepared = prepare(cfg, report=events.append, notice=notices.append, **more)
        run_trainer(prepared)
    finally:
        Trainer.training_step = usual
    return {
        "weights": {n: p.detach() for n, p in prepared.model.named_parameters() if p.requires_grad},
        "losses": [event.loss for event in events],
        "tokens": sum(event.tokens for event in events),
        "notices": notices,
        "calls": calls,
        "eval": prepared.trainer.evaluate()["eval_loss"],
        "fallbacks": _fallbacks(prepared.model),
    }


def _slow(rank: int) -> dict[str, list[float]]:
    """From here on each is late with what the other is to wait for, and only the first writes. When
    free memory was looked at, and when some of it was taken."""
    times: dict[str, list[float]] = {"looked": [], "took": []}

    def late(seconds: float, function: Any) -> Any:
        def wrapped(*args: Any, **kw: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kw)

        return wrapped

    def timed(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kw: Any) -> Any:
            times[name].append(time.monotonic())
            return function(*args, **kw)

        return wrapped

    run_module.check_fit = late(0.2 * rank, timed("looked", run_module.check_fit))
    run_module.load_model = timed("took", run_module.load_model)
    if rank == 1:
        Trainer._save_rng_state = late(1.0, Trainer._save_rng_state)
        run_module.save_adapter = run_module.write_config = None  # not to be called
    else:
        checkpoints.mark = late(0.3, checkpoints.mark)
        run_module.save_adapter = late(0.5, run_module.save_adapter)
    return times


def _fallbacks(model: Any) -> dict[str, int]:
    import fastft

    found: dict[str, int] = fastft.explain(model).to_dict()["calls"]["fallback"]
    return found


def _averaged(rank: int) -> list[Any]:
    """Gradients of parameters that both ranks have, one has, none has; of other types, layouts; of
    more bytes than are exchanged at once."""
    module = torch.nn.ParameterList([torch.zeros(3, 2) for _ in range(5)])
    module.append(torch.nn.Parameter(torch.zeros(5).bfloat16()))
    module.append(torch.nn.Parameter(torch.zeros((processes._BUCKET >> 2) + 1)))
    module[0].grad = torch.full((3, 2), 1.0 + rank)
    if rank == 0:
        module[1].grad = torch.full((3, 2), 8.0)
    module[3].grad = torch.arange(6.0).view(2, 3).t() * (1 + 2 * rank)
    module[4].requires_grad_(False)
    module[5].grad = torch.full((5,), 2.0 + 4 * rank).bfloat16()
    module[6].grad = torch.full_like(module[6], 1.0 - 2 * rank)
    processes.average_gradients(module)
    return [None if p.grad is None else p.grad for p in module]


def _start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),  # what hangs fails
    )  # fmt: skip


def _worker(rank: int, folder: str, settings: dict[str, Any]) -> None:
    _start(rank, folder)
    settings |= {"max_steps": STEPS, "save_steps": 0}

    def config(name: str, **more: Any) -> TrainConfig:
        return TrainConfig(**settings | {"output_dir": f"{folder}/{name}"} | more)

    found: dict[str, Any] = {"averaged": _averaged(rank)}
    for name, failing in FAILURES.items():
        cfg = config(name, gradient_accumulation_steps=2, **LINEAR)
        found[name] = _adapted(cfg, rank, failing.get(rank, ()))
    found["dropout"] = _adapted(config("dropout", lora_dropout=0.2), rank, (1,) if rank else ())
    found["times"] = _slow(rank)
    for name in ("straight", "stopped"):
        # Without an evaluation, in which one would wait for the other.
        options = {"lora_dropout": 0.2, "max_steps": 6, "eval_fraction": 0}
        try:
            callbacks = [_Signal()] if name == "stopped" and rank == 1 else []
            train(config(name, **options), callbacks=callbacks)
        except Interrupted as error:
            found["checkpoint"], found["step"] = error.checkpoint, error.step
            train(config(name, **options, resume_from_checkpoint="last"))
    flat = config("flat", padding="none", memory_policy="lora", group_by_length=True, eval_steps=2)
    found["flat"] = train(flat)
    torch.save(found, f"{folder}/{rank}.pt")
    # A process that cannot go on, at the end: the other's exchange fails when it is gone.
    failing = tuple(range(100)) if rank == 1 else ()
    try:
        _adapted(config("one"), rank, failing)
    except FastftError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error))
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(model_folder, data_file, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    settings = {
        "model": str(model_folder), "data": str(data_file), "r": 4, "max_length": 64,
        "per_device_train_batch_size": 4, "logging_steps": 1, "dtype": "float32",
        "learning_rate": 1e-2, "max_train_samples": 32,
    }  # fmt: skip
    mp.spawn(_worker, args=(str(folder), settings), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of the B matrices, which start at zero, over what they have become."""
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max())
        for name, tensor in expected.items()
        if "lora_B" in name
    )


def test_gradients_are_means_over_the_processes(ranks: Any) -> None:
    for found in (each["averaged"] for each in ranks[1]):
        assert torch.equal(found[0], torch.full((3, 2), 1.5))
        assert torch.equal(found[1], torch.full((3, 2), 4.0))  # half of what one had
        assert found[2] is None
        assert torch.equal(found[3], torch.arange(6.0).view(2, 3).t() * 2)
        assert found[4] is None
        assert torch.equal(found[5], torch.full((5,), 4.0).bfloat16())
        assert torch.equal(found[6], torch.zeros_like(found[6]))


def test_two_processes_are_one_with_the_double_batch(ranks: Any, settings: dict[str, Any]) -> None:
    settings |= {"per_device_train_batch_size": 8, "max_train_samples": 32, "max_steps": STEPS}
    cfg = TrainConfig(**settings | LINEAR, gradient_accumulation_steps=2)
    one = _adapted(cfg, 0, ())
    first, second = (found["none"] for found in ranks[1])
    assert _apart(first["weights"], one["weights"]) <= ROUNDING
    assert first["losses"] == pytest.approx(one["losses"], rel=ROUNDING)
    assert second["losses"] == []  # reported once
    assert first["eval"] == pytest.approx(one["eval"], rel=1e-2)  # means of other batches' means
    assert first["eval"] == second["eval"]
    # Sum over both, each padded to its own longest example.
    assert one["tokens"] // 2 < first["tokens"] <= one["tokens"]
    assert first["fallbacks"] == one["fallbacks"] == {}


@pytest.mark.parametrize("name", [name for name in FAILURES if name != "none"])
def test_out_of_memory_in_one_process_or_both(ranks: Any, name: str) -> None:
    """The step is that of a run without the error, and the same bits in both."""
    first, second = (found[name] for found in ranks[1])
    for key, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][key]), key
    assert 0 < _apart(first["weights"], ranks[1][0]["none"]["weights"]) <= ROUNDING
    assert first["losses"] == pytest.approx(ranks[1][0]["none"]["losses"], rel=ROUNDING)
    for rank, seen in enumerate((first, second)):
        failed = FAILURES[name].get(rank, ())
        said = [text for text in seen["notices"] if "out of memory" in text]
        assert len(said) == len(failed)
        assert all(text.startswith(f"process {rank}: out of memory: micro-") for text in said)
        smallest = 4 >> len(failed)
        assert set(seen["calls"][(failed or (-1,))[-1] + 1 :]) == {smallest}


def test_dropout_s_masks_do_not_part_the_processes(ranks: Any) -> None:
    first, second = (found["dropout"] for found in ranks[1])
    assert second["calls"][:3] == [4, 4, 2]
    for key, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][key]), key


def test_a_signal_to_one_stops_all_and_they_go_on(ranks: Any) -> None:
    """With the same bits as processes that were never stopped; also where the signal reached the
    one that writes nothing."""
    folder, found = ranks
    for each in found:
        assert each["step"] == 3
        assert each["checkpoint"] == str(folder / "stopped" / "checkpoint-3")
    last = folder / "stopped" / "checkpoint-3"
    assert is_whole(last)
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert states < json.loads((last / "complete.json").read_text()).keys()
    stopped, straight = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("stopped", "straight")
    )
    assert all(torch.equal(stopped[key], straight[key]) for key in straight)


def test_all_look_at_the_free_memory_before_one_takes_of_it(ranks: Any) -> None:
    """On a CPU they share it: a model that is loaded already would be counted against another."""
    first, second = (found["times"] for found in ranks[1])
    assert len(first["took"]) == 4
    for one, other in ((first, second), (second, first)):
        assert all(took > look for took, look in zip(one["took"], other["looked"], strict=True))


def test_a_process_that_cannot_go_on_ends_the_others(ranks: Any) -> None:
    assert "a device on which one sequence fits" in (ranks[0] / "1.txt").read_text()
    assert "all 2 of the run, got a failed exchange" in (ranks[0] / "0.txt").read_text()


def test_without_padding_and_with_a_memory_policy(ranks: Any) -> None:
    first, second = (found["flat"] for found in ranks[1])
    assert first.adapter == second.adapter == ranks[0] / "flat" / "adapter"
    assert first.adapter_reload_max_diff == second.adapter_reload_max_diff == 0
    assert first.eval_loss == second.eval_loss < 5.5  # of 260 tokens at random: 5.56


class TestRefusals:
    def test_several_adapters(self, settings: dict[str, Any], monkeypatch: Any) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=r"one: only jobs of one adapter run in several, got"):
            train_together([TrainConfig(**settings)] * 2)

    @pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED"])
    def test_a_model_in_shards(self, settings: Any, monkeypatch: Any, what: str) -> None:
        monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
        with pytest.raises(ConfigError, match=r"hold the whole model each, got .*torchrun"):
            train(TrainConfig(**settings))
        assert not Path(settings["output_dir"]).exists()

    def test_processes_that_do_not_know_of_each_other(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=r"2, as WORLD_SIZE says, got 1"):
            processes.check_count(1)

    def test_a_checkpoint_of_another_number(self, ranks: Any) -> None:
        cfg = TrainConfig(**yaml.safe_load((ranks[0] / "stopped/train_config.yaml").read_text()))
        with pytest.raises(ConfigError, match=r"as many processes as wrote .*: 2, got 1"):
            prepare(cfg)


def test_each_has_a_device_of_its_own_or_its_share(monkeypatch: Any) -> None:
    monkeypatch.setattr(_auto, "_available", lambda: 12)
    monkeypatch.setattr(_auto, "_container_room", lambda: [10])
    assert _auto.free_memory(torch.device("cpu")) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _auto.free_memory(torch.device("cpu")) == 5
    for name, value in {"is_available": True, "current_device": 0, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert working_device() == torch.device("cuda", 0)
    for rank in range(3):  # where a launcher shows each process one GPU, the index is not its rank
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert working_device() == torch.device("cuda", rank % 2)


def test_the_command_line_says_everything_once(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings | {"max_steps": 2}))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "fastft", "train", str(file)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("step 2/2", "modules fused", "held-out loss", "adapter: "):
        assert done.stdout.count(text) == 1, done.stdout
    assert is_whole(Path(settings["output_dir"]) / "checkpoint-2")
