"""DiffusionNFT in a plain diffusers + PEFT loop, with nothing of this repository but ``nft_kernels``.

    python examples/diffusers_lora.py --model stabilityai/stable-diffusion-3.5-medium --device cuda

The reward here is how red a picture is; put your own in its place. Everything that is particular to DiffusionNFT is
marked; the rest is any LoRA training loop. What it leaves out (an evaluation average, gradient accumulation, several
GPUs, resuming) is in ``nft train``.
"""

import argparse

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from nft_kernels import NFTLoss, add_noise, group_advantages, optimality_probability, solver_step
from nft_kernels.solvers import schedule, table


def redness(pictures):
    """One score per picture (B, 3, H, W) in [0, 1]."""
    return (pictures[:, 0] - pictures[:, 1:].mean(1)).mean((1, 2)).float()


@torch.no_grad()
def sample(pipe, embeds, pooled, steps, seeds):
    """Clean latents by any solver: DiffusionNFT does not need to know which."""
    model, solver = pipe.transformer, table("dpm++2M", schedule(steps, shift=pipe.scheduler.config.shift))
    size, ones = model.config.sample_size, torch.ones(len(embeds), device=model.device)
    zeros = torch.zeros(len(embeds), model.config.in_channels, size, size, device=model.device)
    x, history = add_noise(zeros, ones, seed=seeds), ()
    for i, t in enumerate(solver.times):
        v = model(x.to(model.dtype), embeds, pooled, 1000 * t * ones, return_dict=False)[0]
        x, history, *_ = solver_step(solver, i, x, v, history, seed=seeds)
    return x


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a Stable Diffusion 3 pipeline")
    parser.add_argument("--prompts", nargs="+", default=["a picture of a flower", "a picture of a house"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args(arguments)

    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, dtype=dtype).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    model, vae = pipe.transformer, pipe.vae
    model.requires_grad_(False)
    # The policy that is trained, and the old one that samples: they start equal.
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    parameters = {}
    for name in ("default", "old"):
        model.add_adapter(lora, adapter_name=name)
        parameters[name] = [p for n, p in model.named_parameters() if f".{name}." in n]
    for old, new in zip(parameters["old"], parameters["default"], strict=True):
        old.data.copy_(new.data)
    optimizer = torch.optim.AdamW(parameters["default"], lr=options.learning_rate)
    loss_of = NFTLoss(beta=1.0, adv_clip_max=5.0)

    def velocity(adapter, x_t, t, embeds, pooled):
        model.set_adapter(adapter)
        return model(x_t.to(dtype), embeds, pooled, 1000 * t, return_dict=False)[0]

    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(options.prompts, None, None, do_classifier_free_guidance=False)
    groups = torch.arange(len(options.prompts), device=options.device).repeat_interleave(options.group_size)
    embeds, pooled = embeds[groups], pooled[groups]
    rewards_seen = []
    for epoch in range(options.epochs):
        seeds = torch.arange(len(groups), device=options.device) + epoch * len(groups)
        model.set_adapter("old")
        x0 = sample(pipe, embeds, pooled, options.steps, seeds)
        latents = (x0 / vae.config.scaling_factor + (vae.config.shift_factor or 0)).to(dtype)
        with torch.no_grad():
            rewards = redness((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))

        # DiffusionNFT: rewards to optimality probabilities, ...
        r = optimality_probability(group_advantages(rewards, groups))
        for t in torch.rand(4, device=options.device):
            t = t.expand(len(x0))
            # ... noise the clean latents again, ...
            x_t = add_noise(x0, t, seed=seeds + (1 << 40))
            with torch.no_grad():
                v_old = velocity("old", x_t, t, embeds, pooled)
            v_theta = velocity("default", x_t, t, embeds, pooled)
            # ... and the loss in place of flow matching's.
            out = loss_of(v_theta, v_old, x_t, x0, t, r)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters["default"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        # The old policy follows the trained one.
        with torch.no_grad():
            for old, new in zip(parameters["old"], parameters["default"], strict=True):
                old.lerp_(new, 1 - min(0.001 * (epoch + 1), 0.5))
        rewards_seen.append(rewards.mean().item())
        print(f"epoch {epoch}: reward {rewards_seen[-1]:.4f}, loss {out.loss.item():.4f}")
    return rewards_seen


if __name__ == "__main__":
    main()
