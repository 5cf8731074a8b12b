"""The loss in other people's training loops: whatever surrounds it, the gradients are those of the plain formula."""

import functools
import importlib.util
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from nft_kernels import NFTLoss, add_noise, group_advantages, nft_loss, nft_loss_from_rewards, optimality_probability
from nft_kernels.ops.group_norm_silu import group_norm_silu
from nft_kernels.ops.layer_norm_modulate import layer_norm_modulate
from nft_kernels.ops.qk_norm import qk_norm

ROOT = Path(__file__).parents[2]


def batch(size=6):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(size, 4, 8, generator=g) for _ in range(3)]
    return (*x, torch.rand(size, generator=g), torch.rand(size, generator=g))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def plain_loss(v_theta, v_old, x_t, x0, t, r):
    """The design's formula in eager PyTorch; autograd differentiates it."""
    t = t.view(-1, 1, 1)
    parts = []
    for velocity in (v_theta, 2 * v_old - v_theta):
        error = x_t - t * velocity - x0
        weight = error.detach().abs().mean((1, 2)).clamp_min(1e-5)
        parts.append(error.square().mean((1, 2)) / weight)
    return (5 * (r * parts[0] + (1 - r) * parts[1])).mean()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def expected():
    model, (x_t, x0, v_old, t, r) = network(), batch()
    return gradients(model, plain_loss(model(x_t), v_old, x_t, x0, t, r))


def assert_close(got, wanted, **tolerance):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_module_has_the_functions_settings():
    x_t, x0, v_old, t, r = batch()
    module = NFTLoss(beta=0.5, weighting="t", reduction="sum")
    out = module(x0, v_old, x_t, x0, t, r, mask=torch.ones(1, 8))
    same = nft_loss(x0, v_old, x_t, x0, t, r, beta=0.5, weighting="t", reduction="sum", mask=torch.ones(1, 8))
    assert all(torch.equal(a, b) for a, b in zip(out, same, strict=True))
    each = torch.linspace(0.1, 1, 6)
    out = module(x0, v_old, x_t, x0, t, r, beta=each)
    same = nft_loss(x0, v_old, x_t, x0, t, r, beta=each, weighting="t", reduction="sum")
    assert all(torch.equal(a, b) for a, b in zip(out, same, strict=True))
    assert "beta=0.5" in repr(module) and not list(module.parameters()) and not module.state_dict()


def test_the_module_hands_on_everything():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(6, 3, 5, generator=g) for _ in range(5)]
    t, r, weight = (torch.rand(6, generator=g) for _ in range(3))
    mask, policy_weight = torch.rand(2, 5, generator=g)
    given = {"v_ref": x[4], "mask": mask, "policy_weight": policy_weight, "sample_weight": weight}
    packed = {"v_ref": x[4], "segments": torch.tensor([0, 2, 6]), "sample_weight": weight[:2]}
    for tensors, options in (([*x[:4], t, r], given), ([*x[:4], t[:2], r[:2]], packed)):
        wanted = nft_loss(*tensors, **options, kl_weight=0.3)
        got = NFTLoss(kl_weight=0.3)(*tensors, **options)
        assert all(map(torch.equal, got, wanted))
        for name in options.keys() & {"mask", "policy_weight", "sample_weight"}:
            others = {key: value for key, value in options.items() if key != name}
            assert not torch.equal(nft_loss(*tensors, **others, kl_weight=0.3).loss, got.loss)


def test_raw_rewards_and_group_ids():
    x_t, x0, v_old, t, _ = batch()
    rewards, ids = torch.rand(6), torch.tensor([3, 3, 1, 1, 1, 3])
    out = nft_loss_from_rewards(x0, v_old, x_t, x0, t, rewards, ids, std="group", adv_clip_max=2.0, beta=0.3)
    r = optimality_probability(group_advantages(rewards, ids, std="group"), adv_clip_max=2.0)
    assert torch.equal(out.loss, nft_loss(x0, v_old, x_t, x0, t, r, adv_clip_max=2.0, beta=0.3).loss)


