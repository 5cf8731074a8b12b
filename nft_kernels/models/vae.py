"""A faster decoder for diffusers' AutoencoderKL on the CPU, where decoding takes half of a rollout of small pictures.

``accelerate(vae)`` replaces the forward of that one decoder and ``restore(vae)`` puts it back. Parts that it does not
know, such as attention, are called as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..ops.group_norm_silu import group_norm_silu
from ._modules import untouched


def _norm_act(norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    if type(norm) is nn.GroupNorm and type(act) is nn.SiLU and norm.affine and untouched(norm) and untouched(act):
        return group_norm_silu(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps)
    return act(norm(x))


def _resnet(block: Any, x: Tensor) -> Tensor:
    known = type(block) is ResnetBlock2D and untouched(block)
    if not known or block.time_emb_proj or block.upsample or block.downsample or block.output_scale_factor != 1:
        return block(x, None)
    y = block.conv1(_norm_act(block.norm1, block.nonlinearity, x))
    y = block.conv2(_norm_act(block.norm2, block.nonlinearity, y))
    return y.add_(block.conv_shortcut(x) if block.conv_shortcut is not None else x)


def _upsample(layer: Any, x: Tensor) -> Tensor:
    """Nearest neighbours and then a convolution, as one transposed convolution of stride 2: of the 3 x 3 weights those
    that meet the same pixel are added up, which leaves 4 products of 9."""
    conv = layer.conv if type(layer) is Upsample2D and untouched(layer) and layer.use_conv else None
    if type(conv) is not nn.Conv2d or not untouched(conv) or layer.norm is not None or not layer.interpolate:
        return layer(x)
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((3, 3), (1, 1), (1, 1), 1):
        return layer(x)
    # Seen from a pixel the window is mirrored, and the pixel above or to its left in the output sees it one further.
    weight = conv.weight.flip(2, 3).transpose(0, 1)
    weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    return F.conv_transpose2d(x, weight.contiguous(memory_format=torch.channels_last), conv.bias, stride=2, padding=1)


def _forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """As Decoder.forward, to which is left what the CPU has no fast transposed convolution for or needs a gradient."""
    narrow = sample.dtype.itemsize < 4
    if narrow or not sample.is_cpu or torch.is_grad_enabled() or latent_embeds is not None:
        return type(self).forward(self, sample, latent_embeds)
    x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
    first, *others = self.mid_block.resnets
    x = _resnet(first, x)
    for attention, resnet in zip(self.mid_block.attentions, others, strict=True):
        x = _resnet(resnet, x if attention is None else attention(x, temb=None))
    for block in self.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for upsampler in block.upsamplers or ():
            x = _upsample(upsampler, x)
    return self.conv_out(_norm_act(self.conv_norm_out, self.conv_act, x))


def accelerate(vae: AutoencoderKL) -> None:
    """Give this VAE's decoder a faster forward on the CPU, in float32 and float64 and without a gradient, in place,
    until ``restore``. Elsewhere it does what it did.

    Group norms and SiLUs become one kernel, and convolutions of doubled pictures transposed ones. Pictures differ by
    rounding.

    Raises:
        TypeError, ValueError: what is not an AutoencoderKL, or has another forward already.
    """
    if not isinstance(vae, AutoencoderKL):
        raise TypeError(f"vae: got {type(vae).__name__}, accepted is diffusers' AutoencoderKL")
    decoder: Any = vae.decoder
    if "forward" in vars(decoder):
        raise ValueError("vae: its decoder's forward was already replaced, by accelerate or by hooks; restore it first")
    decoder.forward = MethodType(_forward, decoder)


def restore(vae: AutoencoderKL) -> None:
    """Undo ``accelerate``.

    Raises:
        ValueError: a VAE that is not accelerated.
    """
    decoder: Any = vae.decoder
    if getattr(vars(decoder).get("forward"), "__func__", None) is not _forward:
        raise ValueError("vae: got one that is not accelerated")
    del decoder.forward
