"""The CUDA kernels on the CPU, where `emulator/` stands in for CUDA: what they compute, not how they share memory."""

import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cuda import DTYPES, compare_steps, equal, loss_and_gradient

from nft_kernels import add_noise, nft_loss
from nft_kernels.backends import native
from nft_kernels.check import compare_nft_loss
from nft_kernels.ops import _validate
from nft_kernels.reference import add_noise as noise_reference
from nft_kernels.solvers import schedule, table

CXX = shutil.which("g++")
HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
pytestmark = pytest.mark.skipif(CXX is None, reason="no g++")

SHAPES = [
    (1, 1),
    (3, 16),
    (2, 5, 7, 9),  # no whole packs
    (2, 4, 8, 16),  # in clusters of one block
    (3, 4, 32, 96),  # of two blocks
    (5, 4, 16, 64),  # more clusters than run at once
    (2, 8, 33, 31),
    (1, 30_000),  # on all processors
    (3, 26_000),
    (2, 29_999),
    (1, 20_000),  # in two launches
    (2, 50_000),
    (300, 16),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulated")
    includes = [f"-I{HERE / 'emulator'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command = [
        CXX,
        "-std=c++17",
        "-O1",
        "-w",
        "-ffp-contract=off",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
        *includes,
    ]
    sources = {
        "kernels": [HERE / "emulator" / "kernels.cpp"],
        "bindings": [CSRC / "bindings.cpp", '-DNFT_CUDA_ARCHS="emulated"'],
        **{f"cpu_{source.stem}": [source, "-DNFT_ISA=baseline"] for source in CSRC.glob("cpu/*.cpp")},
    }
    objects = [folder / f"{name}.o" for name in sources]
    with ThreadPoolExecutor() as pool:
        compiling = [
            pool.submit(subprocess.run, [*command, "-c", *source, "-o", target], check=True)
            for source, target in zip(sources.values(), objects, strict=True)
        ]
        for each in compiling:
            each.result()
    subprocess.run([CXX, "-shared", "-fopenmp", *objects, "-o", folder / "_C.so", "-lpthread"], check=True)
    spec = importlib.util.spec_from_file_location("emulated._C", folder / "_C.so")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def emulated(module, monkeypatch):
    """Tensors of the CPU are given to the CUDA kernels."""

    def workspace(device, batch):
        return torch.full((module.cuda_workspace_size(batch),), 255, dtype=torch.uint8)

    def scale(grad, grad_loss):
        flat = (grad.data_ptr(), native.CODES[grad.dtype], 0, [grad.numel()], [1])
        module.cuda_scale((0, 0, 0), flat, grad.numel(), grad_loss.dtype == torch.float64, grad_loss.data_ptr())

    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(native, "_where", lambda device, held=None: (0, 0, 0 if held is None else held.data_ptr()))
    monkeypatch.setattr(native, "_workspace", workspace)
    monkeypatch.setattr(native, "scale", scale)


def inputs(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(shape, generator=g).to(dtype) for _ in range(5)]
    t, r = (torch.rand(shape[0], generator=g) for _ in range(2))
    return x, t, r


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_against_the_float64_reference(shape, dtype):
    x, t, r = inputs(shape, dtype)
    compare_nft_loss(*x[:4], t, r, v_ref=x[4], kl_weight=0.1, backend="native")
    compare_nft_loss(*x[:4], t, r, backend="native", beta=0.3, adv_clip_max=2.0)


@pytest.mark.parametrize("shape", [(3, 4, 32, 96), (2, 3, 5, 7)], ids=str)
def test_options(shape):
    x, t, r = inputs(shape)
    common = {"v_ref": x[4], "kl_weight": 0.1, "backend": "native"}
    for prediction, weighting in itertools.product(("v", "x0", "eps"), ("adaptive", "none", "t")):
        compare_nft_loss(*x[:4], 0.1 + 0.8 * t, r, prediction=prediction, weighting=weighting, **common)
    compare_nft_loss(*x[:4], t, r, beta=0.5 + t, sample_weight=r, **common)
    mask = torch.rand(shape[-1]) - 0.3
    compare_nft_loss(*x[:4], t, x[4].sigmoid(), mask=mask.clamp_min(0), detach_weight=False, **common)
    compare_nft_loss(*x[:4], t, r, policy_weight=mask.abs(), **common)
    compare_nft_loss(*x[:4], t[:1], r[:1], segments=torch.tensor([0, shape[0]]), **common)


# The same values elsewhere: channels last, off a word, samples apart, elements apart, one sample for all.
LAYOUTS = [
    lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    lambda x: torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    lambda x: torch.empty(len(x), x[0].numel() + 1)[:, :-1].unflatten(1, x.shape[1:]).copy_(x),
    lambda x: torch.empty(*x.shape, 2)[..., 0].copy_(x),
    lambda x: x[:1].expand_as(x),
]


@pytest.mark.parametrize("shape", [(3, 8, 16), (2, 4, 32, 96)], ids=str)
def test_any_strides_and_alignment(shape):
    x, t, r = inputs(shape)
    for k in range(len(LAYOUTS)):
        y = [layout(a) for layout, a in zip(LAYOUTS[k:] + LAYOUTS[:k], x, strict=True)]
        common = {"v_ref": y[4], "kl_weight": 0.1, "backend": "native"}
        compare_nft_loss(*y[:4], t, r, **common)
        segments = torch.tensor([0, 1, len(t)])
        weights = {"mask": y[4].abs(), "policy_weight": y[3].abs()}
        compare_nft_loss(*y[:4], t[:2], r[:2], **weights, segments=segments, **common)
        compare_steps(table("dpm++3M", schedule(4)), y)
        x_t, expected = (add_noise(y[0], t, noise=y[1], backend=backend) for backend in ("native", "reference"))
        torch.testing.assert_close(x_t, expected)


@pytest.mark.parametrize("shape", [(3, 4, 32, 96), (3, 30_000), (2, 50_000)], ids=str)
def test_reruns_give_the_same_bits(shape):
    x, t, r = inputs(shape)
    first = loss_and_gradient(x, t, r)
    for _ in range(3):
        assert equal(first, loss_and_gradient(x, t, r))
    four = loss_and_gradient(x, t, r, torch.tensor(4.0))
    assert torch.equal(four[-1], 4 * first[-1])
    forward = nft_loss(*x[:4], t, r, backend="native")
    assert equal(first[:-1], forward)


@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (3, 4, 32, 96), (2, 30_000), (2, 50_000)], ids=str)
def test_nan_is_not_hidden_and_nothing_to_learn_gives_no_gradient(shape):
    x, t, _ = inputs(shape)
    x[0] = x[1].clone()
    assert loss_and_gradient(x, t, torch.full_like(t, 0.5))[-1].eq(0).all()
    x[0][0].view(-1)[3] = float("nan")
    out = nft_loss(*x[:4], t, t, backend="native")
    assert all(value[0].isnan() and value[1].isfinite() for value in (out.policy_loss, out.old_deviation_max))
    assert out.loss.isnan()


