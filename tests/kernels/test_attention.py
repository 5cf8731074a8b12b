"""attention against a definition of its own in float64."""

import functools
import math

import pytest
import torch

from nft_kernels.backends import native
from nft_kernels.models import attention as choices
from nft_kernels.ops.attention import attention

NAMES = ("q", "k", "v")


@pytest.fixture(params=["reference", "native"])
def backend(request):
    return available(request.param)


@pytest.fixture
def kernel():
    return available("native")


def available(name):
    if name == "native" and (reason := native.why_not(torch.empty(0))):
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def default_device():
    with torch.device("cpu"):
        yield


def inputs(shape, dtype=torch.float32, seed=3):
    """Queries, keys, values and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def definition(q, k, v):
    """Query by query: the mean of the values, each with a weight of exp(q k / sqrt(d))."""
    outs = []
    for query in q.unbind(1):
        scores = (query[:, None] * k).sum(-1) / math.sqrt(q.shape[-1])
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        outs.append((weights[..., None] * v).sum(1) / weights.sum(1)[..., None])
    return torch.stack(outs, 1)


def plain(q, k, v):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def results(op, q, k, v, grad):
    """The output and the gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_accurate(got, tensors, slack=4):
    """As accurate as the plain formula but for a factor of 2, or to ``slack`` ulp of the largest."""
    exact = results(definition, *(x.double() for x in tensors))
    rounded = results(plain, *tensors)
    for ours, theirs, wanted in zip(got, rounded, exact, strict=True):
        assert ours.dtype == tensors[0].dtype and ours.shape == wanted.shape
        error, allowed = ((x.double() - wanted).abs().max() for x in (ours, theirs))
        assert error <= max(2 * allowed, slack * torch.finfo(ours.dtype).eps * wanted.abs().max())


@pytest.mark.parametrize("d", [8, 20, 32, 64, 72, 128])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 17, 31, 36, 47, 64, 65, 100, 129, 257])
def test_forward_and_gradients(backend, length, d):
    tensors = inputs((2, length, 2, d))
    assert_accurate(results(functools.partial(attention, backend=backend), *tensors), tensors)


