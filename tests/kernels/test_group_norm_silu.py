"""group_norm_silu against a definition of its own in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_kernels.backends import native
from nft_kernels.ops import group_norm_silu as module
from nft_kernels.ops.group_norm_silu import group_norm_silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # and groups
    ((1, 1, 1, 1), 1),
    ((2, 3, 1, 1), 3),
    ((5, 8, 3, 7), 4),
    ((2, 12, 5, 5), 1),
    ((3, 16, 33, 31), 8),
    ((2, 32, 8, 8), 8),
    ((1, 16, 160, 160), 8),  # of more blocks than parts
    ((2, 512, 5, 3), 32),
    ((1, 4100, 2, 1), 41),  # more channels than a block
]
compiled = pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")


@pytest.fixture(params=["reference", pytest.param("native", marks=compiled)])
def backend(request):
    return request.param


def definition(x, weight, bias, groups, eps):
    x, weight, bias = x.double(), weight.double(), bias.double()
    parts = x.reshape(x.shape[0], groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    normed = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view(x.shape)
    z = normed * weight[:, None, None] + bias[:, None, None]
    return z * torch.sigmoid(z)


def inputs(shape, dtype, mean=0.0):
    x = (mean + torch.randn(shape)).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, *torch.randn(2, shape[1]).to(dtype)


def check(x, weight, bias, groups, eps=1e-6, backend="native", rounding=1e-15, lenient=True):
    """Within twice the error of the plain formula, where that is ``lenient``, or 4 ulp. Float64 is compared with a
    definition that rounds as well, by about ``rounding``."""
    dtype = x.dtype
    before = [y.clone() for y in (x, weight, bias)]
    got, plain = (group_norm_silu(x, weight, bias, groups=groups, eps=eps, backend=b) for b in (backend, "reference"))
    want = definition(x, weight, bias, groups, eps)
    error, allowed = ((y.double() - want).abs().max() for y in (got, plain))
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias), strict=True))
    assert error <= max(2 * allowed * lenient, 4 * max(torch.finfo(dtype).eps, rounding) * want.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_against_the_definition(backend, shape, groups, dtype):
    check(*inputs(shape, dtype), groups, backend=backend)


@compiled
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_strides_and_dtypes(data):
    draw, size = data.draw, st.integers(1, 9)
    batch, height, width, groups, each = (draw(size) for _ in range(5))
    torch.manual_seed(draw(st.integers(0, 99)))
    order = draw(st.permutations(range(4)))
    shape = (batch, groups * each, height, width)
    step = draw(st.sampled_from([1, 2]))
    stored = [shape[d] for d in order]
    x = torch.randn(*stored[:3], stored[3] * step).to(draw(st.sampled_from(DTYPES)))[..., ::step]
    x = x.permute(*(order.index(d) for d in range(4)))
    assert x.shape == shape
    weight, bias = (
        torch.randn(shape[1], 2).to(dtype)[:, 0] for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=2))[:2]
    )
    check(x, weight, bias, groups, eps=draw(st.sampled_from([1e-6, 1e-3, 1.0])))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [1000.0, -30_000.0])
def test_pictures_far_from_zero(mean, dtype):
    """The plain formula loses digits here."""
    strict = {"rounding": 1e-15 * abs(mean), "lenient": False}
    check(*inputs((3, 16, 40, 40), dtype, mean), 8, **strict)
    x, weight, bias = inputs((2, 64, 9, 9), dtype)
    # Channels of a group that lie apart.
    check((x + mean * torch.rand(64, 1, 1)).to(dtype), weight, bias, 8, **strict)


@compiled
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e15])
def test_small_and_large_values(size):
    x, weight, bias = inputs((2, 16, 9, 9), torch.float32)
    check(size * x, weight, bias, 8)
    # A last bit of the exponent of exp is as much of its result as the exponent is large.
    check(x, size * weight, bias, 8)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_values_leave_the_bias(dtype):
    weight, bias = torch.randn(2, 16).to(dtype)
    for value in (0.0, 1 / 3, 6e4):
        x = torch.full((2, 16, 13, 13), value, dtype=dtype)
        out = group_norm_silu(x, weight, bias, groups=8, eps=1e-2, backend="native")
        want = definition(torch.zeros_like(x), weight, bias, 8, 1e-2)
        # Rounding may leave some of the last bits of a mean.
        torch.testing.assert_close(out.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2e-1 * value * 1e-6)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_group(dtype):
    x, weight, bias = inputs((3, 16, 20, 20), dtype)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[1, 5, 7, 7] = value
        out, clean = (group_norm_silu(y, weight, bias, groups=8, eps=1e-6, backend="native") for y in (spoilt, x))
        assert out[1, 4:6].isnan().all()
        out[1, 4:6] = clean[1, 4:6]
        assert torch.equal(out, clean)
    weight[3] = math.nan
    bias[9] = math.inf
    out = group_norm_silu(x, weight, bias, groups=8, eps=1e-6, backend="native")
    assert out[:, 3].isnan().all() and (out[:, 9] == math.inf).all() and out[:, 10:].isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_element_is_written_and_nothing_around(shape, groups, dtype, monkeypatch):
    """Inputs lie amid NaN, which must not be read."""
    buffers = []

    def guarded(like, shape, fill=7.0):
        size = math.prod(shape)
        buffers.append(torch.full((size + 128,), fill, dtype=like.dtype))
        inner = buffers[-1][64 : 64 + size].view(shape)
        return inner.fill_(math.nan)

    x, weight, bias = inputs(shape, dtype)
    plain = group_norm_silu(x, weight, bias, groups=groups, eps=1e-6, backend="native")
    pixels = x.permute(0, 2, 3, 1)
    x = guarded(x, pixels.shape, math.nan).copy_(pixels).permute(0, 3, 1, 2)
    weight, bias = (guarded(y, y.shape, math.nan).copy_(y) for y in (weight, bias))
    monkeypatch.setattr(module, "new_empty", guarded)
    out = group_norm_silu(x, weight, bias, groups=groups, eps=1e-6, backend="native")
    assert torch.equal(out, plain) and out.isfinite().all()
    assert (buffers[-1][:64] == 7).all() and (buffers[-1][-64:] == 7).all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 16, 64, 64), (2, 32, 200, 70), (5, 32, 8, 8)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(shape, dtype):
    x, weight, bias = inputs(shape, dtype)

    def run(x):
        return group_norm_silu(x, weight, bias, groups=8, eps=1e-6, backend="native")

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found += [run(x), run(x), torch.cat([run(x[:1]), run(x[1:])])]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_gradient_is_the_references():
    x, weight, bias = (y.requires_grad_() for y in inputs((2, 8, 3, 3), torch.float64))
    torch.autograd.gradcheck(lambda *y: group_norm_silu(*y, groups=4, eps=1e-6), (x, weight, bias))


@compiled
@pytest.mark.parametrize("which", range(3))
def test_a_gradient_is_refused(which, monkeypatch):
    tensors = inputs((2, 8, 3, 3), torch.float32)
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match="'native' cannot run: it has no gradient"):
        group_norm_silu(*tensors, groups=4, eps=1e-6, backend="native")
    with torch.no_grad():
        assert not group_norm_silu(*tensors, groups=4, eps=1e-6, backend="native").requires_grad
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "native")
    assert group_norm_silu(*tensors, groups=4, eps=1e-6).requires_grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_and_passes_opcheck(backend, memory_format):
    x, weight, bias = inputs((2, 8, 3, 5), torch.float32)
    x = x.contiguous(memory_format=memory_format)

    def run(x, weight, bias):
        return group_norm_silu(x, weight, bias, groups=4, eps=1e-6, backend=backend)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight, bias)
    torch.testing.assert_close(out, run(x, weight, bias))
    assert out.stride() == run(x, weight, bias).stride()
    if backend == "native":
        args = (x, weight, bias, 4, 1e-6, backend)
        torch.library.opcheck(torch.ops.nft_kernels.group_norm_silu.default, args)


def test_compiles_where_a_gradient_is_needed():
    x, weight, bias = (y.requires_grad_() for y in inputs((2, 8, 3, 5), torch.float32))

    def run(x):
        return group_norm_silu(x, weight, bias, groups=4, eps=1e-6)

    grads = [torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (run, torch.compile(run, backend="aot_eager"))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, ValueError, r"x: got shape \(2, 8, 3\), accepted is \(B, C, H, W\)"),
        ({"x": torch.zeros(0, 8, 3, 3)}, ValueError, "x: got shape"),
        ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"weight": None}, TypeError, "weight: got NoneType"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: got shape \(7,\), accepted is \(C,\)"),
        ({"bias": torch.zeros(8, dtype=torch.bool)}, TypeError, "bias: got torch.bool"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias: got device meta"),
        ({"groups": 3}, ValueError, "groups: got 3, accepted is a divisor of the 8 channels"),
        ({"groups": 0}, ValueError, "groups: got 0"),
        ({"groups": 2.0}, TypeError, "groups: got float"),
        ({"eps": 0.0}, ValueError, "eps: got 0"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
        ({"backend": "triton"}, RuntimeError, "'triton' cannot run: it has no kernel for group_norm_silu"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 4, "eps": 1e-6}
    with pytest.raises(error, match=message):
        group_norm_silu(**(good | change))
