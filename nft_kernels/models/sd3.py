"""A fused forward for Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206) in diffusers' SD3Transformer2DModel.

``accelerate(transformer)`` replaces the forward of that one instance and ``restore(transformer)`` puts it back. No
module is added or exchanged, so adapters, checkpoints and optimizers see the model they know.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from ..backends import BACKENDS
from ..ops import _validate
from ..ops._rows import backend_of
from ..ops.gelu import unchecked as gelu
from ..ops.layer_norm_modulate import unchecked as layer_norm_modulate
from ..ops.qk_norm import unchecked as qk_norm
from ..ops.quantize_rows import quantize_rows
from . import attention as attention_kernels
from . import float8
from ._linear import linear
from ._lora import LINEAR, known, plain, project
from ._modules import transformed, untouched

QKV = ("to_q", "to_k", "to_v")
CONTEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
# Devices on which the GELU in a product's epilogue is the tanh form that the model was trained with.
_TANH_EPILOGUE = ("cuda",)


@dataclass
class FastPath:
    """What ``accelerate`` returns and the transformer's forward goes by."""

    attention: str
    backend: str
    attention_used: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """Implementation that runs, by shape (B, S, H, d) of the queries, dtype and device."""
    keep_float8: bool = False
    """Whether float8 weights stay in memory after a rollout, and those of the next are written over them: for CUDA
    graphs, which read them at their addresses."""
    _torchs_own: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _chosen: str = "reference"
    _in_rollout: bool = False
    _float8: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _quantized: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, Tensor]]] | None = None

    @contextmanager
    def rollout(self, *, float8: bool = False) -> Iterator[None]:
        """What only evaluations without a gradient can do: GELU in the epilogue of its product (on CUDA) and, if
        wanted, the products with frozen weights of the attention and feed-forward layers in float8.

        It is chosen here and not by the gradient mode, so that outside of it all policies are evaluated alike: one with
        a gradient and one without agree bitwise where their weights do. Inside, adapters keep their own dtype, as do
        layers that ``accelerate`` does not know. Weights may be exchanged inside, but not changed in place.

        Raises:
            RuntimeError: at an evaluation that cannot run so, with the reason.
        """
        for weight, held in self._float8.values() if float8 else ():
            for here, new in zip(held, quantize_rows(weight, backend=self.backend), strict=True):
                here.copy_(new)
        before = self._in_rollout, self._quantized
        self._in_rollout, self._quantized = True, self._float8 if float8 else None
        try:
            yield
        finally:
            self._in_rollout, self._quantized = before
            if self._quantized is None and not self.keep_float8:
                self._float8.clear()

    def begin(self, x: Tensor) -> None:
        """Look whether the evaluation of x can run, and by which backend, once for all its ops."""
        self._chosen = backend_of("layer_norm_modulate", self.backend, x)
        if self._in_rollout and torch.is_grad_enabled():
            raise RuntimeError("rollout: cannot run: it gives no gradients, evaluate under torch.no_grad()")
        if self._quantized is not None:
            reason = "torch.compile does not see it" if torch.compiler.is_compiling() else float8.why_not(x)
            if reason is not None:
                raise RuntimeError(f"float8: cannot run: {reason}")

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear, on the CPU by the faster of two libraries."""
        if x.is_cpu:
            # There rows with gaps between samples would be multiplied sample by sample.
            x = x.contiguous()
        return linear(x, weight, bias) if self._chosen == "native" else F.linear(x, weight, bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear, in float8 if so wanted."""
        return (self.linear if self._quantized is None else self.float8_product)(x, weight, bias)

    def float8_product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
        """F.linear of x or of its GELU. A weight is quantized once, and kept so that its address stays its own."""
        assert self._quantized is not None
        key = weight.data_ptr(), len(weight)
        if key not in self._quantized:
            self._quantized[key] = weight, quantize_rows(weight, backend=self.backend)
        return float8.linear(x, self._quantized[key][1], bias, gelu=gelu, backend=self.backend)

    def gelu(self, x: Tensor) -> Tensor:
        """On the CPU by the kernels that normalize. Triton has none for this, and GPUs need none but torch's own."""
        if self._chosen == "native":
            return gelu(x, backend="native")
        return F.gelu(x, approximate="tanh")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, S, H d) for (B, S, H, d), chosen once for every kind of tensors."""
        compiling, own = torch.compiler.is_compiling(), self.attention in ("auto", "native")
        if own and transformed() and not compiling:
            # The one that all of torch's transforms know.
            return attention_kernels.attend("math", q, k, v).flatten(2)
        # Compiled, it is for any batch and length.
        key = (*((2, 1024) if compiling else q.shape[:2]), *q.shape[2:]), q.dtype, q.device
        if key not in self.attention_used:
            self.attention_used[key] = attention_kernels.select(self.attention, *key)
            self._torchs_own[key] = attention_kernels.select("native", *key)
        chosen = self.attention_used[key]
        # torch's own choice may change with its switches, which an explicit one must not.
        force = not own or chosen != self._torchs_own[key]
        return attention_kernels.attend(chosen, q, k, v, force=force).flatten(2)


Unbiased = tuple[Tensor, Tensor | None]
"""What a layer makes of its input without its bias, and that bias; None where it is in the first or there is none."""


def _unbiased(path: FastPath, layer: Any, x: Tensor) -> Unbiased:
    biases = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biases.append(bias)
        return path.product(x, weight, None)

    # Only a layer that is not called as it is comes to the product, so only its bias is left.
    (y,) = project([layer], x, product)
    return y, biases[0] if biases else None


def _attention(path: FastPath, attn: Any, x: Tensor, context: Tensor | None = None) -> list[Unbiased]:
    """Outputs of the attention for x (B, S, D) and, if given and wanted by the block, for the context (B, S', D)."""

    def qkv(names: tuple[str, ...], stream: Tensor) -> list[Tensor]:
        return [
            y.unflatten(-1, (attn.heads, -1))
            for y in project([getattr(attn, name) for name in names], stream, path.product)
        ]

    q, k, v = qkv(QKV, x)
    joined = () if context is None else qkv(CONTEXT_QKV, context)
    if attn.norm_q is not None:
        weights = attn.norm_q.weight, attn.norm_k.weight
        more = (*joined[:2], attn.norm_added_q.weight, attn.norm_added_k.weight) if joined else ()
        values = {"v": v, "context_v": joined[2]} if joined else {}
        for weight in (*weights, *more[2:]):
            # Kernels read as many values as a head has.
            if weight.shape != q.shape[-1:] or weight.device != q.device:
                raise RuntimeError(
                    f"transformer: got a norm's weight of shape {tuple(weight.shape)} on {weight.device}, accepted are "
                    f"{q.shape[-1]} values on {q.device}, as they were when it was accelerated"
                )
        q, k, *joint = qk_norm(q, k, *weights, *more, **values, eps=attn.norm_q.eps, backend=path._chosen)
        v = joint[0] if joint else v
    elif joined:
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), joined, strict=True))
    out = path.attend(q, k, v)
    if context is None:
        (y,) = project([attn.to_out[0]], out, path.product)
        return [(y, None)]
    # A product of rows that are not contiguous has no epilogue, and would add its bias in a pass of its own.
    results = [_unbiased(path, attn.to_out[0], out[:, : x.shape[1]])]
    if not attn.context_pre_only:
        results.append(_unbiased(path, attn.to_add_out, out[:, x.shape[1] :]))
    return results


