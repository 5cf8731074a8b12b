"""The loss' options against the definition, written out here sample by sample in float64, with autograd's gradient."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nft_kernels import add_noise, check, nft_loss
from nft_kernels.backends import native
from nft_kernels.ops import _validate
from nft_kernels.ops.nft_loss import _within_reach

M = 5.0
FACTORS = {
    "t": lambda t: t,
    "t2": lambda t: t**2,
    "1/t": lambda t: 1 / t,
    "1/t2": lambda t: t**-2,
    "(1-t)/t2": lambda t: (1 - t) / t**2,
}


def definition(
    p_theta, p_old, x_t, x0, t, r, *, p_ref=None, beta=1.0, kl_weight=0.0, weighting="adaptive", prediction="v",
    mask=None, policy_weight=None, segments=None, weight_per="sample", channel_dim=None, detach_weight=True,
    kl_space="v", sample_weight=None, reduction="mean",
):  # fmt: skip
    """Loss and (B,) policy losses. Every tensor is float64; nothing is shared with the library."""
    offsets = list(range(len(x0) + 1)) if segments is None else segments.tolist()
    packed = segments is not None
    losses, policies = [], []
    for i, (start, end) in enumerate(pairwise(offsets)):
        part = slice(start, end) if packed else start
        a, o, noisy, clean = p_theta[part], p_old[part], x_t[part], x0[part]
        share = r[i] if r.ndim == 1 else r.expand(x0.shape)[part]
        m = torch.ones_like(clean) if mask is None else mask.double().expand(x0.shape)[part]
        q = 1 if policy_weight is None else policy_weight.double().expand(x0.shape)[part]
        b = beta[i] if isinstance(beta, torch.Tensor) else beta

        def x0_hat(p, noisy=noisy, i=i):
            if prediction == "v":
                return noisy - t[i] * p
            return p if prediction == "x0" else (noisy - t[i] * p) / (1 - t[i])

        def velocity(p, noisy=noisy, i=i):
            if prediction == "v":
                return p
            return (noisy - p) / t[i] if prediction == "x0" else (p - noisy) / (1 - t[i])

        policy = 0
        for sign, portion in ((1, share), (-1, 1 - share)):
            e = x0_hat((1 - sign * b) * o + sign * b * a) - clean
            e = torch.where(m > 0, e, 0)
            w = torch.ones_like(e)
            if weighting == "adaptive" and weight_per == "sample":
                w = ((m * e.abs()).sum() / m.sum()).clamp_min(1e-5).expand_as(e)
            elif weighting == "adaptive":
                d = channel_dim if packed else channel_dim - 1
                w = ((m * e.abs()).sum(d, keepdim=True) / m.sum(d, keepdim=True)).clamp_min(1e-5).expand_as(e)
            w = w.detach() if detach_weight else w
            scale = 1.0 if weighting in ("adaptive", "none") else FACTORS[weighting](t[i])
            policy = policy + M * scale * torch.where(m > 0, m * q * portion * e**2 / w, 0).sum() / m.sum() / b
        total = policy
        if p_ref is not None:
            view = velocity if kl_space == "v" else x0_hat
            total = total + kl_weight * (m * (view(a) - view(p_ref[part])) ** 2).sum() / m.sum()
        losses.append(total)
        policies.append(policy.detach())
    loss = torch.stack(losses)
    if sample_weight is not None:
        loss = loss * sample_weight
    if reduction == "mean":
        loss = loss.sum() / (len(losses) if sample_weight is None else sample_weight.sum())
    return loss.sum() if reduction == "sum" else loss, torch.stack(policies)


def make(shape, samples=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(shape, generator=g, dtype=torch.float64, device="cpu") for _ in range(5)]
    t, r = (torch.rand(samples or shape[0], generator=g, dtype=torch.float64, device="cpu") for _ in range(2))
    return x, 0.05 + 0.9 * t, r


def compare(x, t, r, backend, dtype, **options):
    def cast(a):
        return (
            a.to(device=torch.get_default_device(), dtype=dtype)
            if a.is_floating_point()
            else a.to(torch.get_default_device())
        )

    given = {k: cast(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    narrow = [cast(a) for a in (*x, t, r)]
    wide = [a.double().cpu() for a in narrow]
    leaf, exact_leaf = narrow[0].clone().requires_grad_(), wide[0].clone().requires_grad_()
    ref = {} if not options.get("kl_weight") else {"v_ref": narrow[4]}
    out = nft_loss(leaf, *narrow[1:4], *narrow[5:], **ref, **given, backend=backend)
    exact_options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    exact_options = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in exact_options.items()
    }
    exact_ref = {} if not options.get("kl_weight") else {"p_ref": wide[4]}
    exact, policies = definition(exact_leaf, *wide[1:4], *wide[5:], **exact_ref, **exact_options)
    seed = torch.linspace(0.5, 1.5, exact.numel(), dtype=torch.float64, device="cpu").view(exact.shape)
    (grad,) = torch.autograd.grad(out.loss, leaf, seed.to(out.loss))
    (exact_grad,) = torch.autograd.grad(exact, exact_leaf, seed)
    close(out.loss, exact, torch.float32 if dtype != torch.float64 else dtype)
    close(out.policy_loss, policies, torch.float32 if dtype != torch.float64 else dtype)
    assert grad.dtype == dtype
    close(grad, exact_grad, dtype)
    return out


def close(got, exact, dtype):
    got, exact = got.detach().double().cpu(), exact.detach()
    eps = torch.finfo(dtype).eps
    # Sums of positive numbers are good to a few eps; the gradient's two terms may cancel to a tenth of their size.
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= 80 * eps * exact.abs().max() + 1e-14


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
OPTIONS = {
    "x0 prediction": {"prediction": "x0"},
    "eps prediction": {"prediction": "eps"},
    "x0 prediction, KL in v": {"prediction": "x0", "kl_weight": 0.1},
    "eps prediction, KL in x0": {"prediction": "eps", "kl_weight": 0.1, "kl_space": "x0"},
    "KL in x0": {"kl_weight": 0.3, "kl_space": "x0"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weighted mean": {"sample_weight": torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)},
    "weighted none": {"reduction": "none", "sample_weight": torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)},
    "gradient through the weight": {"detach_weight": False},
    "weight per token": {"weight_per": "token", "channel_dim": 1},
    "weight per token, gradient through it": {"weight_per": "token", "channel_dim": 1, "detach_weight": False},
    "weight per token, none": {"weight_per": "token", "channel_dim": 1, "reduction": "none"},
    "per-sample beta": {"beta": torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(backend, name, dtype):
    x, t, r = make((3, 6, 4, 3))
    compare(x, t, r, backend, dtype, **OPTIONS[name])


@pytest.mark.parametrize("options", [{}, {"weight_per": "token", "channel_dim": 1}], ids=str)
def test_no_gradient_flows_through_a_weight_at_its_floor(backend, options):
    """Errors whose mean is below 1e-5."""
    x, t, r = make((3, 6, 4, 3))
    compare([1e-7 * a for a in x], t, r, backend, torch.float32, detach_weight=False, **options)


MASKS = {
    "boolean, whole shape": lambda g: torch.rand(3, 6, 4, 3, generator=g, device="cpu") < 0.6,
    "weights, per token": lambda g: torch.rand(3, 1, 4, 3, generator=g, device="cpu", dtype=torch.float64),
    "one for all samples": lambda g: torch.rand(4, 3, generator=g, device="cpu", dtype=torch.float64) + 0.1,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"weight_per": "token", "channel_dim": 1}, {"kl_weight": 0.2}], ids=str)
def test_mask(backend, mask, options):
    x, t, r = make((3, 6, 4, 3))
    weights = MASKS[mask](torch.Generator().manual_seed(1))
    if options.get("weight_per") == "token" and weights.dtype == torch.bool:
        weights[:, 0] = True  # every token keeps a channel, as the definition divides by their number
    compare(x, t, r, backend, torch.float32, mask=weights, **options)


@pytest.mark.parametrize("weights", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_per": "token", "channel_dim": 1},
        {"kl_weight": 0.2, "reduction": "none"},
        {"detach_weight": False, "mask": 0.1 + torch.arange(3.0, dtype=torch.float64, device="cpu")},
    ],
    ids=["plain", "weight per token", "KL", "mask, gradient through the weight"],
)
def test_policy_weight(backend, weights, options):
    x, t, r = make((3, 6, 4, 3))
    weights = MASKS[weights](torch.Generator().manual_seed(1))
    out = compare(x, t, r, backend, torch.float32, policy_weight=weights, **options)
    without = compare(x, t, r, backend, torch.float32, **options)
    for name in out._fields:
        same = torch.allclose(getattr(out, name), getattr(without, name), rtol=1e-5)
        assert same == (name not in ("loss", "policy_loss")), name


def test_what_is_masked_is_not_looked_at(backend):
    x, t, r = make((2, 4, 6))
    x, t, r = [a.float() for a in x], t.float(), r.float()
    mask = torch.ones(2, 1, 6, dtype=torch.bool, device="cpu")
    mask[:, :, 4:] = False
    short = nft_loss(*(a[..., :4].contiguous() for a in x[:4]), t, r, backend="reference")
    for a in x[:4]:
        a[..., 4:] = float("nan")
    device = torch.get_default_device()
    leaf = x[0].to(device).requires_grad_()
    out = nft_loss(leaf, *(a.to(device) for a in (*x[1:4], t, r)), mask=mask.to(device), backend=backend)
    out.loss.backward()
    for got, expected in zip(out, short, strict=True):
        torch.testing.assert_close(got.cpu(), expected)
    assert leaf.grad[..., 4:].eq(0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 1, 4, 3), (3, 6, 4, 3), (1, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_per": "token", "channel_dim": 1}], ids=str)
def test_r_per_token_and_element(backend, shape, options):
    x, t, _ = make((3, 6, 4, 3))
    r = torch.rand(shape, generator=torch.Generator().manual_seed(2), device="cpu", dtype=torch.float64)
    compare(x, t, r, backend, torch.float32, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_weight": 0.1},
        {"reduction": "none"},
        {"weight_per": "token", "channel_dim": 2},
        {"weight_per": "token", "channel_dim": 1, "reduction": "none"},
        {"prediction": "eps", "beta": torch.tensor([0.3, 1.0, 2.0, 0.5], dtype=torch.float64)},
    ],
    ids=str,
)
def test_packed_sequences(backend, options):
    x, t, r = make((19, 3, 8), samples=4)
    compare(x, t, r, backend, torch.float32, segments=torch.tensor([0, 1, 8, 12, 19]), **options)


@pytest.mark.parametrize("dim", [1, 2])
def test_channels_may_be_counted_from_the_end(backend, dim):
    x, t, r = make((2, 8, 6))
    args = [a.to(device=torch.get_default_device(), dtype=torch.float32) for a in (*x[:4], t, r)]
    from_front, from_end = (
        nft_loss(*args, weight_per="token", channel_dim=d, backend=backend, reduction="none") for d in (dim, dim - 3)
    )
    assert all(a.equal(b) for a, b in zip(from_front, from_end, strict=True))


def test_packed_sequences_equal_separate_ones(backend):
    x, t, r = make((19, 8), samples=3)
    x, t, r = [a.float() for a in x], t.float(), r.float()
    device = torch.get_default_device()
    edges = [0, 5, 6, 19]
    out = nft_loss(
        *(a.to(device) for a in (*x[:4], t, r)), segments=torch.tensor(edges, device=device), backend=backend
    )
    for i in range(3):
        alone = nft_loss(
            *(a[None, edges[i] : edges[i + 1]] for a in x[:4]), t[i : i + 1], r[i : i + 1], backend="reference"
        )
        for got, expected in zip(out[1:], alone[1:], strict=True):
            torch.testing.assert_close(got[i].cpu(), expected[0])


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), device="cpu")


def edges(*offsets):
    return torch.tensor(offsets, device="cpu")


LONG = {
    "mask per token": ((2, 8, 24, 24), {"mask": (random(2, 1, 24, 24) - 0.3).relu()}),
    "boolean mask": ((2, 3, 43, 37), {"mask": random(2, 3, 43, 37) < 0.6}),
    "policy weight per token": ((2, 8, 24, 24), {"policy_weight": random(2, 1, 24, 24), "kl_weight": 0.1}),
    "r per element": ((2, 8, 24, 24), {"r": random(2, 8, 24, 24), "kl_weight": 0.1}),
    "gradient through the weight": ((2, 8, 24, 24), {"detach_weight": False, "beta": 0.3}),
    "all but segments": (
        (2, 3, 43, 37),
        {"mask": (random(3, 1, 37) - 0.3).relu(), "r": random(2, 1, 43, 37), "kl_weight": 0.1, "detach_weight": False},
    ),
    "weight per token": ((2, 8, 9, 30), {"weight_per": "token", "channel_dim": 1, "kl_weight": 0.1}),
    "weight per token of frames": ((1, 2, 7, 61, 5), {"weight_per": "token", "channel_dim": 2, "beta": 0.3}),
    "weight per token of few": ((3, 70, 5), {"weight_per": "token", "channel_dim": 1, "prediction": "eps"}),
    "weight per token of many channels": ((2, 129, 11), {"weight_per": "token", "channel_dim": 1}),
    "weight per token, channels last": ((2, 70, 8), {"weight_per": "token", "channel_dim": 2}),
    "segments": ((60, 3, 64), {"segments": edges(0, 1, 40, 60), "kl_weight": 0.1}),
    "segments that are not aligned": ((60, 63), {"segments": edges(0, 9, 10, 60), "detach_weight": False}),
    "all": (
        (60, 4, 64),
        {"segments": edges(0, 2, 41, 60), "mask": (random(60, 1, 64) - 0.3).relu(), "r": random(60, 4, 1),
         "policy_weight": random(60, 1, 64), "kl_weight": 0.1, "detach_weight": False, "prediction": "eps"},
    ),
}  # fmt: skip


def long_case(name, dtype):
    """The positional arguments of ``nft_loss`` and its options, on the default device."""
    shape, options = LONG[name]
    x, t, r = make(shape, samples=len(options["segments"]) - 1 if "segments" in options else None)
    device = torch.get_default_device()
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "kl_weight" in options:
        options["v_ref"] = x[4].to(device, dtype)
    r = options.pop("r", r.to(device).float())
    return [*(a.to(device, dtype) for a in x[:4]), t.to(device).float(), r], options


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long_samples_keep_the_error_bound(kernels, name, dtype, monkeypatch):
    """More elements than a kernel takes at once, and the bound of the design: 4 ulp, or twice the plain formula's."""
    args, options = long_case(name, dtype)
    # The check would cast the offsets.
    monkeypatch.setattr(check, "nft_loss", partial(nft_loss, segments=options.pop("segments", None)))
    check.compare_nft_loss(*args, **options, backend=kernels)


