"""pytest plugin for PEFT's tests: offline, selected by id, with fused layers, every call counted.

Environment: FASTFT_SUITE_SELECT (regular expression over test ids), FASTFT_SUITE_PATCH (1: fused
layers), FASTFT_SUITE_OUT (folder: a file of counts from each process, and outcomes.json).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

OUT = Path(os.environ["FASTFT_SUITE_OUT"])
_outcomes: dict[str, str] = {}
# A test that failed in one phase stays failed, whatever the phases after it say.
_RANK = {"passed": 0, "skipped": 1, "failed": 2}


class _Seen(dict):  # type: ignore[type-arg]
    """Every model counts as fetched before, so that PEFT's helpers leave offline mode on."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 1


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FASTFT_SUITE_PATCH") == "1":
        import fastft

        fastft.patch_peft()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    select = re.compile(os.environ.get("FASTFT_SUITE_SELECT", ""))
    dropped = [item for item in items if not select.search(item.nodeid)]
    if dropped:
        items[:] = [item for item in items if select.search(item.nodeid)]
        config.hook.pytest_deselected(items=dropped)


def pytest_collection_finish(session: pytest.Session) -> None:
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Seen()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    known = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(known, report.outcome, key=_RANK.__getitem__)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        # The controller hears of every test, wherever it ran.
        _write("outcomes.json", _outcomes)
    if os.environ.get("FASTFT_SUITE_PATCH") == "1":
        from fastft.nn import call_counts

        counts = call_counts()
        _write(
            f"counts-{os.getpid()}.json",
            {"fused": counts.fused, "fallback": dict(counts.fallback)},
        )


def _write(name: str, content: Any) -> None:
    temporary = OUT / f".{name}"
    temporary.write_text(json.dumps(content))
    os.replace(temporary, OUT / name)
