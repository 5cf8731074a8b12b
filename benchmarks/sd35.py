"""Stable Diffusion 3.5 Medium's shape with random weights: rollouts and training steps against the usual ways.

    python -m benchmarks.sd35 --json FILE
    python -m benchmarks.sd35 --device cpu --layers 2 --heads 2 --resolution 64 --rollout-batches 2 --micro-batch 2

``official`` is what NVlabs/DiffusionNFT does: float32 weights under float16 autocast, PEFT's adapters unmerged, and for
a training step three evaluations and the loss with float64 weights. ``compile`` puts torch.compile over that step; its
rollouts have bfloat16 weights with the adapter merged, and those of ``compile, cudnn`` cuDNN's attention besides, where
torch does not choose that by itself.
``nft`` is the trainer with ``dtype=bfloat16 fused_transformer=true``, on a GPU with ``cuda_graphs=true``. All have the
same weights and take turns; their velocities are compared before anything is timed. Text encoders and VAE have no part
in it. What is compiled is every block by itself, as diffusers advises: a block is compiled once for all of its kind.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nft.config import load_config
from nft.console import quieten_libraries
from nft.models.base import Model
from nft.models.sd3 import StableDiffusion3
from nft.plan import SD35_MEDIUM, matrix_rate
from nft.policy import Policy
from nft.rollout import rollout
from nft_kernels import add_noise, nft_loss
from nft_kernels.bench import plain_loss
from nft_kernels.models import attention, float8
from nft_kernels.provenance import write_report

KL_WEIGHT = 1e-4
LOSSES = 100
Draw = Callable[..., Tensor]
Calls = dict[str, Callable[[], Any]]


def random_model(layers: int, heads: int, device: torch.device) -> type[StableDiffusion3]:
    """Stable Diffusion 3.5 Medium without text encoders and VAE: its weights and embeddings are random, and the same in
    every instance."""
    settings = SD35_MEDIUM | {
        "num_layers": layers,
        "num_attention_heads": heads,
        "caption_projection_dim": heads * SD35_MEDIUM["attention_head_dim"],
        "dual_attention_layers": tuple(range(min(layers, 13))),
    }

    class Random(StableDiffusion3):
        def __init__(self, source: str, dtype: torch.dtype):
            torch.manual_seed(0)
            with device:
                self.transformer = SD3Transformer2DModel(**settings)
            self.transformer.to(dtype).requires_grad_(False).eval()
            self.pipeline = SimpleNamespace(
                components={"transformer": self.transformer},
                transformer=self.transformer,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae_scale_factor=8,
                tokenizer_max_length=77,
            )

        @classmethod
        def read_outline(cls, source: str, dtype: torch.dtype, **pipeline: Any) -> Model:
            return cls.outline(settings, dtype, vae_scale_factor=8, **pipeline)

        def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(len(prompts[0]))
            wanted = self.conditions(len(prompts), max_length)
            return tuple(torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in wanted)

    return Random


def make_policy(options: argparse.Namespace, *changes: str) -> Policy:
    """The policy of the trainer, with adapters that have an effect: ``old`` half that of ``default``."""
    fixed = [f"device={options.device}", f"resolution={options.resolution}", "gradient_checkpointing=false"]
    config = load_config("sd35_geneval", [*fixed, *changes])
    model = random_model(options.layers, options.heads, torch.device(options.device))
    with patch("nft.policy.find", return_value=model):
        policy = Policy(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, old in zip(policy.trained, policy._old, strict=True):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            old.copy_(parameter / 2)
    return policy


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, grid: Tensor) -> Tensor:
    """Clean latents from noise x by Euler's method, ``velocity`` being called with latents and times (B,)."""
    with torch.no_grad():
        for t, following in pairwise(grid):
            x = x + (following - t) * velocity(x, t.expand(len(x))).float()
    return x


def compile_blocks(transformer: SD3Transformer2DModel, backend: SDPBackend | None = None) -> None:
    """Compile the forward of every block, with the attention that torch chooses or with one of its backends."""

    def with_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Inside of what is compiled: the kernel is chosen when it is traced.
            with sdpa_kernel(backend):
                return forward(*args, **kwargs)

        return call

    # Three kinds of blocks, each with several adapters, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(with_attention(block.forward) if backend else block.forward)


