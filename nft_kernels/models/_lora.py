"""Frozen linear layers of one input as one matrix product, with PEFT's LoRA adapters added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._autograd import once_differentiable
from ._modules import transformed, untouched

# What may stand where the transformer has a linear layer.
LINEAR: tuple[type, ...] = (nn.Linear,)
try:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    LINEAR = (nn.Linear, BaseTunerLayer)
except ImportError:
    LoraLinear = None  # type: ignore[assignment, misc]


def _one_after_another(parameters: Sequence[Tensor]) -> bool:
    """Whether they lie in one storage as a single tensor of all their rows would."""
    # Asked at every forward: these are faster than the storage itself, whose address they tell.
    address, offset = parameters[0].data_ptr(), parameters[0].storage_offset()
    for p in parameters:
        if p.data_ptr() != address or p.storage_offset() != offset or not p.is_contiguous():
            return False
        elements = p.numel()
        address, offset = address + elements * p.itemsize, offset + elements
    return True


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of the rows of all parameters, which share its memory: whoever changes a parameter in place changes it
    too, and parameters that were given other memory since, as by a merge of adapters, are moved together anew."""
    first = parameters[0]
    if len(parameters) == 1:
        return first.detach()
    if not _one_after_another(parameters):
        # The parameters may outlive a caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            together = torch.cat(list(parameters))
        for p, part in zip(parameters, together.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return first.as_strided((sum(p.shape[0] for p in parameters), *first.shape[1:]), first.stride())


@dataclass(slots=True)
class _Layer:
    """A frozen nn.Linear, and the low-rank products (A, B, scaling) that are added to it."""

    weight: Tensor
    bias: Tensor | None
    adapters: list[tuple[Tensor, Tensor, float]]


def plain(layer: Any) -> bool:
    """Whether it is an nn.Linear that does nothing else."""
    return type(layer) is nn.Linear and untouched(layer)


def known(layer: Any) -> _Layer | None:
    """What a layer computes; None if it is not a frozen nn.Linear with or without plain LoRA around it."""
    wrapped = LoraLinear is not None and type(layer) is LoraLinear
    linear = layer.base_layer if wrapped else layer
    if not plain(linear):
        return None
    # Asked of every layer at every forward: a module's attributes take many times as long as these.
    weight, bias = map(linear._parameters.get, ("weight", "bias"))
    if type(weight) is not nn.Parameter or weight.requires_grad:
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad):
        return None
    if not wrapped:
        return _Layer(weight, bias, [])
    if not untouched(layer):
        return None
    merged = layer.merged
    if merged or layer.disable_adapters:
        # PEFT takes a merged adapter out of the weights when it is disabled.
        return None if merged and layer.disable_adapters else _Layer(weight, bias, [])
    adapters = []
    downs, ups = layer.lora_A, layer.lora_B
    for name in layer.active_adapters:
        if name not in downs:
            continue
        down, up = downs[name], ups[name]
        identity = type(layer.lora_dropout[name]) is nn.Identity and name not in layer.lora_variant
        if not (identity and plain(down) and plain(up) and up.bias is None):
            return None
        adapters.append((down.weight, up.weight, layer.scaling[name]))
    return _Layer(weight, bias, adapters)


