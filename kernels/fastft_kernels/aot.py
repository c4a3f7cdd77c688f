"""Compiles every Triton kernel for every architecture on a machine that needs no GPU.

    python -m fastft_kernels.aot [--arch 90 ...] [--all] [--jobs N] [--json PATH]

A kernel that does not compile, that spills registers or that wants more shared memory than the
architecture has would fail, or crawl, only on the user's GPU. Here it fails before: registers and
stack come from ``cuobjdump -res-usage``, which Triton's wheel carries, and dynamic shared memory
from the compiler. Exit status 1 if anything is over its limit.

``fastft_kernels.variants`` declares what is compiled; ``--all`` takes every combination.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastft_kernels import config
from fastft_kernels._lora_skinny import casts
from fastft_kernels._tiles import GEMM_RANKS
from fastft_kernels.lora_config import ARCHS, LoraArch, TileConfig
from fastft_kernels.variants import ALL_VARIANTS, VARIANTS, Variant

__all__ = ["ALL_VARIANTS", "VARIANTS", "Report", "Variant", "check", "compile_variant", "main"]


@dataclass(frozen=True)
class Report:
    """What one variant takes on one architecture; ``errors`` is empty where it is within limits."""

    arch: str
    kernel: str
    label: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    shared_limit: int = 0
    errors: tuple[str, ...] = ()


# Columns that a multiprocessor has, where it has tensor memory (sm_100).
_TENSOR_MEMORY = 512
# Tables by the rank block alone.
_BY_RANK = ("pair", "pair_copy", "glu_pair")


def _blocks(variant: Variant, arch: LoraArch) -> tuple[dict[str, int], config.Launch]:
    """Block sizes and launch options of a variant, from the architecture's table."""
    if variant.table in ("shrink", "expand", "outer", *_BY_RANK):
        tile = _tile(variant, arch)
        wide = "BLOCK_K" if variant.table in ("shrink", "outer") else "BLOCK_N"
        return {"BLOCK_M": tile.block_m, wide: tile.block_n}, tile.launch
    if variant.table == "gemm":
        gemm = arch.gemm[variant.key[2]]  # type: ignore[index]
        blocks = {f"BLOCK_{axis}": getattr(gemm, f"block_{axis.lower()}") for axis in "MNK"}
        early = gemm.early and variant.constants["BLOCK_R"] == GEMM_RANKS[True]
        blocks.update(PART=gemm.part, GROUP_M=gemm.group_m, EARLY=early)
        return blocks, gemm.launch
    if variant.table in ("cross_entropy", "divergence"):
        rows: config.CrossEntropyConfig = getattr(arch, variant.table)
        return {"BLOCK_V": rows.block_v}, rows.launch
    if variant.table == "adamw":
        return {"CHUNK": arch.adamw.chunk, "BLOCK": arch.adamw.block}, arch.adamw.launch
    if variant.table == "rope":
        return {"HEADS": arch.rope.heads, "BLOCK": variant.key[0]}, arch.rope.launch
    if variant.table in ("norm", "norm_rows"):
        chosen = arch.norm.row(variant.key[0])
        rows = {"ROWS": chosen.rows} if variant.table == "norm_rows" else {}
        return {"BLOCK": chosen.block, **rows}, chosen.launch
    if variant.table == "norm_weight":
        return {"BLOCK": arch.norm.weight.block}, arch.norm.weight.launch
    if variant.table == "prepare":
        prepare = arch.adamw.prepare
        return {"SUMS": arch.adamw.prepare_sums, "BLOCK": prepare.block}, prepare.launch
    block: config.BlockConfig = getattr(arch, variant.table)
    return {"BLOCK": block.block}, block.launch


def _tile(variant: Variant, arch: LoraArch) -> TileConfig:
    by_rank = variant.table in _BY_RANK
    key = variant.key[1] if by_rank else variant.key
    found: TileConfig = getattr(arch, variant.table)[key]
    return found


