"""Compare objectives: the same base, prompts and seeds, curves against cost, intervals and paired tests.

A comparison is a folder: ``runs/METHOD/seed-N`` are ordinary runs, each with a ``result.json`` once it is finished,
as are ``tuning/METHOD/RATE``; ``base`` is a run that is evaluated and not trained.
``compare.json``, ``curves.png`` and ``compare.md`` say what came out. An interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from scipy.stats import ttest_1samp, ttest_rel

from nft_kernels.provenance import provenance

from . import plugins, tasks
from .config import Config, load_config
from .console import quieten_libraries
from .files import check_folder, check_vacant, read_metrics, reading, replace_text
from .objectives import unread
from .plan import evaluations
from .policy import examine
from .rewards.pool import end_with_parent
from .statistics import holm
from .tracking import Tracker

COSTS = {
    "seconds": "seconds of rollout, rewards and training",
    "steps": "optimizer steps",
    "evaluations": "evaluations of the denoiser",
    "pictures": "pictures",
}
"""What the held-out score is plotted against."""
_RESAMPLES = 9999
_POINTS = 50
_TUNING_SEED = 1000
"""No run that is compared has it."""

Method = tuple[str, tuple[str, ...]]
"""A configuration's name and ``key=value`` changes to it."""


@dataclass(frozen=True)
class Suite:
    """Methods by name, of which the first is what the others are compared with; ``ablations`` are changes to it."""

    methods: Mapping[str, Method]
    ablations: Mapping[str, Method]
    solvers: tuple[str, ...]
    """For the evaluation at the end; no method's rollout uses them."""
    quick: tuple[str, ...]
    """Methods of ``--quick``."""
    rates: tuple[float, ...]
    """Learning rates that are tried by ``tune``."""


def _shapes() -> Suite:
    baselines = ("sft", "rwr", "flow_grpo", "flow_grpo_fast", "mix_grpo", "dance_grpo", "awm", "v_grpo")
    strategies = ("explore", "filter")
    changes = {
        "no_negative_branch": "objective=positive",
        "rollout_sde": "rollout_solver=flow-sde",
        "rollout_first_order": "rollout_solver=euler",
        "weighting_none": "weighting=none",
        # Of the velocity's error these are w = t and 1 - t.
        "weighting_t": "weighting=1/t",
        "weighting_1-t": "weighting=(1-t)/t2",
        "old_copy": "old_policy=copy",
        "old_delayed": "old_policy=delayed_0.999",
        "beta_0.1": "beta=0.1",
        "beta_10": "beta=10.0",
        "adv_clip_max_1": "adv_clip_max=1.0",
        "adv_clip_max_2": "adv_clip_max=2.0",
        # As many pictures as before.
        "group_size_6": "group_size=6 prompts_per_epoch=48",
        "group_size_24": "group_size=24 prompts_per_epoch=12",
        "kl_1e-4": "kl_weight=1e-4",
        "kl_1e-2": "kl_weight=1e-2",
        "timesteps_1": "timesteps_per_sample=1",
        "timesteps_9": "timesteps_per_sample=9",
    }
    base: Method = ("shapes", ())
    return Suite(
        methods={"nft": base, **{name: (f"shapes_{name}", ()) for name in (*baselines, *strategies)}},
        ablations={
            "nft": base,
            **{name: ("shapes", tuple(change.split())) for name, change in changes.items()},
            **{name: (f"shapes_{name}", ()) for name in strategies},
        },
        solvers=("unipc", "deis", "dpm++3M"),
        quick=("nft", "rwr", "flow_grpo"),
        rates=(1e-3, 3e-3, 1e-2),
    )


SUITES = {"shapes": _shapes}


# Statistics: plain functions of arrays in which a row is a seed.


def time_to(costs: np.ndarray, scores: np.ndarray, target: float) -> float:
    """Cost (E,) at which the score (E,) first reaches ``target``, linearly between evaluations; infinite if never."""
    reached = np.flatnonzero(scores >= target)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(costs[0])
    share = (target - scores[i - 1]) / (scores[i] - scores[i - 1])
    return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))


