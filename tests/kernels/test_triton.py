"""What only the Triton backend has: addressing, the choice of blocks, and what it says where it cannot run."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nft_kernels.backends import choose, load
from nft_kernels.reference import nft_loss as reference
from nft_kernels.reference.solver_step import Coefficients

triton = pytest.importorskip("triton", minversion="3.4")
tl = pytest.importorskip("triton.language")
common = pytest.importorskip("nft_kernels.backends.triton._common")
offsets = common.offsets
pytestmark = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


@triton.jit
def _offsets(view, sample: tl.int64, start: tl.int64, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), offsets(view, sample, start, BLOCK))


@pytest.mark.parametrize(
    ("sizes", "strides", "start"),
    [
        ((), (), 2**40 + 3),
        ((2**34,), (7,), 2**33 - 1),
        ((5, 2**31 - 2, 3), (2**35, 3, 1), 6 * (2**31 - 2) - 4),
        ((4, 2**33, 2), (2**36, 5, 2**34), 2**34 - 6),
        ((9, 8, 7, 6, 5), (1, 9, 72, 504, 3024), 15107),
    ],
)
def test_offsets_reach_beyond_32_bits(kernels, sizes, strides, start):
    out = torch.empty(8, dtype=torch.int64)
    _offsets[(1,)](common.View(out, 2**33, sizes, strides), 3, start, out, BLOCK=8)
    for lane, got in enumerate(out.tolist()):
        rest, expected = start + lane, 3 * 2**33
        for size, stride in zip(sizes[:0:-1], strides[:0:-1], strict=True):
            rest, digit = divmod(rest, size)
            expected += digit * stride
        assert got == expected + rest * (strides[0] if strides else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can")
def test_a_gpu_on_which_triton_cannot_launch_says_so(kernels):
    assert load("triton").why_not(SimpleNamespace(device=torch.device("cuda"))).startswith("triton cannot launch: ")


def arguments(shape, dtype=torch.float32):
    """What ``nft_loss`` of a backend takes."""
    x = [torch.randn(shape).to(dtype) for _ in range(5)]
    t, r, beta = (torch.rand(shape[0]) + k for k in (0, 0, 0.5))
    return reference.LossInputs(*x[:4], t, r, beta, v_ref=x[4]), reference.Options(kl_weight=0.1)


def guarded(like, dtype, around):
    """A tensor of the layout of ``like`` full of NaN, and the memory before and after it, full of ``around``."""
    margin, strides = 300, torch.empty_strided(like.shape, like.stride()).stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    memory = torch.full((span + 2 * margin,), around, dtype=dtype)
    tensor = memory[margin : margin + span].as_strided(like.shape, strides).fill_(float("nan"))
    return tensor, (memory[:margin], memory[margin + span :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_nothing_outside_is_read_or_written(kernels, layout, dtype, monkeypatch):
    sides, shape, nan = [], (2, 3, 23, 17), float("nan")
    model = torch.empty(shape) if layout == "dense" else torch.empty(2, 17, 23, 3).transpose(1, 3)
    inputs, options = arguments(shape)
    weights = {name: torch.rand(shape) for name in ("r", "mask", "policy_weight")}
    every = inputs._replace(**weights, segments=torch.arange(3))
    inputs, every = (
        reference.LossInputs._make(
            guarded(model, dtype, nan)[0].copy_(x) if torch.is_tensor(x) and x.ndim == 4 else x for x in tensors
        )
        for tensors in (inputs, every)
    )

    def empty_like(x, dtype=None):
        tensor, around = guarded(x, dtype or x.dtype, 7.0)
        sides.extend(around)
        return tensor

    monkeypatch.setattr(torch, "empty_like", empty_like)
    x, v, u, h, t, *_ = inputs
    seeds, square = torch.arange(2), torch.full((2,), nan, dtype=torch.float64)
    backend = load(kernels)
    loss, _, grad = backend.nft_loss(inputs, options, grad_dtype=dtype)
    general_loss, _, general_grad = backend.nft_loss(every, options._replace(detach_weight=False), grad_dtype=dtype)
    noised = torch.empty_like(x)
    backend.add_noise(x, t, seeds, seeds, None, noised, x.new_empty(0))
    outputs = [torch.empty_like(x) for _ in range(3)]
    row = Coefficients(0.9, [0.1, 0.2, 0.3], 0.5, 1.0, -0.5, 0.5, 4.0)
    backend.solver_step(x, v, u, None, [h, x], seeds, seeds, row, *outputs, square)
    assert all(y.isfinite().all() for y in (loss, grad, general_loss, general_grad, noised, *outputs, square))
    assert len(sides) == 12 and all(side.eq(7).all() for side in sides)


def test_long_samples_and_large_batches(kernels, monkeypatch):
    """More slices, and more samples, than the last stage of the loss takes at once."""
    monkeypatch.setattr(sys.modules[load(kernels).nft_loss.__module__], "CELLS", 8)
    for shape in ((1, 20_000), (3, 5_000), (20, 3)):
        inputs, options = arguments(shape)
        loss, details, _ = load(kernels).nft_loss(inputs, options)
        wide = reference.LossInputs._make(x.double() if torch.is_tensor(x) else x for x in inputs)
        losses, *rows = reference.nft_loss(wide, options)
        for got, expected in zip((loss, *details), (losses.sum(), *rows), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_timing_configurations_leaves_the_results_right(kernels, monkeypatch):
    """As NFT_KERNELS_AUTOTUNE=1 does on a GPU, with a clock that prefers the last configuration."""
    from nft_kernels.backends.triton.nft_loss import _differentiate, _sum_slices

    args = arguments((2, 5000))
    expected = load(kernels).nft_loss(*args, grad_dtype=torch.float32)
    monkeypatch.setenv("NFT_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configs, clock = common._configs(), iter(range(100, 0, -1))
    for kernel in (_sum_slices, _differentiate):
        monkeypatch.setattr(kernel, "configs", configs)
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "_do_bench", lambda call, quantiles: call() or [next(clock)] * 3)
    loss, details, grad = load(kernels).nft_loss(*args, grad_dtype=torch.float32)
    assert _differentiate.best_config == configs[-1]
    # The best is kept on disk under its key, which the interpreter leaves out: it has to be JSON.
    assert all(json.dumps(list(kernel.cache)) for kernel in (_sum_slices, _differentiate))
    for got, before in zip((loss, details, grad), expected, strict=True):
        torch.testing.assert_close(got, before, rtol=1e-6, atol=1e-9)


def test_nothing_is_timed_unless_wanted_and_never_in_a_capture(kernels, monkeypatch):
    assert len(common._configs()) == 1
    monkeypatch.setenv("NFT_KERNELS_AUTOTUNE", "1")
    several = common._configs()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len(several) > 1 and common._allowed(several, {}) == several[:1]
    # Up to 3.6 Triton would time the one that is left.
    assert common._clock(pytest.fail, (0.5, 0.2, 0.8)) == [0.0] * 3
    monkeypatch.setenv("NFT_KERNELS_TRITON_CONFIG", "BLOCK=2048,num_warps=8")
    (config,) = common._configs()
    assert config.kwargs["BLOCK"] == 2048 and config.num_warps == 8
    for wrong in (
        "BLOCK=1000,num_warps=4",
        "BLOCK=128,num_warps=4",
        "BLOCK=0,num_warps=4",
        "BLOCK=256,num_warps=3",
        "4",
    ):
        monkeypatch.setenv("NFT_KERNELS_TRITON_CONFIG", wrong)
        with pytest.raises(ValueError, match=f"NFT_KERNELS_TRITON_CONFIG: got '{wrong}', accepted is such as"):
            common._configs()
    monkeypatch.setenv("NFT_KERNELS_TRITON_CONFIG", "2048")
    with pytest.raises(ValueError, match="NFT_KERNELS_TRITON_CONFIG: got '2048'"):
        common._configs()


def test_a_choice_that_cannot_run_says_why(kernels, monkeypatch):
    x, cpu = torch.zeros(1), torch.zeros(1, device="cpu")
    monkeypatch.setenv("NFT_KERNELS_BACKEND", kernels)
    assert choose("auto", x) == kernels
    monkeypatch.delenv("NFT_KERNELS_BACKEND")
    assert choose("auto", cpu) != kernels
    monkeypatch.setattr(load(kernels), "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="backend: 'triton' cannot run: CPU tensors need TRITON_INTERPRET=1"):
        choose(kernels, cpu)
    with pytest.raises(RuntimeError, match="no kernels for meta tensors"):
        choose(kernels, cpu.to("meta"))


def test_triton_is_optional(kernels):
    code = """
import sys
sys.modules["triton"] = None
import torch, nft_kernels
assert "nft_kernels.backends.triton" not in sys.modules
x, t = torch.zeros(2, 3), torch.ones(2)
nft_kernels.add_noise(x, t, seed=0)
try:
    nft_kernels.add_noise(x, t, seed=0, backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("backend: 'triton' cannot run: triton is not installed"), done.stderr
