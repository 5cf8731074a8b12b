"""What setup.py builds where compilers, or the system, are others."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_older_nvcc_compiles_for_what_it_knows(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    for folder in ("a/of/another/version", "lib64"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libcudart_static.a").touch()
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "sm_80\\nsm_89\\nsm_90\\n"\n')
    nvcc.chmod(0o755)
    unset = {"NFT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "NFT_KERNELS_CUDA", "NFT_KERNELS_CPU"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    # Compilers that fail at once, as the commands are all that is looked at, and what a build would bring along.
    (tmp_path / "pybind11.py").write_text("def get_include():\n    return ''\n")
    environment |= {"NVCC": str(nvcc), "CXX": shutil.which("false") or "false", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path / 'temp'}", f"--build-lib={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"{nvcc} does not know 10.0, building without" in done.stderr
    (commands,) = tmp_path.rglob("build.ninja")
    flags = set(re.findall(r"-gencode=(\S+)", commands.read_text()))
    assert f"-L{tmp_path}/lib64 " in commands.read_text()
    assert flags == {"arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"}


@pytest.mark.parametrize(
    ("system", "wanted", "built"),
    [
        ("linux", None, True),
        ("linux", "0", False),
        ("darwin", None, False),
        ("darwin", "1", True),
        ("win32", "", False),
    ],
)
def test_kernels_are_built_on_linux_or_if_asked_for(system, wanted, built):
    program = (
        f"import sys, setuptools.command.build_ext; sys.platform = {system!r}; "
        "setuptools.setup = lambda **options: print(options['ext_modules']); "
        "exec(open('setup.py').read(), {'__name__': 'setup', '__file__': 'setup.py'})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NFT_KERNELS_CPU"}
    environment |= {} if wanted is None else {"NFT_KERNELS_CPU": wanted}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert ("nft_kernels._C" in done.stdout) is built
    assert ("the compiled kernels are for Linux, installing without them" in done.stderr) is (
        system != "linux" and not built
    )
