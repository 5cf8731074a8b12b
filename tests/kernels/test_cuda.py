"""The CUDA kernels on a GPU. Under `compute-sanitizer python -m pytest` every access to memory is checked too."""

import pytest
import torch

# Collected here as well, where ``backend`` and ``kernels`` are those of a GPU.
from test_nft_loss_options import (  # noqa: F401
    test_a_sample_that_is_masked_out_counts_as_nothing,
    test_any_combination,
    test_long_samples_keep_the_error_bound,
    test_mask,
    test_numbers_beyond_their_range_that_nobody_looked_at_give_nan,
    test_option,
    test_packed_sequences,
    test_packed_sequences_equal_separate_ones,
    test_policy_weight,
    test_r_per_token_and_element,
    test_reruns_of_all_options_give_the_same_bits,
    test_what_is_masked_is_not_looked_at,
)

from nft_kernels import add_noise, nft_loss, solver_step
from nft_kernels.backends import native
from nft_kernels.check import compare_nft_loss
from nft_kernels.reference import add_noise as noise_reference
from nft_kernels.solvers import schedule, table

DEVICE = "cuda"
REASON = native.why_not(torch.empty(0, device=DEVICE)) if torch.cuda.is_available() else "no GPU"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (1, 1),
    (2, 16),
    (3, 5, 31, 29),  # no whole packs
    (9, 16, 64, 64),  # the usual latents, in clusters
    (24, 16, 64, 64),
    (1, 16, 128, 128),
    (2, 16, 160, 161),
    (1, 1_000_001),  # in two launches
    (1, 3_000_001),
    (2, 16, 21, 60, 104),  # a video, on all processors at once
    (3, 2_000_000),
    (2, 8_000_000),  # more than they can hold
    (70_000, 16),
]


@pytest.fixture(scope="module", params=["native"])
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=["native"])
def kernels(request):
    return request.param


@pytest.fixture(autouse=True)
def default_device():
    with torch.device(DEVICE):
        yield


def inputs(shape, dtype=torch.float32, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    x = [torch.randn(shape, generator=g, device=DEVICE).to(dtype) for _ in range(5)]
    t, r = (torch.rand(shape[0], generator=g, device=DEVICE) for _ in range(2))
    return x, t, r


def compare(x, t, r, **options):
    compare_nft_loss(*x[:4], t, r, v_ref=x[4], kl_weight=0.1, backend="native", **options)


def loss_and_gradient(x, t, r, scale=None, **options):
    leaf = x[0].detach().requires_grad_()
    out = nft_loss(leaf, *x[1:4], t, r, backend="native", **options)
    out.loss.backward(scale)
    return [*out, leaf.grad]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_against_the_float64_reference(shape, dtype):
    x, t, r = inputs(shape, dtype)
    compare(x, t, r)
    compare_nft_loss(*x[:4], t, r, backend="native", beta=0.3)


@pytest.mark.parametrize("weighting", ["none", "t", "t2", "1/t", "1/t2", "(1-t)/t2"])
def test_weightings(weighting):
    compare(*inputs((3, 16, 32, 32)), weighting=weighting)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_weighs_elements_may_be_wider_than_the_latents(dtype):
    x, t, r = inputs((3, 8, 31, 32), dtype)
    mask, r = torch.rand(3, 1, 31, 32, dtype=torch.float64), r.double().view(-1, 1, 1, 1)
    got, wide = (
        nft_loss(*(a.to(kind) for a in x[:4]), t, r, mask=mask, backend=backend)
        for backend, kind in (("native", dtype), ("reference", torch.float64))
    )
    for ours, theirs in zip(got, wide, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4, 32, 32), (1, 8, 512, 512)], ids=str)
def test_mixed_dtypes_and_per_sample_beta(shape):
    x, t, r = inputs(shape)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float16)
    x = [a.to(dtype) for a, dtype in zip(x, dtypes, strict=True)]
    compare(x, t.double(), r.bfloat16(), beta=torch.rand(shape[0], device=DEVICE) + 0.1)
    x[3] = x[3].double()
    compare(x, t, r)


@pytest.mark.parametrize("side", [8, 128])
def test_strides(side):
    x, t, r = inputs((3, 8, side, side))
    x[0] = x[0].to(memory_format=torch.channels_last)
    x[1] = x[1][:1, :, :1].expand_as(x[0])
    x[2] = torch.randn(3, 8, 2 * side, 2 * side, device=DEVICE)[:, :, ::2, 1::2]
    x[3] = x[3].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    compare(x, t[:, None].expand(3, 2)[:, 0], r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [4096, 400_000])
