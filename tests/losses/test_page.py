"""The code of docs/losses.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fastft
from tests.integration import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    given = tiny.inputs("llama")
    model = fastft.accelerate(tiny.peft_model("llama"))
    names = {
        "torch": torch,
        "model": model,
        "teacher_model": fastft.accelerate(tiny.peft_model("gemma3")),
        "ids": given["input_ids"],
        "labels": given["labels"],
        "mask": torch.ones_like(given["input_ids"]),
    }
    for block in blocks:
        model.zero_grad()
        exec(compile(block, "docs/losses.md", "exec"), names)
        assert all(
            bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.requires_grad
        )
