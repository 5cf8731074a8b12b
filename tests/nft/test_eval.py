"""Evaluation: statistics against their definition, and the whole path on the shapes world."""

import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from distributed_worker import by_fork
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from nft.cli import app
from nft.config import load_config
from nft.distributed import Processes
from nft.evaluate import SUITES, Evaluation, comparison, summary
from nft.evaluate_cli import _print
from nft.policy import Policy
from nft.rewards.base import score
from nft.rollout import rollout
from nft.worlds.shapes.tiny import build_pipeline
from nft.worlds.shapes.verify import verify

pytestmark = pytest.mark.forks

run = CliRunner().invoke
PAPER = ("--suite", "paper", "--override", "device=cpu")


# --- statistics ---


def test_the_mean_is_over_groups_and_the_interval_is_a_normal_ones():
    rng = np.random.default_rng(0)
    groups = {"a": rng.normal(1, 2, 400), "b": rng.normal(3, 1, 100)}
    found = summary(groups)
    mean = (groups["a"].mean() + groups["b"].mean()) / 2
    error = np.sqrt(groups["a"].var() / 400 + groups["b"].var() / 100) / 2
    assert found["mean"] == pytest.approx(mean) and found["prompts"] == 500
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert "low" not in summary({"a": np.array([1.0])})


def test_the_interval_is_of_percentiles():
    """Of ten prompts one succeeds: a resample's number of successes is binomial(10, 0.1), of which 0.35 is at 0 and
    0.987 at 3 or below, 0.930 at 2 or below."""
    found = summary({"a": np.array([0.0] * 9 + [1.0])})
    assert found["low"] == 0 and found["high"] == pytest.approx(0.3)


def test_a_difference_is_of_means_over_groups():
    ours, theirs = ({"a": np.array(a), "b": np.array(b)} for a, b in (([1.0, 1, 1, 0], [0.5]), ([0.0, 0, 0, 0], [0.0])))
    assert comparison(ours, theirs)["difference"] == pytest.approx((0.75 + 0.5) / 2)


def test_the_paired_test_counts_sign_flips():
    """Five prompts that all got better: 2 of the 32 sign patterns are as extreme."""
    before = {"a": np.array([0.1, 0.2, 0.3, 0.4, 0.5])}
    after = {"a": before["a"] + [0.1, 0.2, 0.3, 0.1, 0.2]}
    assert comparison(after, before) == pytest.approx({"difference": 0.18, "p": 2 / 32})
    assert comparison(before, before)["p"] == 1
    assert comparison({"a": np.array([0.5])}, {"a": np.array([0.25])}) == {"difference": 0.25}
    with pytest.raises(ValueError, match="baseline: got other prompts"):
        comparison(after, {"a": np.zeros(4)})


# --- the shapes world ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline().save_pretrained(folder)
    return f"pipeline={folder}"


@pytest.fixture(scope="module")
def tuned(pipeline, tmp_path_factory):
    policy = Policy(load_config("shapes", [pipeline, "lora_rank=4"]))
    for parameter in policy.trained:
        parameter.data.add_(0.1)
    folder = tmp_path_factory.mktemp("run")
    policy.save_adapter("default", folder / "checkpoint" / "default")
    return folder


def evaluate(output, pipeline, *more):
    arguments = ["eval", "--suite", "shapes", "--limit", "2", "--override", pipeline, "--output", str(output)]
    return run(app, [*arguments, *more], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals") / "base"
    result = evaluate(folder, pipeline)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_table_is_of_the_pictures_that_are_kept(base):
    folder, output = base
    entries = Evaluation("shapes", folder.parent / "other", subject="s", limit=2).entries["shapes"]
    assert len(entries) == 12 and len({entry["tag"] for entry in entries}) == 6
    files = sorted((folder / "pictures" / "shapes").iterdir())
    assert [path.name for path in files] == [f"{i:05d}_0.png" for i in range(12)]
    verdicts = [verify(np.asarray(Image.open(path)), entry).correct for path, entry in zip(files, entries, strict=True)]
    results = json.loads((folder / "results.json").read_text())
    assert results["GenEval"]["mean"] == pytest.approx(np.mean(verdicts))
    sizes = []
    for path in files:
        buffer = io.BytesIO()
        Image.open(path).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert results["JPEG kB"]["mean"] == pytest.approx(np.mean(sizes))
    assert f"{np.mean(sizes):.3f} [" in output
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["solver"], settings["steps"]) == ("euler", 40)


