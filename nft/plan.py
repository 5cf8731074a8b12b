"""What a run will cost, from its configuration and the transformer's: nothing is loaded.

The transformer is built on the meta device, where tensors have shapes and no data, and its batches go through it: every
matrix product is counted as it would run, and every tensor for as long as it lives.
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nft_kernels.solvers import schedule, table

from .config import Config, ConfigError
from .distributed import check_device, repeated_blocks
from .files import reading
from .models import find
from .models.base import Model, check_resolution
from .models.flux import Flux
from .models.sd3 import StableDiffusion3
from .objectives import OBJECTIVES
from .policy import KEPT_BYTES, check_kind, decoded_together, old_policy_decay, pipeline_source
from .rollout import noisy, solver_options

# Gated on the hub, so that a plan could not read them before the licence is accepted: the transformer's and the
# VAE's settings, and the parameters of the text encoders (CLIP-L, CLIP-G, T5-XXL) and the VAE (arXiv 2403.03206 and the
# model's page).
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
_SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
# FLUX.1 has the same VAE, CLIP-L and T5-XXL; what is not named here diffusers' class has by default.
_KNOWN: dict[str, tuple[type[Model], dict[str, Any], int]] = {
    "stabilityai/stable-diffusion-3.5-medium": (StableDiffusion3, SD35_MEDIUM, 5_665_000_000),
    "stabilityai/stable-diffusion-3.5-large": (StableDiffusion3, _SD35_LARGE, 5_665_000_000),
    "black-forest-labs/FLUX.1-dev": (Flux, {"guidance_embeds": True}, 4_970_000_000),
    "black-forest-labs/FLUX.1-schnell": (Flux, {}, 4_970_000_000),
}
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward


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
    """Bytes by what they hold; ``activations`` are the most that a rollout, a backward or the VAE has at once, and with
    ``cuda_graphs`` those of all evaluations, which keep them, and the VAE's. Text encoders and VAE are missing where
    their weights are not on disk, and where they are offloaded count by what they need beyond the activations whose
    place they take."""
    seconds: float
    """Of the transformer alone, with ``tflops``."""


def matrix_rate(size: int = 2048, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> float:
    """TFLOP/s of a product of ``size`` x ``size``, the best of ten."""
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e12


def _folder(source: str) -> Path | None:
    """Where a pipeline is on disk, be it in the hub's cache."""
    if os.path.isdir(source):  # which is false, too, for a name that no file can have
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def _elements(folder: Path) -> int:
    """Of a pipeline's weights outside of its transformer."""
    found: dict[tuple[str, str], int] = {}
    for name in DiffusionPipeline.load_config(folder).keys() - {"transformer"}:
        for path in folder.glob(f"{name}/*.safetensors"):
            with reading(path, "pipeline"), safe_open(path, "pt") as file:
                # By name, as a folder may hold a variant, too, or all of it in one file and in several.
                found |= {(name, key): math.prod(file.get_slice(key).get_shape()) for key in file.keys()}
    return sum(found.values())


def _outline(config: Config) -> tuple[Model, int | None]:
    """The model without its weights, and the bytes of the pipeline's other weights, if they are on disk."""
    source = pipeline_source(config.pipeline)
    dtype = getattr(torch, config.dtype)
    pipeline = {"default_sample_size": 128, "tokenizer_max_length": 77}
    if source in _KNOWN and not Path(source).is_dir():
        kind, settings, others = _KNOWN[source]
        return kind.outline(settings, dtype, _VAE, **pipeline), others * dtype.itemsize
    try:
        kind = find(source)
        folder = _folder(source)
        tokenizer = folder / "tokenizer" / "tokenizer_config.json" if folder else None
        if tokenizer and tokenizer.is_file():
            pipeline["tokenizer_max_length"] = json.loads(tokenizer.read_text())["model_max_length"]
        others = _elements(folder) * dtype.itemsize if folder else 0
        return kind.read_outline(source, dtype, **pipeline), others or None
    except OSError as error:
        raise ConfigError(f"pipeline: the settings of {source!r} cannot be read: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"pipeline: the settings of {source!r} cannot be used: {error!r}") from None


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
    steps = sum(config.at(i).updates_per_epoch for i in range(epoch)) if c.old_policy_counts == "updates" else epoch
    copied = old_policy_decay(c.old_policy, steps) == 0
    updates = max(min(c.updates_per_epoch, trained), 1)
    first = trained // updates * c.timesteps_per_sample if copied else 0
    old = pairs - first if OBJECTIVES[c.objective].needs_old else 0
    return c.pictures * exact + c.candidates * cheap, pairs, old, pairs if c.kl_weight > 0 else 0


class _Costs(TorchDispatchMode):
    """FLOPs of the matrix products inside, and the most bytes that tensors made inside held at once and hold now."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = self.now = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **(kwargs or {}), out_val=out)
            # Of its five products one gives the scores anew, which a plain backward has kept.
            self.flops += flops * 4 // 5 if func.overloadpacket is _ATTENTION_BACKWARD else flops
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._held:
                self._held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention that keeps no matrix of all pairs of tokens, as torch would on the meta device."""
    size = (*query.shape[:-1], key.shape[-2])
    bias = None if attn_mask is None else query.new_empty(()).expand(size)
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, query.requires_grad)[0]


@contextmanager
def _counting(train: bool) -> Iterator[_Costs]:
    # What a model makes itself, such as its positions, has to lie beside the weights.
    with (
        torch.device("meta"),
        torch.set_grad_enabled(train),
        patch.object(F, "scaled_dot_product_attention", _attend),
        _Costs() as costs,
    ):
        yield costs