class Plain:
    """A policy's transformer by diffusers and PEFT alone, under float16 autocast."""

    def __init__(self, policy: Policy, compiled: bool):
        self.policy = policy
        self.used: str | None = "default"
        self.loss: Callable[..., Tensor] = plain_loss
        if compiled:
            compile_blocks(policy.transformer)
            self.loss = torch.compile(plain_loss)

    def use(self, adapter: str | None) -> None:
        """As diffusers does it."""
        if adapter is None:
            self.policy.transformer.disable_adapters()
        else:
            self.policy.transformer.enable_adapters()
            self.policy.transformer.set_adapter(adapter)
        self.used = adapter

    def velocity(self, adapter: str | None, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        if adapter != self.used:
            self.use(adapter)
        with torch.autocast(x.device.type, torch.float16):
            return self.policy.velocity(x, t, *conditions)

    def draw(self, x: Tensor, grid: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
        return euler(lambda x, t: self.velocity("old", x, t, *conditions), x, grid)

    def step(self, x0: Tensor, t: Tensor, r: Tensor, conditions: tuple[Tensor, ...]) -> None:
        shaped = t.view(-1, 1, 1, 1)
        x_t = (1 - shaped) * x0 + shaped * torch.randn_like(x0)
        with torch.no_grad():
            v_old, v_ref = (self.velocity(name, x_t, t, *conditions) for name in ("old", None))
        v = self.velocity("default", x_t, t, *conditions)
        kl = (v.float() - v_ref.float()).square().mean()
        (self.loss(v.float(), v_old.float(), x_t, x0, t, r) + KL_WEIGHT * kl).backward()
        clear(self.policy)


def merged_and_compiled(policy: Policy) -> dict[str, Draw]:
    """Rollouts by torch.compile of a transformer without PEFT, whose weights have the adapter merged, with the
    attention that torch chooses and, on a GPU where that is another one, with cuDNN's."""
    with policy.merged("old"):
        weights = {k.replace(".base_layer", ""): v for k, v in policy.transformer.state_dict().items()}
        weights = {k: v.clone() for k, v in weights.items() if "lora_" not in k}

    def draw_by(backend: SDPBackend | None) -> Draw:
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(policy.transformer.config).eval()
        transformer.load_state_dict(weights, assign=True)
        transformer.requires_grad_(False)
        compile_blocks(transformer, backend)

        def draw(x: Tensor, grid: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
            return euler(lambda x, t: policy.model.velocity(transformer, x.to(policy.dtype), t, *conditions), x, grid)

        return draw

    draws = {"compile": draw_by(None)}
    heads = policy.transformer.config.num_attention_heads
    chosen = attention.select("native", (1, 1024, heads, 64), policy.dtype, policy.device)
    if policy.device.type == "cuda" and chosen != "cudnn":
        draws["compile, cudnn"] = draw_by(SDPBackend.CUDNN_ATTENTION)
    return draws


def clear(policy: Policy) -> None:
    for parameter in policy.trained:
        parameter.grad = None


def measure(calls: Calls, device: torch.device, seconds: float) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Seconds of every call, in turns, and the most bytes that two calls before them allocate, what they compile and
    record included; and what they give."""
    cuda = device.type == "cuda"
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in calls}
    outputs = {}
    for name, call in calls.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):
            outputs[name] = call()
        if cuda:
            torch.cuda.synchronize()
            results[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(result["seconds"]) < 3 for result in results.values()):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            results[name]["seconds"].append(time.perf_counter() - begin)
    for result in results.values():
        result["median"] = statistics.median(result["seconds"])
    return results, outputs


def flops(policy: Policy) -> int:
    """Of one sample's evaluation without adapters."""
    model = type(policy.model).outline(dict(policy.transformer.config), policy.dtype, tokenizer_max_length=77)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, *policy.latent_shape, dtype=policy.dtype)
        model.velocity(model.transformer, x, torch.empty(1), *model.conditions(1, policy._max_sequence_length))
    return counter.get_total_flops()


def draws_of(fused: Policy, official: Plain, compiled: dict[str, Draw], batch: int, steps: int) -> Calls:
    """Rollouts of as many pictures from the same noise."""
    device, prompts, seeds = fused.device, ["a"] * batch, list(range(batch))
    grid, keys = fused.times(steps).to(device), torch.tensor(seeds, device=device)
    x = add_noise(torch.zeros(batch, *fused.latent_shape, device=device), torch.ones(batch, device=device), seed=keys)
    wide, narrow = official.policy.embed(prompts), fused.embed(prompts)

    def ours(float8: bool) -> Tensor:
        with fused.merged("old", float8=float8):
            return rollout(fused, prompts, seeds, grid, "euler", batch)

    calls: Calls = {"official": partial(official.draw, x, grid, wide)}
    calls |= {name: partial(draw, x, grid, narrow) for name, draw in compiled.items()}
    calls["nft"] = partial(ours, False)
    if device.type == "cuda" and float8.why_not(x.to(fused.dtype)) is None:
        calls["nft, float8"] = partial(ours, True)
    return calls


def steps_of(fused: Policy, plain: dict[str, Plain], size: int) -> Calls:
    """Training steps on as many pairs up to the gradient, and the loss and its gradient by themselves, many times: one
    alone would be mostly the wait for the device."""
    device = fused.device
    x0 = torch.randn(size, *fused.latent_shape, device=device)
    t, r = (torch.linspace(0.1, 0.9, size, device=device) for _ in range(2))
    seeds, narrow = torch.arange(size, device=device), fused.embed(["a"] * size)

    def ours() -> None:
        x_t = add_noise(x0, t, seed=seeds)
        with torch.no_grad():
            fused.use("old")
            v_old = fused.velocity(x_t, t, *narrow)
            fused.use(None)
            v_ref = fused.velocity(x_t, t, *narrow)
        fused.use("default")
        v = fused.velocity(x_t, t, *narrow)
        nft_loss(v, v_old, x_t, x0, t, r, v_ref=v_ref, kl_weight=KL_WEIGHT).loss.backward()
        clear(fused)

    v, v_old, v_ref = (torch.randn_like(x0, dtype=fused.dtype) for _ in range(3))
    v.requires_grad_()

    def losses() -> None:
        for _ in range(LOSSES):
            torch.autograd.grad(nft_loss(v, v_old, x0, x0, t, r, v_ref=v_ref, kl_weight=KL_WEIGHT).loss, v)

    calls: Calls = {name: partial(each.step, x0, t, r, each.policy.embed(["a"] * size)) for name, each in plain.items()}
    return {**calls, "nft": ours, f"nft: {LOSSES} losses": losses}


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def difference(fused: Policy, official: Plain) -> float:
    """Of the old policy's velocities, relative to their norm."""
    x, t = torch.randn(2, *fused.latent_shape, device=fused.device), torch.tensor([0.3, 0.8], device=fused.device)
    with torch.no_grad():
        expected = official.velocity("old", x, t, *official.policy.embed(["a", "a"])).float()
        fused.use("old")
        got = fused.velocity(x, t, *fused.embed(["a", "a"])).float()
    return relative(got, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=SD35_MEDIUM["num_layers"])
    parser.add_argument("--heads", type=int, default=SD35_MEDIUM["num_attention_heads"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rollout-batches", type=int, nargs="+", default=[24])
    parser.add_argument("--micro-batch", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=40, help="for rollouts and steps each")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quieten_libraries()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    graphs = f"cuda_graphs={str(device.type == 'cuda').lower()}"
    fused = make_policy(options, "dtype=bfloat16", "fused_transformer=true", graphs)
    plain = {"official": Plain(make_policy(options, "dtype=float32"), compiled=False)}
    size = 8192 if device.type == "cuda" else 1024
    evaluation, rate = flops(fused), 1e12 * matrix_rate(size, torch.bfloat16, device)
    report: dict[str, Any] = {
        **{key: getattr(options, key) for key in ("layers", "heads", "resolution", "steps", "micro_batch")},
        "flops_per_evaluation": evaluation,
        "matrix_flops_per_second": rate,
        "velocity_difference": difference(fused, plain["official"]),
        "rollout": {},
    }
    print(f"relative difference of velocities, nft to official: {report['velocity_difference']:.2e}")
    compiled = {} if options.no_compile else merged_and_compiled(fused)
    for batch in options.rollout_batches:
        calls = draws_of(fused, plain["official"], compiled, batch, options.steps)
        results, latents = measure(calls, device, options.seconds)
        report["rollout"][batch] = results
        print(f"rollout of {batch} pictures, {options.steps} steps")
        for name, result in results.items():
            each = result["median"] / batch / options.steps
            result |= {"milliseconds_per_evaluation": 1e3 * each, "share_of_matrix_rate": evaluation / each / rate}
            result["difference"] = relative(latents[name], latents["official"])
            print(
                f"  {name:20} {1e3 * result['median'] / batch:9.2f} ms a picture, {1e3 * each:8.3f} ms an evaluation, "
                f"{result['share_of_matrix_rate']:.0%} of the matrix rate, {result.get('peak_bytes', 0) / 1e9:.2f} GB, "
                f"latents differ by {result['difference']:.1e}"
            )
    report["attention"] = sorted({*fused._fast_path.attention_used.values()})
    if compiled:
        del compiled, calls
        torch._dynamo.reset()
        plain["compile"] = Plain(make_policy(options, "dtype=float32"), compiled=True)
    results, _ = measure(steps_of(fused, plain, options.micro_batch), device, options.seconds)
    report["training_step"] = results
    print(f"training step of {options.micro_batch} pairs")
    for name, result in results.items():
        print(f"  {name:20} {1e3 * result['median']:9.2f} ms, {result.get('peak_bytes', 0) / 1e9:.2f} GB")
    share = results[f"nft: {LOSSES} losses"]["median"] / LOSSES / results["nft"]["median"]
    print(f"  the loss is {share:.2%} of nft's step")
    if options.json:
        write_report(options.json, "python -m benchmarks.sd35", device, report)


if __name__ == "__main__":
    main()
