"""The training loop of DiffusionNFT: sample with the old policy, score, and regress on the forward process.

Every random choice comes from a stream that is named by seed, epoch and purpose, and every picture and pair has a seed
of its own. So a resumed run does what an unbroken one would, and what is drawn does not depend on how many processes
share the work: each takes its share of the epoch's pictures, then its share of the pairs of every update.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from nft_kernels import add_noise
from nft_kernels.solvers import Row, table

from . import checkpoint, files, tasks
from .alarms import Alarms, distribution, preflight
from .config import Config, ConfigError, load_config
from .data.prompts import in_turn
from .distributed import Processes, sharded_like, whole
from .full import FullPolicy
from .objectives import OBJECTIVES, Batch, Step
from .objectives.base import Loss
from .policy import Policy, old_policy_decay
from .rewards.base import RewardError
from .rewards.combine import Combined, combine, weighted_sum
from .rollout import noisy, rollout, solver_options
from .selection import extremes, uninformative
from .surroundings import changes, surroundings
from .tracking import Tracker

# Seconds to wait before a failed reward is asked again.
_WAITS = (5, 30)
# What is written to a run's folder beside its log.
_WRITTEN = {"config.yaml", "checkpoints", "checkpoint", "best", "pictures", "report.html"}
_WRITTEN |= {"before.png", "after.png", "reward.png"}
_MEASURED = ("loss", "kl", "old_deviation", "velocity_rms")


def _mean(scores: Tensor) -> float:
    """Of those that are finite."""
    return scores[scores.isfinite()].mean().item()


def _begun(path: Path) -> bool:
    """Whether a file holds the settings of a run that ended before it logged anything, and not a user's own."""
    try:
        return path.read_text(encoding="utf-8") == load_config(str(path)).dump()
    except (OSError, ValueError):
        return False