@pytest.mark.parametrize("options", [{}, {"detach_weight": False}], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (2, 30_000), (2, 50_000)], ids=str)
@pytest.mark.parametrize("name", ["t", "r"])
def test_numbers_beyond_their_range_give_nan(monkeypatch, name, shape, options):
    monkeypatch.setattr(_validate, "_within", lambda *_: None)
    x, t, r = inputs(shape)
    {"t": t, "r": r}[name][1] = 500
    *values, grad = loss_and_gradient(x, t, r, **options)
    for rows in (values[1], grad.flatten(1)):
        assert rows[0].isfinite().all() and rows[1].isnan().all()
    assert values[0].isnan()
    x_t = add_noise(x[3], t, seed=0, backend="native")
    assert x_t[0].isfinite().all() and x_t[1].isnan().all() == (name == "t")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 103), (2, 4, 16, 32)], ids=str)
def test_noise_is_that_of_the_reference(shape, dtype):
    x, t, _ = inputs(shape, dtype)
    seed = torch.arange(shape[0]) * 2**33 - 5
    noise = noise_reference.normals(seed, torch.zeros_like(seed), x[0][0].numel()).view(shape)
    x_t = add_noise(x[0], t, seed=seed, backend="native")
    exact = noise_reference.add_noise(x[0].double(), t, noise.double(), torch.float64)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert x_t.dtype == dtype and ((x_t.double() - exact).abs() <= tolerance * exact.abs().clamp_min(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["heun", "flow-sde", "dpm++3M", "unipc"])
def test_solver_step_against_the_reference(name, dtype):
    x, _, _ = inputs((3, 4, 9, 11), dtype)
    compare_steps(table(name, schedule(5, shift=3.0)), x)