class _Measured(NamedTuple):
    flops: int
    """Of one sample."""
    peak: int
    """Bytes of the whole batch, gradients of weights among them, as they are there at the peak."""


def _measure(model: Model, config: Config, batch: int, train: bool) -> _Measured:
    """One evaluation of a batch, with its backward if ``train``."""
    x_t = torch.empty(batch, *model.latent_shape(config.resolution), dtype=model.transformer.dtype, device="meta")
    conditions, t = model.conditions(batch, config.max_sequence_length), torch.empty(batch, device="meta")
    with _counting(train) as costs:
        out = model.velocity(model.transformer, x_t, t, *conditions)
        if train:
            out.backward(torch.empty_like(out))
        del out
    model.transformer.zero_grad()
    return _Measured(costs.flops // batch, costs.peak - costs.now)


def _decoding(model: Model, resolution: int | None) -> int:
    """Bytes that the VAE has at once."""
    shape = model.latent_shape(resolution)
    with _counting(train=False) as costs:
        model.decode(torch.empty(decoded_together(model, shape), *shape))
    return costs.peak


def plan(config: Config, gpus: int = 1, *, tflops: float = 300.0, epoch: int = 1) -> Plan:
    """Estimate one epoch.

    Args:
        config: the run.
        gpus: how many processes share an epoch.
        tflops: what one GPU reaches on the transformer, in 1e12 FLOPs a second; 300 is typical of an H100 in bfloat16.
        epoch: which epoch, from 0: the old policy is evaluated in fewer updates while it is a copy of the trained one.

    Raises:
        ConfigError: a transformer whose settings cannot be read.
        ValueError: no GPU, no speed, one GPU for several processes, or what the transformer cannot do.
    """
    if gpus < 1 or not 0 < tflops < math.inf:
        raise ValueError(f"gpus and tflops: got {gpus} and {tflops}, accepted are finite numbers above 0")
    check_device(config.device, gpus)
    c, (model, others) = config.at(epoch), _outline(config)
    transformer, dtype = model.transformer, getattr(torch, c.dtype)
    check_kind(c, type(model))
    check_resolution(c.resolution, model.unit, model.largest)
    latents = math.prod(model.latent_shape(c.resolution))
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    buffers = sum(buffer.numel() for buffer in transformer.buffers())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in repeated_blocks(transformer)]
    full, parts = c.adapter == "full", gpus if c.shard else 1
    size = 4 if full else dtype.itemsize
    if full:
        transformer.float()
    merged = _measure(model, c, c.rollout_batch, train=False)
    if c.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if c.adapter == "lora":
        transformer.requires_grad_(False)
        with torch.device("meta"):
            transformer.add_adapter(LoraConfig(r=c.lora_rank, lora_alpha=c.lora_alpha, target_modules=model.targets))
    own = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in own:
        parameter.data = parameter.data.to("meta", torch.float32)
    trained = sum(parameter.numel() for parameter in own)
    adapted = merged if full else _measure(model, c, c.rollout_batch, train=False)
    step = _measure(model, c, c.micro_batch, train=True)
    decoding = _decoding(model, c.resolution)

    rollout, pairs, old, reference = evaluations(config, epoch)
    adapted_weights = sum(m.base_layer.weight.numel() for m in transformer.modules() if isinstance(m, LoraLayer))
    # Every process merges once an epoch, unless its weights are sharded.
    rollout_flops = rollout * merged.flops + gpus * 2 * c.lora_rank * adapted_weights
    if parts > 1:
        rollout_flops = rollout * adapted.flops
    training_flops = pairs * step.flops + old * adapted.flops + reference * merged.flops

    embeddings = sum(x.nbytes for x in model.conditions(1, c.max_sequence_length))
    solver = table(c.rollout_solver, schedule(c.rollout_steps), **solver_options(c, epoch))
    # Clean latents, and the states around the rows that draw noise.
    kept = 2 + len(solver.rows[noisy(solver)]) if OBJECTIVES[c.objective].trajectory else 1
    memory = {
        # Of full fine-tuning this is the float32 copy that is the reference.
        "transformer": (parameters // parts + buffers) * size,
        # Trained, old, averaged and put aside for an evaluation; gradient; two moments. All in float32.
        "trained weights and optimizer": 7 * 4 * trained // (parts if full else 1),
        "merged weights": adapted_weights * dtype.itemsize if parts == 1 else 0,
        # Candidates are gone before the others are drawn.
        "latents of an epoch": 4 * max(c.pictures * kept, c.candidates) * latents,
        # Of as many prompts as a run may have.
        "embeddings of prompts": min(config.epochs * c.prompts_per_epoch * embeddings, KEPT_BYTES),
        "activations": max(step.peak, (adapted if parts > 1 else merged).peak, decoding),
    }
    if c.cuda_graphs:
        # Every kind of evaluation keeps its own.
        kinds = [OBJECTIVES[c.objective].needs_old, c.kl_weight > 0]
        untrained = sum(kinds) * _measure(model, c, c.micro_batch, train=False).peak
        memory["activations"] = step.peak + merged.peak + untrained + decoding
    if others is not None:
        # Offloaded, they take the place of activations that are not kept.
        free = memory["activations"] if c.offload and not c.cuda_graphs else 0
        memory["text encoders and VAE"] = max(others - free, 0)
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