def test_eager_and_gradient_accumulation():
    model, (x_t, x0, v_old, t, r) = network(), batch()
    assert_close(gradients(model, nft_loss(model(x_t), v_old, x_t, x0, t, r).loss), expected())
    for part in (slice(0, 4), slice(4, 6)):
        loss = nft_loss(model(x_t[part]), v_old[part], x_t[part], x0[part], t[part], r[part]).loss
        (loss * (part.stop - part.start) / 6).backward()
    assert_close([p.grad for p in model.parameters()], expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler(dtype):
    """Velocities come in half precision, latents in float32; the scaler's factor leaves the gradients as they are."""
    model, (x_t, x0, v_old, t, r) = network(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", dtype):
        v_theta = model(x_t)
        assert v_theta.dtype == dtype
        out = nft_loss(v_theta, v_old.to(dtype), x_t, x0, t, r)
    assert out.loss.dtype == torch.float32
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    wide = network()
    wanted = gradients(wide, plain_loss(wide(x_t), v_old, x_t, x0, t, r))
    # Half precision in the network, not in the loss, is what differs.
    for p, w in zip(model.parameters(), wanted, strict=True):
        assert (p.grad - w).norm() <= 16 * torch.finfo(dtype).eps * w.norm()


def test_activation_checkpointing():
    model, (x_t, x0, v_old, t, r) = network(), batch()
    v_theta = torch.utils.checkpoint.checkpoint(model, x_t, use_reentrant=False)
    assert_close(gradients(model, nft_loss(v_theta, v_old, x_t, x0, t, r).loss), expected())
    # And with the loss itself inside, which is then run twice.
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: nft_loss(model(x), v_old, x_t, x0, t, r).loss, x_t, use_reentrant=False
    )
    assert_close(gradients(model, loss), expected())


def test_compiled_training_step():
    model, (x_t, x0, v_old, t, r) = network(), batch()
    step = torch.compile(lambda x: nft_loss(model(x), v_old, x_t, x0, t, r).loss, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, step(x_t)), expected())