def test_misaligned_pointers_and_samples(elements, dtype):
    x, t, r = inputs((3, elements), dtype)
    x[1] = torch.empty(3 * elements + 1, device=DEVICE, dtype=dtype)[1:].view(3, elements).copy_(x[1])
    x[2] = torch.empty(3, elements + 1, device=DEVICE, dtype=dtype)[:, :-1].copy_(x[2])
    compare(x, t, r)


@pytest.mark.parametrize("elements", [16, 1003, 65_536, 1_000_001, 2_000_000])
def test_nothing_is_written_around_the_outputs(elements, monkeypatch):
    x, t, r = inputs((3, elements), torch.bfloat16)
    buffers = []

    def guarded(like, dtype=None):
        buffer = torch.full((like.numel() + 512,), 7.0, dtype=dtype or like.dtype, device=like.device)
        buffers.append(buffer)
        return buffer[256:-256].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", guarded)
    loss_and_gradient(x, t, r)
    weights = {"mask": x[2].abs(), "policy_weight": x[3].abs()}
    every = {**weights, "segments": torch.tensor([0, 1, 3]), "detach_weight": False}
    loss_and_gradient(x, t[:2], x[3].abs().clamp_max(1), **every)
    add_noise(x[0], t, seed=1, backend="native")
    solver_step(table("flow-sde", schedule(4)), 1, x[0], x[1], seed=1, x0=True, backend="native")
    assert len(buffers) >= 5
    assert all(b[:256].eq(7).all() and b[-256:].eq(7).all() for b in buffers)


@pytest.mark.parametrize("shape", [(9, 16, 64, 64), (2, 16, 21, 60, 104), (70_000, 16)], ids=str)
def test_reruns_are_bitwise_equal_and_inputs_stay(shape):
    x, t, r = inputs(shape, torch.bfloat16)
    before = [a.clone() for a in x]
    first = loss_and_gradient(x, t, r, v_ref=x[4], kl_weight=0.1)
    assert all(equal(first, loss_and_gradient(x, t, r, v_ref=x[4], kl_weight=0.1)) for _ in range(20))
    assert equal(before, x)


def test_forward_alone_gives_the_same_values():
    for shape in SHAPES:
        x, t, r = inputs(shape)
        assert equal(nft_loss(*x[:4], t, r, backend="native"), loss_and_gradient(x, t, r)[:-1])


@pytest.mark.parametrize("shape", [(3, 7, 9), (2, 16, 64, 64), (2, 1_000_000), (2, 2_000_000)], ids=str)
def test_gradient_vanishes_exactly_where_nothing_is_to_learn(shape):
    x, t, _ = inputs(shape)
    x[0] = x[1].clone()
    assert loss_and_gradient(x, t, torch.full_like(t, 0.5))[-1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1001, 65_536])
def test_gradient_scale(elements, dtype):
    x, t, r = inputs((3, elements), dtype)
    one, four = (loss_and_gradient(x, t, r, torch.tensor(s, device=DEVICE)) for s in (1.0, 4.0))
    if dtype == torch.float16:
        exact = loss_and_gradient([a.double() for a in x], t, r, torch.tensor(65536.0, device=DEVICE))[-1]
        grad = loss_and_gradient(x, t, r, torch.tensor(65536.0, device=DEVICE))[-1].double()
        assert ((grad - exact).abs() <= 0.01 * exact.abs() + 1e-5).all()
    else:
        assert torch.equal(four[-1], 4 * one[-1])


@pytest.mark.parametrize("shape", [(2, 40), (2, 16, 64, 64), (2, 1_000_000), (2, 2_000_000)], ids=str)
def test_nan_is_not_hidden(shape):
    x, t, r = inputs(shape)
    x[0][0].view(-1)[3] = float("nan")
    out = nft_loss(*x[:4], t, r, backend="native")
    assert all(value[0].isnan() and value[1].isfinite() for value in (out.policy_loss, out.old_deviation_max))
    assert out.loss.isnan()


