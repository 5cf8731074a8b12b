"""What a run will cost, from its configuration and the transformer's: nothing is loaded.

The transformer is built on the meta device, where tensors have shapes and no data, and one batch goes through it: every
matrix product is counted as it would run, and every tensor that the backward needs.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nft_kernels.solvers import schedule, table

from .config import Config, ConfigError
from .models.base import JOINT_ATTENTION, check_resolution
from .objectives import OBJECTIVES
from .policy import SHAPES_PIPELINE, old_policy_decay
from .rollout import noisy, solver_options

# Gated on the hub, so that a plan could not read them before the licence is accepted: the transformer's settings, and
# the parameters of the text encoders (CLIP-L, CLIP-G, T5-XXL) and the VAE (arXiv 2403.03206 and the model's page).
_SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
_SD35_LARGE = _SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
_KNOWN = {
    "stabilityai/stable-diffusion-3.5-medium": (_SD35_MEDIUM, 5_665_000_000),
    "stabilityai/stable-diffusion-3.5-large": (_SD35_LARGE, 5_665_000_000),
}
_CLIP_TOKENS, _VAE_FACTOR = 77, 8


class Plan(NamedTuple):
    """Costs of one epoch; FLOPs over all GPUs, memory per GPU, a multiply-add being two FLOPs."""

    parameters: int
    trained_parameters: int
    rollout_evaluations: int
    training_evaluations: int
    """Forward passes of the trained, the old and the reference policy."""
    held_out_evaluations: int
    """For every task group in one evaluation, every ``eval_every`` epochs."""
    rollout_flops: int
    training_flops: int
    memory: dict[str, int]
    """Bytes by what they hold, of which ``activations`` is the larger of a rollout's and a backward's."""
    seconds: float
    """Of the transformer alone, with ``tflops``."""


def _settings(config: Config) -> tuple[dict[str, Any], int, int]:
    """Settings of the transformer, tokens of the CLIP encoders, and bytes of the pipeline's other weights."""
    source = str(SHAPES_PIPELINE) if config.pipeline == "shapes" else config.pipeline
    size = 4 if config.dtype == "float32" else 2
    if source in _KNOWN and not Path(source).is_dir():
        settings, others = _KNOWN[source]
        return settings, _CLIP_TOKENS, others * size
    try:
        settings = SD3Transformer2DModel.load_config(source, subfolder="transformer")
    except OSError as error:
        raise ConfigError(f"pipeline: the transformer's settings of {source!r} cannot be read: {error}") from None
    if settings["_class_name"] != SD3Transformer2DModel.__name__:
        raise ConfigError(
            f"pipeline: {source!r} has a {settings['_class_name']}, a plan knows {SD3Transformer2DModel.__name__} only"
        )
    weights = [p for p in Path(source).rglob("*.safetensors") if p.parent.name != "transformer"]
    tokenizer = Path(source) / "tokenizer" / "tokenizer_config.json"
    tokens = json.loads(tokenizer.read_text())["model_max_length"] if tokenizer.is_file() else _CLIP_TOKENS
    return settings, tokens, sum(path.stat().st_size for path in weights)


def evaluations(config: Config, epoch: int = 1, filtered: int = 0) -> tuple[int, int, int, int]:
    """Forward passes of one epoch (from 0) over all processes: of its rollout with its candidates, and in training of
    the trained, the old and the reference policy. The old policy is evaluated in fewer updates while it is a copy of
    the trained one. So many groups as ``filtered`` are not trained on."""
    c = config.at(epoch)
    exact, cheap = (
        len(table(c.rollout_solver, schedule(steps), **solver_options(c, epoch)).times)
        for steps in (c.rollout_steps, c.explore_steps or c.rollout_steps)
    )
    trained = c.pictures - filtered * c.group_size
    pairs = trained * c.timesteps_per_sample
    copied = old_policy_decay(c.old_policy, epoch) == 0
    updates = max(min(c.updates_per_epoch, trained), 1)
    first = trained // updates * c.timesteps_per_sample if copied else 0
    old = pairs - first if OBJECTIVES[c.objective].needs_old else 0
    return c.pictures * exact + c.candidates * cheap, pairs, old, pairs if c.kl_weight > 0 else 0


class _Measured(NamedTuple):
    flops: int
    saved: int