def applies(variant: Variant, arch: LoraArch) -> bool:
    """Whether a launcher makes this variant on the architecture."""
    if variant.table == "gemm":
        return arch.gemm is not None
    if variant.table in _BY_RANK:
        return variant.key[1] in getattr(arch, variant.table)
    if variant.kernel == "_shrink_kernel" and variant.types["a0_ptr"] != variant.types["x_ptr"]:
        return not casts(*(variant.constants[n] for n in ("SIBLINGS", "BLOCK_R", "MASKED")))
    return True


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compiles one variant for one architecture and reads what it takes."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    arch = ARCHS[capability]
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    blocks, launch = _blocks(variant, arch)
    constants = {
        name: names[value] if isinstance(value, str) else value
        for name, value in {**variant.constants, **blocks}.items()
    }
    types = {name: kind.format(**blocks) for name, kind in variant.types.items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    fixed = {param.name for param in kernel.params if param.do_not_specialize}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if variant.aligned and (kind[0] == "*" or (kind[0] == "i" and name not in fixed))
    }
    compiled = compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options(),
    )
    usage = _resource_usage(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    errors = []
    stack = usage["STACK"] + usage["LOCAL"]
    if stack > variant.stack_limit:
        errors.append(f"{stack} bytes of stack, limit {variant.stack_limit}")
    if shared > arch.shared_limit:
        errors.append(f"{shared} bytes of shared memory, limit {arch.shared_limit}")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > _TENSOR_MEMORY:  # Triton then compiles a trap and nothing else
        errors.append(f"{columns} columns of tensor memory, limit {_TENSOR_MEMORY}")
    if _overwritten(compiled.asm.get("ttgir", "")):
        errors.append("a product in the background reads a buffer that the next copies write")
    if variant.table in ("outer", *_BY_RANK) and variant.aligned:
        said, runs = _tile(variant, arch).resident, _resident(usage["REG"], shared, launch, arch)
        if runs < said:
            errors.append(f"{runs} run at a time, the table says {said}")
    return Report(
        arch.name, variant.kernel, variant.label, usage["REG"], stack, shared, arch.shared_limit,
        tuple(errors),
    )  # fmt: skip


def _overwritten(ttgir: str) -> bool:
    """Whether a product that runs on into the next turn of a loop reads from a buffer that is also
    loaded into registers: Triton 3.6 gives such a tile one buffer too few, and the copies ahead
    write what the product still reads (Hopper's matrix unit)."""
    text = re.sub(r" loc\([^\n]*", "", ttgir)
    if not any(int(n) for n in re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", text)):
        return False
    buffer = dict(re.findall(r"%(\S+) = ttg\.memdesc_index %(\S+?)\[", text))
    for view, of in re.findall(r"%(\S+) = ttg\.memdesc_(?:trans|reshape|subslice) %([\w#]+)", text):
        if of in buffer:
            buffer[view] = buffer[of]
    loaded = {buffer[v] for v in re.findall(r"ttg\.local_load %(\S+) ", text) if v in buffer}
    products = re.findall(r"ttng\.warp_group_dot %(\S+?), %(\S+?), .*?isAsync = true", text)
    return any(buffer.get(operand) in loaded for pair in products for operand in pair)


def _resident(registers: int, shared: int, launch: config.Launch, arch: LoraArch) -> int:
    """Programs that a multiprocessor runs at a time."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * launch.num_warps)
    return min(by_registers, (arch.shared_limit + 1024) // (shared + 1024))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel in ``cubin``."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if " REG:" in line or line.startswith("REG:"))
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", line)}


def _guarded(job: tuple[Variant, int]) -> Report:
    variant, capability = job
    try:
        return compile_variant(variant, capability)
    except Exception as error:  # a compiler error is a result: every other variant still runs
        text = f"{type(error).__name__}: {error}"
        name = ARCHS[capability].name
        return Report(name, variant.kernel, variant.label, errors=(text,))


def check(
    capabilities: Iterable[int] = tuple(ARCHS),
    variants: Sequence[Variant] = VARIANTS,
    jobs: int | None = None,
) -> list[Report]:
    """Compiles ``variants`` for ``capabilities`` in ``jobs`` processes (default: one a CPU)."""
    work = [
        (variant, capability)
        for capability in capabilities
        for variant in variants
        if applies(variant, ARCHS[capability])
    ]
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    # Spawned, not forked: the caller may hold threads, and the interpreter must be off.
    context = multiprocessing.get_context("spawn")
    with _without("TRITON_INTERPRET"):
        pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context)
        with pool:
            return list(pool.map(_guarded, work, chunksize=4))


class _without:
    """Removes a variable from the environment that child processes inherit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.value = os.environ.pop(self.name, None)

    def __exit__(self, *_: object) -> None:
        if self.value is not None:
            os.environ[self.name] = self.value


def _write_json(path: Path, reports: Sequence[Report]) -> None:
    import triton

    document = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastft_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHS, default=[*ARCHS])
    parser.add_argument("--all", action="store_true", help="every combination, not the extremes")
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    reports = check(options.arch, ALL_VARIANTS if options.all else VARIANTS, options.jobs)
    for report in reports:
        state = "; ".join(report.errors) or "ok"
        print(
            f"{report.arch:6} {report.kernel:24} reg {report.registers:3} stack {report.stack:3} "
            f"shared {report.shared:6}/{report.shared_limit}  {report.label}  {state}"
        )
    if options.json is not None:
        _write_json(options.json, reports)
    failed = sum(bool(report.errors) for report in reports)
    print(f"{len(reports)} compiled, {failed} over a limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
