"""The binary: one for every processor, and nothing of one instruction set leaks into another."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

import fastft
from fastft import native

X86 = platform.machine().lower() in ("x86_64", "amd64")


def test_build_info() -> None:
    info = native.build_info()
    assert info["instruction_set"] == info["instruction_sets_usable"][0]
    assert "generic" in info["instruction_sets_usable"]
    if X86:
        built = {"generic", "avx2", "avx512", "avx512bf16"}
        assert set(info["instruction_sets_built"]) == built
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_architectures"]) == info["cuda"]


@pytest.mark.skipif(not X86 or not shutil.which("objdump"), reason="needs x86-64 and objdump")
def test_wide_instructions_stay_in_their_functions() -> None:
    """AVX-512 registers appear only inside functions of the two avx512 namespaces, and products of
    bfloat16 only inside one: neither in what runs at load time nor in a function the linker
    shares."""
    path = native.module().__file__
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    function, wide, narrow_products = "", set(), set()
    for line in text.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = match.group(1)
        elif "%zmm" in line:
            wide.add(function)
        if "vdpbf16ps" in line or "vcvtneps2bf16" in line:
            narrow_products.add(function)
    assert wide, "no AVX-512 code at all"
    assert not [f for f in wide if "avx512" not in f]
    assert narrow_products, "no bfloat16 products at all"
    assert not [f for f in narrow_products if "avx512bf16" not in f]


def test_refuses_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="'sse9'"):
        native.module().dropout_mask(0, 0, 0, 0, isa="sse9")


def test_keep_heap_says_whether_it_could() -> None:
    assert native.module().keep_heap() is (platform.libc_ver()[0] == "glibc")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fastft.__version__)