class _Adapted(torch.autograd.Function):
    """A product with the weights of several layers, and the low-rank products of their adapters added to it in place.

    It is computed in one dtype, that of the product, to which a single launch casts the adapters' own weights, and by
    the same kernels whether or not a gradient is wanted. Of the sizes of activations only x is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        product: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: list[int],
        places: list[tuple[int, float]],
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        """The outputs of every layer.

        Args:
            sizes: numbers of outputs of the layers.
            places: which layer each adapter belongs to, and its scaling.
            masters: the A of all adapters, then every B.
        """
        rows = x.reshape(-1, x.shape[-1])
        out = product(rows, weight, bias)
        rows = rows.to(out.dtype)
        ranks = [a.shape[0] for a in masters[: len(places)]]
        down = rows.new_empty(sum(ranks), rows.shape[1])
        ups = [rows.new_empty(b.shape) for b in masters[len(places) :]]
        torch._foreach_copy_([*down.split_with_sizes(ranks), *ups], masters)
        low = torch.mm(rows, down.t())
        outs, lows = out.split_with_sizes(sizes, 1), low.split_with_sizes(ranks, 1)
        for (i, scaling), part, up in zip(places, lows, ups, strict=True):
            outs[i].addmm_(part, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, low, down, *ups)
        ctx.sizes, ctx.places, ctx.ranks = sizes, places, ranks
        ctx.shape, ctx.dtype, ctx.masters_dtype = x.shape, x.dtype, masters[0].dtype
        return out.view(*x.shape[:-1], -1).split_with_sizes(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight, low, down, *ups = ctx.saved_tensors
        outs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_low = torch.empty_like(low)
        for (i, scaling), part, up in zip(ctx.places, grad_low.split_with_sizes(ctx.ranks, 1), ups, strict=True):
            part.addmm_(outs[i], up, beta=0, alpha=scaling)
        grad_x: Tensor | None = None
        grad_masters: tuple[Tensor | None, ...] = (None,) * (2 * len(ups))
        if ctx.needs_input_grad[1]:
            grad_x = torch.mm(grad_low, down)
            for out, part in zip(outs, weight.to(rows.dtype).split_with_sizes(ctx.sizes), strict=True):
                grad_x.addmm_(out, part)
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        if any(ctx.needs_input_grad[6:]):
            lows = low.split_with_sizes(ctx.ranks, 1)
            narrow = [
                torch.mm(grad_low.t(), rows),
                *(
                    torch.empty_like(up).addmm_(outs[i].t(), part, beta=0, alpha=scaling)
                    for (i, scaling), part, up in zip(ctx.places, lows, ups, strict=True)
                ),
            ]
            wide = [torch.empty_like(grad, dtype=ctx.masters_dtype) for grad in narrow]
            torch._foreach_copy_(wide, narrow)
            grad_masters = (*wide[0].split_with_sizes(ctx.ranks), *wide[1:])
        return None, grad_x, None, None, None, None, *grad_masters


def _worth_adding(layers: Sequence[_Layer], x: Tensor) -> bool:
    """Whether the adapters of layers are better added to their weights: where nothing is rounded away, as it would be
    of float32 adapters in a bfloat16 weight or under autocast, and the gradients of the whole weights take no more
    multiplications than the products of the adapters beside them, forward and backward. How many rows there are does
    not count, so that a sample's result does not depend on its batch."""
    # First what settles it in half precision, where time is short.
    if x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
        return False
    for layer in layers:
        masters = [master for down, up, _ in layer.adapters for master in (down, up)]
        if any(tensor.dtype != x.dtype for tensor in (layer.weight, *masters)):
            return False
        (outputs, inputs), rank = layer.weight.shape, sum(len(down) for down, _, _ in layer.adapters)
        if rank and inputs * outputs > 2 * rank * (inputs + outputs):
            return False
    return True


def project(layers: Sequence[Any], x: Tensor, product: Any) -> Sequence[Tensor]:
    """What each layer makes of x, with one matrix product for all weights and one for all LoRA down projections.

    Layers of another kind are called one by one, and so are all while weights must not be moved.
    """
    found = [] if transformed() else [layer for layer in map(known, layers) if layer is not None]
    kinds = {(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in found}
    if len(found) < len(layers) or len(kinds) > 1:
        return [layer(x) for layer in layers]
    weight = _joined([layer.weight for layer in found])
    biases = [layer.bias for layer in found if layer.bias is not None]
    bias = _joined(biases) if biases else None
    sizes = [layer.weight.shape[0] for layer in found]
    adapters = [(i, *adapter) for i, layer in enumerate(found) for adapter in layer.adapters]
    if adapters and _worth_adding(found, x):
        parts = list(weight.split_with_sizes(sizes))
        for i, down, up, scaling in adapters:
            parts[i] = torch.addmm(parts[i], up, down, alpha=scaling)
        weight = torch.cat(parts)
    elif adapters:
        places, downs, ups = zip(*(((i, scaling), down, up) for i, down, up, scaling in adapters), strict=True)
        return _Adapted.apply(product, x, weight, bias, sizes, places, *downs, *ups)
    out = product(x, weight, bias)
    return [out] if len(layers) == 1 else out.split_with_sizes(sizes, -1)