def test_reruns_of_all_options_give_the_same_bits(kernels):
    (v_theta, *args), options = long_case("all", torch.float32)
    runs = []
    for _ in range(2):
        leaf = v_theta.clone().requires_grad_()
        out = nft_loss(leaf, *args, **options, backend=kernels)
        runs.append([*out, *torch.autograd.grad(out.loss, leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("detach_weight", [True, False])
def test_a_sample_that_is_masked_out_counts_as_nothing(backend, detach_weight):
    x, t, r = make((3, 4, 6))
    x, (t, r) = ([a.to(torch.get_default_device(), torch.float32) for a in tensors] for tensors in (x, (t, r)))
    mask = torch.ones(3, 4, 6)
    mask[1] = 0
    leaf = x[0].requires_grad_()
    out = nft_loss(leaf, *x[1:4], t, r, mask=mask, detach_weight=detach_weight, backend=backend)
    out.loss.backward()
    alone = nft_loss(*(a[::2] for a in x[:4]), t[::2], r[::2], detach_weight=detach_weight, backend="reference")
    torch.testing.assert_close(out.loss * 3, alone.loss * 2)
    assert out.policy_loss[1] == 0 and leaf.grad[1].eq(0).all() and leaf.grad[::2].ne(0).all()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    prediction=st.sampled_from(["v", "x0", "eps"]),
    weighting=st.sampled_from(["adaptive", "none", *FACTORS]),
    weighted=st.sets(st.sampled_from(["mask", "policy_weight"])),
    r_shape=st.sampled_from(["sample", "token", "element"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    kl_weight=st.sampled_from([0.0, 0.2]),
    kl_space=st.sampled_from(["v", "x0"]),
    seed=st.integers(0, 99),
)
def test_any_combination(
    backend, shape, prediction, weighting, weighted, r_shape, reduction, kl_weight, kl_space, seed
):
    x, t, r = make(shape, seed=seed)
    t = 0.3 + 0.4 * t
    g = torch.Generator().manual_seed(seed)
    if r_shape != "sample":
        channels = shape[1] if r_shape == "element" else 1
        r = torch.rand(shape[0], channels, *shape[2:], generator=g, device="cpu", dtype=torch.float64)
    options = {"prediction": prediction, "weighting": weighting, "reduction": reduction}
    for name in sorted(weighted):
        options[name] = 0.1 + torch.rand(shape[0], 1, *shape[2:], generator=g, device="cpu", dtype=torch.float64)
    if kl_weight:
        options |= {"kl_weight": kl_weight, "kl_space": kl_space}
    compare(x, t, r, backend, torch.float64, **options)


def test_backward_of_none_takes_a_gradient_per_sample_after_compilation():
    x, t, r = make((3, 4, 6))
    x, t, r = [a.float() for a in x], t.float(), r.float()

    def losses(v):
        return nft_loss(v, *x[1:4], t, r, reduction="none").loss

    grads = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaf = x[0].clone().requires_grad_()
        grads += torch.autograd.grad(run(leaf), leaf, torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(*grads) and grads[0][1].eq(0).all()


def test_backward_of_none_in_half_precision_scales_by_the_gradients_themselves():
    x, t, r = make((4, 16, 64))
    x, t, r = [a.bfloat16() for a in x], t.float(), r.float()
    # Nearly halfway between two numbers of bfloat16.
    scale = 1.29296875 + torch.tensor([-2e-4, -1e-4, 1e-4, 2e-4])
    grads = []
    for backend, dtype in (("native", torch.bfloat16), ("reference", torch.float64)):
        leaf = x[0].to(dtype).requires_grad_()
        losses = nft_loss(leaf, *(a.to(dtype) for a in x[1:4]), t, r, reduction="none", backend=backend).loss
        grads += torch.autograd.grad(losses, leaf, scale.to(losses.dtype))
    got, expected = (grad.double().flatten(1) for grad in grads)
    # Single elements are rounded to either side, a factor would show in all of them.
    assert ((got * expected).sum(1) / expected.square().sum(1) - 1).abs().max() < 2**-11


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(
            ({"weighting": name, "t": torch.tensor([0.0, 0.5])}, ValueError, r"t: got values outside \(0, 1\]")
            for name in ("1/t", "1/t2", "(1-t)/t2")
        ),
        ({"prediction": "score"}, ValueError, "prediction: got 'score', accepted are v, x0, eps"),
        ({"prediction": "eps", "t": torch.tensor([0.5, 1.0])}, ValueError, "t: got values outside"),
        ({"kl_space": "eps"}, ValueError, "kl_space: got 'eps'"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max'"),
        ({"weight_per": "pixel"}, ValueError, "weight_per: got 'pixel'"),
        ({"weight_per": "token"}, TypeError, "channel_dim: got NoneType"),
        ({"weight_per": "token", "channel_dim": 3}, ValueError, "channel_dim: got 3, accepted is a dimension from 1"),
        ({"weight_per": "token", "channel_dim": -3}, ValueError, "channel_dim: got -3"),
        ({"channel_dim": 1}, ValueError, "channel_dim: got 1 with weight_per='sample'"),
        ({"weighting": "t", "detach_weight": False}, ValueError, "weighting: got 't' with weight_per"),
        ({"weighting": "none", "weight_per": "token", "channel_dim": 1}, ValueError, "weighting: got 'none'"),
        ({"mask": torch.ones(2, 3, 7)}, ValueError, r"mask: got shape \(2, 3, 7\)"),
        ({"mask": -torch.ones(2, 3, 8)}, ValueError, "mask: got values outside"),
        ({"mask": torch.ones(2, 3, 8, dtype=torch.int32)}, TypeError, "mask: got torch.int32"),
        ({"policy_weight": torch.ones(2, 3, 7)}, ValueError, r"policy_weight: got shape \(2, 3, 7\)"),
        ({"policy_weight": torch.full((2, 3, 8), torch.inf)}, ValueError, "policy_weight: got values outside"),
        ({"policy_weight": 0.5}, TypeError, "policy_weight: got float"),
        ({"r": torch.full((2, 1, 8), 1.5)}, ValueError, "r: got values outside"),
        ({"r": torch.full((3, 1, 8), 0.5)}, ValueError, r"r: got shape \(3, 1, 8\)"),
        ({"r": torch.full((2, 4), 0.5)}, ValueError, r"one value per sample, or 3 dimensions that broadcast to x0's"),
        ({"segments": torch.tensor([0, 1])}, ValueError, "segments: got offsets"),
        ({"segments": torch.tensor([0, 2, 2])}, ValueError, "segments: got offsets"),
        ({"segments": torch.tensor([0.0, 2.0])}, TypeError, "segments: got torch.float32"),
        ({"segments": torch.tensor([0, 2])}, ValueError, r"t: got shape \(2,\), accepted is \(1,\)"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight: got shape"),
        ({"sample_weight": -torch.ones(2)}, ValueError, "sample_weight: got values"),
    ],
)
def test_combinations_that_make_no_sense_are_named(change, error, message):
    x, t, r = make((2, 3, 8))
    good = dict(zip(("v_theta", "v_old", "x_t", "x0"), x, strict=False)) | {"t": t, "r": r}
    with pytest.raises(error, match=message):
        nft_loss(**(good | change))


@pytest.mark.parametrize(
    ("options", "time"), [({"prediction": "eps"}, 1 - 1e-12), ({"weighting": "1/t"}, 1e-50)], ids=str
)
def test_a_time_that_float32_takes_for_an_end_is_one_where_it_computes(options, time):
    (x, _, r), t = make((2, 3, 8)), torch.tensor([0.5, time], dtype=torch.float64)
    assert nft_loss(*x[:4], t, r, **options).loss.isfinite()
    with pytest.raises(ValueError, match="t: got values outside"):
        nft_loss(*(a.float() for a in x[:4]), t, r, **options)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.bool], ids=str)
def test_what_weighs_elements_may_have_any_dtype(backend, kind):
    """As it stands in that dtype: nothing is reinterpreted."""
    x, t, _ = make((3, 4, 9))
    device = torch.get_default_device()
    x, t = [a.to(device).float() for a in x], t.to(device)
    mask, share = (a[None].to(device) for a in random(2, 4, 9))
    mask, share = (a > 0.3 if kind == torch.bool else a.to(kind) for a in (mask, share))
    got = nft_loss(*x[:4], t.float(), share, mask=mask, policy_weight=mask, backend=backend)
    mask = mask.double()
    wide = nft_loss(*(a.double() for a in x[:4]), t, share.double(), mask=mask, policy_weight=mask, backend="reference")
    for ours, theirs in zip(got, wide, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"weight_per": "token", "channel_dim": 1}], ids=str)
def test_samples_that_all_count_nothing_have_no_loss_and_no_gradient(backend, options):
    x, t, r = make((3, 4, 9))
    x, (t, r) = ([a.to(torch.get_default_device()) for a in tensors] for tensors in (x, (t, r)))
    leaf = x[0].requires_grad_()
    out = nft_loss(leaf, *x[1:4], t, r, sample_weight=torch.zeros(3), backend=backend, **options)
    out.loss.backward()
    assert out.loss.item() == 0 and leaf.grad.eq(0).all() and out.policy_loss.gt(0).all()


def test_offsets_beyond_the_tensors_are_refused_when_compiled_too(backend):
    x, t, r = make((19, 4), samples=1)
    loss = torch.compile(partial(nft_loss, backend=backend), fullgraph=True, backend="aot_eager")
    if backend == "reference":
        pytest.skip("it has no kernel that could write there")
    if torch.get_default_device().type == "cuda":
        pytest.skip("a GPU is not asked for offsets: there the loss becomes NaN")
    with pytest.raises(ValueError, match=r"segments: got offsets \[0, 30\], accepted are rising ones from 0 to 19"):
        loss(*x[:4], t, r, segments=torch.tensor([0, 30]))


@pytest.mark.parametrize(("name", "value"), [("t", 500.0), ("t", -0.01), ("t", math.nan), ("r", 1.5), ("r", -3.0)])
@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 30_000), (2, 50_000)], ids=str)
@pytest.mark.parametrize("options", [{}, {"detach_weight": False}], ids=str)
def test_numbers_beyond_their_range_that_nobody_looked_at_give_nan(backend, monkeypatch, name, value, shape, options):
    monkeypatch.setattr(_validate, "_within", lambda *_: None)
    x, t, r = make(shape)
    x, (t, r) = ([a.to(torch.get_default_device()).float() for a in tensors] for tensors in (x, (t, r)))
    {"t": t, "r": r}[name][1] = value
    leaf = x[0].requires_grad_()
    out = nft_loss(leaf, *x[1:4], t, r, backend=backend, **options)
    out.loss.backward()
    others = torch.arange(shape[0]) != 1
    for values in (out.policy_loss, leaf.grad.flatten(1)):
        assert values[1].isnan().all() and values[others].isfinite().all()
    assert out.loss.isnan()


