"""The code of docs/optimizers.md runs as it stands, but for the trainers' (see test_trainer)."""

from __future__ import annotations

import re
from pathlib import Path

from fastft import optim
from tests.integration import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    model = tiny.peft_model("llama")
    names = {"model": model, "optim": optim, "ids": tiny.inputs("llama")["input_ids"]}
    for block in blocks:
        if "Trainer(" not in block:
            exec(compile(block, "docs/optimizers.md", "exec"), names)
    assert names["release"].optimizer.skipped_steps == 0


def test_the_page_lists_every_optimizer() -> None:
    table = PAGE.split("\n## ")[0]
    kinds = [n for n in optim.__all__ if isinstance(getattr(optim, n), type)]
    for name in set(kinds) - {"FusedOptimizer", "StepInBackward"}:
        assert f"`{name}`" in table, name
