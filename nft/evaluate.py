"""Evaluation of a checkpoint: pinned prompts, seeds and solver; a table with intervals and paired tests.

Everything is kept in one folder: ``settings.json``, ``pictures``, ``scores`` and ``results.json``. An evaluation that
was interrupted goes on where it stopped, and only with the settings that it began with. Several processes share the
drawing; the first one scores.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import bootstrap, permutation_test
from torch import Tensor

from .data import geneval, prompts
from .data.prompts import Entry
from .data.text import parse_json
from .distributed import Processes
from .files import check_folder, check_vacant, reading, replace_text, save_picture
from .rewards import registry
from .rewards.base import RewardError, check_entries, score
from .rewards.ocr import OCR
from .statistics import holm

Draw = Callable[[list[str], list[int]], Tensor]
"""Pictures (B, H, W, 3) uint8 of prompts and their seeds."""
Options = Mapping[str, Mapping[str, Any]]
"""The rewards' own options by reward, with JSON's types."""

_RESAMPLES = 9999


@dataclass(frozen=True)
class Column:
    """One figure of the table: the mean of a reward's score, or of one of its details, times ``scale``."""

    title: str
    prompts: str
    reward: str
    value: str = "score"
    scale: float = 1.0


@dataclass(frozen=True)
class Suite:
    """What is evaluated and how; ``published`` are figures of others by row and title, ``source`` says whose."""

    config: str
    columns: tuple[Column, ...]
    prompts: Mapping[str, Callable[[], list[Entry]]]
    solver: str = "euler"
    steps: int = 40
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""


_TITLES = ("GenEval", "OCR", "PickScore", "ClipScore", "HPSv2.1", "Aesthetic", "ImgRwd", "UniRwd")
_TABLE_1 = {
    row: dict(zip(_TITLES, values, strict=True))
    for row, values in {
        "SD-XL": (0.55, 0.14, 22.42, 0.287, 0.280, 5.60, 0.76, 2.93),
        "SD3.5-L": (0.71, 0.68, 22.91, 0.289, 0.288, 5.50, 0.96, 3.25),
        "FLUX.1-Dev": (0.66, 0.59, 22.84, 0.295, 0.274, 5.71, 0.96, 3.27),
        "SD3.5-M, no guidance": (0.24, 0.12, 20.51, 0.237, 0.204, 5.13, -0.58, 2.02),
        "SD3.5-M, guidance": (0.63, 0.59, 22.34, 0.285, 0.279, 5.36, 0.85, 3.03),
        "FlowGRPO on GenEval": (0.95, 0.66, 22.51, 0.293, 0.274, 5.32, 1.06, 3.18),
        "FlowGRPO on OCR": (0.66, 0.92, 22.41, 0.290, 0.280, 5.32, 0.95, 3.15),
        "FlowGRPO on PickScore": (0.54, 0.68, 23.50, 0.280, 0.316, 5.90, 1.29, 3.37),
        "DiffusionNFT": (0.94, 0.91, 23.80, 0.293, 0.331, 6.01, 1.49, 3.49),
    }.items()
}

SUITES = {
    "paper": Suite(
        config="sd35_geneval",
        columns=(
            Column("GenEval", "geneval", "geneval", "correct"),
            Column("OCR", "ocr", "ocr"),
            Column("PickScore", "drawbench", "pickscore", "pickscore"),
            Column("ClipScore", "drawbench", "clipscore"),
            Column("HPSv2.1", "drawbench", "hpsv2"),
            Column("Aesthetic", "drawbench", "aesthetic"),
            Column("ImgRwd", "drawbench", "imagereward"),
            Column("UniRwd", "drawbench", "unifiedreward", scale=5.0),
        ),
        prompts={
            "geneval": lambda: prompts.benchmark("geneval"),
            "ocr": lambda: prompts.benchmark("ocr"),
            "drawbench": lambda: prompts.benchmark("preference"),
        },
        published=_TABLE_1,
        source="arXiv 2509.16117, Table 1; SD-XL and SD3.5-L at 1024 x 1024, the others at 512 x 512",
    ),
    "shapes": Suite(
        config="shapes",
        columns=(
            Column("GenEval", "shapes", "shapes", "correct"),
            Column("Strict", "shapes", "shapes", "strict"),
            Column("JPEG kB", "shapes", "jpeg", "kilobytes"),
        ),
        prompts={"shapes": lambda: prompts.held_out("shapes", 40)},
    ),
}


