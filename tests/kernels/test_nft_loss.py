"""The loss against the design's closed form, written independently here in float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_kernels import add_noise, nft_loss
from nft_kernels.backends import load, native
from nft_kernels.check import KernelMismatchError, compare_nft_loss
from nft_kernels.reference.nft_loss import Options

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
M = 5.0


def inputs(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    options = {"generator": g, "dtype": torch.float64, "device": "cpu"}
    x = [torch.randn(shape, **options).to(torch.get_default_device(), dtype) for _ in range(5)]
    t, r = (torch.rand(shape[0], **options).to(torch.get_default_device(), torch.float32) for _ in range(2))
    return x, t, r


def closed_form(v_theta, v_old, x_t, x0, t, r, v_ref=None, beta=1.0, kl_weight=0.0, weighting="adaptive"):
    """Loss, per-sample values, gradient by hand, and the size of the terms that the gradient is the sum of."""
    v_theta, v_old, x_t, x0, t, r = (x.double() for x in (v_theta, v_old, x_t, x0, t, r))
    batch, losses, grad, size = len(t), [], torch.zeros_like(v_theta), 0.0
    betas = torch.as_tensor(beta, dtype=torch.float64).expand(batch)
    rows = {k: [] for k in ("policy", "l+", "l-", "w+", "w-", "kl", "dev", "max")}
    for i in range(batch):
        b, n = betas[i], x0[i].numel()
        branches = []
        for sign in (1, -1):
            velocity = (1 - sign * b) * v_old[i] + sign * b * v_theta[i]
            e = x_t[i] - t[i] * velocity - x0[i]
            w = e.abs().mean().clamp_min(1e-5) if weighting == "adaptive" else torch.ones(()).double()
            s = t[i]
            scale = {"t": s, "t2": s**2, "1/t": 1 / s, "1/t2": s**-2, "(1-t)/t2": (1 - s) / s**2}.get(weighting, 1.0)
            branches.append((scale * (e * e).mean() / w, w, -2 * scale * sign * b * t[i] * e / (n * w)))
        (lp, wp, gp), (ln, wn, gn) = branches
        policy = M * (r[i] * lp + (1 - r[i]) * ln) / b
        terms = [M * r[i] * gp / b / batch, M * (1 - r[i]) * gn / b / batch]
        grad[i] = sum(terms)
        size = max(size, *(term.abs().max().item() for term in terms))
        kl = torch.zeros(()).double()
        if v_ref is not None:
            delta = v_theta[i] - v_ref[i].double()
            kl = (delta * delta).mean()
            grad[i] += 2 * kl_weight * delta / n / batch
        d = (v_theta[i] - v_old[i]).abs()
        for key, value in zip(rows, (policy, lp, ln, wp, wn, kl, d.mean(), d.max()), strict=True):
            rows[key].append(value)
        losses.append(policy + kl_weight * kl)
    return torch.stack(losses).mean(), {k: torch.stack(v) for k, v in rows.items()}, grad, size


def bound(size, dtype):
    """4 units in the last place at the top of the binade of the largest value, so 8 eps of it at the bottom."""
    return 8 * torch.finfo(dtype).eps * size + 1e-12


def condition(v_theta, v_old, x_t, x0, t, beta):
    """How much e+- = x_t - t v+- - x0 is smaller than what it is the sum of: with few elements it may nearly cancel,
    and the inputs' own rounding then is that much larger in it."""
    worst = 1.0
    for i in range(len(t)):
        terms = x_t[i].abs().double() + x0[i].abs() + t[i] * (1 + 2 * beta) * (v_old[i].abs() + v_theta[i].abs())
        for sign in (1, -1):
            velocity = (1 - sign * beta) * v_old[i].double() + sign * beta * v_theta[i].double()
            weight = (x_t[i].double() - t[i] * velocity - x0[i]).abs().mean()
            worst = max(worst, (terms.max() / weight).item())
    return worst


def assert_matches(x, t, r, backend, slack=1.0, **options):
    leaf = x[0].clone().requires_grad_()
    v_ref = x[4] if options.get("kl_weight") else None
    out = nft_loss(leaf, *x[1:4], t, r, v_ref=v_ref, backend=backend, **options)
    loss, rows, grad, size = closed_form(*x[:4], t, r, v_ref=v_ref, **options)
    used = x[:4] if v_ref is None else x
    math = torch.float64 if any(a.dtype == torch.float64 for a in used) else torch.float32
    assert out.loss.dtype == math and out.loss.shape == ()
    for got, exact in zip(out, (loss, *rows.values()), strict=True):
        assert (got.detach().double() - exact).abs().max().item() <= slack * bound(exact.abs().max().item(), math)
    (scaled,) = torch.autograd.grad(out.loss, leaf)
    assert scaled.dtype == leaf.dtype
    assert (scaled.double() - grad).abs().max().item() <= slack * bound(max(size, grad.abs().max().item()), leaf.dtype)


