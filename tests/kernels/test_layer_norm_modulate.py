"""layer_norm_modulate against a definition of its own in float64."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from nft_kernels import backends
from nft_kernels.backends import native
from nft_kernels.ops._rows import backend_of
from nft_kernels.ops.layer_norm_modulate import layer_norm_modulate

module = importlib.import_module("nft_kernels.ops.layer_norm_modulate")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPE = (2, 3, 37)
RESIDUALS = {
    "plain": (),
    "residual": ("y", "gate"),
    "bias": ("y", "gate", "y_bias"),
    "second": ("y", "gate", "y2", "gate2"),
    "all": ("y", "gate", "y_bias", "y2", "gate2"),
}


def definition(
    x, scale, shift, scale2=None, shift2=None, *, y=None, gate=None, y_bias=None, y2=None, gate2=None, dtype
):
    """In float64; only h is rounded to x's dtype, as the next layer finds it, which is no step for the gradient."""
    x, scale, shift = x.double(), scale.double(), shift.double()
    h = x
    for opened, residual in ((gate, y), (gate, y_bias), (gate2, y2)):
        if residual is not None:
            h = h + torch.einsum("bd,bsd->bsd", opened.double(), residual.double().expand(x.shape))
    h = h + (h.detach().to(dtype).double() - h.detach())
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pairs = [(scale, shift)] if scale2 is None else [(scale, shift), (scale2.double(), shift2.double())]
    return h, *(normed * (1 + a[:, None]) + b[:, None] for a, b in pairs)


def inputs(dtype, dual=True, residual="all"):
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        x = torch.randn(shape, generator=generator, device="cpu")
        return x.to(torch.get_default_device(), dtype).requires_grad_()

    named = {"x": leaf(*SHAPE), "scale": leaf(2, 37), "shift": leaf(2, 37)}
    if dual:
        named |= {"scale2": leaf(2, 37), "shift2": leaf(2, 37)}
    shapes = {"y": SHAPE, "y2": SHAPE, "y_bias": (37,), "gate": (2, 37), "gate2": (2, 37)}
    return named | {name: leaf(*shapes[name]) for name in RESIDUALS[residual]}


def exact(named, weights):
    wide = {name: x.detach().double().requires_grad_() for name, x in named.items()}
    outs = definition(**wide, dtype=named["x"].dtype)
    return outs, torch.autograd.grad(loss(outs, weights), list(wide.values()))


def loss(outs, weights):
    return sum((out.double() * w).sum() for out, w in zip(outs, weights, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dual", [False, True], ids=["one", "two"])
def test_forward_and_gradients(backend, dual, residual, dtype):
    named = inputs(dtype, dual, residual)
    weights = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3 if dual else 2)]
    outs = layer_norm_modulate(**named, backend=backend)
    grads = torch.autograd.grad(loss(outs, weights), list(named.values()))
    wanted, wanted_grads = exact(named, weights)
    for got, want in zip((*outs, *grads), (*wanted, *wanted_grads), strict=True):
        # 4 units in the last place of the largest value, whichever end of its binade it lies at.
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).abs().max() <= 8 * max(torch.finfo(dtype).eps, 1e-15) * want.abs().max()
    if residual == "plain":
        assert torch.equal(outs[0], named["x"])


