"""Make the base policy of the shapes world: flow matching on true captions, then on captions that are often wrong.

A base model that had only seen true captions would leave reinforcement learning nothing to do, and one that had only
seen wrong ones would have learnt too little to be improved. So the second, short phase gives a share of the pictures
the caption of another picture of the same task group: the base policy draws clean shapes and knows what the words mean,
but follows its prompt only sometimes, as SD3.5-Medium without guidance does on GenEval.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from rich.progress import Progress

from nft.files import check_folder, check_vacant

from .prompts import GROUPS, split
from .render import render
from .tiny import TEXT_LENGTH, build_pipeline

# Relations and colours that belong to one of two objects take longest to learn.
_SHARES = {"single_object": 1, "two_object": 1, "counting": 2, "colors": 1, "position": 4, "color_attr": 2}


def _pictures(count: int, rng: random.Random) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Rendered uint8 pictures of shape (count, 3, 64, 64), and the training prompts they show."""
    groups = split(held_out=False)
    entries = [rng.choice(groups[tag]) for tag in rng.choices(GROUPS, [_SHARES[tag] for tag in GROUPS], k=count)]
    pictures = np.stack([render(entry, rng) for entry in entries])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), entries


def _captions(entries: list[dict[str, Any]], wrong_share: float, rng: random.Random) -> list[str]:
    """The prompts, a share of them replaced by another of the same task group."""
    groups = split(held_out=False)
    return [(rng.choice(groups[e["tag"]]) if rng.random() < wrong_share else e)["prompt"] for e in entries]


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
    """Minimise ``batch_loss``, which draws a new batch at every call, with AdamW; the rate warms up over the first 5%
    of the steps and falls to 0 over the last 30%."""
    parameters = [p for m in modules for p in m.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate * min(1, (step + 1) / (0.05 * steps), (steps - step) / (0.3 * steps))
    )
    task = progress.add_task(name, total=steps)
    for _ in range(steps):
        loss = batch_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        progress.update(task, advance=1, description=f"{name}, loss {loss.item():.4f}")
    for module in modules:
        module.eval()


def _vae_loss(vae: Any, pictures: torch.Tensor, batch: int) -> Callable[[], torch.Tensor]:
    def batch_loss() -> torch.Tensor:
        x = _scaled(pictures[torch.randint(len(pictures), (batch,))])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        # Strong enough that the decoder shrugs off the flow model's small errors.
        return error.square().mean() + 0.2 * error.abs().mean() + 1e-2 * posterior.kl().mean() / x[0].numel()

    return batch_loss


@torch.no_grad()
def _encode(pipeline: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Latents of all pictures; sets the VAE's shift and scale so that they have mean 0 and deviation 1."""
    vae = pipeline.vae
    latents = torch.cat([vae.encode(_scaled(part)).latent_dist.mean for part in pictures.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _flow_loss(pipeline: Any, latents: torch.Tensor, captions: list[str], batch: int) -> Callable[[], torch.Tensor]:
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
        # Noisier than SD3's times, as what a picture shows is decided there.
        t = torch.sigmoid(0.3 + torch.randn(batch))
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        velocity = transformer(x_t, embeds, pooled, 1000 * t, return_dict=False)[0]
        return (velocity - (noise - x0)).square().mean()

    return batch_loss


def pretrain(
    output: Path,
    *,
    seed: int = 0,
    pictures: int = 24_000,
    vae_steps: int = 1_000,
    flow_steps: int = 8_000,
    wrong_steps: int = 300,
    batch: int = 64,
    wrong_share: float = 0.65,
) -> StableDiffusion3Pipeline:
    """Train the tiny pipeline and save it with ``save_pretrained`` in float16.

    Args:
        output: folder to write.
        seed: seed of weights, pictures and training.
        pictures: how many pictures are rendered.
        vae_steps: optimizer steps of the autoencoder, on a quarter of the batch.
        flow_steps: optimizer steps of the transformer with its text encoders on true captions.
        wrong_steps: and then on partly wrong ones.
        batch: pictures per flow-matching step.
        wrong_share: share of pictures that carry another picture's caption in the second phase.

    Raises:
        OSError: an output that cannot be written to, or holds anything.
        ValueError: a number that is out of range, named.
    """
    check_folder(output)
    check_vacant(output)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, accepted are 0 to {2**63 - 1}")
    for key, count in (
        ("pictures", pictures),
        ("vae_steps", vae_steps),
        ("flow_steps", flow_steps),
        ("wrong_steps", wrong_steps),
        ("batch", batch),
    ):
        if count < 1:
            raise ValueError(f"{key}: got {count}, accepted are positive numbers")
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share: got {wrong_share}, accepted is 0 to 1")
    pipeline, rng = build_pipeline(seed), random.Random(seed)
    data, entries = _pictures(pictures, rng)
    with Progress() as progress:
        fit = partial(_fit, progress=progress)
        loss = _vae_loss(pipeline.vae, data, max(1, batch // 4))
        fit([pipeline.vae], loss, name="autoencoder", steps=vae_steps, learning_rate=2e-3)
        pipeline.vae.requires_grad_(False)
        latents = _encode(pipeline, data)
        flow = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        for name, share, steps, rate in (
            ("true captions", 0.0, flow_steps, 2e-3),
            ("wrong captions", wrong_share, wrong_steps, 5e-4),
        ):
            loss = _flow_loss(pipeline, latents, _captions(entries, share, rng), batch)
            fit(flow, loss, name=name, steps=steps, learning_rate=rate)
    pipeline.to(torch.float16).save_pretrained(output)
    return pipeline