def test_an_interrupted_evaluation_goes_on(base, pipeline):
    folder, _ = base
    before = (folder / "results.json").read_text()
    pictures = sorted((folder / "pictures" / "shapes").iterdir())
    pixels = [np.asarray(Image.open(path)).astype(int) for path in pictures]
    for path in pictures[5:]:
        path.unlink()
    scores = folder / "scores" / "shapes_jpeg.jsonl"
    scores.write_text(scores.read_text()[:-30])  # the last line is cut off
    (folder / "scores" / "shapes_shapes.jsonl").unlink()
    kept = {path: path.stat().st_mtime_ns for path in pictures[:5]}
    result = evaluate(folder, pipeline)
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(scores.read_text().splitlines()) == 12
    # A picture is its prompt's and seed's, but for the last bit of a matrix product, which depends on the batch.
    assert max(np.abs(np.asarray(Image.open(p)) - old).max() for p, old in zip(pictures, pixels, strict=True)) <= 1
    after = json.loads((folder / "results.json").read_text())
    assert after["JPEG kB"]["mean"] == pytest.approx(json.loads(before)["JPEG kB"]["mean"], rel=0.01)


def test_other_settings_are_not_mixed(base, pipeline):
    """Neither pictures of another resolution nor scores by other options stand in for those that are asked for."""
    folder, _ = base
    before = (folder / "results.json").read_text()
    for more, message in (
        (["--override", "resolution=32"], "resolution is None there and 32 here"),
        (["--override", "dtype=bfloat16"], "dtype is 'float32' there and 'bfloat16' here"),
        (["--set", "jpeg.quality=10"], "quality is 'not set' there and 10 here"),
        (["--per-prompt", "2"], "pictures_per_prompt is 1 there and 2 here"),
    ):
        result = evaluate(folder, pipeline, *more)
        assert result.exit_code == 2 and message in result.output, result.output
    scores = folder / "scores" / "shapes_jpeg.jsonl"
    whole = scores.read_text()
    scores.write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert evaluate(folder, pipeline, "--set", "jpeg.quality=10").exit_code == 2
    scores.write_text(whole)
    assert (folder / "results.json").read_text() == before


def test_two_processes_draw_and_score_as_one(base, pipeline, tmp_path):
    """Batches of 5 of 12 pictures: two processes draw 5 and 1 each."""
    folder, _ = base

    def work():
        result = evaluate(tmp_path / "two", pipeline, "--override", "rollout_batch=5")
        assert result.exit_code == 0, result.output
        shown = "pictures, scores and results" in result.output
        assert shown == (os.environ["RANK"] == "0"), result.output

    by_fork(2, work)
    names = sorted(path.name for path in (folder / "pictures" / "shapes").iterdir())
    assert sorted(path.name for path in (tmp_path / "two" / "pictures" / "shapes").iterdir()) == names
    for name in names:
        one, two = (np.asarray(Image.open(f / "pictures" / "shapes" / name)) for f in (folder, tmp_path / "two"))
        # The last bit of a matrix product depends on the batch.
        assert np.abs(one.astype(int) - two).max() <= 1
    for reward in ("shapes", "jpeg"):
        lines = (tmp_path / "two" / "scores" / f"shapes_{reward}.jsonl").read_text().splitlines()
        assert [json.loads(line)["picture"] for line in lines] == names
    one, two = (json.loads((f / "results.json").read_text()) for f in (folder, tmp_path / "two"))
    assert two["JPEG kB"]["mean"] == pytest.approx(one["JPEG kB"]["mean"], rel=0.01)
    assert not [path for path in (tmp_path / "two").rglob("*") if path.suffix == ".tmp"]


