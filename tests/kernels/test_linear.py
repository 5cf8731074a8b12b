"""Products by oneDNN against F.linear in float64."""

import pytest
import torch
import torch.nn.functional as F

from nft_kernels.models import _linear
from nft_kernels.models._linear import linear

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["AVX512", "AVX2"])
def capability(request, monkeypatch):
    """What torch says of the processor; oneDNN runs with either."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    _linear._onednn.cache_clear()
    if request.param == "AVX512" and _linear._onednn() is None:
        pytest.skip("this torch has no oneDNN that fits")
    yield request.param
    _linear._onednn.cache_clear()


def tensors(rows, inputs, outputs):
    draw = torch.Generator().manual_seed(0)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def within(got, wanted, a, b, terms):
    """The bound of a sum of ``terms`` products in any order (Higham, Accuracy and Stability, section 3.1)."""
    assert got.shape == wanted.shape
    bound = (terms + 1) * EPS * (a.double().abs() @ b.double().abs())
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (3, 5), (2, 16)])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (96, 32), (17, 5), (1, 1)])
@pytest.mark.parametrize("strided", [False, True])
def test_product_and_gradients(capability, rows, inputs, outputs, strided):
    x, weight, bias = tensors(rows, inputs, outputs)
    grad = torch.randn(*rows, outputs)
    if strided:
        x, grad = (y.transpose(0, -1).contiguous().transpose(0, -1) for y in (x, grad))
        weight = weight.t().contiguous().t()
    leaves = [y.detach().requires_grad_() for y in (x, weight, bias)]
    y = linear(*leaves)
    y.backward(grad)
    if capability == "AVX512":
        with torch.no_grad():
            assert torch.equal(linear(x, weight, bias), y)
    exact = [y.detach().double().requires_grad_() for y in (x, weight, bias)]
    wanted = F.linear(*exact)
    wanted.backward(grad.double())
    flat, flat_grad = x.flatten(0, -2), grad.flatten(0, -2)
    ones = torch.ones(len(flat), 1)
    both = torch.cat([flat, ones], 1), torch.cat([weight, bias[:, None]], 1).t()
    within(y.flatten(0, -2), wanted.flatten(0, -2), *both, inputs + 1)
    within(leaves[0].grad.flatten(0, -2), exact[0].grad.flatten(0, -2), flat_grad, weight, outputs)
    within(leaves[1].grad, exact[1].grad, flat_grad.t(), flat, len(flat))
    within(leaves[2].grad[:, None], exact[2].grad[:, None], flat_grad.t(), ones, len(flat))


def test_a_row_does_not_depend_on_the_others(capability):
    x, weight, bias = tensors((512,), 128, 384)
    whole = linear(x, weight, bias)
    for rows in (8, 24, 104, 256):
        assert torch.equal(linear(x[-rows:], weight, bias), whole[-rows:])


def operators(x, weight, bias):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        y = linear(x, weight, bias)
    return y, {event.key for event in seen.key_averages()}


def test_who_multiplies(capability):
    (_, names) = operators(*tensors((8,), 16, 32))
    assert ("mkldnn::_linear_pointwise" in names) == (capability == "AVX512")


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "mixed", "autocast", "empty"])
def test_others_are_left_to_torch(capability, kind):
    x, weight, bias = tensors((0,) if kind == "empty" else (8,), 16, 32)
    if kind in ("float64", "bfloat16"):
        x, weight, bias = (y.to(getattr(torch, kind)) for y in (x, weight, bias))
    if kind == "mixed":
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight.double(), bias)
        return
    with torch.autocast("cpu", enabled=kind == "autocast"):
        y, names = operators(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
    assert "mkldnn::_linear_pointwise" not in names
