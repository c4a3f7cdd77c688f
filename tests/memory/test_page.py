"""The code of docs/memory.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastft.memory import POLICIES
from tests.memory.models import llama, steps

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"model": llama()}
    if not hasattr(names["model"], "activation_checkpointing_enable"):
        pytest.skip("this Transformers has another name for it")
    for block in blocks:
        exec(compile(block, "docs/memory.md", "exec"), names)
        steps(names["model"], 1)


def test_the_page_lists_every_policy() -> None:
    for policy in (*POLICIES, "auto"):
        assert f"| `{policy}` |" in PAGE
