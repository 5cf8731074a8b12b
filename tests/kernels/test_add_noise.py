import math

import pytest
import torch

from nft_kernels import add_noise
from nft_kernels.backends import native
from nft_kernels.reference.add_noise import philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's published known-answer vectors for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [w.item() for w in words] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_formula(backend, dtype):
    x0, noise = torch.randn(3, 4, 17, 9).to(dtype), torch.randn(3, 9, 17, 4).transpose(1, 3)
    t = torch.tensor([0.0, 0.3, 1.0])
    x_t = add_noise(x0, t, noise=noise, backend=backend)
    exact = torch.stack([(1 - s) * a + s * n for s, a, n in zip(t.double(), x0.double(), noise.double(), strict=True)])
    assert x_t.dtype == dtype and x_t.shape == x0.shape
    assert (x_t.double() - exact).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-15) * exact.abs().max()
    assert torch.equal(x_t[0], x0[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_to_the_nearest_and_ties_to_even(dtype):
    if reason := native.why_not(torch.empty(0)):
        pytest.skip(reason)
    ulp = torch.finfo(dtype).eps
    near = 1 + ulp * torch.tensor([0.25, 0.49, 0.5, 0.51, 1.5, 2.5, 3.5, 3.75])
    edge = torch.finfo(dtype).max * (1 + ulp * torch.tensor([0.2, 0.24, 0.26]))
    x0 = torch.cat([near, edge, torch.randn(5), torch.full((3,), torch.finfo(dtype).tiny / 3)])[None]
    x0 = torch.cat([x0, -x0])
    got = add_noise(x0, torch.zeros(2), noise=torch.zeros_like(x0), out_dtype=dtype, backend="native")
    assert torch.equal(got, x0.to(dtype))


def test_lazy_negations_are_carried_out(backend):
    """A conjugate's imaginary part is its memory with the sign left to whoever reads it."""
    x0, noise = (torch.randn(2, 9, dtype=torch.cfloat).conj().imag for _ in range(2))
    assert x0.is_neg() and noise.is_neg()
    t = torch.tensor([0.2, 0.7])
    wanted = add_noise(x0.clone(), t, noise=noise.clone(), backend=backend)
    assert torch.equal(add_noise(x0, t, noise=noise, backend=backend), wanted)


def test_seeds_may_lie_apart_in_memory(backend):
    apart, x0 = torch.tensor([3, 4, -(2**62), 5, 2**40 + 1, 6])[::2], torch.zeros(3, 7)
    noise = add_noise(x0, torch.ones(3), seed=apart, backend=backend)
    for seed, drawn in zip((3, -(2**62), 2**40 + 1), noise, strict=True):
        alone = add_noise(x0[:1], torch.ones(1), seed=torch.tensor([seed]), backend=backend)
        assert torch.equal(drawn, alone[0])


def test_seeded_noise_is_standard_normal_and_uncorrelated(backend):
    n = 20_000 if backend == "triton" else 200_000  # the interpreter is slow
    eps = add_noise(torch.zeros(4, n), torch.ones(4), seed=11, backend=backend).double()
    assert eps.mean(1).abs().max() < 5 / math.sqrt(n)
    assert (eps.var(1) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert ((eps**4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / n)
    off = torch.corrcoef(eps) - torch.eye(4)
    assert off.abs().max() < 5 / math.sqrt(n)
    assert (eps[:, 1:] * eps[:, :-1]).mean(1).abs().max() < 5 / math.sqrt(n)


def test_backends_draw_the_same_noise(kernels):
    x0, t = torch.zeros(3, 5, 1003), torch.ones(3)
    a, b = (add_noise(x0, t, seed=-5, backend=name) for name in ("reference", kernels))
    # One ulp of log, cos and sin, and the rounding of their product.
    assert ((a - b).abs() <= 4 * torch.finfo(torch.float32).eps * a.abs().clamp_min(1)).all()


def test_noise_is_box_mullers(kernels):
    n = 20_000 if kernels == "triton" else 2_000_000
    noise = add_noise(torch.zeros(1, n), torch.ones(1), seed=7, backend=kernels)[0].double()
    words = [torch.arange(n // 4), *[torch.zeros(n // 4, dtype=torch.int64)] * 3]
    bits = torch.stack(philox(words, [torch.tensor([7]), torch.tensor([0])]), -1).view(-1, 2)
    radial, angular = ((bits >> 8).float().add(0.5).mul(2.0**-24)).unbind(-1)
    radius, angle = (-2 * radial.double().log()).sqrt(), (2 * math.pi * angular).double()
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()
    # An ulp of the logarithm, half of it after the root, and of 1 for the cosine; the root and the product are rounded.
    bound = 2.5 * torch.finfo(torch.float32).eps * radius.repeat_interleave(2)
    assert ((noise.cpu() - exact).abs() <= bound).all()


@pytest.mark.parametrize("isa", getattr(native._C, "isas", []))
def test_instruction_sets_draw_the_same_bits(isa, monkeypatch):
    x0, t, seeds = torch.zeros(3, 10_003), torch.ones(3), torch.tensor([3, -5, 2**62])
    best = add_noise(x0, t, seed=seeds, backend="native")
    monkeypatch.setenv("NFT_KERNELS_ISA", isa)
    assert torch.equal(add_noise(x0, t, seed=seeds, backend="native"), best)


def test_per_sample_seeds_do_not_depend_on_the_batch(backend):
    seeds = torch.tensor([3, -(2**62), 2**40 + 1])
    x0, t = torch.randn(3, 4, 7), torch.tensor([0.2, 0.5, 0.9])
    whole = add_noise(x0, t, seed=seeds, backend=backend)
    parts = [add_noise(x0[i : i + 1], t[i : i + 1], seed=seeds[i : i + 1], backend=backend) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, add_noise(x0, t, seed=seeds + 1, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_wide_copy_is_what_the_result_was_rounded_from(backend, dtype):
    x0, t = torch.randn(3, 4, 9).to(dtype), torch.tensor([0.2, 0.5, 0.9])
    x_t, wide = add_noise(x0, t, seed=3, keep_wide=True, backend=backend)
    assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wide, add_noise(x0, t, seed=3, out_dtype=wide.dtype, backend=backend))
    # Either neighbour: Triton's interpreter truncates where hardware rounds to nearest.
    assert ((x_t.double() - wide.double()).abs() <= torch.finfo(dtype).eps * wide.double().abs()).all()


def test_compiles_and_passes_opcheck(backend):
    x0, t, noise = torch.randn(2, 9), torch.rand(2), torch.randn(2, 9)

    def run(x):
        return add_noise(x, t, noise=noise, backend=backend)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x0), run(x0))
    args = (x0, t, None, None, noise, torch.float32, True, backend)
    torch.library.opcheck(torch.ops.nft_kernels.add_noise.default, args)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "seed, noise: got both or neither"),
        ({"seed": 1, "noise": torch.zeros(2, 3)}, ValueError, "seed, noise"),
        ({"seed": 1.5}, TypeError, "seed: got float"),
        ({"seed": 2**63}, ValueError, "seed: got"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed: got torch.int64 of shape"),
        ({"noise": torch.zeros(2, 4)}, ValueError, "noise: got shape"),
        ({"seed": 1, "out_dtype": torch.int8}, TypeError, "out_dtype: got torch.int8"),
        ({"seed": 1, "keep_wide": 1}, TypeError, "keep_wide: got 1, accepted are True and False"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        add_noise(torch.zeros(2, 3), torch.tensor([0.1, 0.2]), **options)
