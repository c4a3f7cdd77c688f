"""Builds fastft._C: CPU kernels once per instruction set, CUDA kernels where nvcc is found.

No torch at build time. FASTFT_CUDA=1 makes a missing nvcc an error, FASTFT_CUDA=0 skips CUDA;
TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") chooses the architectures."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INCLUDES = [str(ROOT / folder) for folder in ("csrc", "csrc/include", "csrc/cpu")]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Instruction set -> compiler flags. One binary holds all of them; csrc/cpu/dispatch.cpp chooses.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
ISA_FLAGS = {"generic": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512.split()}
ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
if not X86:
    ISA_FLAGS = {"generic": []}
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


def find_nvcc():
    """CUDA_HOME, then PATH, then PyPI's nvidia-cuda-nvcc; None when there is none."""
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes] + [shutil.which("nvcc")]
    candidates += [str(p) for e in sys.path for p in Path(e or ".").glob("nvidia/*/bin/nvcc")]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_library(nvcc):
    """Folder of the toolkit's headers and its static runtime, as nvcc itself names the toolkit:
    the nvcc on PATH may be a wrapper script."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"TOP=(.*)", plan.stderr)
    home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]
    folders = (home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib")))
    found = [p / "libcudart_static.a" for p in folders if (p / "libcudart_static.a").exists()]
    if not found:
        raise SystemExit(f"setup.py: no libcudart_static.a under {home}; try FASTFT_CUDA=0")
    return home / "include", found[0]


def cuda_gencode(nvcc):
    """-gencode flags: machine code for each architecture nvcc knows, PTX for the newest only."""
    listed = subprocess.check_output([nvcc, "--list-gpu-code"], text=True)
    known = set(re.findall(r"sm_(\d+a?)", listed))
    asked = [w for w in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if w]
    numbers = [w.removesuffix("+PTX").replace(".", "") for w in asked] or CUDA_ARCHITECTURES
    chosen = [n for n in numbers if n.rstrip("a") in known]  # nvcc lists 90, takes 90a too
    if not chosen:
        raise SystemExit(f"setup.py: {nvcc} knows none of {list(numbers)}, only {sorted(known)}")
    ptx = [w.removesuffix("+PTX").replace(".", "") for w in asked if w.endswith("+PTX")]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx or chosen[-1:]]
    return chosen, flags


class BuildExt(build_ext):
    """Compiles csrc/cpu/isa.cpp once per instruction set and csrc/cuda/*.cu with nvcc."""

    def build_extension(self, ext):
        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        ext.include_dirs += INCLUDES
        openmp = self.openmp_flags(out)
        flags = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += openmp or ["-Wno-unknown-pragmas"]
        ext.extra_compile_args += flags
        ext.extra_link_args += openmp
        # -fno-math-errno and -fno-trapping-math let square roots and comparisons vectorise;
        # neither changes a value. No -ffast-math anywhere.
        flags = ["-std=c++17", *flags, "-fno-math-errno", "-fno-trapping-math"]
        flags.append("-fno-strict-aliasing")  # pairs of bfloat16 are read as words
        for isa, isa_flags in ISA_FLAGS.items():
            macros = [f"-DFASTFT_ISA={isa}", *(f"-I{folder}" for folder in INCLUDES)]
            source, target = str(ROOT / "csrc/cpu/isa.cpp"), str(out / f"isa_{isa}.o")
            self.spawn([*self.cxx(), *flags, *isa_flags, *macros, "-c", source, "-o", target])
            ext.extra_objects.append(target)
        if X86:
            ext.define_macros.append(("FASTFT_X86", "1"))
        self.add_cuda(ext, out)
        super().build_extension(ext)

    def cxx(self):
        return list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])

    def openmp_flags(self, out):
        """["-fopenmp"] when the compiler and linker take it, else nothing (Apple's clang)."""
        with tempfile.TemporaryDirectory(dir=out) as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return !omp_get_max_threads(); }\n")
            command = [*self.cxx(), "-fopenmp", str(source), "-o", f"{folder}/probe"]
            probe = subprocess.run(command, capture_output=True)
        return ["-fopenmp"] if probe.returncode == 0 else []

    def add_cuda(self, ext, out):
        mode = os.environ.get("FASTFT_CUDA", "auto")
        nvcc = None if mode == "0" else find_nvcc()
        if nvcc is None:
            if mode == "1":
                where = "CUDA_HOME, PATH or PyPI's nvidia-cuda-nvcc"
                raise SystemExit(f"setup.py: FASTFT_CUDA=1 but no nvcc in {where}")
            print(f"fastft: building without CUDA (FASTFT_CUDA={mode}, nvcc: {nvcc})")
            return
        architectures, gencode = cuda_gencode(nvcc)
        headers, runtime = cuda_library(nvcc)
        flags = ["-std=c++17", "-O3", "-lineinfo", "-cudart", "static", "--threads", "2"]
        flags += [
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            *(f"-I{folder}" for folder in INCLUDES),
        ]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            target = str(out / f"{source.stem}.cu.o")
            self.spawn([nvcc, *flags, *gencode, "-c", str(source), "-o", target])
            ext.extra_objects.append(target)
        ext.define_macros += [("FASTFT_WITH_CUDA", "1"), ("FASTFT_NVCC", f'"{nvcc}"')]
        ext.define_macros.append(("FASTFT_CUDA_ARCHITECTURES", f'"{";".join(architectures)}"'))
        ext.include_dirs.append(str(headers))
        ext.extra_link_args += [str(runtime), "-lpthread", "-ldl", "-lrt"]


_SOURCES = ("decoder_layer", "dispatch", "lora_layers", "pool")
sources = ["csrc/bind.cpp", *(f"csrc/cpu/{name}.cpp" for name in _SOURCES)]
depends = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]
extension = Pybind11Extension("fastft._C", sources, cxx_std=17, depends=depends)
if __name__ == "__main__":
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
