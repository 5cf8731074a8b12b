"""A user's own modules, as the documents have them."""

import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from typer.testing import CliRunner

from nft.cli import app
from nft.compare import Run
from nft.config import load_config
from nft.objectives import OBJECTIVES
from nft.rewards import registry
from nft.trainer import Trainer
from nft_kernels.solvers import SOLVERS

DOCS = Path(__file__).parents[2] / "docs"
SMALL = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
         "eval_steps=1", "eval_solver=euler", "lora_rank=4"]  # fmt: skip


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The documents' modules in the working folder, and nothing registered by them that stays."""
    for page, name in (("solvers", "adams"), ("baselines", "mine")):
        (code,) = re.findall(rf"```python\n(# {name}\.py\n.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for table, name in ((SOLVERS, "adams2"), (OBJECTIVES, "better_half")):
        table.pop(name, None)
    for name in ("adams", "mine"):
        sys.modules.pop(name, None)


def test_a_solver_and_an_objective_of_ones_own(modules, pipeline, tmp_path):
    run = CliRunner().invoke
    arguments = [f"pipeline={pipeline}", *SMALL, "plugins=[adams, mine]", "rollout_solver=adams2",
                 "objective=better_half", "epochs=1"]  # fmt: skip
    result = run(app, ["train", *arguments, "--output", "run"])
    assert result.exit_code == 0, result.output
    # The run's settings name them: another process has imported nothing.
    for table, name in ((SOLVERS, "adams2"), (OBJECTIVES, "better_half")):
        del table[name]
    for name in ("adams", "mine"):
        del sys.modules[name]
    for more in (
        ["train", "--resume", "--output", "run", "epochs=2"],
        ["sample", "a dog", "--checkpoint", "run", "--solver", "adams2", "--steps", "2"],
        ["plan", "--config", "run/config.yaml"],
    ):
        result = run(app, more)
        assert result.exit_code == 0, result.output
    data = Trainer(load_config("run/config.yaml"), tmp_path / "other").sample()
    assert set(data["r"].tolist()) <= {0.0, 2.0} and torch.is_tensor(data["x0"])


def test_a_comparisons_processes_import_the_module(modules, pipeline, tmp_path):
    """Settings come to a new process as they were checked, without a check that would import it."""
    settings = [f"pipeline={pipeline}", *SMALL, "plugins=[mine]", "objective=better_half", "epochs=1"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(Run(tmp_path / "run", load_config("shapes", settings))).result()
    assert (tmp_path / "run" / "result.json").is_file()


def test_solvers_of_a_module_are_listed(modules):
    Path("needy.py").write_text(
        "from nft_kernels.solvers import register\n\n\n"
        '@register(\'needy\')\ndef needy(sigmas, *, gamma):\n    """Needs [gamma]."""\n'
    )
    try:
        listed = CliRunner().invoke(app, ["solvers", "adams", "needy"])
    finally:
        SOLVERS.pop("needy", None)
        sys.modules.pop("needy", None)
    assert listed.exit_code == 0 and re.search(r"adams2 +│ +2 +│ +1 +│ +no", listed.output), listed.output
    assert "[gamma]." in listed.output and "'gamma')" in listed.output


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nothing_here", "plugins: got 'nothing_here', but there is no module 'nothing_here'"),
        ("broken", "plugins: got 'broken', but broken fails: ZeroDivisionError: division by zero"),
        ("leaving", "plugins: got 'leaving', but leaving fails: SystemExit"),
        ("", "plugins: got '', but  fails: ValueError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(modules, module, message):
    Path("broken.py").write_text("1 / 0\n")
    Path("leaving.py").write_text("import sys\n\nsys.exit()\n")
    for arguments in (["solvers", module], ["plan", f"plugins=['{module}']"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.output


def test_what_a_module_prints_is_no_part_of_the_settings_that_are_shown(tmp_path):
    (tmp_path / "chatty.py").write_text("print('hello: there')\n")
    command = [sys.executable, "-m", "nft.cli", "config", "show", "plugins=[chatty]"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(shown.stdout)["plugins"] == ["chatty"] and "hello" not in shown.stdout
    assert "hello: there" in shown.stderr


def test_names_that_nothing_registers_are_named_with_those_that_are_known():
    for setting in ("rollout_solver", "eval_solver"):
        result = CliRunner().invoke(app, ["plan", f"{setting}=eulr"])
        assert result.exit_code == 2 and f"{setting}: got 'eulr', accepted are euler, heun," in result.output
    result = CliRunner().invoke(app, ["plan", "objective=dpo"])
    assert result.exit_code == 2 and "objective: got 'dpo', accepted are awm, grpo, nft" in result.output


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        (
            "SOLVERS['odd'] = lambda sigmas: None",
            ["rollout_solver=odd"],
            "odd: got NoneType, accepted is a SolverTable",
        ),
        ("SOLVERS['odd'] = lambda sigmas: {}['a']", ["rollout_solver=odd"], "for which odd fails: KeyError: 'a'"),
        (
            "SOLVERS['odd'] = lambda sigmas: SolverTable('odd', 1, 'velocity', ())",
            ["rollout_solver=odd"],
            "odd: got no rows for 2 steps, accepted is at least one",
        ),
        (
            "SOLVERS['odd'] = lambda s: SolverTable('odd', 1, 'velocity', (Row(1.0, 1.0, ()),))",
            ["rollout_solver=odd"],
            "rows: got Row(t=1.0, a=1.0, b=(), c=0.0) as row 0 of odd",
        ),
        (
            "SOLVERS['odd'] = lambda s: SolverTable("
            "'odd', 1, 'velocity', tuple(Row(t, 1.0, (-0.1,), 0.1 * (i % 2)) for i, t in enumerate(s[:-1])))",
            ["rollout_solver=odd", "objective=grpo", "rollout_steps=4", "timesteps_per_sample=2"],
            "rollout_solver: got odd, which draws noise in the rows [1, 3], but grpo trains on rows one after another",
        ),
        ("OBJECTIVES['odd'] = {}", [], "plugins: got {} as the objective 'odd', accepted is an Objective"),
        (
            "OBJECTIVES['odd'] = OBJECTIVES['rwr']._replace(reads='beta')",
            [],
            "as the objective 'odd', accepted is an Objective, of which reads is a tuple of names of settings",
        ),
    ],
)
def test_what_cannot_work_is_named_before_any_work(modules, code, settings, message):
    header = "from nft.objectives import OBJECTIVES\nfrom nft_kernels.solvers import SOLVERS, Row, SolverTable\n"
    Path("odd.py").write_text(f"{header}\n{code}\n")
    try:
        result = CliRunner().invoke(app, ["train", *SMALL, *settings, "plugins=[odd]", "--output", "run"])
    finally:
        sys.modules.pop("odd", None)
        SOLVERS.pop("odd", None)
        OBJECTIVES.pop("odd", None)
    assert result.exit_code == 2 and message in result.output, (result.output, result.exception)
    assert not Path("run").exists()


@pytest.mark.parametrize("own", ["json.py", "json/__init__.py"])
def test_a_module_that_another_one_hides_is_not_taken_for_it(tmp_path, monkeypatch, own):
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=r"plugins: got 'json', but .*json.__init__\.py comes before the working"):
        load_config("shapes", ["plugins=[json]"])


def test_a_bundled_reward_is_not_looked_for_in_the_working_folder(tmp_path, monkeypatch):
    """As in a checkout of this project whose installed copy lies elsewhere."""
    copy = tmp_path / "nft" / "rewards" / "jpeg.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert registry.find("jpeg").__name__ == "JPEGCompressibility"
    with pytest.raises(ValueError, match="comes before the working folder's module of that name"):
        registry.find("nft.rewards.jpeg:JPEGCompressibility")
