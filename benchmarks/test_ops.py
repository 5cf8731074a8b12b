"""The cases of ``python -m nft_kernels.bench`` under pytest-benchmark: ``python -m pytest benchmarks``."""

from itertools import product

import pytest
import torch

from nft_kernels.bench import PROVIDERS, Case, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = [("nft_loss", "forward"), ("nft_loss", "both"), ("add_noise", "forward"), ("solver_step", "forward")]
CASES = [
    Case(op, mode, dtype, shape, 9, "warm")
    for (op, mode), dtype, shape in product(OPS, ("float32", "bfloat16"), ("sd35_512", "flux_1024"))
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.mode}-{case.dtype}-{case.shape}")
def test_time(benchmark, case, provider):
    try:
        work = build(case, DEVICE, [provider])
    except ValueError as error:
        pytest.skip(str(error))
    error = (work.checked[provider]().double() - work.exact).abs().max()
    assert error <= 16 * torch.finfo(getattr(torch, case.dtype)).eps * work.size

    def run():
        work.calls[provider]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