def _read_ocr(path: Path) -> list[Entry]:
    entries = prompts.read(path)
    check_entries(OCR, entries, f"prompts: {path}")
    return entries


_READERS: dict[str, Callable[[Path], list[Entry]]] = {"geneval": geneval.read, "ocr": _read_ocr}


def read_settings(folder: Path, key: str) -> dict[str, Any]:
    """The settings that a folder's evaluation was begun with.

    Raises:
        OSError: a folder without any.
        ValueError: a file that is not what ``Evaluation`` writes; ``key`` is what the message calls the folder.
    """
    path = folder / "settings.json"
    try:
        settings = parse_json(path.read_text())
        if not isinstance(settings["subject"], str):
            raise TypeError
    except OSError as error:
        raise type(error)(f"{key}: {path} cannot be read: {error.strerror}; give the folder of an evaluation") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{key}: {path} is damaged, accepted is the folder of an evaluation") from None
    return settings


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} is {there.get(key, 'not set')!r} there and {here.get(key, 'not set')!r} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    )


def _spec(reward: str, options: Options | None) -> dict[str, Any]:
    """What scores in a reward's place, and its options."""
    spec = {"reward": reward, **(options or {}).get(reward, {})}
    if not isinstance(spec["reward"], str):
        raise ValueError(f"{reward}.reward: got {spec['reward']!r}, accepted is a reward's name or address")
    return spec


