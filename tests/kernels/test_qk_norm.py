"""qk_norm against a definition of its own in float64."""

import pytest
import torch

from nft_kernels.ops.qk_norm import qk_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("q", "k", "weight_q", "weight_k", "context_q", "context_k", "context_weight_q", "context_weight_k")
SHAPES = ((2, 5, 3, 12),) * 2 + ((12,),) * 2 + ((2, 4, 3, 12),) * 2 + ((12,),) * 2
VALUES = {"v": (2, 5, 3, 12), "context_v": (2, 4, 3, 12)}


def inputs(dtype, context=True):
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES[: 8 if context else 4]]
    device = torch.get_default_device()
    return {n: x.to(device, dtype).requires_grad_() for n, x in zip(NAMES, tensors, strict=False)}


def with_values(named):
    """Also values of both streams."""
    generator = torch.Generator().manual_seed(6)
    values = {name: torch.randn(shape, generator=generator, device="cpu") for name, shape in VALUES.items()}
    return named | {name: x.to(named["q"]).requires_grad_() for name, x in values.items()}


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_joined_unchanged(backend, dtype):
    plain, named = inputs(dtype), with_values(inputs(dtype))
    alone, outs = (qk_norm(**x, backend=backend) for x in (plain, named))
    values = torch.stack([*named["v"].unbind(1), *named["context_v"].unbind(1)], 1)
    grads = [torch.randn(2, 9, 3, 12).to(dtype) for _ in range(3)]
    wanted_grads = *torch.autograd.grad(alone, list(plain.values()), grads[:2]), grads[2][:, :5], grads[2][:, 5:]
    got_grads = torch.autograd.grad(outs, list(named.values()), grads)
    for got, want in zip((*outs, *got_grads), (*alone, values, *wanted_grads), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


def test_the_reference_passes_gradcheck():
    assert torch.autograd.gradcheck(
        lambda *x: qk_norm(*x[:8], v=x[8], context_v=x[9], backend="reference"),
        tuple(with_values(inputs(torch.float64)).values()),
        fast_mode=True,
    )


def test_any_strides(backend):
    """Slices of a fused projection, heads that are not dense, and gradients in attention's layout."""
    fused = torch.randn(2, 5, 3 * 36)
    q, k, v = (part.unflatten(-1, (3, 12)) for part in fused.split(36, -1))
    context = torch.randn(2, 3, 4, 12).transpose(1, 2), torch.randn(2, 4, 3, 24)[..., ::2]
    named = inputs(torch.float32) | {"q": q, "k": k, "context_q": context[0], "context_k": context[1]}
    named |= {"weight_q": torch.randn(24)[::2], "context_weight_k": torch.randn(1).expand(12)}
    leaves = {name: x.detach().requires_grad_() for name, x in named.items()}
    context_v = torch.randn(2, 4, 3, 24)[..., ::2]
    *outs, values = qk_norm(**leaves, v=v, context_v=context_v, backend=backend)
    assert torch.equal(values[:, :5], v) and torch.equal(values[:, 5:], context_v)
    wide = [x.detach().double().requires_grad_() for x in named.values()]
    wanted = definition(*(dict(zip(named, wide, strict=True))[name] for name in NAMES))
    weights = [torch.randn(2, 3, 9, 12).transpose(1, 2) for _ in range(2)]
    grads = torch.autograd.grad(outs, list(leaves.values()), weights)
    wanted_grads = torch.autograd.grad(wanted, wide, [w.double() for w in weights])
    for got, want in zip((*outs, *grads), (*wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [False, True], ids=["pair", "values"])
def test_compiles_and_passes_opcheck(backend, values):
    named = inputs(torch.float32)
    tensors = list((with_values(named) if values else named).values())

    def run(*tensors):
        more = dict(zip(list(VALUES)[: len(tensors) - 8], tensors[8:], strict=True))
        return qk_norm(*tensors[:8], **more, backend=backend)

    eager, outs = run(*tensors), torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    grads = [torch.autograd.grad(sum(out.square().sum() for out in r), tensors) for r in (eager, outs)]
    for a, b in zip((*eager, *grads[0]), (*outs, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if backend != "reference":
        torch.library.opcheck(
            torch.ops.nft_kernels.qk_norm.default, (*tensors, *[None] * (10 - len(tensors)), 1e-6, backend)
        )


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
        ({"v": torch.zeros(2, 5, 3, 12)}, ValueError, "v, context_v: got one of them or no context"),
        ({"v": torch.zeros(2, 4, 3, 12), "context_v": torch.zeros(2, 4, 3, 12)}, ValueError, "v: got shape"),
        ({"v": torch.zeros(2, 5, 3, 12), "context_v": torch.zeros(2, 5, 3, 12)}, ValueError, "context_v: got shape"),
        (
            {"v": torch.zeros(2, 5, 3, 12), "context_v": torch.zeros(2, 4, 3, 12, dtype=torch.float64)},
            TypeError,
            "context_v: got torch.float64, accepted is the dtype of v",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        qk_norm(**inputs(torch.float32) | change)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_streams_of_other_dtypes(backend, dtypes):
    """The joint sequence has that of the first stream; the reference rounds the others first."""
    first, others = dtypes
    named = {name: x.detach().to(others) for name, x in inputs(torch.float32).items()}
    named |= {"q": named["q"].to(first), "k": named["k"].to(first)}
    wanted = definition(*(x.double() for x in named.values()))
    for got, want in zip(qk_norm(**named, backend=backend), wanted, strict=True):
        assert got.dtype == first
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)
