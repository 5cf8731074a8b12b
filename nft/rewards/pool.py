"""Scoring beside sampling: batches are handed over as they are drawn, and the scores collected at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import registry
from .base import Metadata, Reward, RewardError, Scored, join, score, validate

_TRIES = 3
_MOST_WORKERS = 256


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run.

    Args:
        reward: a name of the registry, ``module:attribute``, or ``http://host:port/name`` on a reward server.
        weight: its share in the combination; one of 0 is only watched.
        device: for rewards that use one; the run's own by default. A device of its own overlaps with sampling.
        workers: processes of a CPU reward, or requests under way to a server, at most 256; a reward on a device has
            one worker.
        options: the reward's own, such as ``{quality: 80}``; with JSON's types.
    """

    reward: str
    weight: float = 1.0
    device: str | None = None
    workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, kind in (("reward", str), ("device", str | None), ("workers", int), ("options", dict)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{key}: got {value!r}, accepted is {getattr(kind, '__name__', kind)}")
        if not 1 <= self.workers <= _MOST_WORKERS:
            raise ValueError(f"workers: got {self.workers}, accepted are 1 to {_MOST_WORKERS}")


def end_with_parent() -> None:
    """Have this process end with the one that started it, even if that is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@cache
def _in_this_process(name: str, options: str) -> Reward:
    torch.set_num_threads(1)
    return registry.load(name, json.loads(options))


def _prepare(name: str, options: str) -> None:
    _in_this_process(name, options)


def _score_here(name: str, options: str, pictures: Any, prompts: list[str], metadata: Metadata) -> dict[str, Any]:
    reward = _in_this_process(name, options)
    scored = score(reward, torch.from_numpy(pictures), prompts, metadata, all_finite=False)
    return {"score": scored.score.numpy(), "details": {name: v.numpy() for name, v in scored.details.items()}}


class _Processes:
    """A reward in processes of its own, which are made anew when one dies."""

    def __init__(self, spec: RewardSpec):
        self.spec, self.options = spec, json.dumps(spec.options)
        self.lock = threading.Lock()
        self.closed = False
        self.pool = self._start()
        try:
            for future in [self._submit(self.pool, _prepare) for _ in range(spec.workers)]:
                future.result()
        except BaseException:
            self.close()
            raise

    def _start(self) -> ProcessPoolExecutor:
        # Forking a process that has threads and CUDA is not safe.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.spec.workers, mp_context=context, initializer=end_with_parent)

    def _submit(self, pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Future[Any]:
        # Ctrl-C is the caller's to handle: a process that is started for this never sees it, not even as it imports.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(function, self.spec.reward, self.options, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        for _ in range(_TRIES):
            with self.lock:
                pool = self.pool
            try:
                found = self._submit(pool, _score_here, pictures.numpy(), prompts, metadata).result()
            except BrokenProcessPool:
                with self.lock:
                    if self.closed:
                        break
                    if self.pool is pool:
                        self.pool = self._start()
                continue
            details = {name: torch.from_numpy(values) for name, values in found["details"].items()}
            return Scored(torch.from_numpy(found["score"]), details)
        why = "it was stopped" if self.closed else f"its process died in {_TRIES} tries"
        raise RewardError(f"reward {self.spec.reward}: {why}")

    def close(self) -> None:
        with self.lock:
            self.closed, pool = True, self.pool
        # One that hangs would be waited for, here and at the end of Python.
        for process in [*(pool._processes or {}).values()]:
            process.kill()
        pool.shutdown(cancel_futures=True)


class _Here:
    """A reward in this process, for those that wait for a device or a server."""

    def __init__(self, spec: RewardSpec, device: str):
        self.reward: Any = registry.load(spec.reward, spec.options, device=spec.device or device)

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        return score(self.reward, pictures, prompts, metadata, all_finite=False)

    def close(self) -> None:
        # Its model leaves the device now, and not once the next stage's has come there as well.
        self.reward = None


@dataclass
class _Batch:
    pictures: Tensor | None
    prompts: list[str]
    metadata: Metadata
    running: int = 0
    scores: dict[str, Scored] = field(default_factory=dict)


class Scorer:
    """Scores batches with several rewards at once while the caller goes on.

    ``submit`` hands over a batch and returns at once, or waits while ``max_pending`` batches are being scored;
    ``gather`` waits for the rest and returns every reward's scores in the order of submission. What has no score yet
    is kept: after an error ``gather`` may be called again and scores only what is missing.
    """

    def __init__(self, rewards: Mapping[str, RewardSpec], *, device: str = "cpu", max_pending: int = 8):
        """Load all rewards and start their workers.

        Args:
            rewards: by the name their scores come back under.
            device: of rewards that use one and whose spec names none.
            max_pending: batches whose scoring is under way; more wait.

        Raises:
            ValueError: no rewards, or a ``max_pending`` that is not positive.
            RewardError: a reward that cannot be loaded, named; those before it are stopped again.
        """
        if not rewards or max_pending < 1:
            label, got = ("max_pending", max_pending) if rewards else ("rewards", "none")
            raise ValueError(f"{label}: got {got}, accepted is at least one")
        self._workers: dict[str, Any] = {}
        self.judges: dict[str, Reward | type[Reward]] = {}
        """What knows the needs of each reward: itself, or its class."""
        self._threads: dict[str, ThreadPoolExecutor] = {}
        try:
            for name, spec in rewards.items():
                self._load(name, spec, device)
        except BaseException:
            self.close()
            raise
        self._batches: list[_Batch] = []
        self._errors: dict[str, Exception] = {}
        self._changed = threading.Condition()
        self._max_pending = max_pending

    def _load(self, name: str, spec: RewardSpec, device: str) -> None:
        try:
            kind = None if spec.reward.startswith(registry.REMOTE) else registry.find(spec.reward)
            if kind is None or kind.threaded or kind.uses_device:
                worker = self._workers[name] = _Here(spec, device)
                # What a server's reward needs is known by its instance only.
                self.judges[name] = worker.reward
                # Two calls at a time of a model on one device would only share it.
                count = 1 if kind is not None and kind.uses_device else spec.workers
            else:
                self._workers[name], self.judges[name] = _Processes(spec), kind
                # A process finds the next call at hand: this one, busy drawing, is slow to hand it over.
                count = spec.workers + 1
            self._threads[name] = ThreadPoolExecutor(count, thread_name_prefix=f"reward-{name}")
        except Exception as error:
            raise RewardError(f"reward {name}: {error}") from error

    def submit(self, pictures: Tensor, entries: Metadata) -> None:
        """Hand over uint8 pictures (B, H, W, 3) and their entries, each with a ``prompt``.

        Raises:
            TypeError, ValueError: a batch that cannot be scored, which is not taken.
        """
        for i, entry in enumerate(entries):
            if "prompt" not in entry:
                raise ValueError(f"entries: entry {i} lacks prompt")
        prompts = [entry["prompt"] for entry in entries]
        for judge in self.judges.values():
            validate(judge, pictures, prompts, entries)
        # The caller may draw its next pictures into the same memory.
        batch = _Batch(pictures.to("cpu", copy=True), prompts, list(entries))
        with self._changed:
            self._changed.wait_for(lambda: sum(b.running > 0 for b in self._batches) < self._max_pending)
            self._batches.append(batch)
            for name in self._workers:
                # A reward that failed gets its next chance in gather.
                if name not in self._errors:
                    self._send(batch, name)

    def _send(self, batch: _Batch, name: str) -> None:
        batch.running += 1
        future = self._threads[name].submit(self._score, batch, name)
        future.add_done_callback(partial(self._finished, batch, name))

    def _score(self, batch: _Batch, name: str) -> Scored:
        # What waits behind a failure would only wait for the same server again.
        if name in self._errors:
            raise RewardError(f"{name}: a batch before this one has failed")
        return self._workers[name](batch.pictures, batch.prompts, batch.metadata)

    def _finished(self, batch: _Batch, name: str, future: Future[Scored]) -> None:
        with self._changed:
            batch.running -= 1
            error = None if future.cancelled() else future.exception()
            if error is not None:
                self._errors.setdefault(name, error if isinstance(error, Exception) else RewardError(repr(error)))
            elif not future.cancelled():
                batch.scores[name] = future.result()
            if len(batch.scores) == len(self._workers):
                batch.pictures = None
            self._changed.notify_all()

    def gather(self) -> dict[str, Scored]:
        """Scores of all batches by reward, in the order of submission; the scorer is empty afterwards. Some may be NaN
        or infinite.

        Raises:
            ValueError: nothing was submitted.
            RewardError: a reward failed, named. Nothing is lost: call again to score what is missing.
        """
        with self._changed:
            if not self._batches:
                raise ValueError("gather: nothing was submitted")
            self._changed.wait_for(lambda: not any(b.running for b in self._batches))
            retried, self._errors = set(self._errors), {}
            for batch in self._batches:
                for name in retried - set(batch.scores):
                    self._send(batch, name)
            self._changed.wait_for(lambda: not any(b.running for b in self._batches))
            if self._errors:
                name, error = next(iter(self._errors.items()))
                done = sum(name in b.scores for b in self._batches)
                kept = f"{done} of {len(self._batches)} batches are scored"
                raise RewardError(f"reward {name}: {error} ({kept})") from error
            found = {name: join(name, [batch.scores[name] for batch in self._batches]) for name in self._workers}
            self._batches = []
        return found

    def close(self) -> None:
        """Stop all workers, at once where they have processes of their own, and let go of all rewards."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.close()
        for threads in self._threads.values():
            threads.shutdown()
        self.judges.clear()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
