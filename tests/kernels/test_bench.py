"""The benchmark command: what it measures is checked, and what became slower is reported."""

import functools
import json

import pytest
import torch

from nft_kernels import bench
from nft_kernels.backends import native

# The compiled module may have been left out.
NATIVE = [] if native.why_not(torch.empty(0)) else ["native"]


def run(tmp_path, *arguments):
    path = tmp_path / "results.json"
    code = bench.main([*arguments, "--batches", "2", "--seconds", "0.01", "--device", "cpu", "--json", str(path)])
    return code, json.loads(path.read_text())


def test_every_op_and_mode_is_checked_and_timed(tmp_path):
    providers = ["eager", "reference", *NATIVE]
    code, report = run(
        tmp_path, "--ops", "nft_loss", "add_noise", "solver_step", "--modes", *bench.MODES, "--dtypes", "float32",
        "--providers", *providers, "--csv", str(tmp_path / "r.csv"), "--caches", "warm", "cold",
    )  # fmt: skip
    rows = report["results"]
    assert code == 0 and all(row["check"] for row in rows)
    assert {(r["op"], r["mode"]) for r in rows if r["op"] == "nft_loss"} == {("nft_loss", m) for m in bench.MODES}
    assert {r["op"] for r in rows} == {"nft_loss", "add_noise", "solver_step"}
    assert all(0 < r["p20"] <= r["median"] <= r["p80"] and r["over_eager"] > 0 for r in rows)
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + len(rows)
    assert {"command", "date", "device", "versions"} <= set(report)


def test_options_of_the_loss_are_checked_against_plain_formulas(tmp_path):
    """Also for packed tokens, whose channels come last."""
    code, report = run(
        tmp_path, "--options", *bench.OPTIONS, "--dtypes", "float32", "--shapes", "sd35_512", "flux_1024",
        "--providers", "eager", "reference", *NATIVE,
    )  # fmt: skip
    rows = report["results"]
    assert code == 0 and all(row["check"] for row in rows)
    assert {row["option"] for row in rows} == set(bench.OPTIONS)


