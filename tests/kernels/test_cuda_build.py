"""What of the CUDA kernels can be tested without a GPU: how they compile, and how they cut up tensors."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
CXX = shutil.which(os.environ.get("CXX", "g++"))
FRAME = re.compile(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes")

SLICES = r"""
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "cuda/slices.h"
using namespace nft;
using namespace nft::cuda;

void expect(bool right, const char* what) {
  if (!right) { std::puts(what); std::exit(1); }
}

int main() {
  for (int64_t batch : {1, 2, 9, 512, 513, 70000})
    for (int64_t packs : {1, 2, 31, 32, 255, 256, 257, 8192, 100003, 1 << 28}) {
      const Slices s = slices_of(batch, packs);
      expect(s.splits >= 1 && s.splits <= most_splits(batch), "slices for the grid");
      expect(batch * most_splits(batch) <= batch + kBlocks, "slices for the workspace");
      expect(s.first(0) == 0 && s.last(s.splits - 1) == packs, "both ends");
      for (int64_t i = 0; i < s.splits; ++i) {
        expect(s.first(i) < s.last(i), "no slice is empty");
        expect(i == 0 || s.first(i) == s.last(i - 1), "every pack once");
      }
      const int threads = threads_for(s.length);
      expect(threads % 32 == 0 && threads >= 32 && threads <= kThreads, "threads");
    }
  // Element (i, j, k) of a (3, 5, 7) tensor with strides (100, 0, 3).
  View view{nullptr, kFloat32, 0, 3, {3, 5, 7}, {100, 0, 3}};
  for (int64_t e = 0; e < 105; ++e) {
    const Run run = run_at(view, e);
    expect(run.offset == e / 35 * 100 + e % 7 * 3 && run.length == 7 - e % 7, "three dimensions");
  }
  view = View{nullptr, kFloat32, 0, 1, {int64_t(1) << 40}, {2}};
  expect(run_at(view, int64_t(1) << 39).offset == int64_t(1) << 40, "beyond 32 bits");
  expect(run_at(View{}, 0).offset == 0, "one element");

  alignas(16) char data[64];
  auto aligned = [&](int shift, int dtype, int64_t batch_stride, int64_t stride, int64_t batch, int64_t elements) {
    return packed<float>(View{data + shift, dtype, batch_stride, 1, {elements}, {stride}}, batch, elements);
  };
  expect(aligned(0, kBFloat16, 64, 1, 2, 64) && aligned(0, kFloat32, 64, 1, 2, 64), "packed");
  expect(aligned(0, kBFloat16, 3, 1, 1, 64), "the batch stride of one sample means nothing");
  expect(!aligned(2, kBFloat16, 64, 1, 2, 64), "pointer");
  expect(!aligned(0, kBFloat16, 65, 1, 2, 64), "batch stride");
  expect(!aligned(0, kBFloat16, 64, 2, 2, 64), "stride");
  expect(!aligned(0, kBFloat16, 64, 1, 2, 63), "part of a pack");
  expect(!aligned(0, kFloat64, 64, 1, 2, 64), "more than two words");
}
"""


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_slices_runs_and_alignment(tmp_path):
    (tmp_path / "slices.cpp").write_text(SLICES)
    program = tmp_path / "slices"
    subprocess.run([CXX, "-std=c++17", f"-I{CSRC}", tmp_path / "slices.cpp", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", ["nft_loss", "add_noise", "solver_step"])
def test_kernels_use_no_local_memory(source, arch, tmp_path):
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-Werror",
        "all-warnings",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Xptxas",
        "-v",
    ]
    result = subprocess.run(
        [*command, CSRC / "cuda" / f"{source}.cu", "-o", tmp_path / "out.cubin"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = FRAME.findall(result.stderr + result.stdout)
    assert kernels
    assert not [kernel for kernel in kernels if any(int(size) for size in kernel[1:])]