def test_the_reference_passes_gradcheck():
    named = inputs(torch.float64)
    names = list(named)

    def run(*tensors):
        return layer_norm_modulate(**dict(zip(names, tensors, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(run, tuple(named.values()), fast_mode=True)


def test_any_strides_and_mixed_dtypes(backend):
    x = torch.randn(2, 37, 3).transpose(1, 2)
    modulation = torch.randn(2, 4 * 37).to(torch.bfloat16).split(37, 1)
    y = torch.randn(3, 2, 37).transpose(0, 1).to(torch.float16)
    args = x, *modulation[:2]
    y_bias, y2 = torch.randn(37, 2, dtype=torch.bfloat16)[:, 1], torch.randn(2, 3, 2 * 37)[..., ::2]
    residuals = {"y": y, "gate": modulation[2], "y_bias": y_bias, "y2": y2, "gate2": modulation[3]}
    outs = layer_norm_modulate(*args, **residuals, backend=backend)
    want = definition(*args, **residuals, dtype=x.dtype)
    for got, exact in zip(outs, want, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_float64_shift_has_a_float64_gradient(backend):
    named = inputs(torch.float32, residual="plain")
    named["shift2"] = named["shift2"].detach().double().requires_grad_()
    weights = [torch.randn(SHAPE) for _ in range(3)]
    (grad,) = torch.autograd.grad(loss(layer_norm_modulate(**named, backend=backend), weights), named["shift2"])
    torch.testing.assert_close(grad, weights[2].double().sum(1), rtol=1e-14, atol=1e-14)


def test_h_is_normalized_as_it_was_rounded(backend):
    """So that the backward, which finds h in memory, differentiates what the forward computed."""
    named = inputs(torch.bfloat16)
    h, *outs = layer_norm_modulate(**named, backend=backend)
    rest = {name: x for name, x in named.items() if name not in ("x", *RESIDUALS["all"])}
    again = layer_norm_modulate(h, **rest, backend=backend)[1:]
    assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True))


def test_only_one_output_used(backend):
    named = inputs(torch.float32)
    weights = [torch.zeros(SHAPE), torch.zeros(SHAPE), torch.randn(SHAPE)]
    out = layer_norm_modulate(**named, backend=backend)[2]
    names = ("x", "y", "y2", "y_bias", "scale2")
    grads = torch.autograd.grad((out * weights[2]).sum(), [named[name] for name in names])
    _, want = exact(named, weights)
    want = dict(zip(named, want, strict=True))
    for got, name in zip(grads, names, strict=True):
        torch.testing.assert_close(got.double(), want[name], rtol=1e-5, atol=1e-6)


def test_frozen_modulation_gets_no_gradient(backend):
    named = inputs(torch.float32)
    for name in set(named) - {"x", "y", "y2"}:
        named[name].requires_grad_(False)
    sum(out.sum() for out in layer_norm_modulate(**named, backend=backend)).backward()
    assert {name for name, x in named.items() if x.grad is not None} == {"x", "y", "y2"}


@pytest.mark.parametrize("trained", ["y_bias", "gate", "gate2", "scale2"])
def test_each_gradient_alone(backend, trained):
    named = inputs(torch.float32)
    weights = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]
    _, want = exact(named, weights)
    for name in set(named) - {trained}:
        named[name].requires_grad_(False)
    loss(layer_norm_modulate(**named, backend=backend), weights).backward()
    torch.testing.assert_close(
        named[trained].grad.double(), dict(zip(named, want, strict=True))[trained], rtol=1e-5, atol=1e-5
    )


def test_compiles_and_passes_opcheck(backend):
    named = inputs(torch.float32)
    names, tensors = list(named), list(named.values())

    def run(*tensors):
        return layer_norm_modulate(**dict(zip(names, tensors, strict=True)), backend=backend)

    eager = run(*tensors)
    outs = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    grads = [torch.autograd.grad(sum(out.square().sum() for out in r), tensors) for r in (eager, outs)]
    for a, b in zip((*eager, *grads[0]), (*outs, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if backend != "reference":
        order = ("x", "y", "y2", "y_bias", "gate", "gate2", "scale", "shift", "scale2", "shift2")
        args = *(named[name] for name in order), 1e-6, backend
        torch.library.opcheck(torch.ops.nft_kernels.layer_norm_modulate.default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 37)}, ValueError, r"x: got shape \(2, 37\)"),
        ({"x": torch.zeros(2, 3, 37, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"scale": torch.zeros(3, 37)}, ValueError, r"scale: got shape \(3, 37\), accepted is \(B, D\) = \(2, 37\)"),
        ({"shift": None}, TypeError, "shift: got NoneType"),
        ({"shift2": None}, ValueError, "scale2, shift2: got one of them"),
        ({"gate": None}, ValueError, "y, gate: got one of them"),
        ({"y": torch.zeros(2, 2, 37)}, ValueError, "y: got shape"),
        ({"y": None, "gate": None}, ValueError, "y_bias: got one without y, accepted is one with y and gate"),
        ({"y": None, "gate": None, "y_bias": None}, ValueError, "y2: got one without y"),
        ({"y_bias": torch.zeros(2, 37)}, ValueError, r"y_bias: got shape \(2, 37\), accepted is \(D,\) = \(37,\)"),
        ({"y_bias": torch.zeros(37, dtype=torch.int64)}, TypeError, "y_bias: got torch.int64"),
        ({"y2": None}, ValueError, "y2, gate2: got one of them"),
        ({"y2": torch.zeros(2, 3, 36)}, ValueError, "y2: got shape"),
        ({"gate2": torch.zeros(2, 36)}, ValueError, "gate2: got shape"),
        ({"eps": 0.0}, ValueError, "eps: got 0.0"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        layer_norm_modulate(**inputs(torch.float32) | change)


@pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")
def test_the_environment_chooses(monkeypatch):
    named, seen = inputs(torch.float32, False, "plain"), []
    monkeypatch.setattr(module, "load", lambda backend: seen.append(backend) or backends.load(backend))
    for name, chosen in (("native", ["native"]), ("reference", []), ("", ["native"])):
        monkeypatch.setenv("NFT_KERNELS_BACKEND", name)
        seen.clear()
        layer_norm_modulate(**named)
        layer_norm_modulate(**named, backend="reference")
        assert seen == chosen
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="NFT_KERNELS_BACKEND: got 'fast'"):
        layer_norm_modulate(**named)


def test_native_is_refused_by_name_beside_a_gpu(monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), is_cpu=False)
    message = "'native' cannot run: it has no kernel for qk_norm on cuda, accepted are triton, reference"
    with pytest.raises(RuntimeError, match=f"backend: {message}"):
        backend_of("qk_norm", "native", gpu)
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "native")
    with pytest.raises(RuntimeError, match=f"NFT_KERNELS_BACKEND: {message}"):
        backend_of("qk_norm", "auto", gpu)
