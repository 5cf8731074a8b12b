"""The faster decoder against diffusers' own on tiny random autoencoders."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import AutoencoderKL

from nft_kernels.models.vae import accelerate, restore

CHANNELS, GROUPS = (16, 24, 32), 8


def build(**options):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": CHANNELS,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "norm_num_groups": GROUPS,
        "layers_per_block": 1,
    }
    vae = AutoencoderKL(**(settings | options)).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return vae


def pair(**options):
    """diffusers' VAE and an accelerated copy of it."""
    plain = build(**options)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, fast


def latents(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def decode(vae, z):
    return vae.decode(z).sample


@pytest.mark.parametrize("options", [{}, {"mid_block_add_attention": False}, {"act_fn": "relu"}], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 5, 8), (2, 4, 16, 7)], ids=str)
def test_pictures_are_those_of_diffusers(shape, options):
    plain, fast = pair(**options)
    z = latents(*shape)
    exact = decode(plain.double(), z.double())
    torch.testing.assert_close(decode(fast.double(), z.double()), exact, rtol=1e-11, atol=1e-12)
    got, own = ((decode(vae.float(), z).double() - exact).abs().max() for vae in (fast, plain))
    assert got <= max(2 * own, 4 * torch.finfo(torch.float32).eps * exact.abs().max())


def test_fewer_products(monkeypatch):
    """Pictures are never doubled, and norms that an activation follows are not torch's."""
    _, fast = pair()
    seen = []
    for name in ("interpolate", "silu", "conv_transpose2d"):
        original = getattr(torch.nn.functional, name)
        monkeypatch.setattr(
            torch.nn.functional, name, lambda *args, n=name, f=original, **kw: (seen.append(n), f(*args, **kw))[1]
        )
    decode(fast, latents(1, 4, 4, 4))
    assert seen.count("conv_transpose2d") == len(CHANNELS) - 1 and "interpolate" not in seen
    seen.clear()
    restore(fast)
    decode(fast, latents(1, 4, 4, 4))
    assert "interpolate" in seen and "conv_transpose2d" not in seen


def test_a_gradient_and_half_precision_are_left_to_diffusers():
    plain, fast = pair()
    found = []
    for vae in (plain, fast):
        z = latents(2, 4, 4, 4).requires_grad_()
        out = vae.decode(z).sample
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), z)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    narrow = latents(2, 4, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(*(decode(vae.to(torch.bfloat16), narrow) for vae in (plain, fast)))


@pytest.mark.parametrize("part", ["up_blocks.0.resnets.1", "up_blocks.1.upsamplers.0", "conv_norm_out", "conv_in"])
def test_hooks_are_called(part):
    plain, fast = pair()
    for vae in (plain, fast):
        vae.decoder.get_submodule(part).register_forward_hook(lambda module, args, out: 2 * out)
    z = latents(1, 4, 4, 4)
    torch.testing.assert_close(decode(fast, z), decode(plain, z), rtol=1e-4, atol=1e-5)


def test_parts_that_compute_something_else_are_called_as_they_are():
    plain, fast = pair()
    for vae in (plain, fast):
        vae.decoder.up_blocks[0].resnets[0].output_scale_factor = 2.0
        upsampler = vae.decoder.up_blocks[1].upsamplers[0]
        upsampler.norm = torch.nn.LayerNorm(CHANNELS[1], elementwise_affine=False)
    z = latents(1, 4, 4, 4)
    torch.testing.assert_close(decode(fast, z), decode(plain, z), rtol=1e-4, atol=1e-5)


def test_restore_and_refusals():
    plain, fast = pair()
    with pytest.raises(ValueError, match="vae: its decoder's forward was already replaced"):
        accelerate(fast)
    restore(fast)
    z = latents(2, 4, 4, 4)
    assert torch.equal(decode(fast, z), decode(plain, z))
    with pytest.raises(ValueError, match="vae: got one that is not accelerated"):
        restore(fast)
    with pytest.raises(TypeError, match="vae: got Linear, accepted is diffusers' AutoencoderKL"):
        accelerate(torch.nn.Linear(1, 1))


def test_weights_may_change():
    """Nothing of them is kept."""
    plain, fast = pair()
    z = latents(1, 4, 4, 4)
    decode(fast, z)
    for vae in (plain, fast):
        for parameter in vae.decoder.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(decode(fast, z), decode(plain, z), rtol=1e-4, atol=1e-5)
