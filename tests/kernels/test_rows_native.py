"""What the C++ kernels on rows write, and where; test_layer_norm_modulate and its like compare it."""

import importlib

import pytest
import torch

from nft_kernels.backends import native
from nft_kernels.ops.attention import attention
from nft_kernels.ops.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODULES = {
    name: importlib.import_module(f"nft_kernels.ops.{name}") for name in ("layer_norm_modulate", "qk_norm", "gelu")
}


def guarded(like, shape, fill):
    """Of this shape, and a buffer around it."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 128,), fill, dtype=like.dtype)
    return buffer[64 : 64 + size].view(shape), buffer


def tensors(shapes, dtype):
    """Each amid NaN, which must not be read."""
    found = []
    for shape in shapes:
        x, _ = guarded(torch.empty(0, dtype=dtype), shape, float("nan"))
        found.append(x.copy_(torch.randn(shape)).requires_grad_())
    return found


def case(op, width, dtype, batch=3):
    """The op with all it can do, as a function of a list of tensors, and these."""
    if op == "gelu":
        return lambda x: (MODULES[op].gelu(*x, backend="native"),), tensors([(batch, 5, width)], dtype)
    if op == "qk_norm":
        stream, context = (batch, 4, 3, width), (batch, 2, 3, width)
        shapes = [stream] * 2 + [(width,)] * 2 + [context] * 2 + [(width,)] * 2 + [stream, context]
        return (
            lambda x: MODULES[op].qk_norm(*x[:8], v=x[8], context_v=x[9], backend="native"),
            tensors(shapes, dtype),
        )
    names = ("x", "y", "y2", "y_bias", "gate", "gate2", "scale", "shift", "scale2", "shift2")
    shapes = [(batch, 5, width)] * 3 + [(width,)] + [(batch, width)] * 6
    return (
        lambda x: MODULES[op].layer_norm_modulate(**dict(zip(names, x, strict=True)), backend="native"),
        tensors(shapes, dtype),
    )


def evaluate(run, leaves):
    outs = run(leaves)
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 32, 37, 64, 1536])
@pytest.mark.parametrize("op", MODULES)
def test_every_element_is_written_and_nothing_around(op, width, dtype, monkeypatch):
    buffers = []

    def poisoned(like, shape):
        out, buffer = guarded(like, shape, float("nan"))
        buffer[:64] = buffer[buffer.numel() - 64 :] = 7
        buffers.append(buffer)
        return out

    run, leaves = case(op, width, dtype)
    before = [x.detach().clone() for x in leaves]
    plain = evaluate(run, leaves)
    monkeypatch.setattr(MODULES[op], "new_empty", poisoned)
    again = evaluate(run, leaves)
    assert buffers and all(x.isfinite().all() for x in again)
    assert all((side == 7).all() for buffer in buffers for side in (buffer[:64], buffer[-64:]))
    assert all(torch.equal(a, b) for a, b in zip([*plain, *leaves], [*again, *before], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", MODULES)
def test_bits_depend_neither_on_threads_nor_on_the_batch(op, dtype):
    run, leaves = case(op, 128, dtype, batch=61)
    # Sums over a batch, which plain PyTorch takes, depend on it.
    leaves = [x if x.shape[0] == 61 and x.ndim > 2 else x.detach() for x in leaves]
    trained = [x for x in leaves if x.requires_grad]
    weights = [torch.randn_like(out) for out in run(leaves)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs = run(leaves)
            found.append([*outs, *torch.autograd.grad(outs, trained, weights)])
    finally:
        torch.set_num_threads(threads)
    for part in (slice(7, 8), slice(20, 61)):
        few = [x.detach()[part].requires_grad_(x.requires_grad) if x.shape[0] == 61 else x for x in leaves]
        outs = run(few)
        grads = torch.autograd.grad(outs, [x for x in few if x.requires_grad], [w[part] for w in weights])
        assert all(torch.equal(a, b[part]) for a, b in zip([*outs, *grads], found[0], strict=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("op", [*MODULES, "attention", "group_norm_silu"])
def test_a_lazy_negation_is_seen(op):
    def lazily(x):
        return torch._neg_view(-x.detach())

    if op == "attention":
        run, leaves = lambda x: (attention(*x, backend="native"),), tensors([(2, 5, 3, 8)] * 3, torch.float32)
    elif op == "group_norm_silu":
        leaves = [x.detach() for x in tensors([(2, 4, 3, 5), (4,), (4,)], torch.float32)]
        run = lambda x: (group_norm_silu(*x, groups=2, eps=1e-6, backend="native"),)  # noqa: E731
    else:
        run, leaves = case(op, 32, torch.float32)
    lazy = [lazily(x).requires_grad_(x.requires_grad) for x in leaves]
    outs, again = run(leaves), run(lazy)
    assert all(x.is_neg() for x in lazy) and all(map(torch.equal, outs, again))
    if outs[0].requires_grad:
        weights = [torch.randn_like(out) for out in outs]
        grads = torch.autograd.grad(outs, leaves, weights)
        assert all(map(torch.equal, grads, torch.autograd.grad(again, lazy, list(map(lazily, weights)))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype):
    """Their mean takes digits that the normalized rows still have."""
    x = (1000 + torch.randn(2, 3, 1536)).to(dtype)
    scale, shift = torch.randn(2, 2, 1536).to(dtype)

    def run(backend, *tensors):
        return MODULES["layer_norm_modulate"].layer_norm_modulate(*tensors, backend=backend)[1].double()

    exact = run("reference", *(y.double() for y in (x, scale, shift)))
    got = (run("native", x, scale, shift) - exact).abs().max()
    # The plain formula, which would allow for more, loses a hundred times as much in float32.
    assert got <= 4 * max(torch.finfo(dtype).eps, 1e-12) * exact.abs().max()


def test_rows_of_one_large_value():
    """Of their variance rounding leaves something, below zero as well."""
    x = (1e12 * (1 + torch.rand(400, 1, 1))).expand(-1, 1, 2999).contiguous()
    out = MODULES["layer_norm_modulate"].layer_norm_modulate(x, *torch.zeros(2, 400, 2999), backend="native")[1]
    assert out.isfinite().all()
