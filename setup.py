"""Compile csrc/ into nft_kernels._C with ninja. No torch is needed: the module takes raw pointers.

Environment: NFT_KERNELS_CPU=0 (pure Python), NFT_KERNELS_CUDA unset/1/0 (when nvcc is there / required / skip),
NFT_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST (such as "8.0;9.0a"), MAX_JOBS, CXX, NVCC, and NFT_KERNELS_SANITIZE (such as
"address,undefined") for the C++ kernels' own tests.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_paths

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}


def switch(name: str) -> "bool | None":
    value = os.environ.get(name)
    if value not in (None, "", "0", "1"):
        sys.exit(f"{name}: got {value!r}, accepted are unset, 0 and 1")
    return None if not value else value == "1"


def wants_kernels() -> bool:
    wanted = switch("NFT_KERNELS_CPU")
    if wanted is None and sys.platform != "linux":
        print("nft_kernels: the compiled kernels are for Linux, installing without them", file=sys.stderr)
        return False
    return wanted is not False


def cuda_compiler() -> "str | None":
    wanted = switch("NFT_KERNELS_CUDA")
    if wanted is False:
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None and wanted:
        sys.exit("NFT_KERNELS_CUDA=1 but no nvcc was found: install the CUDA toolkit or set NVCC or CUDA_HOME")
    if nvcc is None:
        print("nft_kernels: no nvcc found, building without the CUDA kernels", file=sys.stderr)
    return nvcc


def known_archs(nvcc: str) -> str:
    """Those of the default architectures that this nvcc compiles for."""
    wanted = ("8.0", "9.0a", "10.0")
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    # An nvcc too old to list them says so itself when it compiles.
    known = [a for a in wanted if f"sm_{a.rstrip('a').replace('.', '')}" in codes]
    if codes and len(known) < len(wanted):
        missing = ", ".join(a for a in wanted if a not in known)
        print(f"nft_kernels: {nvcc} does not know {missing}, building without", file=sys.stderr)
    return ";".join(known or wanted)


def cuda_archs(nvcc: str) -> "list[str]":
    listed = os.environ.get("NFT_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or known_archs(nvcc)
    archs = [a for a in listed.replace("+PTX", "").replace(",", ";").replace(" ", ";").split(";") if a]
    if not archs or not all(a.rstrip("af").replace(".", "").isdigit() for a in archs):
        sys.exit(f"NFT_CUDA_ARCHS: got {listed!r}, accepted is a list such as '8.0;9.0a;10.0'")
    return archs


def cuda_flags(archs: "list[str]") -> str:
    names = [a.replace(".", "") for a in archs]
    # Code for 9.0a runs on 9.0 alone: the PTX, which newer devices compile, is that of the baseline architecture.
    newest = max((a.rstrip("af") for a in names), key=int)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    return " ".join([*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cxx = shutil.which(os.environ.get("CXX", "g++"))
        if cxx is None:
            sys.exit("nft_kernels: no C++ compiler found; set CXX, or NFT_KERNELS_CPU=0 for a pure-Python install")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = f"-I{pybind11.get_include()} -I{get_paths()['include']}"
        isas = {"baseline": ""} | (X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {})
        names = [n for n in isas if n != "baseline"]
        wanted = os.environ.get("NFT_KERNELS_SANITIZE")
        sanitize = f"-fsanitize={wanted} -fno-omit-frame-pointer -g" if wanted else ""
        rules = [
            f"cxx = {cxx}",
            # No contraction to fused multiply-add but where math.h asks for it: where v_theta = v_old and r = 1/2 the
            # two branches cancel exactly, and every instruction set that has it gives the same bits.
            # No code here asks what trapped; compilers that have to keep it leave loops with a clamp scalar.
            "flags = -std=c++17 -O3 -ffp-contract=off -fPIC -fopenmp -fvisibility=hidden -fno-math-errno "
            f"-fno-trapping-math -Wall {sanitize} {includes}",
            "rule cxx",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []

        def compile_to(name: str, rule: str, source: Path, extra: str = "") -> None:
            rules.extend([f"build {name}: {rule} {source}", f"  extra = {extra}"])
            objects.append(name)

        has = "".join(f" -DNFT_HAS_{n.upper()}" for n in names)
        libraries = ""
        nvcc = cuda_compiler()
        if nvcc:
            archs = cuda_archs(nvcc)
            has += f""" '-DNFT_CUDA_ARCHS="{", ".join(archs)}"'"""
            rules += [
                f"nvcc = {nvcc}",
                # -fmad=false for the same reason as -ffp-contract=off.
                "cuflags = -std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden -cudart static "
                f"{cuda_flags(archs)}",
                "rule nvcc",
                "  command = $nvcc $cuflags -ccbin $cxx -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            for source in sorted(CSRC.glob("cuda/*.cu")):
                compile_to(f"{source.stem}_cuda.o", "nvcc", source)
            toolkit = Path(nvcc).resolve().parent.parent
            # Of its own places first: a toolkit may be a whole environment, with other versions in it.
            folders = [
                library.parent
                for root in (toolkit, Path("/usr/local/cuda"))
                for pattern in ("lib64", "lib", "targets/*/lib", "**")
                for library in sorted(root.glob(f"{pattern}/libcudart_static.a"))
            ]
            libraries = " ".join([*(f"-L{folder}" for folder in folders[:1]), "-lcudart_static -ldl -lrt -lpthread"])
        compile_to("bindings.o", "cxx", CSRC / "bindings.cpp", has)
        for isa, flags in isas.items():
            for source in sorted(CSRC.glob("cpu/*.cpp")):
                compile_to(f"{source.stem}_{isa}.o", "cxx", source, f"-DNFT_ISA={isa} {flags}")
        rules += [
            "rule link",
            f"  command = $cxx {sanitize} -shared -fopenmp $in -o $out $libraries",
            f"build {target}: link {' '.join(objects)}",
            f"  libraries = {libraries}",
        ]
        (build / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), *jobs], check=True)


setup(
    ext_modules=[Extension("nft_kernels._C", sources=[])] if wants_kernels() else [], cmdclass={"build_ext": NinjaBuild}
)
