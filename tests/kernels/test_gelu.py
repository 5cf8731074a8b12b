"""gelu against a definition of its own in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nft_kernels.backends import native
from nft_kernels.ops.gelu import gelu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
compiled = pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")


@pytest.fixture(params=["reference", pytest.param("native", marks=compiled)])
def backend(request):
    return request.param


def definition(x):
    """x times a sigmoid, which keeps its digits at both ends."""
    x = x.double()
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def slope(x):
    x = x.double().detach().requires_grad_()
    return torch.autograd.grad(definition(x).sum(), x)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 5, 1027)], ids=str)
def test_forward_and_gradient(backend, shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.randn(shape).to(dtype)
    results = [
        (y, *torch.autograd.grad(y, x, weight)) for y in (gelu(x, backend=backend), F.gelu(x, approximate="tanh"))
    ]
    for got, plain, want in zip(*results, (definition(x), weight.double() * slope(x)), strict=True):
        assert got.dtype == dtype and got.shape == shape
        error, allowed = ((y.double() - want).abs().max() for y in (got, plain))
        # Float64 is compared with a definition that rounds as well.
        assert error <= max(2 * allowed, 4 * max(torch.finfo(dtype).eps, 1e-15) * want.abs().max())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_negative_values_keep_their_digits(dtype):
    x = torch.linspace(-9, 9, 4001, dtype=dtype).requires_grad_()
    out = gelu(x, backend="native")
    (grad,) = torch.autograd.grad(out.sum(), x)
    eps = torch.finfo(dtype).eps
    # The exponent is rounded, by which its size counts.
    assert ((out - definition(x)).abs() <= 4 * eps * (1 + x.abs() ** 3) * definition(x).abs()).all()
    assert (
        (grad - slope(x)).abs() <= 8 * eps * (1 + x.abs() ** 3) * (slope(x).abs() + (definition(x) / x).abs())
    ).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values(backend, dtype):
    large = torch.tensor([20.0, 3e4, torch.finfo(dtype).max], dtype=torch.float64)
    x = torch.cat([-large, large, torch.tensor([math.inf, -math.inf, math.nan])]).to(dtype).repeat(5).requires_grad_()
    out = gelu(x, backend=backend)
    assert torch.equal(out[3:7], x[3:7]) and (out[:3].double().abs() < 1e-30).all() and out[7:9].isnan().all()
    assert torch.equal(out[9:].nan_to_num(7), out[:-9].nan_to_num(7))
    if backend == "native":
        # torch's own has a NaN where a factor overflows beside one that is 0.
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad[8].isnan() and (grad[3:7] == 1).all()
        assert (grad[[0, 1, 2, 7]].double().abs() < 1e-30).all()


def test_any_strides(backend):
    x = torch.randn(3, 5, 8).transpose(0, 1)[..., ::2].requires_grad_()
    out = gelu(x, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out.double(), definition(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), slope(x), rtol=1e-5, atol=1e-6)


def test_compiles_and_passes_opcheck(backend):
    x = torch.randn(3, 37, requires_grad=True)
    eager, out = gelu(x, backend=backend), torch.compile(gelu, fullgraph=True, backend="aot_eager")(x, backend=backend)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (eager, out)]
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(*grads)
    if backend == "native":
        torch.library.opcheck(torch.ops.nft_kernels.gelu.default, (x, backend))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 0)}, ValueError, "x: got shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
        (
            {"backend": "triton"},
            RuntimeError,
            "'triton' cannot run: it has no kernel for gelu, accepted are native, ref",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        gelu(**({"x": torch.zeros(2, 8)} | change))