def _feed_forward(path: FastPath, ff: Any, x: Tensor) -> Tensor:
    first, last = ff.net[0].proj, ff.net[2]
    fits = plain(first) and path._quantized is None
    if path._in_rollout and fits and x.device.type in _TANH_EPILOGUE:
        hidden = torch._addmm_activation(first.bias, x.flatten(0, 1), first.weight.T, use_gelu=True)
        return project([last], hidden.unflatten(0, x.shape[:2]), path.product)[0]
    (hidden,) = project([first], x, path.product)
    if path._quantized is not None and (found := known(last)) is not None and not found.adapters:
        return project([last], hidden, functools.partial(path.float8_product, gelu=True))[0]
    # Adapters, and layers that are called as they are, take the GELU itself.
    return project([last], path.gelu(hidden), path.product)[0]


class Stream(NamedTuple):
    """x (B, S, D), to which the norm that reads it next adds the residual gate y."""

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None


def _block(
    path: FastPath, block: Any, sample: Stream, context: Stream, mod: Sequence[Tensor], context_mod: Sequence[Tensor]
) -> tuple[Stream, Stream]:
    """One joint block: sample and context under modulations (B, D), in the order of their linears."""
    norm = functools.partial(layer_norm_modulate, eps=block.norm1.norm.eps, backend=path._chosen)
    shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = mod
    last = block.context_pre_only
    context_scale, context_shift = context_mod if last else (context_mod[1], context_mod[0])
    modulations = (scale, shift, dual[1], dual[0]) if dual else (scale, shift)
    x, normed, *second = norm(sample.x, *modulations, y=sample.y, gate=sample.gate)
    context_x, normed_context = norm(context.x, context_scale, context_shift, y=context.y, gate=context.gate)
    (y, bias), *context_y = _attention(path, block.attn, normed, normed_context)
    y2, gate2 = (_attention(path, block.attn2, second[0])[0][0], dual[2]) if dual else (None, None)
    x, normed = norm(x, ff_scale, ff_shift, y=y, gate=gate, y_bias=bias, y2=y2, gate2=gate2)
    sample = Stream(x, _feed_forward(path, block.ff, normed), ff_gate)
    if last:
        return sample, Stream(context_x)
    ((y, bias),) = context_y
    _, _, gate, ff_shift, ff_scale, ff_gate = context_mod
    x, normed = norm(context_x, ff_scale, ff_shift, y=y, gate=gate, y_bias=bias)
    return sample, Stream(x, _feed_forward(path, block.ff_context, normed), ff_gate)