def test_a_picture_that_was_cut_off_is_drawn_again(tmp_path, monkeypatch):
    evaluation = Evaluation("shapes", tmp_path, subject="s", limit=1)

    def killed(picture, file, **_):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.draw(lambda prompts, seeds: torch.zeros(len(prompts), 8, 8, 3, dtype=torch.uint8), 4)
    assert len(evaluation.missing()) == 6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_picture_is_drawn_by_one_process(count, tmp_path):
    """Seven pictures in batches of two; each process takes part in as many rounds as the others."""

    def work():
        evaluation = Evaluation("shapes", tmp_path / "e", subject="s", limit=2)
        evaluation.entries["shapes"] = evaluation.entries["shapes"][:7]
        seen = []

        def draw(texts, seeds):
            seen.append(seeds)
            return torch.tensor(seeds, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3).contiguous()

        processes = Processes("cpu")
        evaluation.draw(draw, 2, processes=processes)
        (tmp_path / f"seen{processes.rank}").write_text(json.dumps(seen))
        assert not evaluation.missing()

    by_fork(count, work)
    seen = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in range(count)]
    assert len({len(batches) for batches in seen}) == 1
    pictures = sorted((tmp_path / "e" / "pictures" / "shapes").iterdir())
    assert [np.asarray(Image.open(path)).flat[0] for path in pictures] == list(range(7))
    drawn = [seed for batches in seen for batch in batches for seed in batch]
    # One that has no picture left draws the first again, and drops it.
    assert sorted(drawn) == [0] * (len(drawn) - 7) + list(range(7))


def test_a_checkpoint_is_compared_with_a_baseline(base, pipeline, tuned, tmp_path):
    folder, _ = base
    result = evaluate(tmp_path / "tuned", pipeline, "--checkpoint", str(tuned), "--baseline", str(folder))
    assert result.exit_code == 0, result.output
    found, before = (json.loads((f / "results.json").read_text())["JPEG kB"] for f in (tmp_path / "tuned", folder))
    assert found["difference"] == pytest.approx(found["mean"] - before["mean"]) and found["difference"] != 0
    assert 0 < found["p"] <= 1 and "p, paired" in result.output and "after Holm" in result.output
    # Of the three columns' p the smallest counts three times, the next twice.
    columns = json.loads((tmp_path / "tuned" / "results.json").read_text()).values()
    steps = [min(1.0, p * (3 - i)) for i, p in enumerate(sorted(c["p"] for c in columns))]
    expected = [max(steps[: i + 1]) for i in range(3)]
    assert sorted(c["p_holm"] for c in columns) == pytest.approx(expected)
    clash = evaluate(folder, pipeline, "--checkpoint", str(tuned))
    assert clash.exit_code == 2 and "holds an evaluation with other settings" in clash.output
    other = evaluate(tmp_path / "other", pipeline, "--baseline", str(folder), "--set", "jpeg.quality=20")
    output = " ".join(other.output.split())
    assert other.exit_code == 2 and "baseline: " in output and "quality is 'not set' there and 20 here" in output
    more = evaluate(tmp_path / "other", pipeline, "--baseline", str(folder), "--limit", "3")
    output = " ".join(more.output.split())
    assert more.exit_code == 2 and f"error: baseline: {folder} holds an evaluation with other settings" in output
    assert "here, of the prompts that --prompts and --limit choose; give another folder" in output
    assert not (tmp_path / "other" / "pictures").exists()