def _measure(model: SD3Transformer2DModel, inputs: tuple[Tensor, ...], train: bool) -> _Measured:
    """One evaluation, with its backward if ``train``: FLOPs, and bytes that are kept for the backward."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            # A freed storage's address would be used again.
            alive.append(tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(train), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*inputs, return_dict=False)[0]
        if train:
            out.backward(torch.empty_like(out))
    return _Measured(counter.get_total_flops(), sum(kept.values()))


def plan(config: Config, gpus: int = 1, *, tflops: float = 300.0, epoch: int = 1) -> Plan:
    """Estimate one epoch.

    Args:
        config: the run.
        gpus: how many processes share an epoch.
        tflops: what one GPU reaches on the transformer, in 1e12 FLOPs a second; 300 is typical of an H100 in bfloat16.
        epoch: which epoch, from 0: the old policy is evaluated in fewer updates while it is a copy of the trained one.

    Raises:
        ConfigError: a transformer whose settings cannot be read.
        ValueError: no GPU, no speed, or a resolution that the transformer does not take.
    """
    if gpus < 1 or not tflops > 0:
        raise ValueError(f"gpus and tflops: got {gpus} and {tflops}, accepted are positive numbers")
    c, (settings, clip_tokens, others) = config.at(epoch), _settings(config)
    dtype = getattr(torch, c.dtype)
    with torch.device("meta"):
        model = SD3Transformer2DModel.from_config(settings).to(device="meta", dtype=dtype)
    shape = model.config
    side = c.resolution // _VAE_FACTOR if c.resolution else shape.sample_size
    tokens = clip_tokens + c.max_sequence_length

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(size, device="meta", dtype=dtype)
            for size in (
                (batch, shape.in_channels, side, side),
                (batch, tokens, shape.joint_attention_dim),
                (batch, shape.pooled_projection_dim),
                (batch,),
            )
        )

    unit = _VAE_FACTOR * shape.patch_size
    check_resolution(c.resolution, unit, unit * shape.pos_embed_max_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer_blocks]
    full, parts = c.adapter == "full", gpus if c.shard else 1
    size = 4 if full else dtype.itemsize
    merged = _measure(model, inputs(1), train=False)
    if c.adapter == "lora":
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=c.lora_rank, lora_alpha=c.lora_alpha, target_modules=JOINT_ATTENTION))
        model.to("meta")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted, step = _measure(model, inputs(1), train=False), _measure(model, inputs(1), train=True)
    flops = step.flops
    if c.gradient_checkpointing:
        flops += adapted.flops

    rollout, pairs, old, reference = evaluations(config, epoch)
    adapted_weights = sum(m.base_layer.weight.numel() for m in model.modules() if isinstance(m, LoraLayer))
    # Every process merges once an epoch, unless its weights are sharded.
    rollout_flops = rollout * merged.flops + gpus * 2 * c.lora_rank * adapted_weights
    if parts > 1:
        rollout_flops = rollout * adapted.flops
    training_flops = pairs * flops + old * adapted.flops + reference * merged.flops

    activations = step.saved
    if c.gradient_checkpointing:
        # One block is kept whole, of the others what goes in.
        block = step.saved // shape.num_layers
        width = shape.num_attention_heads * shape.attention_head_dim
        activations = block + shape.num_layers * ((side // shape.patch_size) ** 2 + tokens) * width * dtype.itemsize
    solver = table(c.rollout_solver, schedule(c.rollout_steps), **solver_options(c, epoch))
    # Clean latents, and the states around the rows that draw noise.
    kept = 2 + len(solver.rows[noisy(solver)]) if OBJECTIVES[c.objective].trajectory else 1
    memory = {
        # Of full fine-tuning this is the float32 copy that is the reference.
        "transformer": (parameters // parts + buffers) * size,
        # Offloaded, they are there in turns and not while the transformer is at work.
        "text encoders and VAE": 0 if c.offload else others,
        # Trained, old, averaged and put aside for an evaluation; gradient; two moments. All in float32.
        "trained weights and optimizer": 7 * 4 * trained // (parts if full else 1),
        "merged weights": adapted_weights * dtype.itemsize if parts == 1 else 0,
        # Candidates are gone before the others are drawn.
        "latents of an epoch": 4 * max(c.pictures * kept, c.candidates) * shape.in_channels * side * side,
        "activations": activations * c.micro_batch,
    }
    if parts > 1:
        # A block, the one after it that is fetched meanwhile, and what is outside of them.
        memory["weights put together"] = (parameters - sum(blocks) + 2 * max(blocks)) * size
        if full and pairs > c.updates_per_epoch * gpus * c.micro_batch:
            # They are exchanged after the last micro-batch.
            memory["gradients put together"] = 4 * trained
    return Plan(
        parameters=parameters,
        trained_parameters=trained,
        rollout_evaluations=rollout,
        training_evaluations=pairs + old + reference,
        held_out_evaluations=c.eval_prompts_per_group * len(table(c.eval_solver, schedule(c.eval_steps)).times),
        rollout_flops=rollout_flops,
        training_flops=training_flops,
        memory=memory,
        seconds=(rollout_flops + training_flops) / (gpus * tflops * 1e12),
    )


def plan_stages(config: Config, gpus: int = 1, *, tflops: float = 300.0) -> list[Plan]:
    """An epoch of every stage: its second one where it has one, as in a run's first the old policy is a copy.

    Args and raises: as of ``plan``.
    """
    lengths = [stage.epochs for stage in config.all_stages()]
    starts = accumulate([0, *lengths[:-1]])
    return [
        plan(config, gpus, tflops=tflops, epoch=start + min(1, length - 1))
        for start, length in zip(starts, lengths, strict=True)
    ]
