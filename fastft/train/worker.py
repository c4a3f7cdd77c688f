"""One side of the demo, in a process of its own: ``python -m fastft.train.worker``.

Reads a JSON object from stdin, ``{"config": {...}, "sample": bool, "stop_steps": int or null,
"stop_seconds": float or null}``, and writes one JSON object a line to stdout; what libraries print
goes to stderr. A process each keeps the sides apart:
patches, allocator state and peak memory of one do not reach the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from fastft.errors import FastftError

__all__ = ["main"]

Emit = Callable[..., None]

# Tokens generated for the sample: enough for a docstring of two or three lines.
SAMPLE_TOKENS = 48
# A time limit leaves at least the demo's warm-up steps and as many timed ones.
LEAST_STEPS = 6


def main() -> int:
    """Runs what stdin asks for. Exit code 0, 2 for a clear error (sent as an event), 130 for
    Ctrl-C."""
    # The pipe to the parent keeps a descriptor of its own; prints of libraries join stderr.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: str, **fields: Any) -> None:
        pipe.write(json.dumps({"event": event, **fields}) + "\n")
        pipe.flush()

    try:
        task = json.load(sys.stdin)
        _work(task, emit)
    except FastftError as error:
        emit("error", text=str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _work(task: dict[str, Any], emit: Emit) -> None:
    from fastft.train.callbacks import StopAfter
    from fastft.train.config import config_from_dict
    from fastft.train.machine import PeakMemory, device_name, touch
    from fastft.train.run import explanation, prepare, run_trainer, save_adapter

    cfg, sample = config_from_dict(task["config"]), bool(task["sample"])
    stop = StopAfter(task["stop_steps"], task["stop_seconds"], least=LEAST_STEPS)
    emit("state", text="loading")
    memory: PeakMemory | None = None

    def report(event: Any) -> None:
        extra = memory.extra() if memory is not None else 0
        emit("step", **dataclasses.asdict(event), extra_bytes=extra)

    prepared = prepare(cfg, callbacks=[stop], report=report)
    model, trainer = prepared.model, prepared.trainer
    trainable, total = model.get_nb_trainable_parameters()
    emit(
        "loaded",
        device=device_name(),
        device_type=trainer.args.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        trainable=trainable,
        parameters=total,
        train_examples=len(prepared.data.train),
        eval_examples=len(prepared.data.eval or ()),
        notes=prepared.data.notes,
    )
    touch(model)
    memory = PeakMemory(trainer.args.device)
    memory.start()
    started = time.perf_counter()
    run_trainer(prepared)
    emit(
        "trained",
        seconds=time.perf_counter() - started,
        extra_bytes=memory.extra(),
        memory_method=memory.method,
        explanation=explanation(prepared),
    )
    emit("state", text="saving the adapter, reading it back")
    from pathlib import Path

    from fastft.train.run import adapter_difference

    adapter = save_adapter(model, Path(cfg.output_dir) / "adapter")
    emit("saved", adapter=str(adapter), reload_max_diff=adapter_difference(prepared, adapter))
    emit("state", text="evaluating")
    emit("evaluated", **_evaluate(prepared, sample))
    if sample and prepared.data.eval_examples:
        emit("state", text="writing a sample")
        emit("sampled", **_sample(prepared))


def _evaluate(prepared: Any, before: bool) -> dict[str, float | None]:
    """Loss on the held-out split after training and, if asked, before: the base model is the model
    with its adapters switched off."""
    from fastft.train.run import evaluate

    losses: dict[str, float | None] = {"after": evaluate(prepared)}
    if before:
        with prepared.model.disable_adapter():
            losses["before"] = evaluate(prepared)
    return losses


def _sample(prepared: Any) -> dict[str, str]:
    """The answer to one held-out example, greedily, with and without the adapters."""
    some = sorted(prepared.data.eval_examples[:9], key=lambda e: len(_question(e)[0]))
    # Of middling length: the shortest functions are trivial.
    example = some[len(some) // 2]
    prompt, reference = _question(example)
    return {
        "prompt": prompt,
        "reference": reference,
        "after": _generate(prepared, example),
        "before": _generate(prepared, example, adapters=False),
    }


def _question(example: Any) -> tuple[str, str]:
    """What is asked and what was answered, as text."""
    if example.text is not None:
        half = len(example.text) // 2
        return example.text[:half], example.text[half:]
    messages = example.as_messages()
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    asked = messages[turn - 1]["content"] if turn else ""
    return asked, messages[turn]["content"]


def _generate(prepared: Any, example: Any, adapters: bool = True) -> str:
    import torch

    from fastft.train.data import prompt_ids

    model, tokenizer = prepared.model, prepared.tokenizer
    ids = prompt_ids(example, tokenizer)[-prepared.cfg.max_length :]
    input_ids = torch.tensor([ids], device=prepared.trainer.args.device)
    model.eval()
    with torch.no_grad(), contextlib.nullcontext() if adapters else model.disable_adapter():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    sys.exit(main())