@pytest.mark.parametrize("length", range(1, 40))
def test_every_short_length(kernel, length):
    tensors = inputs((1, length, 1, 9))
    assert_accurate(results(attention, *tensors), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference(dtype):
    tensors = inputs((2, 9, 3, 8), dtype)
    assert_accurate(results(attention, *tensors), tensors)


def test_the_reference_passes_gradcheck():
    tensors = [x.requires_grad_() for x in inputs((1, 5, 2, 4), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, backend="reference"), tensors, fast_mode=True)


def test_strides(backend):
    """A slice of a fused projection and of a joint sequence, transposed heads, one head for all, gaps in a head."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    q = random(3, 11, 3 * 40).split(40, -1)[1].unflatten(-1, (2, 20))
    k = random(3, 19, 2, 20)[:, 8:]
    v = random(3, 2, 11, 20).transpose(1, 2)
    op = functools.partial(attention, backend=backend)
    for tensors in (
        (q, k, v, random(11, 3, 2, 20).transpose(0, 1)),
        (q[:1].expand(3, -1, -1, -1), k[:, :, :1].expand(-1, -1, 2, -1), v, random(3, 1, 2, 20).expand(-1, 11, -1, -1)),
        (random(3, 11, 2, 40)[..., ::2], k, random(3, 11, 20, 2).mT, random(1).expand(3, 11, 2, 20)),
    ):
        got = results(op, *tensors)
        assert_accurate(got, tensors)
        dense = results(op, *(x.contiguous() for x in tensors))
        assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True)) or backend == "reference"


@pytest.mark.parametrize("scale", [10, 1e4, 1e8, 1e15])
def test_large_scores_do_not_overflow(backend, scale):
    q, k, v, grad = inputs((2, 37, 2, 32))
    q, k = scale * q, (scale if scale > 10 else 1) * k
    got = results(functools.partial(attention, backend=backend), q, k, v, grad)
    assert all(x.isfinite().all() for x in got)
    if scale == 10:
        assert_accurate(got, (q, k, v, grad))
    else:
        # One key has all the weight.
        best = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()).argmax(-1)
        wanted = torch.einsum("bihj,bjhd->bihd", torch.nn.functional.one_hot(best, 37).float(), v)
        torch.testing.assert_close(got[0], wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(backend, bad):
    tensors = inputs((2, 21, 2, 24))
    clean = attention(*tensors[:3], backend=backend)
    tensors[0][1, 5, 0, 3] = bad
    got, wanted = attention(*tensors[:3], backend=backend), plain(*tensors[:3])
    assert got[1, 5, 0].isnan().all() and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[~got.isnan()], clean[~got.isnan()])
    # The gradients of its queries stay there too.
    grad_q = results(functools.partial(attention, backend=backend), *tensors)[1]
    assert torch.equal(grad_q.isnan().all(-1), got.isnan().all(-1))


def test_keys_and_values_that_are_not_finite_give_what_pytorch_gives(backend):
    for which, place in ((1, (0, 3, 1, 2)), (2, (1, 4, 0, 7))):
        for bad in (math.nan, math.inf, -math.inf):
            tensors = inputs((2, 21, 2, 24))[:3]
            tensors[which][place] = bad
            got, wanted = attention(*tensors, backend=backend), plain(*tensors)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_weight_that_underflows_is_zero(backend):
    q = torch.full((1, 2, 1, 8), 50.0)
    k = torch.stack([torch.ones(8), -torch.ones(8)])[None, :, None]
    v = torch.tensor([1.0, math.inf]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    # 0 inf, as in PyTorch; any weight above it would give inf.
    assert attention(q, k, v, backend=backend).isnan().all() and plain(q, k, v).isnan().all()


def guarded(like, around):
    """A tensor of this shape full of NaN, and the memory before and after it."""
    memory = torch.full((like.numel() + 600,), around)
    tensor = memory[300:-300].view(like.shape).fill_(math.nan)
    return tensor, (memory[:300], memory[-300:])


@pytest.mark.parametrize(("length", "d"), [(1, 1), (5, 8), (36, 32), (37, 20), (70, 72), (130, 64)])
def test_nothing_outside_is_read_or_written(kernel, length, d):
    tensors = inputs((3, length, 2, d))
    held = [guarded(x, math.nan)[0].copy_(x) for x in tensors]
    outs = [guarded(tensors[0], 7.0) for _ in range(4)]
    native.attention(*held[:3], outs[0][0])
    native.attention_gradient(*held, *(out for out, _ in outs[1:]))
    assert_accurate([out for out, _ in outs], tensors)
    assert all(side.eq(7).all() for _, sides in outs for side in sides)
    assert all(torch.equal(a, b) for a, b in zip(held, tensors, strict=True))


@pytest.mark.parametrize("shape", [(7, 36, 4, 32), (7, 130, 3, 72)], ids=str)
def test_bitwise_on_rerun_for_any_threads_and_any_batch(kernel, shape):
    tensors = inputs(shape)
    first, threads = results(attention, *tensors), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = results(attention, *tensors)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        torch.set_num_threads(threads)
    for b in range(shape[0]):
        alone = results(attention, *(x[b : b + 1] for x in tensors))
        assert all(torch.equal(a[0], whole[b]) for a, whole in zip(alone, first, strict=True))


def test_instruction_sets_agree(kernel, monkeypatch):
    tensors = inputs((2, 45, 2, 40))
    for isa in native._C.isas:
        monkeypatch.setenv("NFT_KERNELS_ISA", isa)
        assert_accurate(results(attention, *tensors), tensors)


def test_compiles_and_passes_opcheck(backend):
    *tensors, grad = inputs((2, 9, 3, 12))
    run = functools.partial(attention, backend=backend)
    eager = results(run, *tensors, grad)
    compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), *tensors, grad)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if backend == "native":
        leaves = [x.requires_grad_() for x in tensors]
        torch.library.opcheck(torch.ops.nft_kernels.attention.default, tuple(leaves))
        torch.library.opcheck(torch.ops.nft_kernels.attention_gradient.default, (*inputs((2, 9, 3, 12)),))


def test_transforms_of_functions_take_the_reference():
    tensors = inputs((2, 5, 2, 8))[:3]
    torch.testing.assert_close(
        torch.func.vmap(lambda *x: attention(*(y[None] for y in x))[0])(*tensors), plain(*tensors)
    )
    with pytest.raises(RuntimeError, match=r"backend: 'native' cannot run: transforms of torch.func"):
        torch.func.vmap(lambda *x: attention(*(y[None] for y in x), backend="native"))(*tensors)


def test_forward_mode_derivatives_are_not_lost_without_gradients():
    q, k, v = inputs((2, 5, 2, 8))[:3]
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, torch.ones_like(v))
        tangent = torch.autograd.forward_ad.unpack_dual(attention(q, k, dual)).tangent
    # It is linear in the values.
    torch.testing.assert_close(tangent, attention(q, k, torch.ones_like(v)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 36)}, ValueError, r"q: got shape \(2, 5, 36\), accepted is \(B, S, H, d\)"),
        ({"q": torch.zeros(0, 5, 3, 12)}, ValueError, "q: got shape"),
        ({"q": torch.zeros(2, 5, 3, 12).int()}, TypeError, "q: got torch.int32"),
        ({"k": torch.zeros(2, 4, 3, 12)}, ValueError, r"k: got shape \(2, 4, 3, 12\), accepted is the shape of q"),
        ({"v": torch.zeros(2, 5, 3, 8)}, ValueError, "v: got shape"),
        ({"v": None}, TypeError, "v: got NoneType"),
        ({"v": torch.zeros(2, 5, 3, 12).double()}, TypeError, "v: got torch.float64, accepted is the dtype of q"),
        ({"backend": "triton"}, RuntimeError, "backend: 'triton' cannot run: it has no kernel for attention"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast', accepted are"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attention(**dict(zip(NAMES, inputs((2, 5, 3, 12))[:3], strict=True)) | change)


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    tensors = inputs((2, 5, 3, 12), torch.bfloat16)[:3]
    with pytest.raises(RuntimeError, match=r"backend: 'native' cannot run: it takes float32, not torch\.bfloat16"):
        attention(*tensors, backend="native")
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="NFT_KERNELS_BACKEND: 'triton' cannot run"):
        attention(*tensors)


def test_the_choice(kernel, monkeypatch):
    monkeypatch.delenv("NFT_KERNELS_BACKEND", raising=False)
    cpu, select = torch.device("cpu"), choices.select
    assert {select("auto", (batch, 36, 4, 32), torch.float32, cpu) for batch in (1, 7, 64)} == {"short"}
    longest = choices._SHORT
    assert select("auto", (1, longest, 4, 32), torch.float32, cpu) == "short"
    assert select("auto", (1, longest + 1, 4, 32), torch.float32, cpu) == "flash"
    assert select("auto", (1, 36, 4, 32), torch.bfloat16, cpu) == "flash"
    with pytest.raises(RuntimeError, match=r"attention: 'short' cannot run .*: it takes float32, not torch.float64"):
        select("short", (1, 36, 4, 32), torch.float64, cpu)
    q = torch.empty(1, 36, 4, 32, device="meta")
    assert "not on meta" in choices.why_not("short", q, q, q)
    for named in ("reference", "triton"):
        monkeypatch.setenv("NFT_KERNELS_BACKEND", named)
        if named == "reference":
            assert select("auto", (1, 36, 4, 32), torch.float32, cpu) == "flash"
        assert select("short", (1, 36, 4, 32), torch.float32, cpu) == "short"
    monkeypatch.delenv("NFT_KERNELS_BACKEND")
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "IMPORT_ERROR", "left out")
    assert select("auto", (1, 36, 4, 32), torch.float32, cpu) == "flash"
    with pytest.raises(RuntimeError, match="the compiled module is not installed"):
        select("short", (1, 36, 4, 32), torch.float32, cpu)
