"""``fastft doctor``: its JSON has what it promises, and its advice follows from the findings."""

import json
import pkgutil
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastft.reference
from fastft import doctor
from fastft.commands import app
from fastft.doctor import OP_FACTS, TESTED, examine


@pytest.fixture(scope="module")
def findings():
    return examine()


def test_json_schema():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    schema = {
        "fastft": str,
        "python": dict,
        "platform": str,
        "torch": dict,
        "gpu": dict,
        "cpu": dict,
        "compiler": dict,
        "nvcc": dict,
        "native": dict,
        "openmp": (list, type(None)),
        "libraries": dict,
        "ops": dict,
        "ledger": dict,
        "advice": list,
    }
    assert found.keys() == schema.keys()
    for key, kind in schema.items():
        assert isinstance(found[key], kind), key
    assert found["native"].keys() == {"available", "load_error", "build_info"}
    assert found["gpu"].keys() == {"available", "devices"}
    assert found["ledger"].keys() == {"status", "entries"}


def test_every_operation_is_asked_about(findings):
    ops = {m.name for m in pkgutil.iter_modules(fastft.reference.__path__) if m.name[0] != "_"}
    assert set(OP_FACTS) == ops == set(findings["ops"])


def test_ops_say_who_serves_and_why_not_the_others(findings):
    from fastft import backends

    for op, entry in findings["ops"].items():
        assert entry["served_by"] in backends.ORDER, op
        assert all(entry["not_served_by"].values()), op
        better = backends.ORDER[: backends.ORDER.index(entry["served_by"])]
        assert set(better) <= set(entry["not_served_by"])


def test_tested_ranges_agree_with_what_is_declared():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, (oldest, newest) in TESTED.items():
        declared = re.search(rf'"{name}>=([\d.]+)', text)
        assert declared is not None, name
        assert declared[1] == oldest, name
        assert doctor._minor(oldest) <= doctor._minor(newest)


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        (None, "missing"),
        ("1.9.3", "too old"),
        ("1.10.0", "tested"),
        ("2.1.5+cpu", "tested"),
        ("2.2.0.dev1", "newer than tested"),
    ],
)
def test_status(installed, status):
    assert doctor._status(installed, "1.10", "2.1") == status


def test_one_openmp_runtime(findings):
    if findings["openmp"] is None:
        pytest.skip("no /proc here")
    assert len(findings["openmp"]) == 1


class TestAdvice:
    def advice(self, findings, **changes):
        return " | ".join(doctor._advice(findings | changes))

    def test_missing_native_module(self, findings):
        native = {"available": False, "load_error": "ImportError: gone", "build_info": {}}
        assert "ImportError: gone" in self.advice(findings, native=native)
        assert "pip install ." in self.advice(findings, native=native)

    def test_old_library(self, findings):
        entry = {"installed": "0.1", "status": "too old", "oldest": "0.21"}
        libraries = findings["libraries"] | {"peft": entry}
        assert "peft 0.1 is older than 0.21" in self.advice(findings, libraries=libraries)

    def test_bfloat16(self, findings):
        gpu = {"available": False, "devices": []}
        for native, said in ((False, True), (True, False)):
            cpu = findings["cpu"] | {"native_bfloat16": native}
            assert ("train in float32" in self.advice(findings, cpu=cpu, gpu=gpu)) is said

    def test_allocator(self, findings, monkeypatch):
        gpu = {"available": False, "devices": []}
        monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
        expected = "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592"
        assert expected in self.advice(findings, gpu=gpu)
        for name, value in doctor.ALLOCATOR.items():
            monkeypatch.setenv(name, value)
        assert "MALLOC" not in self.advice(findings, gpu=gpu)
        monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("", ""))
        monkeypatch.delenv("MALLOC_MMAP_MAX_")
        assert "MALLOC" not in self.advice(findings, gpu=gpu)

    def test_two_openmp_runtimes(self, findings):
        assert "/a/libgomp.so, /b/libiomp5.so" in self.advice(
            findings, openmp=["/a/libgomp.so", "/b/libiomp5.so"]
        )


class TestLedger:
    def test_not_here(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fastft, "__file__", str(tmp_path / "site" / "fastft" / "__init__.py"))
        assert doctor._ledger() == {"status": "not in this installation", "entries": None}

    def test_read_from_a_checkout(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fastft, "__file__", str(tmp_path / "fastft" / "__init__.py"))
        path = tmp_path / "bench" / "results" / "verified.json"
        path.parent.mkdir(parents=True)
        path.write_text('{"k": 1}')
        assert doctor._ledger() == {"status": str(path), "entries": {"k": 1}}
        path.write_text("{")
        assert doctor._ledger()["entries"] is None
        assert "cannot be read" in doctor._ledger()["status"]


def test_tables(findings, capsys):
    doctor.show(findings)
    shown = capsys.readouterr().out
    for part in ("Libraries", "Who computes", "GPU ledger", "native module", "OpenMP"):
        assert part in shown
    assert "triton/rms_norm: NVIDIA H200, " in shown
    assert len(shown.splitlines()) < 150, "a line for each kernel, not the ledger's JSON"
