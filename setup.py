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
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Instruction set -> compiler flags. One binary holds all of them; csrc/cpu/dispatch.cpp chooses.
ISA_FLAGS = {"generic": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma",
                           "-mprefer-vector-width=512"]  # fmt: skip
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


def find_nvcc():
    """CUDA_HOME, then PATH, then PyPI's nvidia-cuda-nvcc; None when there is none."""
    candidates = [os.path.join(os.environ[k], "bin", "nvcc") for k in ("CUDA_HOME", "CUDA_PATH")
                  if os.environ.get(k)]  # fmt: skip
    candidates.append(shutil.which("nvcc"))
    candidates += [str(p) for entry in sys.path for p in Path(entry or ".").glob("nvidia/*/bin/nvcc")]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_gencode(nvcc):
    """-gencode flags: machine code for each architecture nvcc knows, PTX for the newest only."""
    known = set(re.findall(r"sm_(\d+a?)", subprocess.check_output([nvcc, "--list-gpu-code"], text=True)))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    asked = [w for w in wanted if w]
    numbers = [re.sub(r"\+PTX$", "", w).replace(".", "") for w in asked] or list(CUDA_ARCHITECTURES)
    architectures = [n for n in numbers if n in known or n.rstrip("a") in known]
    if not architectures:
        raise SystemExit(f"setup.py: no architecture of {numbers} is known to {nvcc} ({sorted(known)})")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    ptx = [re.sub(r"\D", "", w) for w in asked if w.endswith("+PTX")] if asked else [architectures[-1]]
    flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
    return architectures, flags


class BuildExt(build_ext):
    """Compiles csrc/cpu/isa.cpp once per instruction set and csrc/cuda/*.cu with nvcc."""

    def build_extension(self, ext):
        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
        ext.include_dirs += [i[2:] for i in includes]
        openmp = self.openmp_flags(out)
        flags = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0", *openmp]
        if not openmp:
            flags += ["-Wno-unknown-pragmas"]
        ext.extra_compile_args += flags
        ext.extra_link_args += openmp
        for isa, isa_flags in ISA_FLAGS.items():
            obj = out / f"isa_{isa}.o"
            # -fno-math-errno and -fno-trapping-math let sqrt and comparisons vectorise; neither
            # changes a value. No -ffast-math anywhere.
            self.spawn([*self.cxx(), "-std=c++17", *flags, "-fno-math-errno", "-fno-trapping-math",
                        *isa_flags, f"-DFASTFT_ISA={isa}", *includes,
                        "-c", str(ROOT / "csrc/cpu/isa.cpp"), "-o", str(obj)])  # fmt: skip
            ext.extra_objects.append(str(obj))
        if X86:
            ext.define_macros.append(("FASTFT_X86", "1"))
        self.add_cuda(ext, out, includes)
        super().build_extension(ext)

    def cxx(self):
        return list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])

    def openmp_flags(self, out):
        """["-fopenmp"] when the compiler takes it, else nothing (Apple's clang)."""
        with tempfile.TemporaryDirectory(dir=out) as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            probe = subprocess.run([*self.cxx(), "-fopenmp", str(source), "-o", f"{folder}/probe"],
                                   capture_output=True)  # fmt: skip
        return ["-fopenmp"] if probe.returncode == 0 else []

    def add_cuda(self, ext, out, includes):
        mode = os.environ.get("FASTFT_CUDA", "auto")
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        nvcc = None if mode == "0" else find_nvcc()
        if nvcc is None:
            if mode == "1":
                raise SystemExit("setup.py: FASTFT_CUDA=1 but no nvcc in CUDA_HOME, PATH or nvidia-cuda-nvcc")
            print(f"fastft: building without CUDA ({'FASTFT_CUDA=0' if mode == '0' else 'no nvcc found'})")
            return
        architectures, gencode = cuda_gencode(nvcc)
        for source in sources:
            obj = out / f"{source.stem}.cu.o"
            self.spawn([nvcc, "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden",
                        "-cudart", "static", "--threads", "2", *gencode, *includes,
                        "-c", str(source), "-o", str(obj)])  # fmt: skip
            ext.extra_objects.append(str(obj))
        home = Path(nvcc).resolve().parent.parent
        library = next((p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()), None)
        if library is None:
            raise SystemExit(f"setup.py: {nvcc} has no libcudart_static.a; set CUDA_HOME or FASTFT_CUDA=0")
        ext.define_macros += [("FASTFT_WITH_CUDA", "1"), ("FASTFT_NVCC", f'"{nvcc}"'),
                              ("FASTFT_CUDA_ARCHITECTURES", f'"{";".join(architectures)}"')]  # fmt: skip
        ext.include_dirs.append(str(home / "include"))
        ext.extra_link_args += [str(library / "libcudart_static.a"), "-lpthread", "-ldl", "-lrt"]


setup(
    ext_modules=[Pybind11Extension("fastft._C", ["csrc/bind.cpp", "csrc/cpu/dispatch.cpp"], cxx_std=17,
                                   depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")])],
    cmdclass={"build_ext": BuildExt},
)  # fmt: skip
