"""qk_norm against a definition of its own in float64."""

import pytest
import torch

from nft_kernels.ops.qk_norm import qk_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("q", "k", "weight_q", "weight_k", "context_q", "context_k", "context_weight_q", "context_weight_k")
SHAPES = ((2, 5, 3, 12),) * 2 + ((12,),) * 2 + ((2, 4, 3, 12),) * 2 + ((12,),) * 2


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def inputs(dtype, context=True):
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES[: 8 if context else 4]]
    device = torch.get_default_device()
    return {n: x.to(device, dtype).requires_grad_() for n, x in zip(NAMES, tensors, strict=False)}


def definition(q, k, weight_q, weight_k, *context):
    """Token by token: each head is scaled to a root mean square of nearly 1."""

    def normed(x, weight):
        return [weight * token / (token.square().mean(-1, keepdim=True) + 1e-6).sqrt() for token in x.unbind(1)]

    tokens = [normed(q, weight_q), normed(k, weight_k)]
    if context:
        tokens = [tokens[0] + normed(context[0], context[2]), tokens[1] + normed(context[1], context[3])]
    return [torch.stack(part, 1) for part in tokens]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["alone", "joint"])
def test_forward_and_gradients(backend, context, dtype):
    named = inputs(dtype, context)
    outs = qk_norm(**named, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in named.values()]
    wanted = definition(*wide)
    weights = [torch.randn(out.shape, dtype=torch.float64).to(dtype) for out in wanted]
    grads = torch.autograd.grad(outs, list(named.values()), weights)
    wanted_grads = torch.autograd.grad(wanted, wide, [w.double() for w in weights])
    for got, want in zip((*outs, *grads), (*wanted, *wanted_grads), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).abs().max() <= 8 * max(torch.finfo(dtype).eps, 1e-15) * want.abs().max()


def test_the_reference_passes_gradcheck():
    assert torch.autograd.gradcheck(
        lambda *x: qk_norm(*x, backend="reference"), tuple(inputs(torch.float64).values()), fast_mode=True
    )


def test_any_strides(backend):
    """Slices of a fused projection, heads that are not dense, and gradients in attention's layout."""
    fused = torch.randn(2, 5, 3 * 36)
    q, k = (part.unflatten(-1, (3, 12)) for part in fused.split(36, -1)[:2])
    context = torch.randn(2, 3, 4, 12).transpose(1, 2), torch.randn(2, 4, 3, 24)[..., ::2]
    named = inputs(torch.float32) | {"q": q, "k": k, "context_q": context[0], "context_k": context[1]}
    named |= {"weight_q": torch.randn(24)[::2], "context_weight_k": torch.randn(1).expand(12)}
    leaves = {name: x.detach().requires_grad_() for name, x in named.items()}
    outs = qk_norm(**leaves, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in named.values()]
    wanted = definition(*(dict(zip(named, wide, strict=True))[name] for name in NAMES))
    weights = [torch.randn(2, 3, 9, 12).transpose(1, 2) for _ in range(2)]
    grads = torch.autograd.grad(outs, list(leaves.values()), weights)
    wanted_grads = torch.autograd.grad(wanted, wide, [w.double() for w in weights])
    for got, want in zip((*outs, *grads), (*wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_compiles_and_passes_opcheck(backend):
    tensors = list(inputs(torch.float32).values())

    def run(*tensors):
        return qk_norm(*tensors, backend=backend)

    eager, outs = run(*tensors), torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    grads = [torch.autograd.grad(sum(out.square().sum() for out in r), tensors) for r in (eager, outs)]
    for a, b in zip((*eager, *grads[0]), (*outs, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if backend == "triton":
        torch.library.opcheck(torch.ops.nft_kernels.qk_norm.default, (*tensors, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 36)}, ValueError, r"q: got shape \(2, 5, 36\), accepted is \(B, S, H, d\)"),
        ({"k": torch.zeros(2, 4, 3, 12)}, ValueError, "k: got shape"),
        ({"weight_k": torch.zeros(3, 12)}, ValueError, "weight_k: got shape"),
        ({"weight_q": None}, TypeError, "weight_q: got NoneType"),
        ({"context_k": None}, ValueError, "context_q, context_k and their weights: got 3 of the 4"),
        ({"context_q": torch.zeros(2, 4, 2, 12)}, ValueError, "context_q: got shape"),
        ({"context_k": torch.zeros(2, 5, 3, 12)}, ValueError, "context_k: got shape"),
        ({"backend": "native"}, RuntimeError, "it has no kernel for qk_norm"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        qk_norm(**inputs(torch.float32) | change)