def _target(judged_by: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return judged_by["reward"], {key: value for key, value in judged_by.items() if key != "reward"}


class Evaluation:
    """One checkpoint on one suite in one folder."""

    def __init__(
        self,
        suite: str,
        folder: Path,
        *,
        subject: str,
        sampling: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        limit: int | None = None,
        per_prompt: int = 1,
        key: str = "output",
    ):
        """Open a folder that was begun with the same settings, or one that is written to when drawing begins.

        Args:
            suite: a name in ``SUITES``.
            folder: where everything is kept.
            subject: what is evaluated, such as the checkpoint's path; part of the settings.
            sampling: whatever else the pictures depend on, such as resolution and dtype, with JSON's types; part of
                the settings.
            files: prompt files that replace the suite's sets, by set; for ``geneval`` the benchmark's own
                ``evaluation_metadata.jsonl``.
            limit: prompts of each set and task group, all by default.
            per_prompt: pictures of each prompt, whose scores are averaged.
            key: what messages call the folder.

        Raises:
            OSError, ValueError: an unknown suite or set, a file that cannot be read, or a folder of other settings.
        """
        if suite not in SUITES:
            raise ValueError(f"suite: got {suite!r}, accepted are {', '.join(SUITES)}")
        check_folder(folder)
        check_vacant(folder, ("metrics.jsonl",))
        if per_prompt < 1:
            raise ValueError(f"per_prompt: got {per_prompt}, accepted are positive numbers")
        self.suite, self.folder, self.per_prompt, self.key = SUITES[suite], folder, per_prompt, key
        unknown = sorted(set(files or {}) - set(self.suite.prompts))
        if unknown:
            raise ValueError(f"prompts: got {', '.join(unknown)}, accepted are {', '.join(self.suite.prompts)}")
        self.entries: dict[str, list[Entry]] = {}
        self.left_out: dict[str, str] = {}
        files = files or {}
        self.generated = [name for name in self.suite.prompts if name not in files]
        for name, make in self.suite.prompts.items():
            found = _READERS.get(name, prompts.read)(files[name]) if name in files else make()
            seen: dict[str, int] = {}
            for entry in found:
                seen[entry["tag"]] = seen.get(entry["tag"], 0) + 1
                if limit is None or seen[entry["tag"]] <= limit:
                    self.entries.setdefault(name, []).append(entry)
        digest = hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()
        self.settings = {
            "suite": suite,
            "subject": subject,
            "solver": self.suite.solver,
            "steps": self.suite.steps,
            "pictures_per_prompt": self.per_prompt,
            "prompts_sha256": digest,
            **(sampling or {}),
        }
        if (folder / "settings.json").exists():
            self._compare()

    def _begin(self) -> None:
        """Write the settings, which nothing was refused for, and from now on all others are."""
        path = self.folder / "settings.json"
        if not path.exists():
            replace_text(path, json.dumps(self.settings, indent=1))
        self._compare()

    def _compare(self) -> None:
        begun = read_settings(self.folder, self.key)
        if begun != self.settings:
            apart = _differences(begun, self.settings)
            if begun.get("prompts_sha256") != self.settings["prompts_sha256"]:
                apart += ", of the prompts that --prompts and --limit choose"
            raise ValueError(
                f"{self.key}: {self.folder} holds an evaluation with other settings: {apart}; give another folder"
            )

    def _jobs(self, name: str) -> list[tuple[Entry, int, Path]]:
        """Every picture's entry, seed and file; a seed belongs to its place in the set."""
        per_prompt = self.per_prompt
        return [
            (entry, i * per_prompt + j, self.folder / "pictures" / name / f"{i:05d}_{j}.png")
            for i, entry in enumerate(self.entries[name])
            for j in range(per_prompt)
        ]

    def missing(self) -> list[tuple[Entry, int, Path]]:
        """Entry, seed and file of every picture that is not there yet."""
        return [job for name in self.entries for job in self._jobs(name) if not job[2].exists()]

    def draw(
        self,
        draw: Draw,
        batch: int,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
        processes: Processes | None = None,
    ) -> None:
        """Draw this process' share of the pictures that are not there yet, ``batch`` at a time, and tell how many of it
        are done. Returns when all processes are.

        Raises:
            ValueError: a folder that another evaluation has begun in the meantime.
        """
        self._begin()
        processes = processes or Processes("cpu")
        missing = self.missing()
        # None begins before all have seen what is missing.
        processes.wait()
        own = missing[processes.share(len(missing))]
        for step in range(processes.rounds(len(missing), batch)):
            part = own[step * batch : (step + 1) * batch]
            # A process that has none left still has to bring its part of sharded weights to the others.
            drawn = part or missing[:1]
            pictures = draw([entry["prompt"] for entry, _, _ in drawn], [seed for _, seed, _ in drawn]).cpu()
            for picture, (_, _, path) in zip(pictures[: len(part)], part, strict=True):
                save_picture(picture, path)
            on_batch(min((step + 1) * batch, len(own)), len(own))
        processes.wait()

    def _wanted(self) -> list[tuple[str, str]]:
        """Prompt set and reward of the columns that are not left out."""
        return sorted({(c.prompts, c.reward) for c in self.suite.columns if c.title not in self.left_out})

    def check(self, options: Options | None = None, baseline: Evaluation | None = None) -> None:
        """Find out what keeps the pictures from being scored, before any is drawn.

        Args:
            options: see ``score``.
            baseline: see ``results``.

        Raises:
            ValueError: an unknown reward or option, a value that it refuses, prompts without what a reward needs,
                pictures, of the baseline as well, that were scored with other options before, or a baseline without
                the scores of any column.
        """
        if baseline is not None and all(baseline.column(column) is None for column in self.suite.columns):
            titles = ", ".join(column.title for column in self.suite.columns)
            raise ValueError(
                f"baseline: {baseline.folder} has no scores of {titles}; accepted is the folder of an evaluation that "
                "has them of at least one"
            )
        for name, reward in self._wanted():
            judged_by = _spec(reward, options)
            self._check_spec(name, reward, judged_by)
            if baseline is not None:
                baseline._check_spec(name, reward, judged_by)
            if len(self.read_scores(name, reward)) == len(self._jobs(name)):
                continue
            target, own = _target(judged_by)
            try:
                # What has a device is loaded after the policy is gone.
                judge = registry.examine(target, own, where=f"rewards.{reward}")
                if target.startswith(registry.REMOTE):
                    judge = registry.load(target, own, where=f"rewards.{reward}")
            except (RewardError, FileNotFoundError):
                # Its columns are left out, unless it can be had later.
                continue
            check_entries(judge, self.entries[name], f"prompts: {name}")

    def score(
        self,
        options: Options | None = None,
        *,
        device: str = "cpu",
        batch: int = 64,
        on_reward: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Score all pictures with every reward that can be had; the others' columns are left out with the reason.

        Args:
            options: the rewards' own options by reward; ``reward`` replaces the reward itself, for example with the
                address of one on a reward server.
            device: of rewards that use one.
            batch: pictures that are scored and then written at a time.
            on_reward: told of each reward before it is loaded.

        Raises:
            ValueError: see ``check`` and ``draw``.
        """
        self._begin()
        with (self.folder / "scores.lock").open("w") as lock:
            # What another command in this folder is scoring is waited for, and not scored twice.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name, reward in self._wanted():
                on_reward(reward)
                try:
                    self._score(name, reward, _spec(reward, options), device, batch)
                except (RewardError, FileNotFoundError) as error:
                    titles = [c.title for c in self.suite.columns if (c.prompts, c.reward) == (name, reward)]
                    self.left_out |= dict.fromkeys(titles, str(error))

    def _scores_path(self, name: str, reward: str) -> Path:
        return self.folder / "scores" / f"{name}_{reward}.jsonl"

    def read_scores(self, name: str, reward: str) -> list[dict[str, Any]]:
        """Lines of one reward on one prompt set, one for each picture in their order. One that was cut off or is not of
        its picture does not count, nor do those after it."""
        path = self._scores_path(name, reward)
        found: list[dict[str, Any]] = []
        texts = path.read_text().splitlines() if path.exists() else []
        for text, (_, _, picture) in zip(texts, self._jobs(name), strict=False):
            try:
                line = parse_json(text)
            except ValueError:
                break
            if not isinstance(line, dict) or line.get("picture") != picture.name:
                break
            found.append(line)
        return found

    def _judged_by(self, name: str, reward: str) -> dict[str, Any]:
        """What made the scores that are there."""
        path = self._scores_path(name, reward).with_suffix(".json")
        with reading(path, self.key):
            return dict(json.loads(path.read_text()))

    def _check_spec(self, name: str, reward: str, judged_by: dict[str, Any]) -> None:
        """Whether the scores that are there, if any, are by this reward with these options."""
        if self.read_scores(name, reward):
            before = self._judged_by(name, reward)
            if before != judged_by:
                raise ValueError(
                    f"{self.key}: {self._scores_path(name, reward)} holds scores of {reward} with other options: "
                    f"{_differences(before, judged_by)}; delete it or give another folder"
                )

    def _score(self, name: str, reward: str, judged_by: dict[str, Any], device: str, batch: int) -> None:
        self._check_spec(name, reward, judged_by)
        jobs, lines, path = self._jobs(name), self.read_scores(name, reward), self._scores_path(name, reward)
        if len(lines) == len(jobs):
            return
        target, own = _target(judged_by)
        judge = registry.load(target, own, device=device, where=f"rewards.{reward}")
        replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        replace_text(path.with_suffix(".json"), json.dumps(judged_by))
        for start in range(len(lines), len(jobs), batch):
            part = jobs[start : start + batch]
            pictures = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for _, _, file in part]))
            scored = score(judge, pictures, [entry["prompt"] for entry, _, _ in part], [entry for entry, _, _ in part])
            with path.open("a") as file:
                for i, (entry, seed, picture) in enumerate(part):
                    values = {"score": scored.score[i].item()} | {k: v[i].item() for k, v in scored.details.items()}
                    line = {"picture": picture.name, "seed": seed, "tag": entry["tag"], "prompt": entry["prompt"]}
                    file.write(json.dumps(values | line) + "\n")

    def column(self, column: Column) -> dict[str, np.ndarray] | None:
        """One value per prompt, the mean of its pictures, by task group; None where it was left out."""
        if column.title in self.left_out:
            return None
        lines = self.read_scores(column.prompts, column.reward)
        if len(lines) != len(self._jobs(column.prompts)):
            return None
        if not all(column.value in line for line in lines):
            judge = self._judged_by(column.prompts, column.reward)["reward"]
            self.left_out[column.title] = f"reward {judge} gives no detail {column.value}"
            return None
        values = column.scale * np.array([line[column.value] for line in lines])
        per_prompt = values.reshape(-1, self.per_prompt).mean(1)
        tags = [entry["tag"] for entry in self.entries[column.prompts]]
        return {tag: per_prompt[[t == tag for t in tags]] for tag in dict.fromkeys(tags)}

    def results(self, baseline: Evaluation | None = None) -> dict[str, dict[str, Any]]:
        """Every column's mean, interval, pictures whose detail ``answered`` is 0, if any, and, beside a baseline on the
        same prompts, difference and p, also after Holm's correction for as many columns; written to ``results.json``
        too.

        Raises:
            ValueError: a baseline on other prompts or of other rewards.
        """
        found: dict[str, dict[str, Any]] = {}
        for column in self.suite.columns:
            groups = self.column(column)
            if groups is None:
                found[column.title] = {"left_out": self.left_out.get(column.title, "not scored yet")}
                continue
            found[column.title] = summary(groups)
            lines = self.read_scores(column.prompts, column.reward)
            if unanswered := sum(line.get("answered", 1) == 0 for line in lines):
                found[column.title]["unanswered"] = unanswered
            if baseline is not None and (other := baseline.column(column)) is not None:
                where = column.prompts, column.reward
                baseline._check_spec(*where, self._judged_by(*where))
                found[column.title] |= comparison(groups, other)
        tested = [result for result in found.values() if "p" in result]
        for result, p in zip(tested, holm([result["p"] for result in tested]), strict=True):
            result["p_holm"] = p
        replace_text(self.folder / "results.json", json.dumps(found, indent=1))
        return found


def summary(groups: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean over task groups of their means over prompts, with a 95% bootstrap interval of prompts drawn within their
    groups (percentile, 9999 resamples); no interval where a group has one prompt only."""
    samples = list(groups.values())

    def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    found: dict[str, Any] = {"mean": float(statistic(*samples)), "prompts": sum(map(len, samples))}
    found["groups"] = {tag: float(values.mean()) for tag, values in groups.items()}
    if min(map(len, samples)) > 1:
        drawn = bootstrap(samples, statistic, n_resamples=_RESAMPLES, method="percentile", batch=100, rng=0)
        found["low"], found["high"] = map(float, drawn.confidence_interval)
    return found


def comparison(groups: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Difference to a baseline's mean and the two-sided p of a paired permutation test over prompts; no p where
    there is one prompt only.

    Raises:
        ValueError: values of other prompts.
    """
    if {tag: len(v) for tag, v in groups.items()} != {tag: len(v) for tag, v in baseline.items()}:
        raise ValueError("baseline: got other prompts, accepted is an evaluation on the same ones")
    # Weights that make the sum over prompts the mean over groups of their means.
    weights = [np.full(len(v), 1 / (len(groups) * len(v))) for v in groups.values()]
    mine, theirs = (
        np.concatenate([w * side[tag] for w, tag in zip(weights, groups, strict=True)]) for side in (groups, baseline)
    )

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a - b).sum(axis=axis)

    if len(mine) < 2:
        return {"difference": float(statistic(mine, theirs))}
    test = permutation_test(
        (mine, theirs), statistic, permutation_type="samples", n_resamples=_RESAMPLES, vectorized=True, batch=100, rng=0
    )
    return {"difference": float(test.statistic), "p": float(test.pvalue)}
