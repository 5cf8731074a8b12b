"""quantize_rows against a search for the nearest float8 number, in float64."""

import math

import pytest
import torch

from nft_kernels.ops import quantize_rows as module
from nft_kernels.ops.quantize_rows import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels():
    pytest.importorskip("triton", minversion="3.4")
    if reason := module.why_not(DEVICE):
        pytest.skip(reason)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("kernels")
    return request.param


def numbers():
    """All finite float8 numbers from 0 on, made of their exponents and mantissas."""
    return torch.tensor(
        [math.ldexp(m if e == 0 else 8 + m, max(e, 1) - 10) for e in range(16) for m in range(8)][:127],
        dtype=torch.float64,
    )


def codes(rows):
    """Places among the float8 numbers, negative ones below zero; there is one zero."""
    code = rows.view(torch.uint8).long()
    return (code & 127) * (1 - 2 * (code >> 7))


def gelu(x):
    """Of float64."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 37, 1536])
def test_every_element_is_the_nearest_number(backend, width, dtype):
    x = (torch.randn(2, 3, width) * torch.logspace(-3, 3, 6).view(2, 3, 1)).to(dtype)
    rows, scale = quantize_rows(x, backend=backend)
    assert rows.dtype == torch.float8_e4m3fn and rows.shape == (6, width) and rows.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (6, 1)
    exact = x.double().view(6, width)
    torch.testing.assert_close(448 * scale.double(), exact.abs().amax(1, keepdim=True), rtol=3e-7, atol=0)
    scaled = exact / scale.double()
    got, grid = rows.double(), numbers()
    above = torch.bucketize(scaled.abs(), grid).clamp(1, 126)
    nearest = torch.minimum((scaled.abs() - grid[above - 1]).abs(), (scaled.abs() - grid[above]).abs())
    assert torch.all((got - scaled).abs() <= nearest + 3e-7 * scaled.abs())
    assert torch.equal(codes(rows).abs(), torch.searchsorted(grid, got.abs()))


def test_all_numbers_and_their_midpoints(backend):
    """Under a scale of one: numbers stay, halves go to the even of both, and everything else to the nearer."""
    grid = numbers()
    halves = (grid[1:] + grid[:-1]) / 2
    low, high = (torch.nextafter(halves.float(), torch.tensor(end)) for end in (0.0, 448.0))
    x = torch.cat([grid.float(), halves.float(), low, high])
    order, steps = torch.arange(127), torch.arange(126)
    wanted = torch.cat([order, steps + steps % 2, steps, steps + 1])
    # The first element gives every row the scale that float32 has closest to one.
    x = torch.cat([torch.full((2, 1), 448.0), torch.stack([x, -x])], 1)
    rows, scale = quantize_rows(x, backend=backend)
    assert torch.equal(scale, torch.ones(2, 1))
    assert torch.equal(codes(rows)[:, 1:], torch.stack([wanted, -wanted]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree_bitwise(dtype, kernels):
    x = torch.randn(3, 5, 700, device=DEVICE).mul(3).to(dtype)
    plain, fused = (quantize_rows(x, backend=backend) for backend in ("reference", "triton"))
    assert torch.equal(codes(fused[0]), codes(plain[0])) and torch.equal(fused[1], plain[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(backend, dtype):
    """At most one step away, and rarely, from what float64 gives: GELU itself has other last bits."""
    x = torch.randn(4, 16, 384).mul(2).to(dtype)
    rows, scale = quantize_rows(x, gelu=True, backend=backend)
    exact = gelu(x.double()).view(64, 384)
    wanted, wanted_scale = quantize_rows(exact, backend="reference")
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    steps = (codes(rows) - codes(wanted)).abs()
    assert steps.max() <= 1 and steps.double().mean() < 1e-3


def test_any_strides(backend):
    """The sample's part of a joint sequence, part of a fused projection, and rows that are not dense."""
    out, fused = torch.randn(3, 7, 48), torch.randn(6, 3 * 20)
    for x in (out[:, :5], out[:, 5:], out.transpose(0, 1), out[..., ::2], fused.split(20, 1)[1], fused.t()):
        got, wanted = (quantize_rows(y, backend=backend) for y in (x, x.contiguous()))
        assert all(a.is_contiguous() and torch.equal(a.float(), b.float()) for a, b in zip(got, wanted, strict=True))


def test_rows_at_the_ends_of_float32(backend):
    x = torch.zeros(5, 24)
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = 1e-40, 3e38, math.inf, math.nan
    rows, scale = quantize_rows(x, backend=backend)
    assert codes(rows)[0].eq(0).all()
    assert scale[:2].eq(torch.finfo(torch.float32).tiny).all()
    assert rows[2, 4] == 448 and rows[2].float().count_nonzero() == 1
    assert scale[3].isinf() and scale[4].isnan()


def test_no_gradient(backend):
    assert not any(y.requires_grad for y in quantize_rows(torch.randn(2, 8, requires_grad=True), backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, r"x: got shape \(8,\), accepted is \(N, D\) or \(B, S, D\)"),
        ({"x": torch.zeros(2, 0)}, ValueError, "x: got shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"gelu": "no"}, TypeError, "gelu: got 'no'"),
        ({"backend": "native"}, RuntimeError, "it has no kernel for quantize_rows"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        quantize_rows(**({"x": torch.zeros(2, 8)} | change))


def test_a_gpu_without_float8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "it needs an NVIDIA GPU of compute capability 8.9" in module.why_not(torch.device("cuda"))
    assert module.why_not(torch.device("cpu")) is None
