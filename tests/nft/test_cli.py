"""Commands as a user types them."""

import pytest

pytest.importorskip("diffusers")

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from nft.cli import app
from nft.config import load_config
from nft.policy import Policy
from nft.worlds.shapes.tiny import build_pipeline

run = CliRunner().invoke


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline().save_pretrained(folder)
    return f"pipeline={folder}"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_sample_writes_a_picture_for_every_prompt_and_seed(pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two blue squares\n\n")
    common = ["--set", pipeline, "--steps", "2"]
    result = run(app, ["sample", "a red circle", "--file", str(prompts), "--per-prompt", "2", *common,
                       "--output", str(tmp_path / "a")])  # fmt: skip
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["0000_seed0.png", "0001_seed1.png", "0002_seed0.png", "0003_seed1.png", "grid.png"]
    # One prompt and one seed make one picture, whatever else is drawn, but for the last bit of a matrix product, which
    # depends on the batch; another solver or guidance makes another picture.
    run(app, ["sample", "two blue squares", "--seed", "1", *common, "--output", str(tmp_path / "b")])
    alone = pixels(tmp_path / "b" / "0000_seed1.png")
    assert np.abs(alone - pixels(tmp_path / "a" / "0003_seed1.png")).max() <= 1
    for i, more in enumerate((["--solver", "heun"], ["--guidance", "4"])):
        run(app, ["sample", "two blue squares", "--seed", "1", *common, *more, "--output", str(tmp_path / str(i))])
        assert np.abs(alone - pixels(tmp_path / str(i) / "0000_seed1.png")).max() > 5


def test_sample_takes_a_checkpoint_of_any_rank(pipeline, tmp_path):
    policy = Policy(load_config("shapes", [pipeline, "lora_rank=4"]))
    for parameter in policy.trained:
        parameter.data.add_(0.1)
    policy.save_adapter("default", tmp_path / "run" / "checkpoint" / "default")
    for name, more in (("base", []), ("tuned", ["--checkpoint", str(tmp_path / "run")])):
        result = run(app, ["sample", "a red circle", "--set", pipeline, "--steps", "2", *more,
                           "--output", str(tmp_path / name)])  # fmt: skip
        assert result.exit_code == 0, result.output
    base, tuned = (pixels(tmp_path / name / "0000_seed0.png") for name in ("base", "tuned"))
    assert np.abs(base - tuned).max() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompts: got none"),
        (["a", "--solver", "eulr"], "eulr"),
        (["a", "--checkpoint", "/nowhere"], "checkpoint: got '/nowhere'"),
        (["a", "--file", "/nowhere"], "/nowhere"),
        (["a", "--set", "devise=cuda"], "devise: unknown key, did you mean device?"),
    ],
)
def test_sample_names_bad_input(arguments, message):
    result = run(app, ["sample", *arguments])
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


def test_solvers_are_listed():
    result = run(app, ["solvers"])
    assert result.exit_code == 0 and "dpm++2M" in result.output
