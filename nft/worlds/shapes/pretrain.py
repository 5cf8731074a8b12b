"""Make the base policy of the shapes world: flow matching on captions that are often wrong.

A base model that had only seen true captions would leave reinforcement learning nothing to do. Here a share of the
pictures carries the caption of another picture of the same task group, so that the base policy draws clean shapes
but follows its prompt only sometimes, as SD3.5-Medium without guidance does on GenEval.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from rich.progress import Progress

from .prompts import GROUPS, split
from .render import render
from .tiny import TEXT_LENGTH, build_pipeline


def _pictures(count: int, wrong_share: float, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Rendered uint8 pictures of shape (count, 3, 64, 64), and their partly wrong captions."""
    groups = split(held_out=False)
    pictures, captions = [], []
    for _ in range(count):
        group = groups[rng.choice(GROUPS)]
        shown = rng.choice(group)
        pictures.append(render(shown, rng))
        captions.append((rng.choice(group) if rng.random() < wrong_share else shown)["prompt"])
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked, captions


def _scaled(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def _fit(
    modules: list[torch.nn.Module],
    batch_loss: Callable[[], torch.Tensor],
    *,
    name: str,
    steps: int,
    learning_rate: float,
    progress: Progress,
) -> None:
    """Minimise ``batch_loss``, which draws a new batch at every call; the rate warms up over the first 5% of the steps
    and falls to 0 over the last 30%. Muon takes the matrices of linear layers, AdamW everything else."""
    parameters = [p for m in modules for p in m.train().parameters()]
    matrices = [layer.weight for m in modules for layer in m.modules() if isinstance(layer, torch.nn.Linear)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    task = progress.add_task(name, total=steps)
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / (0.05 * steps), (steps - step) / (0.3 * steps))
        loss = batch_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.update(task, advance=1, description=f"{name}, loss {loss.item():.4f}")


def _train_vae(pipeline: Any, pictures: torch.Tensor, steps: int, batch: int, progress: Progress) -> None:
    vae = pipeline.vae

    def batch_loss() -> torch.Tensor:
        x = _scaled(pictures[torch.randint(len(pictures), (batch,))])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        # Strong enough that the decoder shrugs off the flow model's small errors.
        return error.square().mean() + 0.2 * error.abs().mean() + 1e-2 * posterior.kl().mean() / x[0].numel()

    _fit([vae], batch_loss, name="autoencoder", steps=steps, learning_rate=2e-3, progress=progress)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def _encode(pipeline: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Latents of all pictures; sets the VAE's shift and scale so that they have mean 0 and deviation 1."""
    vae = pipeline.vae
    latents = torch.cat([vae.encode(_scaled(part)).latent_dist.mean for part in pictures.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _train_flow(
    pipeline: Any, latents: torch.Tensor, captions: list[str], steps: int, batch: int, progress: Progress
) -> None:
    transformer = torch.compile(pipeline.transformer)

    def batch_loss() -> torch.Tensor:
        index = torch.randint(len(latents), (batch,))
        x0 = latents[index]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [captions[i] for i in index.tolist()],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_LENGTH,
        )
        t = torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        velocity = transformer(x_t, embeds, pooled, 1000 * t, return_dict=False)[0]
        return (velocity - (noise - x0)).square().mean()

    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    _fit(modules, batch_loss, name="flow matching", steps=steps, learning_rate=3e-3, progress=progress)


def pretrain(
    output: Path,
    *,
    seed: int = 0,
    pictures: int = 20_000,
    vae_steps: int = 1_500,
    flow_steps: int = 6_000,
    batch: int = 64,
    wrong_share: float = 0.5,
) -> StableDiffusion3Pipeline:
    """Train the tiny pipeline and save it with ``save_pretrained`` in float16.

    Args:
        output: folder to write.
        seed: seed of weights, pictures and training.
        pictures: how many pictures are rendered.
        vae_steps, flow_steps: optimizer steps of the autoencoder and of the transformer with its text encoders.
        batch: pictures per flow-matching step; the autoencoder takes a quarter.
        wrong_share: share of pictures that carry another picture's caption.
    """
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share: got {wrong_share}, accepted is 0 to 1")
    pipeline = build_pipeline(seed)
    data, captions = _pictures(pictures, wrong_share, random.Random(seed))
    with Progress() as progress:
        _train_vae(pipeline, data, vae_steps, max(1, batch // 4), progress)
        _train_flow(pipeline, _encode(pipeline, data), captions, flow_steps, batch, progress)
    pipeline.to(torch.float16).save_pretrained(output)
    return pipeline
