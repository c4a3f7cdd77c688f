"""Compiles every Triton kernel for every architecture on a machine that needs no GPU.

    python -m fastft_kernels.aot [--arch 90 ...] [--all] [--jobs N] [--json PATH]

A kernel that does not compile, that spills registers or that wants more shared memory than the
architecture has would fail, or crawl, only on the user's GPU. Here it fails before: registers and
stack come from ``cuobjdump -res-usage``, which Triton's wheel carries, and dynamic shared memory
from the compiler. Exit status 1 if anything is over its limit.

``VARIANTS`` is the declaration: the heaviest and the lightest form of every kernel for each kind
of dtype and rank; ``--all`` adds every combination in between.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastft_kernels import config
from fastft_kernels.multi_tensor import N_SCALARS

__all__ = ["ALL_VARIANTS", "VARIANTS", "Report", "Variant", "check", "compile_variant", "main"]

_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of argument types and compile-time constants.

    Args:
        module, kernel: where the ``@triton.jit`` function is.
        label: what distinguishes it, for people.
        types: argument name -> Triton type, for the arguments that are not compile-time constants.
        constants: compile-time constants other than block sizes.
        table: the tile table of ``config.Arch`` that gives block sizes, or the field's name.
        key: the key into that tile table: bytes of an element of x, rank block, stacked; for a norm
            its columns first.
        aligned: pointers and sizes are multiples of 16, as they usually are.
        stack_limit: bytes of stack (spilled registers) that are accepted.
    """

    module: str
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    key: tuple[int, int, bool] = (4, 16, False)
    aligned: bool = True
    stack_limit: int = 0


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


_LORA = "fastft_kernels._lora_linear_kernels"
_LOSS = "fastft_kernels.linear_cross_entropy"
_ADAMW = "fastft_kernels.adamw"


# Sizes that are no multiples of 16, which no model's are, load element by element: three masked
# siblings may then spill this much. Measured: at most 72 bytes (Triton 3.6, sm_90, rank 16).
_UNALIGNED_STACK = 80


def _numbered(prefix: str, kind: str, suffix: str = "") -> dict[str, str]:
    return {f"{prefix}{i}{suffix}": kind for i in range(config.MAX_SIBLINGS)}


def _lora(kernel: str, x: str, adapter: str, r: int, siblings: int, masked: bool, **flags: Any):
    """A variant of one of the three wide LoRA kernels."""
    aligned = flags.pop("aligned", True)
    shape = {"M": "i32", "K": "i32", **_numbered("r", "i32")}
    masks = _numbered("mask", "*u8", "_ptr")
    scales = _numbered("scale", "fp32")
    if kernel == "shrink":
        types = {
            "x_ptr": f"*{x}", **_numbered("a", f"*{adapter}", "_ptr"),
            **_numbered("s", f"*{x}", "_ptr"), **masks, **shape, **scales,
        }  # fmt: skip
    elif kernel == "expand":
        shape = {"M": "i32", "N": "i32", **_numbered("r", "i32")}
        types = {
            "y_ptr": f"*{x}", "bias_ptr": f"*{x}", **_numbered("s", f"*{x}", "_ptr"),
            **_numbered("w", f"*{adapter}", "_ptr"), **masks, **shape, **scales,
        }  # fmt: skip
    else:
        types = {
            "x_ptr": f"*{x}", **_numbered("d", f"*{x}", "_ptr"), **_numbered("p", "*fp32", "_ptr"),
            **masks, **shape, "rows_per_split": "i32",
        }  # fmt: skip
    names = {"shrink": "_shrink", "expand": "_expand_add", "outer": "_outer_partial"}
    block_r = config.block_r_for(r, _DTYPES[x])
    text = "".join(f" {name.lower()}={value}" for name, value in flags.items())
    return Variant(
        _LORA, f"{names[kernel]}_kernel",
        f"x={x} ab={adapter} r={r} siblings={siblings} masked={masked}{text}"
        + ("" if aligned else " unaligned"),
        types, {"SIBLINGS": siblings, "MASKED": masked, "BLOCK_R": block_r, **flags},
        kernel, (_DTYPES[x], block_r, masked or siblings > 1), aligned,
        0 if aligned else _UNALIGNED_STACK,
    )  # fmt: skip


def _lora_variants() -> list[Variant]:
    variants = []
    for r in (16, 64):
        # Float32 walks ranks in blocks of 32 at most: rank 64 is its heaviest form.
        for x, adapter in (("bf16", "fp32"), ("fp32", "fp32"))[: 1 if r == 16 else 2]:
            variants += [
                _lora("shrink", x, adapter, r, 3, True, TRANSPOSED=False),
                _lora("expand", x, adapter, r, 3, True, HAS_BIAS=False, TRANSPOSED=False),
                _lora("outer", x, adapter, r, 3, True),
            ]
        variants += [
            _lora("shrink", "bf16", "fp32", r, 1, False, TRANSPOSED=True),
            _lora("expand", "bf16", "fp32", r, 1, False, HAS_BIAS=True, TRANSPOSED=True),
        ]
    variants += [
        _lora("outer", "fp16", "fp16", 16, 1, False),
        _reduce("fp32", False),
        _reduce("bf16", True),
    ]
    mask_types = {"out_ptr": "*u8", "seed_ptr": "*i64", "n_bytes": "i32", "threshold": "i32"}
    variants.append(Variant(_LORA, "_dropout_mask_kernel", "", mask_types, {}, "mask"))
    return variants