def test_a_plot_has_a_label_for_every_case(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures, subplots = [], pyplot.subplots
    monkeypatch.setattr(pyplot, "subplots", lambda **k: figures.append(subplots(**k)) or figures[-1])
    _, report = run(
        tmp_path, "--options", "none", "mask", "--caches", "warm", "cold", "--dtypes", "float32",
        "--providers", "eager", "reference", "--plot", str(tmp_path / "plot.png"),
    )  # fmt: skip
    ((_, axis),) = figures
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert len(labels) == len(set(labels)) == 4 and (tmp_path / "plot.png").is_file()
    for label, eager in zip(labels, [row for row in report["results"] if row["provider"] == "eager"], strict=True):
        assert eager["option"] in label and eager["cache"] in label


def test_no_speed_up_is_reported_for_wrong_numbers(tmp_path, monkeypatch):
    right = bench.nft_loss
    monkeypatch.setattr(bench, "nft_loss", lambda *a, **k: right(*a, **k, beta=0.9))
    code, report = run(tmp_path, "--dtypes", "float32", "--providers", "eager", "reference")
    wrong = next(row for row in report["results"] if row["provider"] == "reference")
    assert code == 1 and not wrong["check"] and wrong["over_eager"] is None


def test_noise_of_another_seed_is_wrong(tmp_path, monkeypatch):
    right = bench.add_noise
    monkeypatch.setattr(bench, "add_noise", lambda x0, t, seed, **k: right(x0, t, seed=seed + 1, **k))
    code, report = run(tmp_path, "--ops", "add_noise", "--dtypes", "float32", "--providers", "eager", "reference")
    assert code == 1 and [row["check"] for row in report["results"]] == [True, False]


def test_every_case_is_compiled_for_its_own_shape(monkeypatch):
    # Tracing is what is counted, and without a compiler behind it takes no time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shapes = []

    def formula(x):
        # Traced once for every compilation.
        shapes.append(x.shape[0])
        return x + 1

    for batch in range(2, 14):
        bench._compiled(formula)(torch.zeros(batch, 3))
    assert shapes == list(range(2, 14))


def test_providers_that_cannot_run_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--providers", "eager", "triton")
    assert "--providers: got triton, which cannot run on cpu" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    measured = bench.measure

    def interrupted(case, *rest):
        if case.mode == "backward":
            raise KeyboardInterrupt
        return measured(case, *rest)

    monkeypatch.setattr(bench, "measure", interrupted)
    chosen = ["--dtypes", "float32", "--providers", "eager", "--modes"]
    code, report = run(tmp_path, *chosen, "forward", "backward", "both")
    assert code == 130 and [row["mode"] for row in report["results"]] == ["forward"]
    assert "stopped: what was measured is kept" in capsys.readouterr().err
    assert bench.main([*chosen, "backward", "--device", "cpu"]) == 130


def test_what_is_the_loss_own_needs_it(tmp_path, capsys):
    for option in (["--modes", "forward"], ["--options", "mask"]):
        with pytest.raises(SystemExit):
            run(tmp_path, "--ops", "add_noise", *option)
        assert "are of nft_loss, got --ops add_noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1000000"], "--threads: got 1000000, accepted are 1 to "),
        (["--threshold", "2"], "--threshold: got 2.0 without --compare"),
        (["--batches", "9", "999"], "--batches: got 9, 999, which need more memory than there is"),
    ],
)
def test_what_a_machine_lacks_and_what_does_nothing_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *_: torch.empty(2**60))
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batches", "--seconds", "--threads", "--threshold"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_are_above_0(option, value, capsys):
    with pytest.raises(SystemExit):
        bench.main([option, value])
    assert f"argument {option}: got {value}, accepted are finite numbers above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--device", "bogus", "a device that torch has here"),
        ("--device", "meta", "a device that torch has here"),
        ("--json", "nowhere/results.json", "a file in a folder that exists"),
        ("--csv", ".", "a file in a folder that exists"),
        ("--plot", "nowhere/plot.png", "a file in a folder that exists"),
        ("--plot", "plot.foo", "a name that ends with .png, .pdf or .svg"),
    ],
)
def test_what_would_fail_after_measuring_is_refused_before(option, value, accepted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        bench.main([option, value])
    assert f"argument {option}: got {value}, accepted is {accepted}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"results": []}', '{"results": 3}', '{"results": [{"a": 1}]}', None]
)
def test_a_comparison_with_nothing_is_refused(tmp_path, capsys, content):
    old = tmp_path / "old.json"
    if content is not None:
        old.write_text(content)
    with pytest.raises(SystemExit):
        bench.main(["--compare", str(old), str(old)])
    assert f"--compare: got {old}" in capsys.readouterr().err


def test_a_comparison_misses_what_is_gone_or_wrong(tmp_path, capsys):
    _, report = run(tmp_path, "--dtypes", "float32", "--providers", "eager", "reference")
    (tmp_path / "old.json").write_text(json.dumps(report))
    report["results"][0]["check"] = False
    del report["results"][1]
    (tmp_path / "new.json").write_text(json.dumps(report))
    assert bench.main(["--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].endswith("eager: fails its check") and lines[1].endswith("reference: is missing")


@pytest.mark.parametrize(("factor", "code"), [(1.05, 0), (1.5, 1)])
def test_comparison_of_two_files(tmp_path, capsys, factor, code):
    _, report = run(tmp_path, "--dtypes", "float32", "--providers", "eager")
    (tmp_path / "old.json").write_text(json.dumps(report))
    report["results"][0]["median"] *= factor
    (tmp_path / "new.json").write_text(json.dumps(report))
    assert bench.main(["--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code
    assert (" us became " if code else "nothing became slower") in capsys.readouterr().out
