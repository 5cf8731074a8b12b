"""The tests that need a GPU, on one that is not there: see ``pretend_gpu.py``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

CXX, TORCH = shutil.which("g++"), Path(torch.__file__).parent
TESTS = Path(__file__).parents[1]
HERE = TESTS / "pretend_gpu"
TRIED = Version("2.13")
pytestmark = [
    pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="no g++ on Linux"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch for GPUs"),
    pytest.mark.skipif(Version(torch.__version__) < TRIED, reason=f"PyTorch below {TRIED}, whose internals differ"),
]
# Of what a GPU has kernels of its own for.
LEFT_OUT = "not compiled and not attention and not bf16"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    library = tmp_path_factory.mktemp("pretend") / "device.so"
    command = [CXX, "-std=c++20", "-O1", "-fPIC", "-shared", HERE / "device.cpp", f"-I{TORCH / 'include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    subprocess.run([*command, *libraries, "-o", library], check=True)
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, "PRETEND_GPU": str(library), "PYTHONPATH": str(HERE)}


@pytest.mark.parametrize("tests", ["nft/test_gpu.py", "kernels/test_sd3_cuda.py"])
def test_what_needs_a_gpu_mixes_nothing_of_the_host_with_it(environment, tests):
    command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    done = subprocess.run([*command, TESTS / tests], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


MISTAKES = {
    "torch.ones(2, device='cuda') + torch.ones(2)": "are on the host",
    "torch.ones(2)[torch.ones(2, device='cuda') > 0]": "are on the host",
    "torch.ones(2).add_(torch.ones((), device='cuda'))": "are on the host",
    "torch.ones(2, device='cuda').numpy()": "is no array",
    "record(lambda: torch.ones(2, device='cuda').sum().item())": "while a graph is recorded",
    "record(lambda: torch.ones(2).to('cuda'))": "while a graph is recorded",
}
TRY_ALL = """
import sys, pretend_gpu, torch
def record(call):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()
pretend_gpu.pytest_configure()
for mistake in sys.argv[1:]:
    try:
        print(eval(mistake))
    except (RuntimeError, TypeError) as error:
        print(error)
"""


def test_mistakes_are_noticed(environment):
    done = subprocess.run([sys.executable, "-c", TRY_ALL, *MISTAKES], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(MISTAKES), done.stderr
    assert all(message in line for message, line in zip(MISTAKES.values(), lines, strict=True)), lines