class Trainer:
    """One run in one folder. ``train`` does everything; the other methods are its steps in order."""

    def __init__(self, config: Config, folder: Path, *, resume: bool = False):
        """Build policy, optimizer and task; with ``resume`` continue from the folder's newest checkpoint, or from the
        start where the run ended before its first.

        Raises:
            FileExistsError: a file, or without ``resume`` a folder that holds a run or what one would overwrite.
            FileNotFoundError: ``resume`` without a run, or a pipeline that cannot be loaded.
            CheckpointError: a damaged checkpoint, or not the same one for all processes.
            ConfigError: with ``resume`` damaged settings in the folder.
            ValueError, TypeError: a device, resolution, tracker or solver option that cannot be used, or with
                ``resume`` a pipeline of other weights or another adapter than the run's, fewer epochs than are
                finished, or a damaged log.
        """
        files.check_folder(folder)
        if resume and not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"resume: {folder} holds no config.yaml, accepted is the folder of a run")
        if not resume and ((folder / "metrics.jsonl").exists() or checkpoint.existing(folder / "checkpoints")):
            raise FileExistsError(f"output: {folder} holds a run already; give another folder or --resume")
        if not resume:
            files.check_vacant(folder, _WRITTEN - ({"config.yaml"} if _begun(folder / "config.yaml") else set()))
        kept = folder / "checkpoints"
        if resume and os.path.lexists(kept) and not (kept.is_dir() and os.access(kept, os.R_OK | os.X_OK)):
            # As on a disk that is not mounted: to begin anew would forget what was logged.
            raise FileNotFoundError(
                f"resume: {kept} is no folder that can be read, accepted is that of the checkpoints"
            )
        logged, finished = files.read_metrics(folder, required=False) if resume else [], 0
        done = checkpoint.existing(kept) if resume else []
        if done:
            about = checkpoint.verify(done[-1])
            finished = about["epoch"]
            if config.epochs < finished:
                raise ValueError(f"epochs: got {config.epochs}, but {finished} are finished already")
            before = load_config(str(folder / "config.yaml"))
            for key in ("adapter", "lora_rank", "lora_alpha"):
                came, was = getattr(config, key), getattr(before, key)
                if came != was:
                    raise ValueError(f"{key}: got {came}, but {folder} was trained with {was}; that cannot be changed")
        for stage in config.all_stages():
            tasks.check(stage, ask=stage is config.at(finished))
        self.config, self.folder = config, folder
        self.processes = Processes(config.device)
        if resume:
            # A network file system may show one machine later than another what was written last.
            epochs = self.processes.gather(torch.tensor([finished]), self.processes.count).tolist()
            if len(set(epochs)) > 1:
                found = ", ".join(map(str, epochs))
                raise checkpoint.CheckpointError(
                    f"resume: the processes found {folder} after epochs {found}, accepted is a folder that is the same "
                    "for all; try again, or look at what each machine has there"
                )
        self.tracker = Tracker(config, folder)
        torch.manual_seed(config.seed)
        self.policy = (FullPolicy if config.adapter == "full" else Policy)(config)
        self.optimizer = torch.optim.AdamW(
            self.policy.trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        # Its decay after update s is min((1+s) / (10+s), 0.9), from the first one on.
        self.ema = EMAModel(self.policy.trained, decay=0.9, update_after_step=-1)
        self.alarms = Alarms(config.alarms)
        self.score: float | None = None
        """Held-out score of the weights as they are, where it was measured."""
        self.epoch = self.step = 0
        self._surroundings = surroundings(self.policy.device, self.processes.count)
        self.changes: list[str] = []
        """What is not as it was when the checkpoint was written that this run goes on from: it rounds otherwise."""
        if done:
            self._load(done[-1], about)
        # An evaluation that an interrupt cut off belongs to the stage that has ended.
        self._enter_stage(self.epoch - (self.epoch > 0 and self.evaluation_due))
        if self.processes.main:
            files.lock(folder)
            for path in (folder / "config.yaml", folder / "metrics.jsonl", *(each / files.MANIFEST for each in done)):
                files.forget_unfinished(path)
            if done:
                # A kill may have come before the links were set.
                self._tidy()
            if resume:
                self._forget_later(logged)
            files.replace_text(folder / "config.yaml", config.dump())
            self.tracker.start()

    def _enter_stage(self, epoch: int) -> None:
        """Take the settings of an epoch (from 0), and what is built from them."""
        c = self.stage = self.config.at(epoch)
        if epoch == self.epoch > 0 and c is not self.config.at(epoch - 1):
            # What another stage's task scored says nothing about this one's, unless an epoch of this one is finished.
            self.alarms.restart()
        self.grid = self.policy.times(c.rollout_steps)
        self.objective = OBJECTIVES[c.objective]
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = c.learning_rate, c.weight_decay
        try:
            table(c.rollout_solver, self.grid.tolist(), **solver_options(c, epoch))
            self.task: tasks.Task = tasks.build(c, self.policy.device)
        except (ValueError, TypeError) as error:
            # In the middle of a run as at its start, and unlike others of these types, it is the user's.
            raise ConfigError(str(error)) from error
        self.groups = self.task.train_prompts()

    def _rng(self, purpose: str) -> random.Random:
        """A stream of its own for every purpose and epoch: a resumed run draws what an unbroken one would."""
        return random.Random(f"{self.config.seed} {self.epoch} {purpose}")

    def _seed(self, purpose: str) -> None:
        """Begin torch's own streams anew, from which rewards may draw: each process and device has another, and none is
        kept in a checkpoint."""
        torch.manual_seed(self._rng(purpose).getrandbits(63))

    def _draw(
        self,
        entries: list[dict[str, Any]],
        seeds: list[int],
        grid: Tensor,
        solver: str,
        *,
        pictures: list[Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Clean latents and scores of this process' share of the entries. Pictures, which may be gigabytes, are kept
        only in a list that is given for them, and in host memory."""
        share = self.processes.share(len(entries))
        if share.start == share.stop:
            # More processes than pictures: draw one that nobody needs, which keeps the tensors' shapes.
            share = slice(0, 1)
        latents, batch = [], self.stage.rollout_batch
        for start in range(share.start, share.stop, batch):
            part = slice(start, min(start + batch, share.stop))
            prompts = [entry["prompt"] for entry in entries[part]]
            latents.append(rollout(self.policy, prompts, seeds[part], grid, solver, batch, **options))
            drawn = self.policy.decode(latents[-1])
            # A task may score them while the next ones are drawn.
            self.task.submit(drawn, entries[part])
            if pictures is not None:
                pictures.append(drawn.cpu())
        if self.policy.sharded:
            # Other processes may draw more batches, and need this one's part of the weights.
            for _ in range(self.processes.rounds(len(entries), batch) - len(latents)):
                idle = {**options, "states": None}
                rollout(self.policy, [entries[0]["prompt"]], seeds[:1], grid, solver, batch, **idle)
        return torch.cat(latents), self._scores()

    def _scores(self) -> Tensor:
        """What the task has scored. A reward that fails is asked again: its server may be starting anew."""
        for wait in _WAITS:
            try:
                return self.task.gather()
            except RewardError:
                time.sleep(wait)
        try:
            return self.task.gather()
        except RewardError as error:
            raise RewardError(f"{error}; --resume draws the same pictures again, from their seeds") from error

    def sample(self) -> dict[str, Any]:
        """One epoch's pictures from the old policy: clean latents, prompts, rewards, r and which of them to train on,
        the same everywhere, and the rollout's states for an objective that trains on them."""
        c, rng = self.stage, self._rng("rollout")
        self._seed("rewards")
        # Where there are more prompts than an epoch has, it goes on with those that the last one did not reach.
        chosen = in_turn(self.groups, self.epoch * c.prompts_per_epoch, c.prompts_per_epoch, self.config.seed)
        entries = [entry for entry in chosen for _ in range(c.explore or c.group_size)]
        seeds = [rng.getrandbits(62) for _ in entries]
        kept: list[Tensor] = []
        options = solver_options(c, self.epoch) | ({"states": kept} if self.objective.trajectory else {})
        explored: dict[str, Any] = {}
        if c.explore:
            with self.policy.merged("old", float8=c.explore_float8):
                index, explored = self._explore(entries, seeds, c.explore)
            entries, seeds = [entries[i] for i in index], [seeds[i] for i in index]
        with self.policy.merged("old"):
            x0, scores = self._draw(entries, seeds, self.grid, c.rollout_solver, **options)
        states = self.processes.gather(torch.cat(kept), len(entries)) if kept else None
        x0, scores = (self.processes.gather(part, len(entries)) for part in (x0, scores))
        combined, measured = self._combine(scores, c.group_size)
        total = weighted_sum(self._by_reward(scores), self.task.weights).view(-1, c.group_size)
        measured |= distribution(combined.r, total, x0)
        measured |= {"reward": total.mean().item(), "strict": _mean(scores[:, -1])}
        measured |= explored | {
            "nonfinite_rewards": measured["nonfinite_rewards"] + explored.get("nonfinite_rewards", 0)
        }
        trained = list(range(len(entries)))
        if c.filter_mean is not None:
            filtered = uninformative(total, c.filter_mean, c.filter_std).tolist()
            trained = [i for i in trained if not filtered[i // c.group_size]]
            measured["filtered_groups"] = sum(filtered)
        r = combined.r
        if c.combine != "per_reward" and trained:
            # Some objectives' weights are relative to the mean of what is trained on.
            r[trained] = self.objective.weights(combined.advantages[trained], c)
        prompts = [entry["prompt"] for entry in entries]
        return {
            "x0": x0,
            "states": states,
            "prompts": prompts,
            "scores": scores,
            "r": r.to(x0.device),
            "trained": trained,
            "measured": measured,
        }

    def _explore(self, entries: list[dict[str, Any]], seeds: list[int], size: int) -> tuple[list[int], dict[str, Any]]:
        """Which of an epoch's candidates, ``size`` per prompt, to draw exactly, by how they score drawn cheaply, and
        what was measured."""
        c, options = self.stage, solver_options(self.stage, self.epoch)
        grid = self.policy.times(c.explore_steps or c.rollout_steps)
        _, scores = self._draw(entries, seeds, grid, c.rollout_solver, **options)
        scores = self.processes.gather(scores, len(entries))
        combined, measured = self._combine(scores, size)
        kept = extremes(combined.advantages.view(-1, size), c.group_size)
        first = torch.arange(0, len(entries), size, device=kept.device)
        reward = weighted_sum(self._by_reward(scores), self.task.weights).mean().item()
        return (first[:, None] + kept).flatten().tolist(), {
            "explore_reward": reward,
            "nonfinite_rewards": measured["nonfinite_rewards"],
        }

    def _rows(self) -> tuple[Row, ...]:
        """The rows of this epoch's rollout that draw noise."""
        c = self.stage
        solver = table(c.rollout_solver, self.grid.tolist(), **solver_options(c, self.epoch))
        return solver.rows[noisy(solver)]

    def _times(self) -> list[float]:
        """The times that are trained on: the rollout's, or those of its rows that draw noise."""
        return [row.t for row in self._rows()] if self.objective.trajectory else self.grid[:-1].tolist()

    def _by_reward(self, scores: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.task.weights, scores.unbind(1), strict=False))

    def _combine(self, scores: Tensor, size: int) -> tuple[Combined, dict[str, Any]]:
        """Advantages and r (B,) of the rewards of groups of ``size``; a score that is not finite counts as the mean of
        its group.

        Raises:
            RewardError: a reward none of whose scores is finite.
        """
        c = self.stage
        groups = scores.view(-1, size, scores.shape[1])
        broken = ~groups[..., :-1].isfinite()
        if broken.any():
            rewards = groups[..., :-1]
            for name, none in zip(self.task.weights, broken.all(0).all(0), strict=True):
                if none:
                    raise RewardError(f"rewards.{name}: none of {len(scores)} scores is finite")
            known = rewards.masked_fill(broken, math.nan)
            rewards.copy_(known.where(~broken, known.nanmean(1, keepdim=True)).nan_to_num(0.0))
        combined = combine(
            self._by_reward(scores),
            self.task.weights,
            torch.arange(len(groups), device=scores.device).repeat_interleave(size),
            method=self.task.method,
            std=c.advantage_std,
            adv_clip_max=c.adv_clip_max,
            mode=c.advantage_mode,
        )
        each = combined.metrics if len(self.task.weights) > 1 else {}
        return combined, {"nonfinite_rewards": int(broken.sum()), **each}

    def _step(self, states: Tensor, t: Tensor) -> tuple[Tensor, Step]:
        """Of a rollout's states (B, K + 1, C, H, W) those before its rows at times t (B,), and what these rows did."""
        rows = self._rows()
        k = torch.searchsorted(-torch.tensor([row.t for row in rows], device=t.device), -t)
        a, b, c = (
            torch.tensor(values, device=t.device)[k]
            for values in zip(*((row.a, row.b[0], row.c) for row in rows), strict=True)
        )
        i = torch.arange(len(k), device=k.device)
        return states[i, k], Step(states[i, k + 1], a, b, c)

    def _loss(
        self, x0: Tensor, r: Tensor, prompts: list[str], t: Tensor, seeds: Tensor, states: Tensor | None = None
    ) -> tuple[Loss, Tensor]:
        """The objective's loss of one micro-batch, and the velocity that it is about."""
        policy = self.policy
        conditions = policy.embed(prompts)
        x_t, step = (add_noise(x0, t, seed=seeds), None) if states is None else self._step(states, t)
        v_old = v_ref = None
        with torch.no_grad():
            if self.objective.needs_old and not policy.old_is_current:
                policy.use("old")
                v_old = policy.velocity(x_t, t, *conditions)
            if self.stage.kl_weight > 0:
                policy.use(None)
                v_ref = policy.velocity(x_t, t, *conditions)
        policy.use("default")
        v_theta = policy.velocity(x_t, t, *conditions)
        batch = Batch(v_theta, v_old, v_ref, x_t, x0, t, r, step)
        if self.objective.verify and self.step < self.stage.verify_kernels_steps:
            self.objective.verify(batch, self.stage)
        return self.objective.loss(batch, self.stage), v_theta.detach()

    def _differentiate(self, *batch: Any, share: float) -> Tensor:
        """Add ``share`` of a micro-batch's gradients to the parameters', and return its means of ``_MEASURED``. It
        leaves nothing of its autograd graph, beside which CUDA could not record another evaluation."""
        out, v = self._loss(*batch)
        (out.loss * share).backward()
        rms = v.float().square().flatten(1).mean(1).sqrt()
        return torch.stack([out.loss.detach().float(), out.kl.mean(), out.old_deviation.mean(), rms.mean()])

    def _accumulate(self, data: dict[str, Any], pairs: list[tuple[int, float, int]]) -> Tensor:
        """Gradients of this process' share of an update's pairs of picture, time and seed, and sums of ``_MEASURED``
        over that share."""
        policy, device, size = self.policy, self.policy.device, self.stage.micro_batch
        own, sums = pairs[self.processes.share(len(pairs))], torch.zeros(len(_MEASURED), device=device)
        rounds = self.processes.rounds(len(pairs), size) if policy.sharded else math.ceil(len(own) / size)
        counts = [len(own[k * size : (k + 1) * size]) for k in range(rounds)]
        # A process that has none left still has to bring its part of the weights to the others.
        parts = [own[k * size : k * size + count] or pairs[:1] for k, count in enumerate(counts)]
        # Copied before the first evaluation: a copy waits for all that the device has been given.
        columns = (torch.tensor(column, device=device) for column in zip(*chain(*parts), strict=True))
        split = (column.split([len(part) for part in parts]) for column in columns)
        for step, (index, t, seeds) in enumerate(zip(*split, strict=True)):
            if policy.sharded:
                policy.transformer.set_requires_gradient_sync(step == rounds - 1)
            prompts = [data["prompts"][i] for i, *_ in parts[step]]
            states = None if data["states"] is None else data["states"][index]
            batch = data["x0"][index], data["r"][index], prompts, t, seeds, states
            # The mean over all pairs of all processes.
            sums += counts[step] * self._differentiate(*batch, share=counts[step] / len(pairs))
        return sums

    def _update(self, sums: Tensor, count: int) -> dict[str, float]:
        """One optimizer step on the summed gradients, unless something is not finite."""
        policy = self.policy
        sums = self.processes.sum_gradients(policy.trained, sums)
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.trained, self.stage.max_grad_norm))
        # All that an update reads back: what is read has to be waited for.
        *means, grad_norm = torch.cat([sums / count, norm[None]]).tolist()
        finite = math.isfinite(grad_norm) and all(map(math.isfinite, means))
        if finite:
            self.optimizer.step()
            policy.old_is_current = False
            self.ema.step(policy.trained)
            self.step += 1
        self.optimizer.zero_grad()
        self.alarms.update(finite)
        return dict(zip((*_MEASURED, "grad_norm"), (*means, grad_norm), strict=True))

    def _noises(self, ts: list[float], rng: random.Random) -> list[tuple[float, int]]:
        """A choice of times ``ts`` to train a picture on, each with a seed for its noise."""
        return [(t, rng.getrandbits(62)) for t in rng.sample(ts, self.stage.timesteps_per_sample)]

    def optimize(self, data: dict[str, Any]) -> dict[str, float]:
        """All optimizer steps of one epoch, then the old policy's update.

        Raises:
            AlarmError: too many updates in a row that were not finite.
        """
        c, rng = self.stage, self._rng("train")
        order = list(data["trained"])
        rng.shuffle(order)
        ts, updates = self._times(), []
        shared = [self._noises(ts, rng) for _ in range(c.prompts_per_epoch)] if c.shared_noise else []
        # Fewer where a filter has left fewer pictures than that.
        count = min(c.updates_per_epoch, len(order))
        for update in range(count):
            # Every picture with each of its times; a micro-batch mixes times.
            first, last = (len(order) * k // count for k in (update, update + 1))
            pairs = [
                (i, *noise)
                for i in order[first:last]
                for noise in (shared[i // c.group_size] if shared else self._noises(ts, rng))
            ]
            updates.append(self._update(self._accumulate(data, pairs), len(pairs)))
        self.epoch += 1
        done = self.epoch if c.old_policy_counts == "epochs" else self.step
        self.policy.update_old(old_policy_decay(c.old_policy, done))
        if not updates:
            return {"nonfinite_updates": 0}
        finite = [update for update in updates if all(map(math.isfinite, update.values()))]
        if not finite:
            return {"nonfinite_updates": len(updates)}
        metrics = {name: sum(update[name] for update in finite) / len(finite) for name in updates[0]}
        metrics["old_deviation_relative"] = metrics["old_deviation"] / max(metrics["velocity_rms"], 1e-12)
        return {**metrics, "nonfinite_updates": len(updates) - len(finite)}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self.policy.use("default")
        self.ema.store(self.policy.trained)
        self.ema.copy_to(self.policy.trained)
        try:
            yield
        finally:
            self.ema.restore(self.policy.trained)

    def evaluate(self, solver: str | None = None) -> tuple[dict[str, float], Tensor, list[str]]:
        """Strict score on held-out prompts, mean over task groups, with the averaged weights and another solver, by
        default ``eval_solver``; its deviation over pictures, each of several rewards' mean and deviation, and how many
        pictures have a score that is not finite, which counts for nothing."""
        c = self.stage
        entries = self.task.held_out_prompts(c.eval_prompts_per_group)
        grid, drawn = self.policy.times(c.eval_steps), list[Tensor]()
        with self._averaged(), self.policy.merged("default"):
            seeds = list(range(len(entries)))
            _, scores = self._draw(entries, seeds, grid, solver or c.eval_solver, pictures=drawn)
        pictures, scores = (self.processes.gather(part, len(entries)).cpu() for part in (torch.cat(drawn), scores))
        strict = scores[:, -1]
        columns = {f"reward_{name}": column for name, column in self._by_reward(scores).items()}
        columns = {"strict": strict, **(columns if len(columns) > 1 else {})}
        tags = [entry["tag"] for entry in entries]
        metrics = {
            f"eval_{tag}": _mean(strict[[i for i, other in enumerate(tags) if other == tag]])
            for tag in dict.fromkeys(tags)
        }
        prompts = [entry["prompt"] for entry in entries]
        found = {f"eval_{name}": _mean(column) for name, column in columns.items()}
        found |= {
            f"eval_{name}_std": column[column.isfinite()].std(correction=0).item() for name, column in columns.items()
        }
        found["eval_strict"] = sum(metrics.values()) / len(metrics)
        found["nonfinite_scores"] = int((~scores.isfinite()).any(1).sum())
        return {**metrics, **found}, pictures, prompts

    def preflight_pictures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, pictures and scores of two pictures of the first prompt."""
        c, entries = self.stage, [self.groups[0][0]] * 2
        prompts = [entry["prompt"] for entry in entries]
        with self.policy.merged("old"):
            options = solver_options(c, self.epoch)
            x0 = rollout(self.policy, prompts, [0, 1], self.grid, c.rollout_solver, c.rollout_batch, **options)
        pictures = self.policy.decode(x0)
        return x0, pictures, self.task.score(pictures, entries)

    def backward(self, x0: Tensor, weights: Tensor) -> None:
        """Gradients of the loss on a few pictures of the first prompt at the middle of the times to train on."""
        device, ts = x0.device, self._times()
        t = torch.full((len(x0),), ts[len(ts) // 2], device=device)
        prompts = [self.groups[0][0]["prompt"]] * len(x0)
        # Whether a gradient comes back does not depend on which states these are.
        states = x0[:, None].expand(-1, len(ts) + 1, *x0.shape[1:]) if self.objective.trajectory else None
        out, _ = self._loss(x0, weights, prompts, t, torch.arange(len(x0), device=device), states)
        out.loss.backward()

    def save(self) -> None:
        """Write a checkpoint, point ``checkpoint`` and ``best`` at the newest and the best, and delete old ones.

        Raises:
            CheckpointError: it cannot be written; the ones before are as they were.
        """
        if self.processes.main:
            stage = self.config.stage_index(self.epoch - 1)
            about: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "score": self.score, "stage": stage}
            about |= {"pipeline": self.policy.fingerprint, "surroundings": self._surroundings}
            checkpoint.write(self._checkpoint, self._fill, about)
            self._tidy()
        elif self.policy.sharded:
            self._fill(None)
        self.processes.wait()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"epoch-{self.epoch:06d}"

    def _tidy(self) -> None:
        """Delete the checkpoints that are not kept, and point at the newest and the best."""
        parent = self._checkpoint.parent
        best = checkpoint.prune(parent, self.config.keep_checkpoints, self.config.keep_every)
        checkpoint.link(self.folder / "checkpoint", checkpoint.existing(parent)[-1])
        if best:
            checkpoint.link(self.folder / "best", best)

    def _fill(self, folder: Path | None) -> None:
        """The trained, the old and the averaged adapter in PEFT's format, and everything else in one file. A process
        without a folder writes nothing, and helps to put together what is sharded."""
        for adapter in ("default", "old"):
            self.policy.save_adapter(adapter, folder and folder / adapter)
        with self._averaged():
            self.policy.save_adapter("default", folder and folder / "ema")
        optimizer = self.optimizer.state_dict()
        for i, moments in optimizer["state"].items():
            together = ((name, whole(moment)) for name, moment in moments.items())
            optimizer["state"][i] = {name: moment.cpu() for name, moment in together if folder}
        if folder is None:
            return
        ema = {name: value for name, value in self.ema.state_dict().items() if name != "shadow_params"}
        state = {
            "optimizer": optimizer,
            "ema": ema,
            "alarms": self.alarms.state(),
            "epoch": self.epoch,
            "step": self.step,
        }
        torch.save(state, folder / "state.pt")

    def _load(self, folder: Path, about: dict[str, Any]) -> None:
        """Go on from a checkpoint, of which ``about`` is the manifest, and whose files have been verified."""
        # A name on the hub may have other weights by now, and a folder that was moved has the same.
        if about["pipeline"] != self.policy.fingerprint:
            raise ValueError(
                f"pipeline: got {self.config.pipeline}, whose weights are others than those that {self.folder} was "
                "trained with, accepted is a pipeline with the same"
            )
        self.changes = changes(about["surroundings"], self._surroundings)
        self.policy.load_adapter("default", folder / "ema")
        shadow = [parameter.detach().clone() for parameter in self.policy.trained]
        for adapter in ("default", "old"):
            self.policy.load_adapter(adapter, folder / adapter)
        self.policy.old_is_current = all(map(torch.equal, self.policy.trained, self.policy._old))
        with files.reading(folder / "state.pt", "checkpoint"):
            state = torch.load(folder / "state.pt", weights_only=True)
            for i, moments in state["optimizer"]["state"].items():
                parameter = self.policy.trained[i]
                moments |= {name: sharded_like(moments[name], parameter) for name in moments if name != "step"}
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict({**state["ema"], "shadow_params": shadow})
            self.alarms.load(state["alarms"])
        self.score = about["score"]
        if self.score is not None:
            # The state is older than the evaluation.
            self.alarms.evaluation(about["held_out"])
        self.epoch, self.step = state["epoch"], state["step"]

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and tell the tracker."""
        if self.processes.main:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": self.epoch, "step": self.step, **metrics}) + "\n")
            self.tracker.log(metrics, self.epoch)

    def _forget_later(self, logged: list[dict[str, Any]]) -> None:
        """Drop what a killed process logged after its last checkpoint: it comes again."""
        kept = []
        for values in logged:
            again = self.evaluation_due and values["epoch"] == self.epoch and "eval_strict" in values
            if values["epoch"] <= self.epoch and self.epoch > 0 and not again:
                kept.append(json.dumps(values) + "\n")
        files.replace_text(self.folder / "metrics.jsonl", "".join(kept))

    def train(
        self,
        on_epoch: Callable[[dict[str, Any]], None] = lambda metrics: None,
        on_eval: Callable[[int, Tensor, list[str]], None] = lambda epoch, pictures, prompts: None,
    ) -> None:
        """Run to the last epoch, and let other processes into the folder. On an interrupt the finished epochs are kept:
        the checkpoint is of the last one, or of the last that ``save_every`` has one for.

        Args:
            on_epoch: told every epoch's and every evaluation's metrics, after they are logged and what is due is saved.
            on_eval: told epoch, pictures (B, H, W, 3) and prompts of every evaluation, before it is saved.

        Raises:
            AlarmError: what cannot or can no longer be trained.
            ConfigError, OSError, RewardError: prompts or rewards of a later stage that cannot be had, or a reward that
                fails.
            CheckpointError: a checkpoint that cannot be written.
            FileExistsError: another process has the folder since.
        """
        if self.processes.main:
            # Once more where an interrupt has ended it.
            files.lock(self.folder)
        try:
            self._train(on_epoch, on_eval)
        finally:
            self.tracker.finish()
            if self.processes.main:
                files.unlock(self.folder)

    def _train(
        self, on_epoch: Callable[[dict[str, Any]], None], on_eval: Callable[[int, Tensor, list[str]], None]
    ) -> None:
        if self.epoch == 0 and self.config.preflight:
            preflight(self)
        if self.evaluation_due:
            on_epoch(self._evaluate(on_eval))
        while self.epoch < self.config.epochs:
            if self.config.at(self.epoch) is not self.stage:
                self.task.close()
                self._enter_stage(self.epoch)
            self.score = None
            begin = time.perf_counter()
            data = self.sample()
            metrics = self.optimize(data) | data["measured"]
            metrics |= {"seconds": time.perf_counter() - begin}
            metrics["alarms"] = self.alarms.epoch(metrics)
            self.log(metrics)
            if self.evaluation_due or self.epoch % self.config.save_every == 0:
                self.save()
            held_out = self._evaluate(on_eval) if self.evaluation_due else None
            on_epoch(metrics)
            if held_out is not None:
                on_epoch(held_out)

    def close(self) -> None:
        """Stop the processes of the task's rewards, after which nothing is scored any more."""
        self.task.close()
        if self.processes.main:
            files.unlock(self.folder)

    @property
    def evaluation_due(self) -> bool:
        """Whether the weights as they are shall be evaluated and have not been."""
        c = self.config
        return self.score is None and (self.epoch % c.eval_every == 0 or self.epoch == c.epochs)

    def _evaluate(self, on_eval: Callable[[int, Tensor, list[str]], None]) -> dict[str, Any]:
        """Evaluate, compare with the last time, log, and tell the checkpoint, after which it is not done again."""
        self._seed("held-out rewards")
        scores, pictures, prompts = self.evaluate()
        on_eval(self.epoch, pictures, prompts)
        self.tracker.pictures(pictures, self.epoch)
        self.score = scores["eval_strict"]
        watched = ["strict", *(f"reward_{name}" for name, weight in self.task.weights.items() if not weight)]
        held_out = {name: (scores[f"eval_{name}"], scores[f"eval_{name}_std"]) for name in watched}
        metrics = {**scores, "alarms": self.alarms.evaluation(held_out, int(scores["nonfinite_scores"]))}
        self.log(metrics)
        if self.processes.main and self.epoch:
            checkpoint.amend(self._checkpoint, score=self.score, held_out=held_out)
            self._tidy()
        return metrics