def test_what_a_baseline_lacks_is_named_and_one_that_lacks_all_is_refused(base, pipeline, tuned, tmp_path):
    baseline = tmp_path / "base"
    shutil.copytree(base[0], baseline)
    arguments = (pipeline, "--checkpoint", str(tuned), "--baseline", str(baseline))
    scores = baseline / "scores" / "shapes_jpeg.jsonl"
    # Cut off: one picture has no score.
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    result = evaluate(tmp_path / "tuned", *arguments)
    assert result.exit_code == 0 and "JPEG kB not compared: the baseline has no scores of it" in result.output
    assert "Strict not compared" not in result.output
    (baseline / "scores" / "shapes_shapes.jsonl").unlink()
    result = evaluate(tmp_path / "other", *arguments)
    said = f"baseline: {baseline} has no scores of GenEval, Strict, JPEG kB; accepted is the folder of an evaluation"
    assert result.exit_code == 2 and said in " ".join(result.output.split())
    assert not (tmp_path / "other").exists()


def test_the_base_is_evaluated_with_guidance_as_a_baseline(base, pipeline, tuned, tmp_path):
    folder, _ = base
    result = evaluate(tmp_path / "guided", pipeline, "--guidance", "4.5")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        policy, suite = Policy(load_config("shapes", [pipeline])), SUITES["shapes"]
        entry, seed, path = Evaluation("shapes", tmp_path / "any", subject="s", limit=2)._jobs("shapes")[0]
        with policy.merged("default"):
            x0 = rollout(policy, [entry["prompt"]], [seed], policy.times(suite.steps), suite.solver, 8, guidance=4.5)
    pictures = Path("pictures", "shapes", path.name)
    guided = np.asarray(Image.open(tmp_path / "guided" / pictures))
    np.testing.assert_array_equal(guided, policy.decode(x0)[0].numpy())
    assert not np.array_equal(guided, np.asarray(Image.open(folder / pictures)))
    clash = evaluate(folder, pipeline, "--guidance", "4.5")
    assert clash.exit_code == 2 and "guidance is 'not set' there and 4.5 here" in " ".join(clash.output.split())
    # It is compared with what draws without.
    after = evaluate(tmp_path / "tuned", pipeline, "--checkpoint", str(tuned), "--baseline", str(tmp_path / "guided"))
    assert after.exit_code == 0 and "p, paired" in after.output, after.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "1e39"], "guidance: got 1e+39"),
        (["--suite", "papers"], "suite: got 'papers', accepted are paper, shapes"),
        (["--output", "latin.txt"], "output: latin.txt is a file; give a folder"),
        (["--prompts", "shape=x"], "prompts: got shape, accepted are shapes"),
        (["--prompts", "shapes"], "--prompts: got 'shapes', accepted is NAME=VALUE"),
        (["--prompts", "shapes=a.txt", "--prompts", "shapes=b.txt"], "got 'shapes=b.txt' beside shapes=a.txt"),
        (["--set", "jpeg.quality=1", "--set", "jpeg.quality=2"], "got 'jpeg.quality=2' beside another jpeg.quality"),
        (["--set", "jpeg.=1"], "--set: got 'jpeg.=1', accepted is NAME.KEY=VALUE"),
        (["--per-prompt", "1001"], "'--per-prompt': got '1001': "),
        (["--baseline", "dict/../e"], "baseline: got dict/../e, which is the output; accepted is another"),
        (["--baseline", ""], "--baseline: got an empty name, accepted is a path"),
        (["--checkpoint", "/nowhere"], "checkpoint: got '/nowhere'"),
        (["--set", "ocr.quality=1"], "accepted is NAME.KEY=VALUE"),
        (["--set", "jpeg.quality=[1"], "--set jpeg.quality: is not YAML"),
        (["--set", "jpeg.quality=1e-3"], "quality: got 0.001"),
        (["--set", "jpeg.quality=!!timestamp 2024-01-01"], "jpeg.options.quality: got datetime.date(2024, 1, 1)"),
        (["--set", "jpeg.reward=3"], "jpeg.reward: got 3, accepted is a reward's name or address"),
        (["--set", "jpeg.reward=http://"], "rewards.jpeg.reward: got 'http://', accepted is http://host:port/name"),
        (["--override", "rollout_options.eta=1"], "override: got 'rollout_options.eta=1', which only training reads"),
        (["--override", "device=cuda:99"], "device: got 'cuda:99', but this machine"),
        (["--prompts", "shapes=unquoted.txt"], "prompts: shapes: metadata: entry 0 lacks include"),
        (["--prompts", "shapes=latin.txt"], "prompts: latin.txt is not UTF-8"),
        (["--baseline", "dict"], "baseline: dict/settings.json is damaged, accepted is the folder of an evaluation"),
        (["--baseline", "list"], "baseline: list/settings.json is damaged"),
        (["--baseline", "text"], "baseline: text/settings.json is damaged"),
        (["--set", "jpeg.reward=jpg"], "reward: got 'jpg', did you mean jpeg?"),
        (["--set", "shapes.reward="], "shapes.reward: got None, accepted is a reward's name or address"),
        (["--set", "jpeg.quality=0"], "quality: got 0, accepted are whole numbers from 1 to 100"),
        (["--set", "jpeg.quality=high"], "rewards.jpeg: quality: got 'high'"),
        (["--set", "jpeg.qualitty=3"], "rewards.jpeg.options.qualitty: unknown key, did you mean quality?"),
        (
            [*PAPER, "--prompts", "drawbench=unquoted.txt", "--set", "clipscore.reward=shapes"],
            "prompts: drawbench: metadata: entry 0 lacks include, which ShapesReward needs",
        ),
        ([*PAPER, "--prompts", "ocr=unquoted.txt"], "'a sign': prompt: got 'a sign', accepted for OCR"),
        ([*PAPER, "--prompts", "geneval=nothing.jsonl"], "line 1: include: got None, accepted is a list of at least"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nft.evaluate_cli._draw", None)
    (tmp_path / "unquoted.txt").write_text('a sign "Open"\na sign\n')
    (tmp_path / "nothing.jsonl").write_text('{"tag": "colors", "prompt": "a red bus"}\n')
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    for name, text in (("dict", "{}"), ("list", "[]"), ("text", "settings")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(text)
    result = run(app, ["eval", "--output", str(tmp_path / "e"), *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    # What was refused leaves nothing behind that would refuse the next one.
    assert not (tmp_path / "e").exists()


def test_a_resolution_that_the_policy_refuses_leaves_no_settings(pipeline, tmp_path):
    result = evaluate(tmp_path / "e", pipeline, "--override", "resolution=24")
    assert result.exit_code == 2 and "resolution: got 24" in result.output
    assert not (tmp_path / "e").exists()


def test_a_folder_is_begun_by_one_evaluation_only(tmp_path):
    first, second = (Evaluation("shapes", tmp_path / "e", subject=name, limit=1) for name in "ab")

    def draw(prompts, seeds):
        return torch.zeros(len(prompts), 8, 8, 3, dtype=torch.uint8)

    first.draw(draw, batch=8)
    with pytest.raises(ValueError, match="subject is 'a' there and 'b' here"):
        second.draw(draw, batch=8)


def test_pictures_of_other_prompts_are_not_taken_for_those_of_a_changed_file(tmp_path):
    file = tmp_path / "ocr.txt"

    def evaluation(text):
        file.write_text(f'a sign that says "{text}"\n')
        return Evaluation("paper", tmp_path / "e", subject="s", limit=1, files={"ocr": file})

    begun = evaluation("yes")
    begun.draw(lambda prompts, seeds: torch.zeros(len(prompts), 8, 8, 3, dtype=torch.uint8), batch=8)
    evaluation("yes")
    with pytest.raises(ValueError, match="holds an evaluation with other settings: prompts_sha256 is "):
        evaluation("no")


# --- the paper's table ---

STAND_INS = """
from nft.rewards.base import Reward, Scored

class First(Reward):
    \"\"\"The first pixel's red / 255.\"\"\"
    def __call__(self, pictures, prompts, metadata):
        red = pictures[:, 0, 0, 0].float()
        details = {"correct": (red > 100).float(), "pickscore": red, "answered": (red != 20).float()}
        return Scored(red / 255, details)
"""


def test_the_paper_suite_prints_its_columns_beside_published_rows(tmp_path, monkeypatch):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    (tmp_path / "bench.txt").write_text("a cat\na dog\na bus\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    evaluation = Evaluation("paper", tmp_path / "e", subject="s", files={"drawbench": tmp_path / "bench.txt"}, limit=3)
    assert {name: len(entries) for name, entries in evaluation.entries.items()} == {
        "geneval": 18, "ocr": 3, "drawbench": 3,
    }  # fmt: skip
    drawn = []

    def draw(prompts, seeds):
        drawn.extend(zip(prompts, seeds, strict=True))
        pictures = torch.zeros(len(prompts), 16, 16, 3, dtype=torch.uint8)
        pictures[:, 0, 0, 0] = torch.tensor(seeds) * 10
        return pictures

    evaluation.draw(draw, batch=5)
    assert len(drawn) == 24 and [seed for _, seed in drawn] == [*range(18), *range(3), *range(3)]
    stand_in = {"reward": "stand_ins:First"}
    names = {column.reward for column in SUITES["paper"].columns}
    evaluation.score({name: stand_in for name in names - {"aesthetic"}})
    results = evaluation.results()
    # Seeds 0 to 17 times ten: those above 100 are right, and a group has three prompts.
    assert results["GenEval"]["mean"] == pytest.approx(7 / 18)
    assert results["PickScore"]["mean"] == pytest.approx(10)
    assert results["UniRwd"]["mean"] == pytest.approx(5 * 10 / 255)
    assert "no file" in results["Aesthetic"]["left_out"]
    # The third picture of every set.
    assert results["OCR"]["unanswered"] == results["UniRwd"]["unanswered"] == 1
    console = Console(width=240, record=True, file=io.StringIO())
    for module in ("nft.console", "nft.evaluate_cli"):
        monkeypatch.setattr(f"{module}.console", console)
    _print(evaluation, results, {}, False)
    text = console.export_text()
    assert "geneval, ocr: prompts of our own and not those of the published rows; give --prompts SET=FILE" in text
    assert "UniRwd: asked in our own words" in text
    assert "UniRwd: pictures without an answer: 1" in text
    _print(evaluation, results, {"unifiedreward": {"question": "{prompt}?"}}, False)
    assert "UniRwd: asked" not in console.export_text()
    assert all(column.title in text for column in SUITES["paper"].columns)
    assert "2509.16117" in text and "Aesthetic left out" in text
    (row,) = [line for line in text.splitlines() if "DiffusionNFT" in line]
    assert [float(cell) for cell in row.split("│")[2:-1]] == [0.94, 0.91, 23.8, 0.293, 0.331, 6.01, 1.49, 3.49]


def test_pictures_of_one_prompt_are_averaged(tmp_path, monkeypatch):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    evaluation = Evaluation("paper", tmp_path / "e", subject="s", limit=2, per_prompt=3)
    red = torch.arange(3 * 14) * 5

    def draw(prompts, seeds):
        pictures = torch.zeros(len(seeds), 4, 4, 3, dtype=torch.uint8)
        pictures[:, 0, 0, 0] = red[seeds]
        return pictures

    evaluation.draw(draw, batch=7)
    evaluation.score({"ocr": {"reward": "stand_ins:First"}, "geneval": {"reward": "stand_ins:First"}})
    ocr = next(column for column in SUITES["paper"].columns if column.title == "OCR")
    np.testing.assert_allclose(evaluation.column(ocr)["ocr"], red[:6].view(2, 3).float().mean(1) / 255, rtol=1e-6)


def red_is_the_seed(prompts, seeds):
    pictures = torch.zeros(len(seeds), 4, 4, 3, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.tensor(seeds)
    return pictures


def test_no_picture_is_scored_twice(tmp_path, monkeypatch):
    """Neither by two commands at once nor where they were not kept apart; what they left is scored anew."""

    def open_folder():
        return Evaluation("shapes", tmp_path, subject="s", limit=1)

    def slow(judge, pictures, prompts, metadata):
        time.sleep(0.02)
        return score(judge, pictures, prompts, metadata)

    monkeypatch.setattr("nft.evaluate.score", slow)
    open_folder().draw(red_is_the_seed, batch=6)
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(open_folder().score, batch=1) for _ in range(2)]:
            future.result()
    path = tmp_path / "scores" / "shapes_jpeg.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    names = [f"{i:05d}_0.png" for i in range(6)]
    assert [json.loads(line)["picture"] for line in lines] == names
    results = open_folder().results()
    broken = ([lines[0], text, *lines[1:]] for text in ("{broken\n", "{}\n", "[]\n"))
    for left in (2 * lines, [*lines[:2], *lines[:2], *lines[2:4]], *broken):
        path.write_text("".join(left))
        open_folder().score()
        assert open_folder().results() == results
    assert path.read_text() == whole
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"output: .*shapes_jpeg.json is damaged: JSONDecodeError"):
        open_folder().check()


def test_a_column_whose_detail_the_reward_lacks_is_left_out_and_the_others_are_not(tmp_path):
    evaluation = Evaluation("shapes", tmp_path, subject="s", limit=1)
    evaluation.draw(red_is_the_seed, batch=6)
    evaluation.score({"shapes": {"reward": "jpeg"}})
    results = evaluation.results()
    assert results["GenEval"] == {"left_out": "reward jpeg gives no detail correct"}
    assert results["Strict"] == {"left_out": "reward jpeg gives no detail strict"}
    assert "mean" in results["JPEG kB"]


def test_scores_of_other_rewards_are_not_compared(tmp_path):
    evaluations = [
        Evaluation("shapes", tmp_path / key, subject="s", limit=1, key=key) for key in ("baseline", "output")
    ]
    for evaluation, options in zip(evaluations, ({}, {"jpeg": {"quality": 20}}), strict=True):
        evaluation.draw(red_is_the_seed, batch=6)
        evaluation.score(options)
    with pytest.raises(ValueError, match=r"baseline: .*quality is 'not set' there and 20 here"):
        evaluations[1].results(evaluations[0])


def test_sets_without_a_file_are_generated_and_said_to_be(tmp_path):
    (tmp_path / "ocr.txt").write_text('a sign that says "yes"\n')
    evaluation = Evaluation("paper", tmp_path / "e", subject="s", limit=1, files={"ocr": tmp_path / "ocr.txt"})
    assert evaluation.generated == ["geneval", "drawbench"]
    assert [entry["tag"] for entry in evaluation.entries["drawbench"]] == ["person", "animal", "thing", "place"]


def test_generated_sets_are_pinned():
    """A change of the generators would change every figure without a word."""
    prompts = [entry["prompt"] for entry in SUITES["paper"].prompts["geneval"]()]
    texts = [entry["prompt"] for entry in SUITES["paper"].prompts["ocr"]()]
    pictures = [entry["prompt"] for entry in SUITES["paper"].prompts["drawbench"]()]
    assert (len(prompts), len(texts), len(pictures)) == (480, 1000, 200)
    pinned = Path(__file__).with_name("pinned_prompts.txt").read_text().splitlines()
    assert pinned == [*prompts[::40], *texts[::100], *pictures[::20]]