def test_functional_gradient():
    model, (x_t, x0, v_old, t, r) = network(), batch()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return nft_loss(torch.func.functional_call(model, parameters, (x_t,)), v_old, x_t, x0, t, r).loss

    got = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    assert_close([got[name] for name in parameters], expected())
    with pytest.raises(RuntimeError, match="'native' cannot run: transforms of torch"):
        torch.func.grad(lambda v: nft_loss(v, v_old, x_t, x0, t, r, backend="native").loss)(x0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_derivatives(reduction, enabled):
    x_t, x0, v_old, t, r = batch()
    v, direction = 0.9 * v_old, torch.ones_like(v_old)
    leaf = v.clone().requires_grad_()
    nft_loss(leaf, v_old, x_t, x0, t, r, reduction=reduction).loss.sum().backward()
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        dual = torch.autograd.forward_ad.make_dual(v, direction)
        loss = nft_loss(dual, v_old, x_t, x0, t, r, reduction=reduction).loss.sum()
        tangent = torch.autograd.forward_ad.unpack_dual(loss).tangent
        with pytest.raises(RuntimeError, match="'native' cannot run: forward-mode"):
            nft_loss(dual, v_old, x_t, x0, t, r, reduction=reduction, backend="native")
    torch.testing.assert_close(tangent, leaf.grad.sum())


def test_a_map_over_batches():
    x_t, x0, v_old, t, r = batch()
    stacked = [torch.stack([x, 0.5 * x]) for x in (0.9 * v_old, v_old, x_t, x0, t, r)]
    got = torch.vmap(lambda *args: nft_loss(*args).loss)(*stacked)
    assert_close(list(got), [plain_loss(*(x[i] for x in stacked)) for i in (0, 1)])


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": math.nan},
        {"adv_clip_max": -1.0},
        {"kl_weight": math.inf},
        {"weighting": "adaptiv"},
        {"prediction": "epsilon"},
        {"weight_per": "pixel"},
        {"channel_dim": 1},
        {"weighting": "none", "detach_weight": False},
        {"kl_space": "eps"},
        {"reduction": "max"},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_the_module_refuses_settings_when_it_is_made(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: got"):
        NFTLoss(**settings)


def test_a_weight_per_token_needs_to_know_the_channels_when_the_module_is_made():
    with pytest.raises(TypeError, match="channel_dim: got NoneType, accepted is a dimension from 1 on"):
        NFTLoss(weight_per="token")
    with pytest.raises(ValueError, match="channel_dim: got 0"):
        NFTLoss(weight_per="token", channel_dim=0)


def test_more_dimensions_than_kernels_take_are_left_to_the_reference():
    x = [torch.randn(2, *[2] * 12).transpose(1, 12) for _ in range(4)]
    t = r = torch.tensor([0.3, 0.7])
    assert nft_loss(*x, t, r).loss == nft_loss(*x, t, r, backend="reference").loss
    with pytest.raises(RuntimeError, match="'native' cannot run: kernels take at most 12 dimensions"):
        nft_loss(*x, t, r, backend="native")


def _distributed(rank, port, sharded):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, (x_t, x0, v_old, t, r) = network(), batch()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    mine = slice(3 * rank, 3 * rank + 3)
    nft_loss(model(x_t[mine]), v_old[mine], x_t[mine], x0[mine], t[mine], r[mine]).loss.backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
    assert_close(grads, expected())
    if sharded:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        spread = functools.partial(DTensor.from_local, device_mesh=mesh, placements=[Replicate()])
        rows, vector, pictures = torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(2, 4, 3, 3)
        heads, weights = torch.ones(2, 3, 1, 4), torch.ones(4)
        for name, run in {
            "v_theta": lambda: nft_loss(spread(x_t), v_old, x_t, x0, t, r),
            "segments": lambda: nft_loss(x_t, v_old, x_t, x0, t[:1], r[:1], segments=spread(torch.tensor([0, len(t)]))),
            "scale": lambda: layer_norm_modulate(rows, spread(vector), vector),
            "weight_k": lambda: qk_norm(heads, heads, weights, spread(weights)),
            "bias": lambda: group_norm_silu(pictures, weights, spread(weights), groups=2, eps=1e-6),
        }.items():
            with pytest.raises(TypeError, match=rf"{name}: got a DTensor, accepted is a plain tensor, such as"):
                run()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes(sharded):
    if sharded and torch.__version__ < "2.9":
        pytest.skip("older versions shard on GPUs only")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_distributed, (port, sharded), nprocs=2)


def test_example_runs(tmp_path):
    pytest.importorskip("diffusers")
    from nft.worlds.shapes.tiny import build_pipeline

    build_pipeline().save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("diffusers_lora", ROOT / "examples" / "diffusers_lora.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rewards = example.main(
        ["--model", str(tmp_path), "--epochs", "2", "--group-size", "3", "--steps", "2", "--prompts", "a red circle"]
    )
    assert len(rewards) == 2 and rewards[0] != rewards[1]


def test_importing_the_kernels_needs_neither_triton_nor_diffusers():
    code = "import sys, nft_kernels; sys.exit(bool({'triton', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_lazy_negation_is_seen(backend):
    def lazy(*shape):
        return torch.randn(*shape, dtype=torch.cfloat).conj().imag

    v_theta, v_old, x_t, x0 = (lazy(3, 40) for _ in range(4))
    t, r = torch.full((3,), 0.4), torch.full((3,), 0.7)
    assert x0.is_neg()
    plain = [x.clone() for x in (v_theta, v_old, x_t, x0)]
    assert nft_loss(v_theta, v_old, x_t, x0, t, r, backend=backend).loss == nft_loss(*plain, t, r, backend=backend).loss
    noised = add_noise(x0, t, noise=x_t, backend=backend)
    torch.testing.assert_close(noised, 0.6 * plain[3] + 0.4 * plain[2])


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        v_old, x_t, x0 = torch.randn(3, 3, 40)
    v, t, r = torch.randn(3, 40, requires_grad=True), torch.full((3,), 0.4), torch.full((3,), 0.7)
    (first,) = torch.autograd.grad(nft_loss(v, v_old, x_t, x0, t, r, backend="native").loss, v)
    (second,) = torch.autograd.grad(nft_loss(v, v_old, x_t, x0, t, r, backend="reference").loss, v)
    torch.testing.assert_close(first, second)


def penalized(v, others, backend, **options):
    """The gradient of a loss with a penalty on its own gradient."""
    loss = nft_loss(v, *others, backend=backend, **options).loss.sum()
    (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
    (loss + 50 * gradient.square().sum()).backward()
    return v.grad


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "reduction": "sum"}, {"detach_weight": False}], ids=str)
def test_a_gradient_can_be_penalized(options):
    """By the reference: kernels know no derivative of theirs."""
    v, *others = torch.randn(4, 3, 40, dtype=torch.float64)
    others = *others, torch.full((3,), 0.4), torch.full((3,), 0.7)
    first, second = (penalized(v.clone().requires_grad_(), others, name, **options) for name in ("native", "reference"))
    torch.testing.assert_close(first, second)
    assert torch.autograd.gradgradcheck(
        lambda v: nft_loss(v, *others, weighting="none", backend="native").loss, v.requires_grad_()
    )


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"weight_per": "token", "channel_dim": 1}], ids=str)
def test_a_second_derivative_is_refused_where_it_would_be_0(options):
    v, *others = torch.randn(4, 3, 4, 10)
    with pytest.raises(RuntimeError, match="can be differentiated once, and twice with backend='reference'"):
        penalized(v.requires_grad_(), (*others, torch.full((3,), 0.4), torch.full((3,), 0.7)), "native", **options)


