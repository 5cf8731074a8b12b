"""The cases of ``python -m nft_kernels.bench`` under pytest-benchmark: ``python -m pytest benchmarks``."""

import pytest
import torch

from nft_kernels.bench import Case, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    *(Case("nft_loss", mode, "float32", "sd35_512", 9, "warm") for mode in ("forward", "both")),
    Case("add_noise", "forward", "float32", "sd35_512", 9, "warm"),
    Case("solver_step", "forward", "float32", "sd35_512", 9, "warm"),
]


@pytest.mark.parametrize("provider", ["eager", "native", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.mode}")
def test_time(benchmark, case, provider):
    work = build(case, DEVICE, ["eager", provider])
    if provider not in work.calls:
        pytest.skip(f"{provider} does not run here")
    assert (work.checked[provider]().double() - work.exact).abs().max() <= 16 * torch.finfo(
        torch.float32
    ).eps * work.size

    def run():
        work.calls[provider]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