def _modulations(path: FastPath, transformer: Any, temb: Tensor) -> list[tuple[Tensor, ...]]:
    """All modulations of one timestep: of the blocks' samples and contexts in turn, and of the output."""
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    outs = project([norm.linear for norm in (*norms, transformer.norm_out)], F.silu(temb), path.linear)
    return [out.split(temb.shape[-1], -1) for out in outs]


def _forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    block_controlnet_hidden_states: None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    skip_layers: None = None,
) -> Any:
    """As SD3Transformer2DModel.forward.

    Raises:
        ValueError: one of the options that only the original forward knows.
    """
    options = {
        "block_controlnet_hidden_states": block_controlnet_hidden_states,
        "joint_attention_kwargs": joint_attention_kwargs or None,
        "skip_layers": skip_layers,
    }
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}: got {type(value).__name__}, accepted is None; restore(transformer) brings it back"
            )
    path = self._fast_path
    path.begin(hidden_states)
    height, width = hidden_states.shape[-2:]
    sample = Stream(self.pos_embed(hidden_states).contiguous())
    context = Stream(*project([self.context_embedder], encoder_hidden_states, path.linear))
    *mods, out_mod = _modulations(path, self, self.time_text_embed(timestep, pooled_projections))
    for block, mod, context_mod in zip(self.transformer_blocks, mods[::2], mods[1::2], strict=True):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            sample, context = self._gradient_checkpointing_func(_block, path, block, sample, context, mod, context_mod)
        else:
            sample, context = _block(path, block, sample, context, mod, context_mod)
    x, y, gate = sample
    scale, shift = out_mod
    _, x = layer_norm_modulate(x, scale, shift, y=y, gate=gate, eps=self.norm_out.norm.eps, backend=path._chosen)
    p = self.config.patch_size
    (patches,) = project([self.proj_out], x, path.linear)
    patches = patches.unflatten(-1, (p, p, self.out_channels)).unflatten(1, (height // p, width // p))
    out = torch.einsum("bhwpqc->bchpwq", patches).flatten(4).flatten(2, 3)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _check(transformer: SD3Transformer2DModel) -> None:
    for name, attn in transformer.named_modules():
        if not isinstance(attn, Attention):
            continue
        if type(attn.processor) is not JointAttnProcessor2_0 or attn.fused_projections:
            kind = f"{type(attn.processor).__name__} in {name}"
            raise ValueError(f"transformer: got {kind}, accepted is JointAttnProcessor2_0 without fused projections")
        for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
            if norm is not None and (type(norm) is not RMSNorm or norm.weight is None or norm.bias is not None):
                raise ValueError(
                    f"transformer: got {type(norm).__name__} in {name}, accepted is qk_norm='rms_norm' or None"
                )
    for part in ("transformer_blocks", "norm_out"):
        for name, module in getattr(transformer, part).named_modules(prefix=part):
            # Linear layers that have hooks are called, the modules around them are not.
            if not isinstance(module, LINEAR) and not untouched(module):
                raise ValueError(f"transformer: got hooks on {name}, accepted are those of linear layers")
    if any(block._chunk_size is not None for block in transformer.transformer_blocks):
        raise ValueError("transformer: got forward chunking, accepted is none: call disable_forward_chunking() first")


def accelerate(transformer: SD3Transformer2DModel, *, attention: str = "auto", backend: str = "auto") -> FastPath:
    """Give this transformer a fused forward, in place, until ``restore``.

    Frozen projections of the same input are moved together in memory (their parameters stay what they are), so that one
    matrix product makes queries, keys and values, and another all modulations of a timestep.

    Args:
        transformer: any SD3 or SD3.5 transformer of diffusers, with or without LoRA adapters of PEFT, which may come,
            go, be switched or be merged at any time.
        attention: ``auto`` takes the first that can run for a shape; ``native`` is torch's own choice among ``cudnn``,
            ``flash``, ``efficient`` and ``math``; ``short`` is this package's for short sequences on a CPU; ``flash2``,
            ``flash3`` and ``flash4`` are the packages flash_attn, flash_attn_interface and flash_attn.cute. A choice
            that cannot run raises at the first forward.
        backend: of the fused normalizations and, on the CPU, of the GELU and of products in float32: ``auto``,
            ``native`` (on the CPU), ``triton`` or ``reference``.

    Returns:
        The handle; its ``attention_used`` says which attention ran for which shapes.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what is accepted.
    """
    if not isinstance(transformer, SD3Transformer2DModel):
        raise TypeError(f"transformer: got {type(transformer).__name__}, accepted is diffusers' SD3Transformer2DModel")
    _validate.choice("attention", attention, attention_kernels.CHOICES)
    _validate.choice("backend", backend, BACKENDS)
    if "forward" in vars(transformer):
        raise ValueError("transformer: its forward was already replaced, by accelerate or by hooks; restore it first")
    _check(transformer)
    path = FastPath(attention, backend)
    transformer._fast_path = path
    transformer.forward = MethodType(_forward, transformer)
    return path


def restore(transformer: SD3Transformer2DModel) -> None:
    """Undo ``accelerate``: diffusers' forward again, and weights that were moved together in memory of their own.

    Raises:
        ValueError: a transformer that is not accelerated, or whose forward something else has replaced since.
    """
    if "_fast_path" not in vars(transformer):
        raise ValueError("transformer: got one that is not accelerated")
    if getattr(vars(transformer).get("forward"), "__func__", None) is not _forward:
        raise ValueError("transformer: its forward was replaced since, as by hooks; remove them first")
    del transformer.forward, transformer._fast_path
    for p in transformer.parameters():
        if p.untyped_storage().nbytes() != p.numel() * p.element_size():
            p.data = p.data.clone()