@pytest.mark.parametrize("value", [500.0, -0.01, math.nan])
def test_times_beyond_their_range_that_nobody_looked_at_give_no_picture(backend, monkeypatch, value):
    monkeypatch.setattr(_validate, "_within", lambda *_: None)
    x_t = add_noise(torch.randn(3, 4, 9), torch.tensor([0.2, value, 0.9]), seed=0, backend=backend).flatten(1)
    assert x_t[::2].isfinite().all() and x_t[1].isnan().all()


def test_times_of_a_thousand_give_nan_when_compiled(backend):
    x, t, r = make((3, 4, 9))
    loss = torch.compile(partial(nft_loss, backend=backend), fullgraph=True, backend="aot_eager")
    x, (t, r) = ([a.to(torch.get_default_device()) for a in tensors] for tensors in (x, (t, r)))
    assert loss(*x[:4], t, r).loss.isfinite() and loss(*x[:4], 1000 * t, r).loss.isnan()


def test_the_check_takes_a_loss_for_every_sample(backend):
    x, t, r = make((3, 4, 9))
    args = [a.to(torch.get_default_device()).float() for a in (*x[:4], t, r)]
    assert check.compare_nft_loss(*args, reduction="none", backend=backend)


@pytest.mark.parametrize(
    ("offsets", "safe"),
    [
        ([0, 1, 8, 19], [0, 1, 8, 19]),
        ([0, 30, 8, 19], [0, 19, 19, 19]),
        ([-4, 3, 2, 5], [0, 3, 3, 19]),
        ([2, 2**62, -(2**62), 19], [0, 19, 19, 19]),
        ([0, 19], [0, 19]),
        ([0, 5], [0, 19]),
    ],
)
def test_offsets_that_nobody_looked_at_stay_within_the_tensors(offsets: list[int], safe: list[int]) -> None:
    found, right = _within_reach(torch.tensor(offsets), 19)
    assert found.tolist() == safe
    assert right.item() == (offsets == safe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_offsets_make_the_loss_nan_on_a_gpu(reduction: str) -> None:
    x, t, r = make((19, 5), samples=3)
    v, *others = (a.cuda() for a in x[:4])
    v.requires_grad_()
    offsets = torch.tensor([0, 30, 8, 19], device="cuda")
    loss = nft_loss(v, *others, t.cuda(), r.cuda(), segments=offsets, reduction=reduction).loss
    loss.sum().backward()
    assert loss.isnan().all()
    assert v.grad is not None
    assert v.grad.isnan().any()


@pytest.fixture
def tokens():
    """A function that runs the native loss with a weight per token, and gives all that comes out."""
    if reason := native.why_not(torch.empty(0)):
        pytest.skip(reason)

    def run(x, t, r, **options):
        leaf = x[0].clone().requires_grad_()
        out = nft_loss(leaf, *x[1:4], t, r, weight_per="token", channel_dim=1, backend="native", **options)
        return [*out, *torch.autograd.grad(out.loss.sum(), leaf)]

    return run


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 1), {}),
        ((64,), {}),
        ((40, 1, 1, 2), {}),
        ((2, 1, 6, 7), {"weight_per": "token", "channel_dim": 1}),
        ((2, 6, 1), {"weight_per": "token", "channel_dim": 2}),
    ],
    ids=str,
)
def test_the_gradient_keeps_its_bound_where_a_weight_is_of_few_errors(backend, shape, options):
    """At most twice the error of the plain formula, or 4 units in the last place: an error e that is small beside the
    terms it is the sum of has a weight as small, and e / |e| is as exact as ever."""
    token, worst = options.get("channel_dim"), 0.0

    def plain(v, v_old, x_t, x0, t, r):
        each = (-1, *[1] * (x0.ndim - 1))
        t, r, total = t.view(each), r.view(each), 0
        axes = [token] if token else [*range(1, x0.ndim)]
        for sign, share in ((1, r), (-1, 1 - r)):
            e = x_t - t * ((1 - sign) * v_old + sign * v) - x0
            weight = e.detach().abs().mean(axes, keepdim=True) if axes else e.detach().abs()
            total = total + share * e.square() / weight.clamp_min(1e-5)
        return 5 * total.mean()

    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        x = [torch.randn(shape, generator=g) for _ in range(4)]
        t, r = torch.rand(2, shape[0], generator=g)
        found = []
        for function, dtype in ((plain, torch.float64), (plain, torch.float32), (nft_loss, torch.float32)):
            v, *others = (y.to(torch.get_default_device(), dtype) for y in (*x, t, r))
            v.requires_grad_()
            loss = plain(v, *others) if function is plain else nft_loss(v, *others, backend=backend, **options).loss
            found.append(torch.autograd.grad(loss, v)[0].double())
        exact, eager, ours = found
        unit = torch.finfo(torch.float32).eps * exact.abs().max()
        limit = torch.maximum(2 * (eager - exact).abs().max(), 4 * unit)
        worst = max(worst, ((ours - exact).abs().max() / limit).item())
    assert worst <= 1