def test_nothing_synchronises():
    x, t, r = inputs((4, 16, 64, 64))
    for dtype in (torch.float32, torch.float16):
        cast = [a.to(dtype) for a in x]
        loss_and_gradient(cast, t, r)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_gradient(cast, t, r, torch.full((), 3.0, device=DEVICE))
            add_noise(cast[0], t, seed=3, backend="native")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(9, 16, 64, 64), (2, 16, 21, 60, 104)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_graph(shape, dtype):
    x, t, r = inputs(shape, dtype)
    seed = torch.arange(shape[0], device=DEVICE)

    def step():
        x_t = add_noise(x[3], t, seed=seed, out_dtype=torch.float32, backend="native")
        return [x_t, *loss_and_gradient([*x[:2], x_t, x[3]], t, r)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for fresh in range(3):
        for a, b in zip(x, inputs(shape, dtype, seed=fresh)[0], strict=True):
            a.copy_(b)
        graph.replay()
        assert equal(captured, step())


@pytest.mark.parametrize("shape", [(9, 16, 64, 64), (2, 16, 21, 60, 104)], ids=str)
def test_streams_do_not_disturb_each_other(shape):
    sets = [inputs(shape, torch.bfloat16, seed) for seed in range(4)]
    expected = [loss_and_gradient(*s) for s in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results = [[] for _ in sets]
    for _ in range(50):
        for s, stream, found in zip(sets, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss_and_gradient(*s))
    torch.cuda.synchronize()
    assert all(equal(e, again) for e, found in zip(expected, results, strict=True) for again in found)


def test_compiles_whole():
    x, t, r = inputs((4, 16, 32, 32))

    def step(v):
        return nft_loss(v, *x[1:4], t, r, v_ref=x[4], kl_weight=0.1, backend="native").loss

    eager, compiled = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1003), (9, 16, 64, 64), (70_000, 16)], ids=str)
def test_noise_is_that_of_the_reference(shape, dtype):
    x, t, _ = inputs(shape, dtype)
    seed = torch.arange(shape[0], device=DEVICE) * 2**33 - 5
    noise = noise_reference.normals(seed, torch.zeros_like(seed), x[0][0].numel()).view(shape)
    drawn = add_noise(torch.zeros_like(x[0]), torch.ones_like(t), seed=seed, out_dtype=torch.float32, backend="native")
    assert ((drawn - noise).abs() <= 4 * torch.finfo(torch.float32).eps * noise.abs().clamp_min(1)).all()
    for given in ({"noise": x[1]}, {"seed": seed}):
        eps = given.get("noise", noise).double()
        x_t = add_noise(x[0], t, **given, backend="native")
        exact = noise_reference.add_noise(x[0].double(), t, eps, torch.float64)
        tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert x_t.dtype == dtype and ((x_t.double() - exact).abs() <= tolerance * exact.abs().clamp_min(1)).all()


def compare_steps(solver, x):
    """All rows of a table in a row, by the compiled module and by the reference."""
    history = {"native": (), "reference": ()}
    seed, eps = torch.arange(len(x[0]), device=x[0].device), torch.finfo(x[0].dtype).eps
    for i, row in enumerate(solver.rows):
        noisy = {"seed": seed, "log_prob": True} if row.c > 0 else {}
        options = {"v_uncond": x[2], "guidance": 4.5, "x0": True, **noisy}
        outs = {b: solver_step(solver, i, x[0], x[1], history[b], **options, backend=b) for b in history}
        ours, theirs = outs["native"], outs["reference"]
        history = {b: out.history for b, out in outs.items()}
        for a, b in ((ours.x, theirs.x), (ours.x0, theirs.x0)):
            assert (a.double() - b.double()).abs().max() <= 8 * max(eps, 1e-7) * b.double().abs().max().clamp_min(1)
        if noisy:
            assert torch.allclose(ours.log_prob, theirs.log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 33, 31), (9, 16, 64, 64), (1, 2_000_000)], ids=str)
@pytest.mark.parametrize("name", ["heun", "flow-sde", "dpm++3M", "deis", "unipc"])
def test_solver_step_against_the_reference(name, shape, dtype):
    solver = table(name, schedule(5, shift=3.0))
    x, _, _ = inputs(shape, torch.float32 if dtype == "mixed" else dtype)
    if dtype == "mixed":
        x[1], x[2] = x[1].bfloat16(), x[2].half()
    compare_steps(solver, x)


def test_more_than_two_to_the_31_elements():
    elements = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 8 * elements:
        pytest.skip("needs 18 GB")
    zeros = torch.zeros(1, elements, dtype=torch.bfloat16, device=DEVICE)
    v_theta = zeros.clone()
    v_theta[0, -1] = 1000
    t, r = torch.full((1,), 0.5, device=DEVICE), torch.full((1,), 0.25, device=DEVICE)
    assert torch.equal(add_noise(v_theta, torch.zeros_like(t), seed=0, backend="native"), v_theta)
    leaf = v_theta.requires_grad_()
    out = nft_loss(leaf, zeros, zeros, zeros, t, r, backend="native", weighting="none")
    out.loss.backward()
    assert out.old_deviation_max.item() == 1000 and leaf.grad[0, -1] != 0 and leaf.grad.count_nonzero() == 1
