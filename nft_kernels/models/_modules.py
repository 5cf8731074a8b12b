"""Shared by the fused forwards of diffusers' models."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad


def untouched(module: nn.Module) -> bool:
    """Whether calling it runs its class' forward and nothing else. Hooks of accelerate and diffusers replace that."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def transformed() -> bool:
    """Whether tensors may be others' wrappers now, as under torch.compile, torch.func and forward-mode derivatives:
    weights must not be moved then."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