@pytest.mark.parametrize("left_by", ["mask", "segments"])
def test_the_gradient_keeps_its_bound_where_a_mask_or_a_segment_leaves_few_errors(backend, left_by):
    g = torch.Generator().manual_seed(0)
    v, v_old, x_t = (torch.randn(24, 1, generator=g) for _ in range(3))
    t, r = torch.rand(2, 24, generator=g)
    # e+ is small beside its terms.
    tensors = [v, v_old, x_t, x_t - t[:, None] * v - 1e-3]
    options = {"segments": torch.arange(25)}
    if left_by == "mask":
        tensors = [x.expand(24, 12) for x in tensors]
        options = {"mask": torch.arange(12) == 7}
    place = torch.get_default_device()
    check.compare_nft_loss(*(x.to(place) for x in (*tensors, t, r)), backend=backend, **options)


def test_a_weight_per_token_reads_any_strides(tokens):
    """As the same values in dense memory; tokens beyond a tile, and rows that are shorter than a vector."""
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 16, 9, 37), (3, 5, 3), (2, 100, 41)):
        dense = [torch.randn(shape, generator=g) for _ in range(4)]
        t, r = torch.rand(2, shape[0], generator=g)
        wanted = tokens(dense, t, r)
        strided = [
            dense[0].transpose(1, -1).contiguous().transpose(1, -1),
            dense[1].repeat_interleave(2, -1)[..., ::2],
            dense[2].expand(2, *shape)[0],
            torch.cat([dense[3], dense[3]], 1)[:, : shape[1]],
        ]
        assert all(torch.equal(got, exact) for got, exact in zip(tokens(strided, t, r), wanted, strict=True))


