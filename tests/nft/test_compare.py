"""Comparisons: statistics against independent formulas, and the command on an untrained pipeline."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
from distributed_worker import Brightness, wait_for

pytest.importorskip("diffusers")

from typer.testing import CliRunner

from nft.cli import app
from nft.compare import (
    COSTS,
    SUITES,
    Run,
    _ratio,
    compare,
    curve,
    ratio_of_medians,
    read_run,
    summarise,
    time_to,
    tuning_score,
)
from nft.config import load_config
from nft.objectives import OBJECTIVES
from nft.statistics import holm
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import build_pipeline


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_step_down_procedure_rejects(seed):
    """From the smallest p on, each is compared with alpha over how many are left, until one is too large."""
    p = np.random.default_rng(seed).uniform(size=7) ** 3
    adjusted = holm(p)
    for alpha in np.linspace(0.001, 0.999, 200):
        rejected = set()
        for k, i in enumerate(sorted(range(7), key=lambda i: p[i])):
            if p[i] > alpha / (7 - k):
                break
            rejected.add(i)
        assert {i for i in range(7) if adjusted[i] <= alpha} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_time_to_a_score_is_linear_between_evaluations():
    costs, scores = np.array([0.0, 10.0, 30.0, 40.0]), np.array([0.2, 0.4, 0.3, 0.8])
    assert time_to(costs, scores, 0.3) == pytest.approx(5.0)
    assert time_to(costs, scores, 0.5) == pytest.approx(34.0)
    assert time_to(costs, scores, 0.8) == 40.0 and time_to(costs, scores, 0.1) == 0.0
    assert time_to(costs, scores, 0.81) == math.inf


@pytest.mark.parametrize("last", [9.0, math.inf])
def test_interval_of_a_ratio_is_that_of_every_resample(last):
    times, baseline = np.array([3.0, 5.0, 4.0, last]), np.array([1.0, 2.5, 2.0, 1.5])
    found = ratio_of_medians(times, baseline)
    ratios = sorted(
        np.median(times[list(draw)]) / np.median(baseline[list(draw)]) for draw in itertools.product(range(4), repeat=4)
    )
    assert found["ratio"] == pytest.approx(4.5 / 1.75)
    # The 2.5% of all 256 resamples, give or take what 9999 random ones miss it by: five standard errors are 2 of 256.
    for bound, place in ((found["low"], 0.025), (found["high"], 0.975)):
        assert ratios[max(int(256 * place) - 3, 0)] <= bound <= ratios[min(int(256 * place) + 3, 255)]


def test_a_ratio_of_what_was_never_reached_is_infinite():
    never, once = np.full(3, math.inf), np.array([1.0, 2.0, 3.0])
    assert ratio_of_medians(never, once) == {"ratio": math.inf, "low": math.inf, "high": math.inf}
    assert all(math.isnan(value) for value in ratio_of_medians(never, never).values())


def test_a_resample_without_a_ratio_leaves_no_interval():
    """In 7 of the 27 draws the seed that never gets there comes twice or three times, and inf / inf is no ratio; of
    those that remain all would say 1."""
    times = np.array([1.0, 2.0, math.inf])
    found = ratio_of_medians(times, times)
    assert found["ratio"] == 1 and math.isnan(found["low"]) and math.isnan(found["high"])
    assert _ratio(found) == "1.00 [-, -]"


def test_curves_end_where_the_first_seed_does():
    costs = [np.array([0.0, 10.0]), np.array([0.0, 5.0, 20.0]), np.array([0.0, 40.0])]
    scores = [np.array([0.0, 1.0]), np.array([0.0, 0.0, 0.0]), np.array([0.4, 0.4])]
    found = curve(costs, scores)
    assert found["cost"][0] == 0 and found["cost"][-1] == 10
    # At the end the scores are 1, 0 and 0.4; quartiles of three lie halfway between neighbours.
    assert [found[key][-1] for key in ("low", "median", "high")] == pytest.approx([0.2, 0.4, 0.7])


def synthetic(speed, ends):
    """Runs whose score rises evenly from 0 over 10 * speed of every cost, and the final scores of two solvers."""
    runs = [{**{c: np.array([0.0, 10.0 * speed]) for c in COSTS}, "score": np.array([0.0, end])} for end in ends]
    return runs, [{"a": {"eval_strict": end - 0.1}, "b": {"eval_strict": end + 0.1}} for end in ends]


def test_summary_of_three_seeds():
    first, second, third = [0.5, 0.6, 0.7], [0.4, 0.55, 0.5], [0.5, 0.6, 0.7]
    parts = {name: synthetic(s, e) for name, s, e in (("x", 1, first), ("y", 2, second), ("z", 1, third))}
    runs, results = ({n: part[i] for n, part in parts.items()} for i in (0, 1))
    base = {"a": {"eval_strict": 0.2}, "b": {"eval_strict": 0.3}}
    found = summarise(runs, results, base)
    assert found["base"]["final"] == pytest.approx(0.25) and found["base"]["solvers"] == {"a": 0.2, "b": 0.3}
    assert found["baseline"] == "x" and found["target"] == pytest.approx(0.3)
    y = found["methods"]["y"]
    assert [y["final"][key] for key in ("low", "median", "high")] == pytest.approx([0.45, 0.5, 0.525])
    assert y["solvers"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert y["over_base"] == pytest.approx((0.4 + 0.55 + 0.5) / 3 - 0.25)
    assert y["to_target"]["steps"] == pytest.approx([20 * 0.3 / end for end in second])
    assert y["ratios"]["seconds"]["ratio"] == pytest.approx((20 * 0.3 / 0.5) / (10 * 0.3 / 0.6))
    # Student's t with two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    d = np.subtract(second, first)
    t = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(3))
    assert y["difference"] == pytest.approx(d.mean()) and y["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    # Equal scores are no test, and do not count as one.
    assert math.isnan(found["methods"]["z"]["p_holm"]) and y["p_holm"] == pytest.approx(y["p"])
    # The scores 0.4, 0.5 and 0.55 against the constant 0.25 of the untrained policy; those of x and z are equal.
    gains = np.array(second) - 0.25
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(3))
    assert y["p_over_base"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert y["p_over_base_holm"] == pytest.approx(max(3 * found["methods"]["x"]["p_over_base"], y["p_over_base"]))
    # 4.3027 is the table's 97.5% of Student's t with two degrees of freedom.
    width = 4.3027 * np.std(second, ddof=1) * math.sqrt(4 / 3)
    assert y["another_seed"] == pytest.approx([np.mean(second) - width, np.mean(second) + width], rel=1e-4)
    assert [run["score"] for run in y["runs"]] == [[0.0, end] for end in second]
    assert summarise(runs, results, base, 0.55)["methods"]["y"]["to_target"]["steps"][0] == math.inf


def test_seeds_that_differ_by_rounding_alone_are_no_test():
    """Two seeds that gain as much would otherwise be certain: 0.3 - 0.1 and 0.7 - 0.5 are not the same float."""
    parts = {name: synthetic(1, ends) for name, ends in (("x", [0.1, 0.5]), ("y", [0.3, 0.7]))}
    runs, results = ({n: part[i] for n, part in parts.items()} for i in (0, 1))
    y = summarise(runs, results, {"a": {"eval_strict": 0.0}, "b": {"eval_strict": 0.1}})["methods"]["y"]
    assert y["difference"] == pytest.approx(0.2) and math.isnan(y["p"]) and not math.isnan(y["p_over_base"])


def test_of_several_methods_the_smaller_p_counts_double():
    ends = {"x": [0.5, 0.6, 0.7], "y": [0.4, 0.55, 0.5], "w": [0.1, 0.21, 0.3]}
    parts = {name: synthetic(1, e) for name, e in ends.items()}
    runs, results = ({n: part[i] for n, part in parts.items()} for i in (0, 1))
    methods = summarise(runs, results, {"a": {"eval_strict": 0.2}, "b": {"eval_strict": 0.3}})["methods"]
    larger, smaller = methods["y"]["p"], methods["w"]["p"]
    assert smaller < larger / 2
    assert methods["w"]["p_holm"] == pytest.approx(2 * smaller) and methods["y"]["p_holm"] == pytest.approx(larger)


@pytest.mark.parametrize("suite", SUITES)
def test_methods_can_be_run_and_the_last_evaluation_uses_solvers_that_none_trains_with(suite):
    chosen = SUITES[suite]()
    assert set(chosen.quick) <= set(chosen.methods) and len(chosen.solvers) == 3
    objectives = set()
    for name, (base, changes) in (chosen.methods | chosen.ablations).items():
        config = load_config(base, list(changes))
        objectives.add(config.objective)
        assert config.rollout_solver not in chosen.solvers and config.pictures == 288, name
    assert objectives == set(OBJECTIVES)
    base = load_config("shapes").model_dump()
    ablations = [load_config(b, list(c)).model_dump() for b, c in list(chosen.ablations.values())[1:]]
    changed = {key for other in ablations for key in base if other[key] != base[key]}
    assert changed == {"objective", "rollout_solver", "weighting", "old_policy", "beta", "adv_clip_max", "group_size",
                       "prompts_per_epoch", "kl_weight", "timesteps_per_sample", "explore", "explore_steps",
                       "filter_mean"}  # fmt: skip


TINY = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=4", "micro_batch=4", "timesteps_per_sample=2",
        "eval_prompts_per_group=1", "eval_steps=2", "eval_solver=euler", "lora_rank=2", "eval_every=1",
        "updates_per_epoch=2", "preflight=false"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline().save_pretrained(folder)
    return [f"pipeline={folder}", *TINY]


def test_command_resumes_keeps_what_is_finished_and_writes_a_page(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    arguments = ["compare", *tiny, "--objectives", "mix_grpo", "--seeds", "2", "--epochs", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = CliRunner().invoke(app, [*arguments, "--output", str(whole)])
    assert result.exit_code == 0, result.output
    # One run finished, one broken off after its first epoch, one without its last evaluation.
    changes = {"nft": "shapes", "mix_grpo": "shapes_mix_grpo"}
    run = Trainer(
        load_config(changes["mix_grpo"], ["epochs=2", *tiny, "seed=0"]), parts / "runs" / "mix_grpo" / "seed-0"
    )

    def interrupt(metrics):
        if run.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(interrupt)

    def stop(done, total):
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare("shapes", parts, objectives=["mix_grpo"], seeds=2, epochs=2, overrides=tiny, on_run=stop)
    finished = {path: path.read_text() for path in (parts / "runs").rglob("metrics.jsonl")}
    kept = (parts / "runs" / "mix_grpo" / "seed-0" / "result.json").stat()
    (parts / "runs" / "nft" / "seed-0" / "result.json").unlink()
    assert len(finished) == 2
    result = CliRunner().invoke(app, [*arguments, "--output", str(parts)])
    assert result.exit_code == 0, result.output
    assert all(path.read_text() == text for path, text in finished.items())
    assert (parts / "runs" / "mix_grpo" / "seed-0" / "result.json").stat().st_ino == kept.st_ino
    found = [json.loads((folder / "compare.json").read_text()) for folder in (whole, parts)]
    ends = [one["methods"] for one in found]
    assert list(ends[0]) == ["nft", "mix_grpo"]
    for name in ends[0]:
        assert ends[0][name]["final"] == ends[1][name]["final"] and ends[0][name]["solvers"].keys() == {
            "unipc",
            "deis",
            "dpm++3M",
        }
    page = (parts / "compare.md").read_text()
    untrained = {end["base"]["final"] for end in found}
    assert len(untrained) == 1 and f"| untrained | {untrained.pop():.3f} | " in page
    assert re.search(r"\| nft \| 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] ", page) and "`window=2`" in page
    assert (parts / "curves.png").stat().st_size > 10_000
    # Both methods were given the same prompts and noise: before training their pictures score alike.
    first = {name: read_run(whole / "runs" / name / "seed-1", load_config(changes[name], tiny)) for name in changes}
    assert first["nft"]["score"][0] == first["mix_grpo"]["score"][0]
    # 4 pictures, 4 rows; then 8 pairs, and the old policy's as linear_0.5 never copies, or does for the first update.
    assert first["nft"]["evaluations"].tolist() == [0, 16 + 8 + 8 - 4, 2 * (16 + 8 + 8) - 4]
    assert first["mix_grpo"]["evaluations"].tolist() == [0, 28, 56]
    assert first["nft"]["pictures"].tolist() == [0, 4, 8] and first["nft"]["steps"].tolist() == [0, 2, 4]
    result = CliRunner().invoke(app, [*arguments, "beta=2.0", "--output", str(parts)])
    assert result.exit_code == 2 and "holds a run with other settings" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "count"), [({}, 5), ({"quick": True}, 2), ({"quick": True, "seeds": 3}, 3), ({"seeds": 1}, 1)]
)
def test_quick_takes_the_seeds_that_are_asked_for(tmp_path, monkeypatch, options, count):
    class Enough(Exception):
        pass

    def stop(runs, jobs, on_run):
        assert [run.config.seed for run in runs] == list(range(count))
        raise Enough

    monkeypatch.setattr("nft.compare._run_all", stop)
    with pytest.raises(Enough):
        compare("shapes", tmp_path, objectives=["nft"], **options)


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "c").touch()
    with pytest.raises(FileExistsError, match="c is a file; give a folder"):
        compare("shapes", tmp_path / "c")


def test_a_change_is_for_the_methods_that_read_it(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("nft.compare._run_all", lambda todo, *_: runs.extend(todo) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare("shapes", tmp_path, objectives=["awm"], seeds=1, overrides=["beta=0.5", "clip_range=0.5"])
    assert [(run.config.objective, run.config.beta, run.config.clip_range) for run in runs] == [
        ("nft", 0.5, 1e-4),
        ("awm", 1.0, 0.5),
    ]


def test_minutes_end_a_run_after_the_epoch_that_reaches_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    compare("shapes", tmp_path, objectives=["nft"], seeds=1, minutes=1e-6, overrides=tiny)
    lines = (tmp_path / "runs" / "nft" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 1]
    with pytest.raises(ValueError, match="holds a comparison with other settings"):
        compare("shapes", tmp_path, objectives=["nft"], seeds=1, minutes=2.0, overrides=tiny)


def test_a_run_adds_up_its_minutes_and_reads_its_log_once(tmp_path, monkeypatch):
    told, read = [], []

    class Trained:
        epoch, evaluation_due = 100, False

        def __init__(self, config, folder, *, resume):
            pass

        def train(self, on_epoch):
            for epoch in range(1000):
                told.append(epoch)
                on_epoch({"seconds": 1.0})

        def close(self):
            pass

    before = [{"epoch": i, "step": i, "seconds": 1.0} for i in range(1, 101)]
    monkeypatch.setattr("nft.trainer.Trainer", Trained)
    monkeypatch.setattr("nft.compare.read_metrics", lambda folder, **_: read.append(folder) or before)
    Run(tmp_path, load_config("shapes"), minutes=10.0)()
    assert len(told) == 500 and len(read) == 1


def test_a_damaged_file_of_a_comparison_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    arguments = ["compare", *tiny, "--objectives", "nft", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    run = tmp_path / "runs" / "nft" / "seed-0"
    for path, damaged, message in (
        (run / "metrics.jsonl", "{}\n", "metrics.jsonl, line 1: got"),
        (run / "metrics.jsonl", "", "seed-0 holds no metrics.jsonl with an epoch in it"),
        (run / "result.json", '{"deis": {}}', "seed-0/result.json is damaged: KeyError"),
        (tmp_path / "base" / "result.json", "[", "base/result.json is damaged: JSONDecodeError"),
    ):
        before = path.read_text()
        path.write_text(damaged)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1
        path.write_text(before)
    # The half of a line that a kill leaves is none.
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"epo')
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_a_run_ends_once_its_evaluation_has_reached_the_target(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    scores = {"nft": [0.1, 0.2, 0.7, 0.8], "sft": [0.1, 0.3, 0.2, 0.4]}
    evaluate = Trainer.evaluate

    def scripted(trainer, solver=None):
        metrics, *rest = evaluate(trainer, solver)
        return {**metrics, "eval_strict": scores[trainer.config.objective][trainer.epoch]}, *rest

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    options = {"objectives": ["sft"], "seeds": 1, "epochs": 3, "overrides": tiny}
    for stop, expected in ((False, scores), (True, {**scores, "nft": [0.1, 0.2, 0.7]})):
        compare("shapes", tmp_path / str(stop), target=0.6, stop_at_target=stop, **options)
        for name, score in expected.items():
            run = tmp_path / str(stop) / "runs" / name / "seed-0"
            assert read_run(run, load_config("shapes", tiny))["score"].tolist() == score


def test_tuning_keeps_the_rate_that_scores_best_and_runs_at_once_do_what_one_after_another_does(
    tiny, tmp_path, monkeypatch
):
    suite = replace(SUITES["shapes"](), rates=(1e-3, 3e-3), solvers=("deis",))
    monkeypatch.setitem(SUITES, "shapes", lambda: suite)
    options = {"objectives": ["sft"], "seeds": 1, "epochs": 1, "tune": True, "overrides": tiny}
    seen = []
    compare("shapes", tmp_path / "two", jobs=2, on_run=lambda *progress: seen.append(progress), **options)
    assert seen == [(i, 4) for i in range(5)] + [(i, 2) for i in range(3)]
    assert "2 runs of the same length" in (tmp_path / "two" / "compare.md").read_text()
    best = {"nft": 3e-3, "sft": 1e-3}
    monkeypatch.setattr("nft.compare.tuning_score", lambda run: -abs(float(run.name) - best[run.parent.name]))
    compare("shapes", tmp_path / "one", **options)
    for name, rate in best.items():
        config = load_config(str(tmp_path / "one" / "runs" / name / "seed-0" / "config.yaml"))
        assert (config.learning_rate, config.epochs, config.seed) == (rate, 1, 0)
        for rate in suite.rates:
            folders = [tmp_path / jobs / "tuning" / name / f"{rate:g}" for jobs in ("one", "two")]
            config = load_config(str(folders[0] / "config.yaml"))
            assert (config.learning_rate, config.epochs, config.seed) == (rate, 1, 1000)
            logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
            assert len(logs[0]) == 3
            assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]


def test_workers_end_with_a_command_that_is_killed(tiny, tmp_path):
    code = "import sys; from nft.cli import app; app(sys.argv[1:])"
    arguments = ["compare", "--objectives", "sft", "--seeds", "1", "--minutes", "60", "--jobs", "2"]
    command = psutil.Popen([sys.executable, "-c", code, *arguments, "--output", str(tmp_path), *tiny])
    try:
        for folder in (tmp_path / "runs" / name / "seed-0" for name in ("nft", "sft")):
            wait_for(lambda folder=folder: (folder / "checkpoint").exists() or command.poll() is not None, 120)
        children = command.children(recursive=True)
        assert command.poll() is None and len(children) >= 2
    finally:
        command.kill()
        command.wait()
    wait_for(lambda: not any(child.is_running() for child in children), 120)


def test_tuning_score_is_the_mean_of_the_last_third(tmp_path):
    lines = [{"eval_strict": 1.0}, *({"strict": x} for x in (0.9, 0.8, 0.1, 0.2)), {"eval_strict": 1.0}]
    text = "".join(json.dumps({"epoch": 1, "step": 1, **line}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert tuning_score(tmp_path) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "flowers"], "suite: got 'flowers', accepted are shapes"),
        (["--objectives", "nft,ppo"], "objectives: got 'ppo', accepted are nft, sft"),
        (["--ablations", "--objectives", "awm"], "objectives: got 'awm', accepted are nft, no_negative_branch"),
        (["--objectives", "nft,awm,nft"], "objectives: got nft, awm, nft, accepted is each of them once"),
        (["--seeds", "1001"], "'--seeds': got '1001': "),
        (["resolution=8"], "resolution: got 8, accepted are multiples of 16"),
        (["device=cuda:99"], "device: got 'cuda:99', but this machine"),
        (["tracker=trackio"], "tracker: got 'trackio', but its package is missing"),
        (["--minutes", "1", "--epochs", "2"], "minutes, epochs: got both"),
        (["--stop-at-target"], "stop_at_target: got no target"),
        (["beta=-1"], "beta: got -1"),
        (["--minutes", "inf"], "minutes: got inf, accepted are finite numbers above 0"),
        *((["--target", bad], f"target: got {bad}, accepted are finite numbers") for bad in ("inf", "nan")),
        (["seed=7"], "overrides: got seed=7, accepted is none of seed, which seeds gives"),
        (
            ["--objectives", "awm", "rwr_temperature=2"],
            "overrides: got rwr_temperature=2, accepted is what one of nft, awm",
        ),
        (["--tune", "learning_rate=1e-3"], "overrides: got learning_rate=1e-3, accepted is none of learning_rate"),
        *(
            (
                [*length, "epochs=2"],
                "overrides: got epochs=2, accepted is none of epochs, which minutes or epochs gives",
            )
            for length in (["--epochs", "3"], ["--minutes", "1"], ["--quick"])
        ),
    ],
)
def test_what_cannot_be_compared_is_named_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("nft.tracking.get_available_trackers", lambda: [])
    result = CliRunner().invoke(app, ["compare", *arguments, "--output", str(tmp_path / "c")])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "c").exists()