def _reduce(out: str, transposed: bool) -> Variant:
    types = {
        "out_ptr": f"*{out}", "p_ptr": "*fp32", "splits": "i32", "K": "i32", "r": "i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"TRANSPOSED": transposed}
    return Variant(
        _LORA, "_outer_reduce_kernel", f"out={out} transposed={transposed}", types, constants,
        "reduce",
    )  # fmt: skip


def _loss(slab: str, bias: bool, gradient: bool) -> Variant:
    types = {
        "slab_ptr": f"*{slab}", "labels_ptr": "*i64", "bias_ptr": f"*{slab}",
        "losses_ptr": "*fp32", "correct_ptr": "*i32", "V": "i32", "ignore_index": "i32",
    }  # fmt: skip
    return Variant(
        _LOSS, "_cross_entropy_kernel", f"logits={slab} bias={bias} gradient={gradient}", types,
        {"HAS_BIAS": bias, "GRADIENT": gradient}, "cross_entropy",
    )  # fmt: skip


def _adamw_norm(grad: str, aligned: bool = True) -> Variant:
    types = {
        "addresses_ptr": "*i64", "sizes_ptr": "*i64", "chunk_tensor_ptr": "*i32",
        "chunk_part_ptr": "*i32", "partials_ptr": "*fp32", "n_tensors": "i32",
        "first_chunk": "i32",
    }  # fmt: skip
    constants = {"GRAD": grad, "ALIGNED": aligned}
    return Variant(_ADAMW, "_adamw_norm_kernel", f"g={grad}", types, constants, "adamw")


def _adamw_update(param: str, grad: str, aligned: bool = True) -> Variant:
    types = {
        "addresses_ptr": "*i64", "sizes_ptr": "*i64", "chunk_tensor_ptr": "*i32",
        "chunk_part_ptr": "*i32", "scalars_ptr": "*fp32", "stats_ptr": "*fp32",
        "n_tensors": "i32", "first_chunk": "i32", "sign": "fp32",
    }  # fmt: skip
    constants = {"PARAM": param, "GRAD": grad, "ALIGNED": aligned, "N_IN": N_SCALARS}
    return Variant(
        _ADAMW, "_adamw_update_kernel", f"p={param} g={grad} aligned={aligned}", types, constants,
        "adamw",
    )  # fmt: skip


def _adamw_prepare() -> Variant:
    types = {
        "partials_ptr": "*fp32", "stats_ptr": "*fp32", "steps_ptr": "*fp32", "hyper_ptr": "*fp32",
        "scalars_ptr": "*fp32", "n_chunks": "i32", "n_tensors": "i32", "max_norm": "fp32",
    }  # fmt: skip
    constants = {"N_HYPER": 5, "N_OUT": N_SCALARS}
    return Variant(_ADAMW, "_adamw_prepare_kernel", "", types, constants, "prepare")


def _glu(dtype: str, activation: int, backward: bool, aligned: bool = True) -> Variant:
    names = ["d_gate_ptr", "d_up_ptr", "d_out_ptr"] if backward else ["out_ptr"]
    pointers = dict.fromkeys((*names, "gate_ptr", "up_ptr"), f"*{dtype}")
    types = {**pointers, "columns": "i32", "gate_stride": "i32", "up_stride": "i32"}
    return Variant(
        "fastft_kernels.glu", f"_glu_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} activation={activation}" + ("" if aligned else " unaligned"), types,
        {"ACTIVATION": activation}, "elementwise", aligned=aligned,
    )  # fmt: skip


_NORM = "fastft_kernels.rms_norm"


def _norm(dtype: str, backward: bool, columns: int, round_first: bool = True) -> Variant:
    names = ["dx_ptr", "dy_ptr"] if backward else ["y_ptr"]
    types = {
        **dict.fromkeys((*names, "x_ptr", "weight_ptr"), f"*{dtype}"), "rstd_ptr": "*fp32",
        "columns": "i32", "offset": "fp32", **({} if backward else {"eps": "fp32"}),
    }  # fmt: skip
    return Variant(
        _NORM, f"_rms_norm_{'backward' if backward else 'forward'}_kernel",
        f"x={dtype} columns={columns} round_first={round_first}", types,
        {} if backward else {"ROUND_FIRST": round_first}, "norm", (columns, 0, False),
    )  # fmt: skip


def _norm_weight(dtype: str) -> Variant:
    types = {
        "partial_ptr": "*fp32", "dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "rstd_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "rows_per_split": "i32",
    }  # fmt: skip
    return Variant(_NORM, "_rms_norm_weight_kernel", f"x={dtype}", types, {}, "norm_weight")


VARIANTS: tuple[Variant, ...] = (
    *_lora_variants(),
    _loss("bf16", True, True),
    _loss("fp32", False, True),
    _loss("fp16", False, False),
    _adamw_norm("fp32"),
    _adamw_norm("bf16"),
    _adamw_prepare(),
    _adamw_update("fp32", "fp32"),
    _adamw_update("bf16", "bf16"),
    _adamw_update("fp16", "fp32", aligned=False),
    _glu("bf16", 0, False),
    _glu("fp32", 1, True),
    _glu("bf16", 2, True),
    _norm("bf16", False, 4096),
    _norm("bf16", True, 576),
    _norm("fp32", True, 16384),
    _norm_weight("bf16"),
)


def _all_variants() -> tuple[Variant, ...]:
    """Every combination that a launcher makes."""
    pairs = [(x, a) for x in _DTYPES for a in dict.fromkeys(("fp32", x))]
    booleans = (False, True)
    variants = list(VARIANTS)
    for (x, a), r, aligned in itertools.product(pairs, (16, 32, 64), booleans):
        for siblings, masked in itertools.product((1, 2, 3), booleans):
            case = (x, a, r, siblings, masked)
            flags = {"TRANSPOSED": False, "aligned": aligned}
            variants.append(_lora("outer", *case, aligned=aligned))
            variants.append(_lora("shrink", *case, **flags))
            variants.append(_lora("expand", *case, HAS_BIAS=False, **flags))
        # s B^T of one sibling at a time, where a bias may be; dY B likewise.
        alone, flags = (x, a, r, 1, False), {"TRANSPOSED": True, "aligned": aligned}
        variants.append(_lora("shrink", *alone, **flags))
        variants += [_lora("expand", *alone, HAS_BIAS=bias, **flags) for bias in booleans]
    variants += [_reduce(out, t) for out, t in itertools.product(_DTYPES, booleans)]
    variants += [_loss(*c) for c in itertools.product(_DTYPES, booleans, booleans)]
    variants += [_adamw_norm(*c) for c in itertools.product(_DTYPES, booleans)]
    variants += [_adamw_update(*c) for c in itertools.product(_DTYPES, _DTYPES, booleans)]
    flags = itertools.product(_DTYPES, (0, 1, 2), booleans, booleans)
    variants += [_glu(*case) for case in flags]
    for dtype, columns in itertools.product(_DTYPES, (64, 576, 4096, 8192, 16384)):
        variants += [_norm(dtype, False, columns, first) for first in booleans]
        variants.append(_norm(dtype, True, columns))
    variants += [_norm_weight(dtype) for dtype in _DTYPES]
    unique = {(v.kernel, v.label, json.dumps(v.constants, default=str)): v for v in variants}
    return tuple(unique.values())


ALL_VARIANTS: tuple[Variant, ...] = _all_variants()


def _blocks(variant: Variant, arch: config.Arch) -> tuple[dict[str, int], config.Launch]:
    """Block sizes and launch options of a variant, from the architecture's table."""
    if variant.table in ("shrink", "expand", "outer"):
        tile = getattr(arch, variant.table)[variant.key]
        wide = "BLOCK_N" if variant.table == "expand" else "BLOCK_K"
        return {"BLOCK_M": tile.block_m, wide: tile.block_n}, tile.launch
    if variant.table == "cross_entropy":
        return {"BLOCK_V": arch.cross_entropy.block_v}, arch.cross_entropy.launch
    if variant.table == "adamw":
        return {"CHUNK": arch.adamw.chunk, "BLOCK": arch.adamw.block}, arch.adamw.launch
    if variant.table in ("norm", "norm_weight"):
        norm = arch.norm
        chosen = norm.weight if variant.table == "norm_weight" else norm.row(variant.key[0])
        return {"BLOCK": chosen.block}, chosen.launch
    if variant.table == "prepare":
        prepare = arch.adamw.prepare
        return {"SUMS": arch.adamw.prepare_sums, "BLOCK": prepare.block}, prepare.launch
    block: config.BlockConfig = getattr(arch, variant.table)
    return {"BLOCK": block.block}, block.launch


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compiles one variant for one architecture and reads what it takes."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    arch = config.ARCHS[capability]
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    blocks, launch = _blocks(variant, arch)
    constants = {
        name: names[value] if isinstance(value, str) else value
        for name, value in {**variant.constants, **blocks}.items()
    }
    signature = {name: variant.types.get(name, "constexpr") for name in kernel.arg_names}
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
    return Report(
        arch.name, variant.kernel, variant.label, usage["REG"], stack, shared, arch.shared_limit,
        tuple(errors),
    )  # fmt: skip


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
        name = config.ARCHS[capability].name
        return Report(name, variant.kernel, variant.label, errors=(text,))


def check(
    capabilities: Iterable[int] = tuple(config.ARCHS),
    variants: Sequence[Variant] = VARIANTS,
    jobs: int | None = None,
) -> list[Report]:
    """Compiles ``variants`` for ``capabilities`` in ``jobs`` processes (default: one a CPU)."""
    work = [(variant, capability) for capability in capabilities for variant in variants]
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
    parser.add_argument(
        "--arch", type=int, nargs="*", choices=config.ARCHS, default=[*config.ARCHS]
    )
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