def ratio_of_medians(times: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """median(times) / median(baseline) of (S,) costs of the same seeds, with a 95% bootstrap interval of seeds drawn in
    pairs (percentile, 9999 resamples). A seed that never got there is infinite, and so may be the ratio or a bound;
    where a resample has no ratio, as both medians are infinite, or 0, there is no interval, and its bounds are NaN."""
    draws = np.random.default_rng(0).integers(len(times), size=(_RESAMPLES, len(times)))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.median(times[draws], axis=1) / np.median(baseline[draws], axis=1)
        ratio = np.median(times) / np.median(baseline)
    # An order statistic, as nothing lies between a number and infinity.
    low, high = np.quantile(ratios, (0.025, 0.975), method="inverted_cdf")
    return {"ratio": float(ratio), "low": float(low), "high": float(high)}


def of_another_seed(scores: np.ndarray) -> list[float]:
    """The interval in which one more seed's score falls with a probability of 95%, after (S,) normal ones."""
    if len(scores) < 2:
        return [math.nan, math.nan]
    width = student.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) * math.sqrt(1 + 1 / len(scores))
    return [float(scores.mean() - width), float(scores.mean() + width)]


def curve(costs: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Median and quartiles over seeds at 50 costs that every seed has reached, linearly between its evaluations."""
    grid = np.linspace(0, min(cost[-1] for cost in costs), _POINTS)
    rows = [np.interp(grid, cost, score) for cost, score in zip(costs, scores, strict=True)]
    low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0)
    return {"cost": grid.tolist(), "median": middle.tolist(), "low": low.tolist(), "high": high.tolist()}


# Runs.


class _Enough(Exception):
    """A run has had its minutes."""


def read_run(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """``score`` on held-out prompts at every evaluation of a run, and every one of ``COSTS`` at that point, (E,)."""
    spent = dict.fromkeys(COSTS, 0.0)
    points: list[list[float]] = []
    for line in read_metrics(folder):
        if "eval_strict" in line:
            points.append([*spent.values(), line["eval_strict"]])
        else:
            epoch = line["epoch"] - 1
            spent["seconds"] += line["seconds"]
            spent["steps"] = line["step"]
            spent["evaluations"] += sum(evaluations(config, epoch, line.get("filtered_groups", 0)))
            # Each is decoded and scored, a candidate as well.
            spent["pictures"] += config.at(epoch).pictures + config.at(epoch).candidates
    return dict(zip((*COSTS, "score"), np.array(points, dtype=float).T, strict=True))


@dataclass(frozen=True)
class Run:
    """A training run in a folder, and what it is evaluated with then. It ends with its epochs, with its minutes, or
    where the held-out score has reached ``until``."""

    folder: Path
    config: Config
    minutes: float | None = None
    until: float | None = None
    solvers: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Train, from the newest checkpoint if there is one, and write ``result.json``."""
        from .trainer import Trainer

        # A process of its own has imported nothing, and takes the settings as they were checked.
        plugins.load_all(self.config.plugins)
        saved = self.folder / "config.yaml"
        if saved.is_file() and saved.read_text(encoding="utf-8") != self.config.dump():
            raise ValueError(f"output: {self.folder} holds a run with other settings; give another folder")
        if (self.folder / "result.json").is_file():
            return
        trainer = Trainer(self.config, self.folder, resume=saved.is_file())
        # Read once and not at every epoch, with which it grows.
        lines = read_metrics(self.folder, required=False)

        def on_epoch(metrics: dict[str, Any]) -> None:
            lines.append(metrics)
            spent = sum(line.get("seconds", 0.0) for line in lines)
            reached = max(line.get("eval_strict", -math.inf) for line in lines)
            if spent >= 60 * (self.minutes or math.inf) or reached >= (math.inf if self.until is None else self.until):
                raise _Enough

        try:
            with suppress(_Enough):
                if trainer.epoch and not trainer.evaluation_due:
                    on_epoch({})
                trainer.train(on_epoch)
            result = {solver: trainer.evaluate(solver)[0] for solver in self.solvers}
        finally:
            trainer.close()
        replace_text(self.folder / "result.json", json.dumps(result, indent=1))


def _read_result(path: Path) -> dict[str, dict[str, float]]:
    """The held-out score of a run by solver."""
    with reading(path, "output"):
        found = json.loads(path.read_text())
        return {solver: {"eval_strict": float(scores["eval_strict"])} for solver, scores in found.items()}


def _base_scores(folder: Path, config: Config, solvers: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the untrained policy scores with each solver, from ``result.json`` if it is there."""
    from .trainer import Trainer

    path = folder / "result.json"
    if not path.is_file():
        trainer = Trainer(config, folder, resume=(folder / "config.yaml").is_file())
        try:
            scores = {solver: trainer.evaluate(solver)[0] for solver in solvers}
        finally:
            trainer.close()
        replace_text(path, json.dumps(scores, indent=1))
    return _read_result(path)


def _start_worker(threads: int) -> None:
    quieten_libraries()
    torch.set_num_threads(threads)
    # With a command that was killed: another may go on in the same folder.
    end_with_parent()


def _run_all(runs: Sequence[Run], jobs: int, on_run: Callable[[int, int], None]) -> None:
    """The runs in their order, ``jobs`` of them at once, each with its share of the cores."""
    on_run(0, len(runs))
    if jobs == 1:
        for done, run in enumerate(runs, 1):
            run()
            on_run(done, len(runs))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # A forked process would wait for ever for the threads of this one.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_start_worker, initargs=(threads,)) as pool:
        waiting = [pool.submit(run) for run in runs]
        try:
            for done, finished in enumerate(as_completed(waiting), 1):
                on_run(done, len(runs))
                finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tuning_score(folder: Path) -> float:
    """Mean strict score on training prompts over the last third of a run's epochs."""
    scores = [line["strict"] for line in read_metrics(folder) if "strict" in line]
    return float(np.mean(scores[-math.ceil(len(scores) / 3) :]))


def _check(
    suite: str, seeds: int, minutes: float | None, epochs: int | None, target: float | None, stop_at_target: bool
) -> None:
    """Raise ``ValueError`` for what no comparison can be made with."""
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, accepted are {', '.join(SUITES)}")
    if minutes is not None and epochs is not None:
        raise ValueError("minutes, epochs: got both, accepted is one of them")
    if stop_at_target and target is None:
        raise ValueError("stop_at_target: got no target, accepted is one with a target")
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, accepted are positive numbers")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes: got {minutes}, accepted are finite numbers above 0")
    if target is not None and not math.isfinite(target):
        raise ValueError(f"target: got {target}, accepted are finite numbers")


def _shared(
    methods: Mapping[str, Method], overrides: Sequence[str], given: Mapping[str, str | None]
) -> dict[str, list[str]]:
    """The overrides of each method, whose objective may not read all of them: those are for the others.

    Raises:
        ValueError: an override of what is ``given`` otherwise, or of what no method reads.
    """
    idle = {name: unread(load_config(base, [*changes]).objective) for name, (base, changes) in methods.items()}
    shared: dict[str, list[str]] = {name: [] for name in methods}
    for item in overrides:
        key = item.partition("=")[0]
        if given.get(key):
            raise ValueError(f"overrides: got {item}, accepted is none of {key}, which {given[key]} gives")
        readers = [name for name in methods if key not in idle[name]]
        if not readers:
            raise ValueError(f"overrides: got {item}, accepted is what one of {', '.join(methods)} reads")
        for name in readers:
            shared[name].append(item)
    return shared


def compare(
    suite: str,
    output: Path,
    *,
    objectives: Sequence[str] | None = None,
    ablations: bool = False,
    quick: bool = False,
    seeds: int | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    target: float | None = None,
    stop_at_target: bool = False,
    tune: bool = False,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Run what is missing of a comparison, and write what came out.

    Args:
        suite: a name in ``SUITES``.
        output: folder of the comparison.
        objectives: which methods of the suite, or which ablations; all by default. The first is always among them.
        ablations: compare the ablations of the first method in place of the methods.
        quick: a few methods, two seeds, 75 seconds of each run and few prompts, where nothing else is asked for.
        seeds: runs of each method, of the seeds 0, 1, ...; five by default.
        minutes: of training per run, without evaluations and checkpoints; by default a run is as long as its epochs.
        epochs: of every run, instead.
        target: held-out score for the time-to-target ratio; by default halfway from the base's score to the one that
            the first method ends with, medians over seeds.
        stop_at_target: end a run after the evaluation that reaches ``target``.
        tune: first try each of the suite's learning rates on every method, for the length of a run and with a seed of
            its own, and give the method the one that scores best on training prompts.
        jobs: runs at once, each with its share of the cores.
        overrides: ``key=value`` changes to all methods that read the key.
        on_run: told how many runs are done, and of how many.

    Returns:
        the path of the page.

    Raises:
        ValueError: an unknown suite or method, settings that cannot be used or would be overridden, or a folder of
            other settings or with damaged files.
        AlarmError, CheckpointError: a run that cannot go on.
    """
    if seeds is None:
        seeds = 2 if quick else 5
    _check(suite, seeds, minutes, epochs, target, stop_at_target)
    chosen = SUITES[suite]()
    known = chosen.ablations if ablations else chosen.methods
    first = next(iter(known))
    if quick:
        objectives = objectives or [*(known if ablations else chosen.quick)]
        minutes = 1.25 if minutes is None and epochs is None else minutes
        overrides = ("eval_every=2", "eval_prompts_per_group=10", *overrides)
    for name in objectives or ():
        if name not in known:
            raise ValueError(f"objectives: got {name!r}, accepted are {', '.join(known)}")
    if objectives is not None and len(set(objectives)) < len(objectives):
        raise ValueError(f"objectives: got {', '.join(objectives)}, accepted is each of them once")
    names = [name for name in known if objectives is None or name in objectives or name == first]
    given = {
        "seed": "seeds",
        "epochs": None if minutes is None and epochs is None else "minutes or epochs",
        "learning_rate": "tune" if tune else None,
    }
    shared = _shared({name: known[name] for name in names}, overrides, given)

    def config(name: str, *changes: str) -> Config:
        length = 10**6 if minutes is not None else epochs
        limits = [f"epochs={length}"] if length else []
        return load_config(known[name][0], [*known[name][1], *limits, *shared[name], *changes])

    until = target if stop_at_target else None
    settings = json.dumps({"suite": suite, "minutes": minutes, "until": until, "jobs": jobs})
    check_folder(output)
    # A run's and an evaluation's, which has settings.json as well.
    check_vacant(output, ("metrics.jsonl", "pictures"))
    path = output / "settings.json"
    # Of one that was refused before its first run nothing is left to mix with.
    if path.is_file() and path.read_text(encoding="utf-8") != settings and any(output.rglob("metrics.jsonl")):
        raise ValueError(f"output: {output} holds a comparison with other settings; give another folder")
    configs = {(name, seed): config(name, f"seed={seed}") for seed in range(seeds) for name in names}
    if not path.is_file():
        # What a method's first run would refuse as well, but after those of others.
        for each in (configs[name, 0] for name in names):
            examine(each)
            Tracker(each, output)
            for stage in each.all_stages():
                tasks.check(stage)
    replace_text(path, settings)
    tuning: dict[str, dict[str, float]] = {}
    if tune:
        cheap = ["eval_every=1000000", "eval_prompts_per_group=1", f"seed={_TUNING_SEED}"]
        trials = [
            Run(output / "tuning" / name / f"{rate:g}", config(name, *cheap, f"learning_rate={rate}"), minutes)
            for name in names
            for rate in chosen.rates
        ]
        _run_all(trials, jobs, on_run)
        for run in trials:
            tuning.setdefault(run.folder.parent.name, {})[run.folder.name] = tuning_score(run.folder)
        best = {name: max(scores, key=lambda rate: scores[rate]) for name, scores in tuning.items()}
        configs = {(name, seed): config(name, f"learning_rate={best[name]}", f"seed={seed}") for name, seed in configs}
    # Seed by seed, so that a comparison that is cut short has all methods.
    runs = {
        (name, seed): Run(output / "runs" / name / f"seed-{seed}", each, minutes, until, chosen.solvers)
        for (name, seed), each in configs.items()
    }
    _run_all([*runs.values()], jobs, on_run)
    of_method = {name: [runs[name, seed] for seed in range(seeds)] for name in names}
    curves = {name: [read_run(run.folder, run.config) for run in of_method[name]] for name in names}
    results = {name: [_read_result(run.folder / "result.json") for run in of_method[name]] for name in names}
    base = _base_scores(output / "base", configs[first, 0], chosen.solvers)
    found = summarise(curves, results, base, target)
    found |= {"tuning": tuning, **provenance(torch.device(configs[first, 0].device)), "jobs": jobs}
    return write(output, found, {name: configs[name, 0] for name in names})


def _p(test: Callable[..., Any], scores: np.ndarray | Sequence[float], others: Any) -> float:
    """p of scipy's ``test``, or NaN where seeds differ by rounding alone."""
    differences = np.subtract(scores, others)
    rounding = 1e-12 * max(np.abs(scores).max(), np.abs(others).max())
    return float(test(scores, others).pvalue) if np.ptp(differences) > rounding else math.nan


def summarise(
    runs: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    results: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    base: Mapping[str, Mapping[str, float]],
    target: float | None = None,
) -> dict[str, Any]:
    """Everything that ``compare.json`` holds.

    Args:
        runs: of each method ``read_run`` of every seed; the first method is the baseline.
        results: of each method and seed the scores by solver.
        base: those of the untrained policy.
        target: see ``compare``.
    """
    baseline, *others = runs
    if target is None:
        ends = [np.median([run["score"][i] for run in runs[baseline]]) for i in (0, -1)]
        target = float(np.mean(ends))
    finals = {
        name: np.array([[scores["eval_strict"] for scores in seed.values()] for seed in results[name]]) for name in runs
    }
    untrained = {solver: scores["eval_strict"] for solver, scores in base.items()}
    start = float(np.mean(list(untrained.values())))
    methods: dict[str, Any] = {}
    for name, seeds in runs.items():
        # Of a seed the mean over solvers.
        final = finals[name].mean(1)
        times = {cost: np.array([time_to(run[cost], run["score"], target) for run in seeds]) for cost in COSTS}
        low, middle, high = np.quantile(final, (0.25, 0.5, 0.75)).tolist()
        methods[name] = {
            "final": {"median": middle, "low": low, "high": high, "seeds": final.tolist()},
            "another_seed": of_another_seed(final),
            "solvers": dict(zip(results[name][0], np.median(finals[name], axis=0).tolist(), strict=True)),
            "over_base": float(final.mean() - start),
            # The untrained policy has no seed: it is evaluated with the same prompts and noise as every run.
            "p_over_base": _p(ttest_1samp, final, start),
            "curves": {cost: curve([r[cost] for r in seeds], [r["score"] for r in seeds]) for cost in COSTS},
            "runs": [{key: values.tolist() for key, values in run.items()} for run in seeds],
            "to_target": {cost: values.tolist() for cost, values in times.items()},
        }
    reference = methods[baseline]
    for name in others:
        methods[name]["ratios"] = {
            cost: ratio_of_medians(np.array(times), np.array(reference["to_target"][cost]))
            for cost, times in methods[name]["to_target"].items()
        }
        differences = np.subtract(methods[name]["final"]["seeds"], reference["final"]["seeds"])
        methods[name]["difference"] = float(differences.mean())
        # The unit is a seed: both methods saw the same prompts and noise.
        methods[name]["p"] = _p(ttest_rel, methods[name]["final"]["seeds"], reference["final"]["seeds"])
    for name, p in zip(others, holm([methods[name]["p"] for name in others]), strict=True):
        methods[name]["p_holm"] = p
    for name, p in zip(methods, holm([method["p_over_base"] for method in methods.values()]), strict=True):
        methods[name]["p_over_base_holm"] = p
    return {"baseline": baseline, "target": target, "base": {"final": start, "solvers": untrained}, "methods": methods}


# What is written.


def _json(value: Any) -> Any:
    """JSON has no infinity: what was never reached is null."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never" if value > 0 else "-"


def _p_value(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.2g}"


def _ratio(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "1"
    return f"{_number(found['ratio'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tuning(scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return ""
    rates = list(next(iter(scores.values())))
    rows = [[name, *(f"{score:.3f}" for score in of.values())] for name, of in scores.items()]
    return f"""
## Tuning

Every method had {len(rates)} runs of the same length, with a seed that no run above has, to choose its learning rate.
Strict score on training prompts over the last third of their epochs:

{_table(["method", *rates], rows)}
"""


def write(output: Path, found: Mapping[str, Any], configs: Mapping[str, Config]) -> Path:
    """``compare.json``, ``curves.png`` and ``compare.md``; the path of the last."""
    replace_text(output / "compare.json", json.dumps(_json(found), indent=1))
    _plot(output / "curves.png", found)
    methods = found["methods"]
    solvers = list(methods[found["baseline"]]["solvers"])
    seeds = len(methods[found["baseline"]]["final"]["seeds"])
    scores = [
        [
            name,
            f"{m['final']['median']:.3f} [{m['final']['low']:.3f}, {m['final']['high']:.3f}]",
            " to ".join(map(_number, m["another_seed"])),
            *(f"{m['solvers'][solver]:.3f}" for solver in solvers),
            f"{m['over_base']:+.3f}",
            _p_value(m["p_over_base_holm"]),
            f"{m['difference']:+.3f}" if "difference" in m else "",
            _p_value(m["p_holm"]) if "p_holm" in m else "",
        ]
        for name, m in methods.items()
    ]
    untrained = found["base"]
    each = [f"{untrained['solvers'][solver]:.3f}" for solver in solvers]
    scores.append(["untrained", f"{untrained['final']:.3f}", "", *each, *[""] * 4])
    reached = [
        [
            name,
            f"{sum(map(math.isfinite, m['to_target']['steps']))} of {seeds}",
            *(_ratio(m["ratios"][cost] if "ratios" in m else None) for cost in COSTS),
        ]
        for name, m in methods.items()
    ]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    base, *_ = configs.values()
    differences = [
        [name, ", ".join(f"`{key}={value}`" for key, value in config if value != getattr(base, key))]
        for name, config in configs.items()
    ]
    text = f"""# Comparison

Held-out prompts, strict score, {seeds} seeds; all methods start from the same base and see the same prompts and seeds.
{found["device"]}, {found["jobs"]} runs at once; {versions}; {found["date"]}.

![curves](curves.png)

## Scores at the end

Median [quartiles] over seeds of the mean over three solvers that no rollout uses; where another seed is expected with a
probability of 95%; the median with each solver; the mean gain over the untrained policy, and the mean difference to
{found["baseline"]}, each with the p of a t-test over seeds, the second in pairs, after Holm's correction.

{_table(["method", "score", "another seed", *solvers, "mean gain", "its p", "difference", "its p"], scores)}

## Cost of reaching {found["target"]:.3f}

As a ratio to {found["baseline"]}'s, of medians over seeds, with 95% bootstrap intervals; above 1 it takes longer.

{_table(["method", "seeds that reached it", *COSTS.values()], reached)}

## Settings that differ

{_table(["method", "settings"], differences)}
{_tuning(found["tuning"])}"""
    replace_text(output / "compare.md", text)
    return output / "compare.md"


def _plot(path: Path, found: Mapping[str, Any]) -> None:
    from .report import plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey=True)
    for axis, (cost, label) in zip(axes.flat, COSTS.items(), strict=True):
        for name, method in found["methods"].items():
            curve = method["curves"][cost]
            axis.plot(curve["cost"], curve["median"], label=name)
            axis.fill_between(curve["cost"], curve["low"], curve["high"], alpha=0.2)
        axis.axhline(found["target"], color="grey", linestyle=":")
        axis.set(xlabel=label, ylabel="held-out strict score")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
