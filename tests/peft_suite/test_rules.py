"""The rules by which a run of PEFT's tests is judged; the run itself is `make peft-suite`."""

from __future__ import annotations

import pytest

from tests.peft_suite import __main__ as suite
from tests.peft_suite import expected, hub
from tests.peft_suite.expected import File

FILE = File("test_toy.py", min_fused=10)


@pytest.fixture(autouse=True)
def stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "OFFLINE", {"::test_needs_hub$": "the hub"})
    monkeypatch.setattr(suite, "DIFFERENT", {"::test_repr$": "the repr"})


def run(fused: int = 10, **outcomes: str) -> suite.Run:
    return suite.Run({f"tests/test_toy.py::{t}": o for t, o in outcomes.items()}, fused=fused)


def test_as_stated() -> None:
    found = run(test_a="passed", test_b="skipped", test_needs_hub="failed", test_repr="failed")
    assert suite.complaints(FILE, found, patched=True) == []


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (run(test_a="failed"), "failed: tests/test_toy.py::test_a"),
        (run(test_needs_hub="passed"), "stated to fail and passes: ::test_needs_hub$"),
        (run(9, test_a="passed"), "9 calls ran fused, at least 10 stated"),
    ],
)
def test_what_is_not_as_stated_is_told(found: suite.Run, complaint: str) -> None:
    told = suite.complaints(FILE, found, patched=True)
    assert len(told) == 1
    assert complaint in told[0]


def test_the_stated_differences_are_none_in_plain_peft() -> None:
    found = run(0, test_repr="failed")
    assert len(suite.complaints(FILE, found, patched=False)) == 1


def test_every_other_difference_is_told() -> None:
    plain = run(test_a="passed", test_b="passed", test_repr="passed")
    patched = run(test_a="passed", test_b="skipped", test_repr="failed")
    told = suite.differences(FILE, plain, patched)
    assert len(told) == 1
    assert "passed in plain PEFT, skipped fused: tests/test_toy.py::test_b" in told[0]
    assert suite.differences(FILE, plain, run(test_a="passed", test_repr="passed"))


def test_the_lists_are_in_order() -> None:
    """Most files must run something fused, and every name of the hub is owner/name."""
    assert sum(file.min_fused > 0 for file in expected.FILES) > len(expected.FILES) / 2
    assert all(name.count("/") == 1 for name in hub.MODELS)
