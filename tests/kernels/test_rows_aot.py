"""The kernels on rows of a transformer, compiled ahead of time as test_triton_aot does with the others."""

import sys

import pytest
import test_triton_aot as aot
import torch

# Rows are dense in any layout.
CASES = [case for case in aot.CASES if case[1] == "dense"]
KERNELS = {"_differentiate": 4, "_layer_norm_modulate": 2, "_qk_norm": 2}
# Others have no conversion to this float8.
FLOAT8 = ("sm_90", "sm_100")


def launch_all(backend, dtype, _):
    """All ops with all they can do and with as little, at the sizes of Stable Diffusion 3.5 Medium and Large."""
    from triton.runtime.driver import driver

    def tensor(width):
        """Part of a fused projection."""
        return torch.zeros(2, 32, 3 * width, dtype=dtype).split(width, -1)[1]

    none = torch.empty(0, dtype=dtype)
    for width, full in ((1536, True), (2432, False)):
        row, x = torch.zeros(2, 9 * width, dtype=dtype).split(width, -1)[0], tensor(width)
        dual, y, y2 = (row, tensor(width), tensor(width)) if full else (None, None, None)
        bias = torch.zeros(width, dtype=dtype) if full else None
        h, out2 = (tensor(width), tensor(width)) if full else (none, none)
        inputs = (x, y, y2, bias, dual, dual, row, row, dual, dual)
        backend.layer_norm_modulate(*inputs, h, tensor(width), out2, 1e-6)
        grads = (tensor(width) if full else None, tensor(width), tensor(width) if full else None)
        outputs = (tensor(width), out2, tensor(width) if full else none)
        backend.layer_norm_modulate_gradient(x, dual, dual, row, dual, *grads, *outputs, 1e-6)
        streams = [tensor(width).unflatten(2, (-1, 64)) for _ in range(3 if full else 2)]
        pair, weights = streams[:2], [torch.zeros(64, dtype=dtype)] * 2
        backend.qk_norm(streams, weights, streams, 0, 1e-6)
        backend.qk_norm_gradient(pair, weights, pair, pair, 0, 1e-6)
    if driver.active.get_current_target().arch in (aot.TARGETS[target][1] for target in FLOAT8):
        for width, gelu in ((1536, False), (6144, True), (9728, True)):
            rows = torch.zeros(2, 32, width, dtype=torch.float8_e4m3fn)
            backend.quantize_rows(tensor(width), rows, torch.zeros(64, 1), gelu)


@pytest.fixture(scope="module")
def report():
    return aot.reports(__file__)


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_without_spills(report, target, dtype, layout):
    rows = [row for row in report if row["case"] == [target, dtype, layout]]
    names = [row["kernel"] for row in rows]
    wanted = KERNELS | ({"_quantize_rows": 3} if target in FLOAT8 else {})
    assert {name: names.count(name) for name in sorted(names)} == wanted
    assert all(row["spilled"] == 0 for row in rows)
    assert all(row["vectorized"] for row in rows)


if __name__ == "__main__":
    aot.launch_all, aot.CASES = launch_all, CASES
    aot.main(sys.argv[1])