def test_a_weight_per_token_has_the_same_bits_for_any_threads_and_batch(tokens):
    (*x, _), t, r = make((5, 6, 33, 20))
    x, t, r = [a.float() for a in x], t.float(), r.float()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(tokens(x, t, r, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    alone = tokens([a[2:3] for a in x], t[2:3], r[2:3], reduction="none")
    assert all(torch.equal(a[0], whole[2]) for a, whole in zip(alone, found[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_token_and_sample_only(tokens, bad):
    (*x, _), t, r = make((3, 4, 5, 7))
    x, t, r = [a.float() for a in x], t.float(), r.float()
    clean = tokens(x, t, r, reduction="none")
    x[0][1, 2, 3, 4] = bad
    *out, grad = tokens(x, t, r, reduction="none")
    assert not out[0][1].isfinite() and out[8][1].isnan() == (bad != bad)
    for got, wanted in zip(out, clean, strict=False):
        assert torch.equal(got[::2], wanted[::2])
    spoilt = torch.zeros(3, 4, 5, 7, dtype=torch.bool)
    spoilt[1, :, 3, 4] = True
    assert not grad[1, 2, 3, 4].isfinite() and torch.equal(grad[~spoilt], clean[-1][~spoilt])
    # An infinite weight leaves the token's other channels nothing.
    assert bad == bad or grad[1, :, 3, 4].isnan().all()


def test_a_weight_per_token_copies_nothing_but_where_it_must(tokens, monkeypatch):
    taken, original = [], native.nft_loss
    monkeypatch.setattr(native, "nft_loss", lambda inputs, o, **k: taken.append(o.channels) or original(inputs, o, **k))
    (*x, _), t, r = make((2, 4, 5, 7))
    x, t, r = [a.float() for a in x], t.float(), r.float()
    for options in ({}, {"detach_weight": False}, {"mask": torch.ones(5, 7)}):
        tokens(x, t, r, **options)
    tokens(x, t, torch.rand(2, 1, 5, 7))
    assert taken == [4, 0, 0, 0]


def test_a_weight_per_token_compiles_whole(tokens):
    (*x, ref), t, r = make((2, 4, 5, 7))
    x, t, r, ref = [a.float() for a in x], t.float(), r.float(), ref.float()

    def run(v_theta):
        return nft_loss(
            v_theta, *x[1:4], t, r, v_ref=ref, kl_weight=0.1, weight_per="token", channel_dim=1, backend="native"
        ).loss

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = x[0].clone().requires_grad_()
        loss = call(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