def test_a_second_derivative_of_a_transformers_op_is_refused():
    x = torch.randn(2, 3, 16, requires_grad=True)
    _, out = layer_norm_modulate(x, torch.randn(2, 16), torch.randn(2, 16), backend="native")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.square().sum().backward()


def test_gradients_of_single_samples():
    """vmap over grad, the way to per-sample gradients."""
    x_t, x0, v_old, t, r = batch()
    v = 0.9 * v_old

    def loss(v, *others):
        return nft_loss(v[None], *(x[None] for x in others)).loss

    got = torch.func.vmap(torch.func.grad(loss))(v, v_old, x_t, x0, t, r)
    for i in range(len(v)):
        leaf = v[i : i + 1].clone().requires_grad_()
        plain = plain_loss(leaf, *(x[i : i + 1] for x in (v_old, x_t, x0, t, r)))
        torch.testing.assert_close(got[i], torch.autograd.grad(plain, leaf)[0][0])


def test_compiled_code_takes_other_settings_and_any_batch():
    """What the compiler takes for a variable when it comes a second time: numbers, and the size of a batch."""

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    x_t, x0, v_old, t, r = batch()
    v = 0.9 * v_old
    tensors = v, v_old, x_t, x0, t, r
    step = compiled(lambda beta, kl: nft_loss(*tensors, v_ref=x0, beta=beta, adv_clip_max=beta, kl_weight=kl).loss)
    for numbers in ((0.1, 1e-4), (0.5, 2e-4), (2.0, 3e-4)):
        wanted = nft_loss(*tensors, v_ref=x0, beta=numbers[0], adv_clip_max=numbers[0], kl_weight=numbers[1]).loss
        torch.testing.assert_close(step(*numbers), wanted)
    loss, noised = compiled(lambda *x: nft_loss(*x).loss), compiled(lambda x, t: add_noise(x, t, seed=3))
    for function, arguments in ((loss, tensors), (noised, (x0, t))):
        for size in range(2, 13):
            many = [x.repeat(3, *[1] * (x.ndim - 1))[:size] for x in arguments]
            wanted = plain_loss(*many) if function is loss else add_noise(*many, seed=3)
            torch.testing.assert_close(function(*many), wanted)
    torch.testing.assert_close(torch.compile(nft_loss, fullgraph=True, dynamic=True)(*tensors).loss, loss(*tensors))
    torch._dynamo.reset()


def test_raw_rewards_within_compiled_code():
    x_t, x0, v_old, t, _ = batch()
    step = torch.compile(nft_loss_from_rewards, fullgraph=True, backend="aot_eager")
    for ids in ([0, 0, 1, 1, 2, 2], [5] * 6, [3, 1, 2, 3, 3, 1]):
        arguments = 0.9 * v_old, v_old, x_t, x0, t, torch.linspace(0, 1, 6), torch.tensor(ids)
        torch.testing.assert_close(step(*arguments).loss, nft_loss_from_rewards(*arguments).loss)
    with pytest.raises(ValueError, match="rewards: got NaN or infinity"):
        step(*arguments[:5], torch.full((6,), math.nan), arguments[6])


def test_tensors_without_memory_are_refused():
    x, t = torch.randn(2, 3), torch.full((2,), 0.5)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for arguments in ({"x0": fake, "noise": x}, {"x0": x, "noise": fake}):
        with pytest.raises(TypeError, match="got a FakeTensor, accepted is a plain tensor"):
            add_noise(t=t, **arguments)


@pytest.mark.parametrize("value", [None, "no", 1])
def test_detach_weight_is_a_bool(value):
    x, t = torch.randn(2, 3), torch.full((2,), 0.5)
    with pytest.raises(TypeError, match=f"detach_weight: got {value!r}"):
        nft_loss(x, x, x, x, t, t, detach_weight=value)


def test_a_mask_is_finite():
    x, t = torch.randn(2, 3), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="mask: got values outside"):
        nft_loss(x, x, x, x, t, t, mask=torch.tensor([1.0, torch.inf, 0.0]))
