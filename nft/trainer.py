"""The training loop of DiffusionNFT: sample with the old policy, score, and regress on the forward process."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.training_utils import EMAModel
from torch import Tensor

from nft_kernels import add_noise, group_advantages, nft_loss, optimality_probability
from nft_kernels.check import compare_nft_loss
from nft_kernels.solvers import table

from .config import Config
from .policy import Policy, old_policy_decay
from .rollout import rollout, times
from .tasks import TASKS


class Trainer:
    """One run in one folder. ``train`` does everything; the other methods are its steps in order."""

    def __init__(self, config: Config, folder: Path, *, resume: bool = False):
        """Build policy, optimizer and task; with ``resume`` continue from the folder's checkpoint.

        Raises:
            FileExistsError: a folder that holds a run already, without ``resume``.
            FileNotFoundError: ``resume`` without a checkpoint, or a pipeline that cannot be loaded.
            ValueError, TypeError: a device, resolution or solver option that cannot be used.
        """
        checkpoint = folder / "checkpoint"
        if resume and not checkpoint.is_dir():
            raise FileNotFoundError(f"resume: {folder} holds no checkpoint")
        if not resume and (folder / "metrics.jsonl").exists():
            raise FileExistsError(f"output: {folder} holds a run already; give another folder or --resume")
        self.config, self.folder = config, folder
        torch.manual_seed(config.seed)
        self.policy = Policy(config)
        self.task = TASKS[config.task](self.policy.device)
        self.groups = self.task.train_prompts()
        self.optimizer = torch.optim.AdamW(
            self.policy.trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.ema = EMAModel(self.policy.trained, decay=0.9)
        self.grid = times(config.rollout_steps, self.policy.pipeline.scheduler.config.shift)
        table(config.rollout_solver, self.grid.tolist(), **config.rollout_options)
        self.epoch = self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        if resume:
            self._load(checkpoint)

    def _rng(self, purpose: str) -> random.Random:
        """A stream of its own for every purpose and epoch: a resumed run draws what an unbroken one would."""
        return random.Random(f"{self.config.seed} {self.epoch} {purpose}")

    def sample(self) -> dict[str, Any]:
        """One epoch's pictures from the old policy: clean latents, prompts, rewards and r."""
        c, rng = self.config, self._rng("rollout")
        groups = self.groups
        chosen = [rng.choice(groups[i % len(groups)]) for i in range(c.prompts_per_epoch)]
        entries = [entry for entry in chosen for _ in range(c.group_size)]
        prompts = [entry["prompt"] for entry in entries]
        seeds = [rng.getrandbits(62) for _ in entries]
        with self.policy.merged("old"):
            x0 = rollout(self.policy, prompts, seeds, self.grid, c.rollout_solver, c.rollout_batch, **c.rollout_options)
        scores = self.task.score(self.policy.decode(x0), entries)
        ids = torch.arange(c.prompts_per_epoch).repeat_interleave(c.group_size)
        advantages = group_advantages(scores[:, 0], ids, std=c.advantage_std)
        r = optimality_probability(advantages, adv_clip_max=c.adv_clip_max, mode=c.advantage_mode)
        return {"x0": x0, "prompts": prompts, "scores": scores, "r": r.to(x0.device)}

    def _loss(self, x0: Tensor, r: Tensor, prompts: list[str], t: Tensor, seeds: Tensor) -> Any:
        c, policy = self.config, self.policy
        embeds, pooled = policy.embed(prompts)
        x_t = add_noise(x0, t, seed=seeds)
        v_old = v_ref = None
        with torch.no_grad():
            if not policy.old_is_current:
                policy.use("old")
                v_old = policy.velocity(x_t, t, embeds, pooled)
            if c.kl_weight > 0:
                policy.use(None)
                v_ref = policy.velocity(x_t, t, embeds, pooled)
        policy.use("default")
        v_theta = policy.velocity(x_t, t, embeds, pooled)
        if v_old is None:
            v_old = v_theta.detach()
        options = {
            "v_ref": v_ref,
            "beta": c.beta,
            "adv_clip_max": c.adv_clip_max,
            "kl_weight": c.kl_weight,
            "weighting": c.weighting,
        }
        if self.step < c.verify_kernels_steps:
            compare_nft_loss(v_theta, v_old, x_t, x0, t, r, **options)
        return nft_loss(v_theta, v_old, x_t, x0, t, r, **options)

    def optimize(self, data: dict[str, Any]) -> dict[str, float]:
        """All optimizer steps of one epoch, then the old policy's update."""
        c, rng = self.config, self._rng("train")
        order = list(range(len(data["prompts"])))
        rng.shuffle(order)
        totals: dict[str, list[float]] = {}
        grid = self.grid[:-1].tolist()
        share = -(-len(order) // c.updates_per_epoch)
        for update in range(0, len(order), share):
            # Every picture with each of its times; a micro-batch mixes times.
            pairs = [
                (i, t, rng.getrandbits(62))
                for i in order[update : update + share]
                for t in rng.sample(grid, min(c.timesteps_per_sample, c.rollout_steps))
            ]
            for start in range(0, len(pairs), c.micro_batch):
                part = pairs[start : start + c.micro_batch]
                index = [i for i, _, _ in part]
                t = torch.tensor([t for _, t, _ in part], device=self.policy.device)
                seeds = torch.tensor([seed for _, _, seed in part], device=self.policy.device)
                out = self._loss(data["x0"][index], data["r"][index], [data["prompts"][i] for i in index], t, seeds)
                (out.loss * (len(part) / len(pairs))).backward()
                totals.setdefault("loss", []).append(out.loss.item())
                totals.setdefault("kl", []).append(out.kl.mean().item())
                totals.setdefault("old_deviation", []).append(out.old_deviation.mean().item())
            norm = torch.nn.utils.clip_grad_norm_(self.policy.trained, c.max_grad_norm, error_if_nonfinite=True)
            totals.setdefault("grad_norm", []).append(norm.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.policy.old_is_current = False
            self.ema.step(self.policy.trained)
            self.step += 1
        self.epoch += 1
        self.policy.update_old(old_policy_decay(c.old_policy, self.epoch))
        return {name: sum(values) / len(values) for name, values in totals.items()}

    @contextmanager
    def _averaged(self) -> Any:
        self.policy.use("default")
        self.ema.store(self.policy.trained)
        self.ema.copy_to(self.policy.trained)
        try:
            yield
        finally:
            self.ema.restore(self.policy.trained)

    def evaluate(self) -> tuple[dict[str, float], Tensor, list[str]]:
        """Strict score on held-out prompts, mean over task groups, with the averaged weights and another solver."""
        c = self.config
        entries = self.task.held_out_prompts(c.eval_prompts_per_group)
        prompts = [entry["prompt"] for entry in entries]
        grid = times(c.eval_steps, self.policy.pipeline.scheduler.config.shift)
        with self._averaged(), self.policy.merged("default"):
            x0 = rollout(self.policy, prompts, list(range(len(prompts))), grid, c.eval_solver, c.rollout_batch)
        pictures = self.policy.decode(x0)
        strict = self.task.score(pictures, entries)[:, 1]
        tags = [entry["tag"] for entry in entries]
        metrics = {
            f"eval_{tag}": strict[[i for i, other in enumerate(tags) if other == tag]].mean().item()
            for tag in dict.fromkeys(tags)
        }
        return {"eval_strict": sum(metrics.values()) / len(metrics), **metrics}, pictures, prompts

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        target, fresh = self.folder / "checkpoint", self.folder / "checkpoint.tmp"
        shutil.rmtree(fresh, ignore_errors=True)
        for adapter in ("default", "old"):
            self.policy.save_adapter(adapter, fresh / adapter)
        state = {"optimizer": self.optimizer.state_dict(), "ema": self.ema.state_dict()}
        torch.save({**state, "epoch": self.epoch, "step": self.step}, fresh / "state.pt")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)

    def _load(self, checkpoint: Path) -> None:
        for adapter in ("default", "old"):
            self.policy.load_adapter(adapter, checkpoint / adapter)
        self.policy.old_is_current = all(map(torch.equal, self.policy.trained, self.policy._old))
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.epoch, self.step = state["epoch"], state["step"]

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": self.epoch, "step": self.step, **metrics}) + "\n")

    def train(
        self,
        on_epoch: Callable[[dict[str, float]], None] = lambda metrics: None,
        on_eval: Callable[[int, Tensor, list[str]], None] = lambda epoch, pictures, prompts: None,
    ) -> None:
        """Run to the last epoch. On an interrupt the finished epochs are kept: the checkpoint is of the last one."""
        if self.epoch == 0:
            self._evaluate_and_log(on_epoch, on_eval)
        while self.epoch < self.config.epochs:
            begin = time.perf_counter()
            data = self.sample()
            metrics = self.optimize(data)
            reward, strict = data["scores"].mean(0).tolist()
            metrics |= {"reward": reward, "strict": strict, "seconds": time.perf_counter() - begin}
            self.log(metrics)
            self.save()
            on_epoch(metrics)
            if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
                self._evaluate_and_log(on_epoch, on_eval)

    def _evaluate_and_log(self, on_epoch: Callable[..., None], on_eval: Callable[..., None]) -> None:
        metrics, pictures, prompts = self.evaluate()
        self.log(metrics)
        on_epoch(metrics)
        on_eval(self.epoch, pictures, prompts)