@pytest.mark.parametrize("weighting", ["adaptive", "none", "t", "t2", "1/t", "1/t2", "(1-t)/t2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_weighting(backend, dtype, weighting):
    x, t, r = inputs((3, 4, 17, 13), dtype)
    assert_matches(x, t, r, backend, weighting=weighting, beta=0.7, kl_weight=0.01)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    edges=st.lists(st.sampled_from([0.0, 1.0, 0.37]), min_size=2, max_size=2),
    beta=st.floats(0.05, 10),
    seed=st.integers(0, 99),
    transpose=st.booleans(),
)
def test_any_shape_dtype_mix_and_stride(backend, shape, dtypes, edges, beta, seed, transpose):
    if backend == "triton":
        shape = [min(n, 4) for n in shape]  # the interpreter is slow
    x, t, r = inputs(tuple(shape), seed=seed)
    x = [a.to(d) for a, d in zip(x, dtypes, strict=True)]
    if transpose and len(shape) > 2:
        x = [a.transpose(1, -1).contiguous().transpose(1, -1) if i % 2 else a for i, a in enumerate(x)]
    t[0], r[0] = edges
    assert_matches(x, t, r, backend, slack=condition(*x[:4], t, beta), beta=beta, kl_weight=0.1)


def test_samples_larger_than_a_chunk(backend):
    x, t, r = inputs((2, 16, 65, 63))
    assert_matches(x, t, r, backend, kl_weight=0.5)


def test_first_step_of_an_epoch_has_no_deviation(backend):
    """With v_theta == v_old both branches coincide, and the gradient is that of (2r-1) times the SFT loss."""
    x, t, r = inputs((4, 3, 8, 8))
    x[1] = x[0].clone()
    assert_matches(x, t, r, backend)
    out = nft_loss(*x[:4], t, r, backend=backend)
    assert out.old_deviation_max.eq(0).all() and torch.equal(out.positive_loss, out.negative_loss)


def test_gradient_vanishes_exactly_where_nothing_is_to_learn(backend):
    x, t, _ = inputs((3, 7, 9))
    leaf = x[1].clone().requires_grad_()
    nft_loss(leaf, *x[1:4], t, torch.full((3,), 0.5), backend=backend).loss.backward()
    assert leaf.grad.eq(0).all()


def test_expanded_and_sliced_inputs(backend):
    x, t, r = inputs((3, 4, 8, 6))
    x[1] = torch.randn(1, 4, 1, 6).expand(3, 4, 8, 6)
    x[2] = torch.randn(3, 4, 16, 12)[:, :, ::2, ::2]
    x[0] = x[0].to(memory_format=torch.channels_last)
    assert_matches(x, t, r, backend)


def test_per_sample_beta(backend):
    x, t, r = inputs((3, 4, 5))
    assert_matches(x, t, r, backend, beta=torch.tensor([0.1, 1.0, 4.0]))


def test_gradcheck(backend):
    # Without adaptive weights: those are detached, so numerical differences see another function.
    x, t, r = inputs((2, 3, 4), torch.float64)

    def loss(v):
        return nft_loss(v, *x[1:4], t, r, v_ref=x[4], kl_weight=0.3, beta=0.5, weighting="none", backend=backend).loss

    assert torch.autograd.gradcheck(loss, x[0].requires_grad_())


def test_gradient_scale_and_second_backward(backend):
    x, t, r = inputs((3, 16, 40, 40) if backend == "native" else (3, 7, 20, 20))
    leaf = x[0].clone().requires_grad_()
    loss = nft_loss(leaf, *x[1:4], t, r, backend=backend).loss
    once, twice, third = (
        torch.autograd.grad(loss, leaf, torch.tensor(s), retain_graph=True)[0] for s in (1.0, 2.0, 0.5)
    )
    assert torch.equal(twice, 2 * once) and torch.equal(third, once / 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scale_keeps_float16_gradients_from_underflow(backend, compiled):
    # Few elements, which the interpreter is slow at, with gradients as small as those of many.
    x, t, r = inputs((8, 16, 8, 8), torch.float16)
    exact = closed_form(*x[:4], t, r)[2] / 16
    assert exact.abs().median() < torch.finfo(torch.float16).smallest_normal  # digits are lost without a scale

    def loss(v):
        return nft_loss(v, *x[1:4], t, r, adv_clip_max=5 / 16, backend=backend).loss

    leaf = x[0].clone().requires_grad_()
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    (grad,) = torch.autograd.grad(run(leaf) * 65536, leaf)
    assert (grad.double() / 65536 - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()
    assert ((grad.double() / 65536 - exact).abs() <= 0.01 * exact.abs() + 1e-10).all()


def test_only_v_theta_has_a_gradient(backend):
    x, t, r = inputs((2, 8))
    for a in x:
        a.requires_grad_()
    out = nft_loss(*x[:4], t, r, v_ref=x[4], kl_weight=1.0, backend=backend)
    out.loss.backward()
    assert x[0].grad is not None and all(a.grad is None for a in x[1:])
    assert not any(value.requires_grad for value in out[1:])


def test_overwritten_input_is_noticed(backend):
    x, t, r = inputs((2, 8))
    leaf = x[0].requires_grad_()
    loss = nft_loss(leaf * 1, *x[1:4], t, r, backend=backend).loss
    x[1].add_(1)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def value_and_gradient(x, t, r, backend, kl_weight=0.1):
    leaf = x[0].clone().requires_grad_()
    out = nft_loss(leaf, *x[1:4], t, r, v_ref=x[4], kl_weight=kl_weight, backend=backend)
    out.loss.backward()
    return [*out, leaf.grad]


def test_inputs_stay_and_reruns_are_bitwise_equal(backend):
    x, t, r = inputs((3, 7, 20, 20), torch.bfloat16)
    before = [a.clone() for a in x]
    first, second = (value_and_gradient(x, t, r, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True))


@pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 13])
def test_the_bits_are_the_same_for_any_number_of_threads(batch, dtype):
    """With 13 samples two or three threads have as many of their own and share the last; with 5 they share all."""
    x, t, r = inputs((batch, 9_001), dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(value_and_gradient(x, t, r, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_larger_than_a_cache_has_the_bits_of_its_samples(dtype):
    """It is written past the caches, where the addresses of odd samples allow it."""
    x, t, r = inputs((5, 1_700_003), dtype)

    def gradient(rows):
        leaf = x[0][rows].clone().requires_grad_()
        out = nft_loss(leaf, *(y[rows] for y in x[1:4]), t[rows], r[rows], reduction="sum", backend="native")
        return torch.autograd.grad(out.loss, leaf)[0]

    whole = gradient(slice(None))
    assert whole.nbytes >= 2**24 > whole[:1].nbytes
    for i in range(5):
        assert torch.equal(gradient(slice(i, i + 1)), whole[i : i + 1])


def test_nan_is_not_hidden(backend):
    x, t, r = inputs((2, 40))
    x[0][0, 3] = float("nan")
    out = nft_loss(*x[:4], t, r, backend=backend)
    assert out.policy_loss[0].isnan() and out.old_deviation_max[0].isnan() and out.policy_loss[1].isfinite()


@pytest.mark.parametrize("mask", [None, 0.3])
@pytest.mark.parametrize("values", [(0.3, 0.7, 0.1, 1.3), (1.1, 0.9, 0.3, 0.7), (0.1, 0.1, 0.7, 0.2)])
def test_sums_of_equal_terms_do_not_drift(values, mask, backend):
    """Rounding that falls to the same side at every addition adds up, where that of random terms cancels."""
    tensors = [torch.full((2, 5_003), value) for value in values]
    options = {} if mask is None else {"mask": torch.full((2, 5_003), mask)}
    compare_nft_loss(*tensors, torch.tensor([0.3, 0.9]), torch.tensor([0.2, 0.7]), backend=backend, **options)


@pytest.mark.parametrize("isa", getattr(native._C, "isas", []))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_with_fused_multiply_add_give_the_same_bits(isa, dtype, monkeypatch):
    x, t, r = inputs((3, 5, 31, 29), dtype)
    best = [a.clone() for a in x]
    results = []
    for chosen, tensors in ((native.isa(), best), (isa, x)):
        monkeypatch.setitem(os.environ, "NFT_KERNELS_ISA", chosen)
        assert_matches(tensors, t, r, "native", kl_weight=0.01)
        results.append(value_and_gradient(tensors, t, r, "native", kl_weight=0.01))
    if isa != "baseline":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_whole_and_passes_opcheck(kernels):
    x, t, r = inputs((2, 4, 9))

    def step(v):
        return nft_loss(v, *x[1:4], t, r, v_ref=x[4], kl_weight=0.1, backend=kernels)

    eager, compiled = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    step(eager).loss.backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).loss.backward()
    assert torch.equal(eager.grad, compiled.grad)
    args = (
        eager.detach(),
        *x[1:4],
        t,
        r,
        torch.ones(2, dtype=torch.float64),
        x[4],
        None,
        None,
        None,
        None,
        *Options(kl_weight=0.1),
        False,
        kernels,
    )
    torch.library.opcheck(torch.ops.nft_kernels.nft_loss.default, args)


def test_the_live_check_blames_no_kernel_for_what_has_diverged(kernels):
    x, t, r = inputs((2, 4, 9))
    found = compare_nft_loss(x[0] * 1e30, *x[1:4], t, r, backend=kernels)
    assert all(comparison.passed for comparison in found)


def test_the_live_check_notices_a_wrong_kernel(kernels, monkeypatch):
    x, t, r = inputs((2, 4, 9))
    compare_nft_loss(*x[:4], t, r, backend=kernels)
    right = load(kernels).nft_loss
    monkeypatch.setattr(load(kernels), "nft_loss", lambda *a, **k: (right(*a, **k)[0] * 1.001, *right(*a, **k)[1:]))
    with pytest.raises(KernelMismatchError, match="loss is off by"):
        compare_nft_loss(*x[:4], t, r, backend=kernels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v_old": torch.zeros(2, 7)}, ValueError, "v_old: got shape"),
        ({"x_t": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "x_t: got torch.int32"),
        ({"x0": torch.zeros(0, 8)}, ValueError, "x0: got shape"),
        ({"t": torch.zeros(3)}, ValueError, "t: got shape"),
        ({"t": torch.tensor([0.5, 1.5])}, ValueError, "t: got values outside"),
        ({"r": torch.tensor([0.5, float("nan")])}, ValueError, "r: got values outside"),
        ({"v_theta": torch.zeros(2, 8).to_sparse()}, TypeError, "v_theta: got a tensor of layout torch.sparse_coo"),
        ({"v_theta": torch.zeros(2, 8, device="meta")}, ValueError, "v_theta: got device meta"),
        ({"beta": 0.0}, ValueError, "beta: got 0.0"),
        ({"beta": torch.tensor([1.0, -1.0])}, ValueError, "beta: got values"),
        ({"adv_clip_max": float("nan")}, ValueError, "adv_clip_max: got nan"),
        ({"kl_weight": -1.0}, ValueError, "kl_weight: got -1.0"),
        ({"kl_weight": 1.0}, ValueError, "v_ref: got None"),
        ({"weighting": "t3"}, ValueError, "weighting: got 't3'"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, t, r = inputs((2, 8))
    good = dict(zip(("v_theta", "v_old", "x_t", "x0"), x, strict=False)) | {"t": t, "r": r}
    with pytest.raises(error, match=message):
        nft_loss(**(good | change))


@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 * 2**30, reason="needs 16 GB of memory"
)
def test_a_sample_above_two_to_the_31(kernels):
    """All tensors are one: e+- = -t x, which is 0 but for the last element, beyond the reach of 32-bit indices."""
    if kernels == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter is too slow")
    n = 2**31 + 5
    x = torch.zeros(1, n, dtype=torch.bfloat16)
    x[0, -1] = 1
    leaf, t, r = x.requires_grad_(), torch.full((1,), 0.5), torch.ones(1)
    out = nft_loss(leaf, *[x.detach()] * 3, t, r, backend=kernels)
    out.loss.backward()
    # w+- is clamped at 1e-5, so l+- = t^2 / n / w.
    assert out.positive_loss.item() == pytest.approx(0.25 / n / 1e-5, rel=1e-5)
    assert leaf.grad[0, -1].item() == pytest.approx(2 * M * 0.25 / n / 1e-5, rel=0.01)
    assert leaf.grad[0, : 2**31].count_nonzero() == 0
    x_t = add_noise(x.detach(), t, noise=x.detach(), backend=kernels)
    assert x_t[0, -1] == 1 and x_t[0, :-1].count_nonzero() == 0
