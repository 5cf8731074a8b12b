"""Commands as a user types them."""

import pytest

pytest.importorskip("diffusers")

import gc
import hashlib
import json
import os
import re
import resource
import shlex
import shutil

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nft import report
from nft.alarms import AlarmError
from nft.cli import app
from nft.config import load_config
from nft.console import bars
from nft.full import load_policy
from nft.policy import Policy
from nft.report import save_grid
from nft.trainer import Trainer
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
    common = ["--override", pipeline, "--steps", "2"]
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


def test_sample_draws_the_prompts_of_a_file_that_is_trained_on(pipeline, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two blue squares", "tag": "x", "count": 2}\n')
    for name, source in (("file", ["--file", str(path)]), ("argument", ["two blue squares"])):
        result = run(app, ["sample", *source, "--override", pipeline, "--steps", "2", "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    drawn = [(tmp_path / name / "0000_seed0.png").read_bytes() for name in ("file", "argument")]
    assert drawn[0] == drawn[1]


def test_sample_takes_a_solvers_options(pipeline, tmp_path):
    drawn = []
    for i, more in enumerate(([], ["--option", "eta=0.0"], ["--option", "eta=1.0"])):
        arguments = [
            "--override",
            pipeline,
            "--steps",
            "3",
            "--solver",
            "ddim",
            *more,
            "--output",
            str(tmp_path / str(i)),
        ]
        result = run(app, ["sample", "a red circle", *arguments])
        assert result.exit_code == 0, result.output
        drawn.append((tmp_path / str(i) / "0000_seed0.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_sample_keeps_what_it_has_drawn(pipeline, tmp_path, monkeypatch):
    decode, calls = Policy.decode, []

    def interrupted(policy, latents):
        calls.append(len(latents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(policy, latents)

    monkeypatch.setattr(Policy, "decode", interrupted)
    settings = ["--override", pipeline, "--override", "rollout_batch=2", "--steps", "1"]
    result = run(app, ["sample", "a red circle", *settings, "--per-prompt", "6", "--output", str(tmp_path / "a")])
    assert result.exit_code == 130 and calls == [2, 2, 2]
    assert "stopped: the pictures drawn so far are kept" in result.output
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [f"000{i}_seed{i}.png" for i in range(4)]


def test_sample_of_ten_thousand_pictures_holds_those_of_the_grid_and_names_all_in_their_order(
    pipeline, tmp_path, monkeypatch
):
    monkeypatch.setattr("nft.rollout.rollout", lambda policy, prompts, seeds, *_, **__: torch.tensor(seeds))
    decoded = lambda policy, seeds: (seeds % 251).to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)  # noqa: E731
    monkeypatch.setattr(Policy, "decode", decoded)
    grids = []

    def watched(pictures, prompts, path):
        tensors = (x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape[-3:] == (1, 1, 3))
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        grids.append((pictures[:, 0, 0, 0].tolist(), len(prompts), sum(held.values())))

    monkeypatch.setattr("nft.report.save_grid", watched)
    result = run(app, ["sample", "a red circle", "--override", pipeline, "--per-prompt", "10001", "--output",
                       str(tmp_path / "a")])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [f"{i:05d}_seed{i}.png" for i in range(10001)]
    ((pictures, prompts, held),) = grids
    assert pictures == [i * 10001 // 24 % 251 for i in range(24)] and prompts == 24
    # The grid's, one by one and together, and the last batch.
    assert held <= (2 * 24 + 96) * 3


def test_sample_takes_a_new_folder_every_time(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("samples", "samples-2", "samples-3"):
        result = run(app, ["sample", "a red circle", "--override", pipeline, "--steps", "1"])
        assert result.exit_code == 0 and result.output.endswith(f": {name}\n"), result.output
        assert (tmp_path / name / "0000_seed0.png").is_file()

    # Another command may be drawing, and have taken one since this one began.
    def slow(*given, **options):
        os.mkdir("samples-4")
        return load_policy(*given, **options)

    monkeypatch.setattr("nft.full.load_policy", slow)
    result = run(app, ["sample", "a red circle", "--override", pipeline, "--steps", "1"])
    assert result.exit_code == 0 and result.output.endswith(": samples-5\n"), result.output
    assert not os.listdir("samples-4")


def test_sample_takes_a_checkpoint_of_any_rank(pipeline, tmp_path):
    policy = Policy(load_config("shapes", [pipeline, "lora_rank=4"]))
    for parameter in policy.trained:
        parameter.data.add_(0.1)
    policy.save_adapter("default", tmp_path / "run" / "checkpoint" / "default")
    for name, more in (("base", []), ("tuned", ["--checkpoint", str(tmp_path / "run")])):
        result = run(app, ["sample", "a red circle", "--override", pipeline, "--steps", "2", *more,
                           "--output", str(tmp_path / name)])  # fmt: skip
        assert result.exit_code == 0, result.output
    base, tuned = (pixels(tmp_path / name / "0000_seed0.png") for name in ("base", "tuned"))
    assert np.abs(base - tuned).max() > 5


def test_sample_and_eval_take_the_weights_of_full_fine_tuning(pipeline, tmp_path):
    whole = StableDiffusion3Pipeline.from_pretrained(pipeline.removeprefix("pipeline="))
    with torch.no_grad():
        for parameter in whole.transformer.parameters():
            parameter.mul_(1.05)
    whole.transformer.save_pretrained(tmp_path / "run" / "checkpoint" / "default")
    whole.save_pretrained(tmp_path / "changed")
    tuned = ["--checkpoint", str(tmp_path / "run")]
    cases = {"base": [pipeline], "tuned": [pipeline, *tuned], "changed": [f"pipeline={tmp_path / 'changed'}"]}
    cases["guided"] = [*cases["tuned"], "--guidance", "1", "--reference"]
    for name, more in cases.items():
        result = run(
            app, ["sample", "a red circle", "--steps", "2", "--override", *more, "--output", str(tmp_path / name)]
        )
        assert result.exit_code == 0, result.output
    base, *same = (pixels(tmp_path / name / "0000_seed0.png") for name in cases)
    assert np.abs(base - same[0]).max() > 5
    # v_ref + 1 (v - v_ref) is v up to rounding.
    assert all(np.abs(same[0] - other).max() <= 1 for other in same[1:])
    evaluation = ["eval", "--limit", "1", "--override", pipeline, *tuned, "--output", str(tmp_path / "eval")]
    result = run(app, evaluation, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    weights = (tmp_path / "run" / "checkpoint" / "default" / "diffusion_pytorch_model.safetensors").read_bytes()
    subject = json.loads((tmp_path / "eval" / "settings.json").read_text())["subject"]
    assert subject.endswith(hashlib.sha256(weights).hexdigest())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompts: got none"),
        (["a", "--solver", "eulr"], "solver: got 'eulr', accepted are euler"),
        (["a", "--checkpoint", "/nowhere"], "checkpoint: got '/nowhere'"),
        (["a", "--file", "/nowhere"], "file: /nowhere cannot be read: No such file"),
        (["a", "--file", "latin.txt"], "file: latin.txt is not UTF-8"),
        (["a", "--file", "text.jsonl"], "file: text.jsonl, line 1: "),
        (["a", "--output", "latin.txt"], "output: latin.txt is a file; give a folder"),
        (["a", "--output", ""], "--output: got an empty name, accepted is a path"),
        (["a", "--output="], "--output: got an empty name, accepted is a path"),
        (["a", "--guidance", "inf"], "guidance: got inf, accepted are numbers that float32 holds"),
        (["a", "--guidance", "1e300"], "guidance: got 1e+300, accepted are numbers that float32 holds"),
        (["a", "--output", "drawn"], "output: drawn holds 0000_seed0.png already; give another folder"),
        (["a", "--per-prompt", "2", "--seed", str(2**63 - 1)], f"seed: got {2**63 - 1}, accepted are 0 to {2**63 - 2}"),
        (["a", "--override", "devise=cuda"], "devise: unknown key, did you mean device?"),
        (
            ["a", "--override", "rollout_solver=ddim"],
            "override: got 'rollout_solver=ddim', which only training reads; accepted",
        ),
        (["a", "--option", "eta"], "--option: got 'eta', accepted is NAME=VALUE"),
        (["a", "--option", "eta=1"], "solver: dpm++2M cannot take 20 steps with options {'eta': 1}: eta: unknown"),
        (["a", "--solver", "ddim", "--option", "eta=["], "--option eta: is not YAML"),
        (["a", "--option", "=1"], "--option: got '=1', accepted is NAME=VALUE"),
        (["a", "--option", "eta=0", "--option", "eta=1"], "--option: got 'eta=1' beside eta=0, accepted is one of"),
        (["a", "--per-prompt", "0"], "'--per-prompt': got '0': "),
        (["a", "--per-prompt", "1000001"], "'--per-prompt': got '1000001': "),
        (["a", "--steps", "2.5"], "'--steps': got '2.5': "),
        (["a", "--guidance", "nan"], "'--guidance': got 'nan': "),
        ([""], "prompts: got '', accepted is a text"),
        (["a", " "], "prompts: got ' ', accepted is a text"),
        (["a", "device=cuda"], "prompts: got 'device=cuda', accepted is a text, and settings with --override"),
        (["a", "--file", ""], "--file: got an empty name, accepted is a path"),
        (["a", "--config", ""], "--config: got an empty name"),
        (["a", "--checkpoint="], "--checkpoint: got an empty name"),
        (["a" + chr(0xD800)], "prompts: got 'a\\ud800', accepted is a text"),
    ],
)
def test_sample_names_bad_input(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "text.jsonl").write_text("a dog\n")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "0000_seed0.png").touch()
    result = run(app, ["sample", *arguments])
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which not even root makes a file")
def test_an_output_that_cannot_be_made_is_named_before_the_pipeline_is_loaded(monkeypatch):
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)
    result = run(app, ["train", "--output", "/proc/run"])
    assert result.exit_code == 2 and "error: output: /proc/run cannot be written to: " in result.output


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_an_output_whose_name_is_too_long_is_named(more):
    result = run(app, ["train", "--output", "a" * 300, *more])
    assert result.exit_code == 2 and result.output.startswith("error: output: aaa")
    assert "cannot be made: File name too long" in result.output


def test_an_adapter_of_another_model_is_named(pipeline, tmp_path):
    policy = Policy(load_config("shapes", [pipeline, "lora_rank=4"]))
    policy.save_adapter("default", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    first, *others = sorted(state)
    more = {f"base_model.model.more.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    for broken, message in (
        ({name: state[name] for name in others}, "got transformer_blocks.0.attn.add_k_proj in"),
        ({**state, first: state[first][:, :-1].contiguous()}, "no layer transformer_blocks.0.attn.add_k_proj of size"),
        ({**state, **more}, "does not fit the pipeline, which has no layer more of size (4, 4)"),
    ):
        save_file(broken, path)
        result = run(app, ["sample", "a red circle", "--override", pipeline, "--checkpoint", str(tmp_path)])
        assert result.exit_code == 2, result.output
        assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["file"], "output: file is a file; give a folder"),
        (["file/a"], "output: file/a lies in "),
        (["."], "output: . holds file already; give another folder"),
        (["a", "--flow-steps", "0"], "flow_steps: got 0, accepted are positive numbers"),
        (["a", "--wrong-steps", "-1"], "wrong_steps: got -1"),
        (["a", "--wrong-share", "nan"], "wrong_share: got nan, accepted is 0 to 1"),
        (["a", "--seed", "-1"], "seed: got -1, accepted are 0 to "),
    ],
)
def test_pretrain_names_bad_input_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nft.worlds.shapes.pretrain.build_pipeline", None)
    (tmp_path / "file").touch()
    (tmp_path / "model_index.json").touch()
    result = run(app, ["pretrain", *arguments])
    assert result.exit_code == 2 and f"error: {message}" in result.output, result.output


def test_solvers_are_listed():
    result = run(app, ["solvers"])
    assert result.exit_code == 0 and "dpm++2M" in result.output


TINY = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
        "eval_steps=1", "eval_solver=euler", "lora_rank=4", "epochs=2"]  # fmt: skip


def train(pipeline, output, *more):
    return run(app, ["train", pipeline, *TINY, "--output", str(output), *more])


def test_train_resume_and_reports_of_one_and_several_runs(pipeline, tmp_path, monkeypatch):
    for name in ("one", "two"):
        result = train(pipeline, tmp_path / name, f"seed={len(name)}", "beta=0.5" if name == "one" else "beta=2")
        assert result.exit_code == 0, result.output
    assert "holds a run already" in " ".join(train(pipeline, tmp_path / "one").output.split())
    result = run(app, ["train", "epochs=3", "lora_rank=8", "--resume", "--output", str(tmp_path / "one")])
    assert result.exit_code == 2 and "lora_rank: got 8, but" in result.output
    result = run(app, ["train", "epochs=3", "lora_alpha=8", "--resume", "--output", str(tmp_path / "one")])
    assert result.exit_code == 2 and "lora_alpha: got 8, but" in result.output
    before = (tmp_path / "one" / "config.yaml").read_text()
    result = run(app, ["train", "epochs=1", "--resume", "--output", str(tmp_path / "one")])
    assert result.exit_code == 2 and "epochs: got 1, but 2 are finished already" in result.output
    assert (tmp_path / "one" / "config.yaml").read_text() == before
    result = run(app, ["train", "--config", "shapes_awm", "--resume", "--output", str(tmp_path / "one")])
    assert result.exit_code == 2 and "config: got shapes_awm with --resume, accepted is none" in result.output
    # Where no bar is drawn, as in a log, every epoch has a line.
    assert re.search(r"epoch 1 of 2: reward \d\.\d{3}, loss .*, \d+\.\d s", train(pipeline, tmp_path / "three").output)
    # A resumed run keeps its settings but for what is given anew.
    result = run(app, ["train", "epochs=3", "--resume", "--output", str(tmp_path / "one")])
    assert result.exit_code == 0 and "epoch 3: held-out score" in result.output
    assert "resumed with" not in result.output
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("NFT_KERNELS_BACKEND", "reference")
        result = run(app, ["train", "--resume", "--output", str(tmp_path / "one")])
    assert "resumed with kernels reference" in result.output and "not to the last bit" in result.output
    folder = tmp_path / "one"
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2, 2, 3, 3]
    assert {p.name for p in (folder / "pictures").iterdir()} == {f"epoch-00000{i}.png" for i in (0, 2, 3)}
    # Two grids and the curves, and the alarm that an untrained pipeline's equal scores raise.
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "zero_variance" in page
    assert run(app, ["report", str(folder)]).exit_code == 0
    result = run(app, ["report", str(folder), str(tmp_path / "two"), "--output", str(tmp_path / "both.html")])
    assert result.exit_code == 0, result.output
    both = (tmp_path / "both.html").read_text()
    assert both.count("data:image/png") == 3 and "<td>beta</td><td>0.5</td><td>2</td>" in both.replace("2.0", "2")
    assert "<td>lora_rank</td>" not in both
    alone = tmp_path / "alone.html"
    assert run(app, ["report", str(folder), "--output", str(alone)]).exit_code == 0 and "Curves" in alone.read_text()
    result = run(app, ["report", str(folder), "--output", str(folder / "config.yaml")])
    assert result.exit_code == 2 and "accepted is a file's name that ends with .html" in result.output
    (tmp_path / "folder.html").mkdir()
    for page in ("folder.html", "alone.html/page.html"):
        result = run(app, ["report", str(folder), "--output", str(tmp_path / page)])
        assert result.exit_code == 2 and "error: output: " in result.output, result.output
    result = run(app, ["compare", "--output", str(folder)])
    assert result.exit_code == 2 and "holds metrics.jsonl already; give another folder" in result.output
    result = run(app, ["report", str(folder), str(folder)])
    assert result.exit_code == 2 and "accepted are different ones" in result.output
    result = run(app, ["report", str(folder), str(tmp_path / "none")])
    assert result.exit_code == 2 and "holds no metrics.jsonl" in result.output.replace("\n", " ")


def test_an_interrupt_names_the_epoch_that_is_saved_and_a_command_that_can_be_pasted(pipeline, tmp_path, monkeypatch):
    save, quoted = Trainer.save, "stages=[{epochs: 1}, {epochs: 1}]"

    def interrupted(trainer):
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        save(trainer)

    monkeypatch.setattr(Trainer, "save", interrupted)
    settings = [pipeline, *TINY[:-1], quoted]
    result = run(app, ["train", *settings, "--output", str(tmp_path / "run")])
    assert result.exit_code == 130 and "epoch 1 is saved; go on with" in result.output
    command = shlex.split(result.output.partition("go on with")[2])
    assert "--config" not in command
    assert command[-len(settings) :] == settings and command[:2] == ["nft", "train"]
    monkeypatch.undo()
    result = run(app, command[1:])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "checkpoints" / "epoch-000002").is_dir()


def test_a_full_gpu_is_told_what_needs_less(pipeline, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    for name, arguments in (
        ("nft.trainer.Trainer.sample", ["train", pipeline, *TINY]),
        ("nft.policy.Policy.update_old", ["train", pipeline, *TINY]),
        ("nft.policy.Policy.decode", ["sample", "a red circle", "--override", pipeline, "--steps", "1"]),
        ("nft.policy.Policy.velocity", ["eval", "--limit", "1", "--override", pipeline]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            result = run(app, [*arguments, "--output", str(tmp_path / name)])
        text = " ".join(result.output.split())
        assert result.exit_code == 2 and "CUDA out of memory: smaller rollout_batch and micro_batch" in text, text


def test_memory_of_a_cpu_that_is_not_enough_is_named(pipeline, tmp_path, monkeypatch):
    # More than there are addresses for, and what Python says itself.
    for name, full in (("torch", lambda _: torch.empty(2**60)), ("python", lambda _: bytearray(2**62))):
        with monkeypatch.context() as patch:
            patch.setattr("nft.trainer.Trainer.sample", full)
            result = run(app, ["train", pipeline, *TINY, "--output", str(tmp_path / name)])
        text = " ".join(result.output.split())
        assert result.exit_code == 2 and "smaller rollout_batch and micro_batch" in text, (text, result.exception)


def test_pictures_and_reports_survive_odd_prompts_and_a_line_that_was_cut_off(tmp_path):
    save_grid(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ['a sign "$5" beside "$10"'], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 100
    line = json.dumps({"epoch": 1, "step": 1, "reward": 0.5, "alarms": []})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line[:20]}")
    (tmp_path / "config.yaml").write_text(load_config("shapes").dump())
    assert run(app, ["report", str(tmp_path)]).exit_code == 0


def test_a_full_disk_leaves_no_half_of_a_page_or_picture(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "reward": 0.5}\n')
    draw = ["sample", "a red circle", "--override", pipeline, "--steps", "1"]
    commands = {"reward.png": ["report", "."], "comparison.html": ["report", ".", "--output", "comparison.html"],
                "samples/0000_seed0.png": draw}  # fmt: skip
    for name, command in commands.items():
        assert run(app, command).exit_code == 0
        if "sample" in command:
            (tmp_path / name).unlink()
            (tmp_path / "samples" / "grid.png").unlink()
            command += ["--output", "samples"]
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            result = run(app, command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert result.exit_code == 2 and f"{name} could not be written: File too large" in result.output, result.output
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_a_run_without_its_log_has_no_report(pipeline, tmp_path):
    arguments = ["train", pipeline, *TINY, "epochs=1", "--output", str(tmp_path)]
    assert run(app, arguments).exit_code == 0
    (tmp_path / "metrics.jsonl").unlink()
    result = run(app, ["train", "--output", str(tmp_path), "--resume"])
    assert result.exit_code == 2 and "error: metrics: " in result.output, result.output


def test_config_show_prints_a_file_that_trains_the_same(tmp_path):
    result = run(app, ["config", "show", "--config", "sd35_multi_reward_1gpu", "beta=0.2", "stages.1.epochs=7"])
    assert result.exit_code == 0
    (tmp_path / "shown.yaml").write_text(result.output)
    shown = load_config(str(tmp_path / "shown.yaml"))
    assert shown.beta == 0.2 and shown.at(806).rewards == {"geneval": 1.0} and shown.at(807).beta == 0.2
    result = run(app, ["config", "show", "bta=1"])
    assert result.exit_code == 2 and "did you mean beta?" in result.output


def test_plan_prints_costs_without_the_weights():
    result = run(app, ["plan", "--config", "shapes", "--gpus", "2"])
    assert result.exit_code == 0 and "2,880 evaluations" in result.output and "GiB" in result.output
    for resolution in ("8", "24", "100000"):
        result = run(app, ["plan", f"resolution={resolution}"])
        assert result.exit_code == 2 and f"resolution: got {resolution}, accepted are multiples of 16" in result.output
    for overrides, message in (
        (["device=cuda:0", "--gpus", "4"], "device: got 'cuda:0' for 4 processes, accepted are cuda and cpu"),
        (["--config", "sd35_ocr", "pipeline=black-forest-labs/FLUX.1-dev", "fused_transformer=true"],
         "fused_transformer: got true for a FluxPipeline, accepted is StableDiffusion3Pipeline"),
    ):  # fmt: skip
        result = run(app, ["plan", *overrides])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    result = run(app, ["plan", "pipeline=/nowhere"])
    assert result.exit_code == 2 and "/nowhere" in result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["group_size=1"], "group_size: got 1"),
        (["epochs"], "accepted is key=value"),
        (["device=cuda:99"], "device: got 'cuda:99'"),
        (["tracker=trackio"], "tracker: got 'trackio'"),
        (["--config", "shape"], "did you mean shapes?"),
    ],
)
def test_train_names_what_it_cannot_use_before_any_work(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr("nft.tracking.get_available_trackers", lambda: [])
    result = run(app, ["train", *overrides, "--output", str(tmp_path / "run")])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [1, 600])
def test_the_time_remaining_is_told_however_long_an_epoch_takes(seconds):
    progress, now = bars(), [0.0]
    progress.get_time = lambda: now[0]
    bar = progress.add_task("", total=100)
    for done in range(1, 11):
        now[0] += seconds
        progress.update(bar, completed=done)
    assert progress.tasks[0].time_remaining == 90 * seconds


def test_brackets_in_an_error_are_printed():
    result = run(app, ["train", "[red]=1"])
    assert result.exit_code == 2 and "[red]" in result.output


@pytest.mark.parametrize("charset", ["ascii", "utf-8"])
def test_what_cannot_be_printed_is_no_reason_to_fail(tmp_path, charset):
    """A name that the terminal's encoding lacks, and one that is no text."""
    found = []
    for name in ("\u5713", os.fsdecode(b"caf\xe9")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 1\n")
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "reward": 0.5}\n')
        found.append(str(folder))
    invoke = CliRunner(charset=charset).invoke
    result = invoke(app, ["report", *found, "--output", f"{found[1]}/both.html"])
    assert result.exit_code == 0 and r"caf\udce9/both.html" in result.output, (result.output, result.exception)
    assert "caf\ufffd</td>" in (folder / "both.html").read_text(encoding="utf-8")
    assert invoke(app, ["solvers"], env={"COLUMNS": "60"}).exit_code == 0


def test_an_error_is_no_output_and_a_name_no_emoji():
    result = run(app, ["config", "show", "a:fire:b=1"])
    assert result.exit_code == 2 and result.stdout == "" and "a:fire:b: unknown key" in result.stderr


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint", "best", "checkpoints", "pictures", "report.html"])
def test_a_new_run_overwrites_nothing(pipeline, tmp_path, name):
    own = tmp_path / name if "." in name else tmp_path / name / "mine.txt"
    own.parent.mkdir(exist_ok=True)
    own.write_text("base: shapes  # mine\nepochs: 3\n")
    result = train(pipeline, tmp_path)
    assert result.exit_code == 2 and f"holds {name} already; give another folder" in " ".join(result.output.split())
    assert own.read_text() == "base: shapes  # mine\nepochs: 3\n" and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_run_that_ended_at_its_preflight_can_be_begun_again(pipeline, tmp_path, monkeypatch):
    def broken(_):
        raise AlarmError("preflight: broken")

    with monkeypatch.context() as once:
        once.setattr("nft.trainer.preflight", broken)
        assert "preflight: broken" in train(pipeline, tmp_path).output
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}
    again = train(pipeline, tmp_path, "epochs=1")
    assert again.exit_code == 0 and "begins anew" not in again.output
    shutil.rmtree(tmp_path / "checkpoints")
    assert "resumed without a checkpoint" in train(pipeline, tmp_path, "epochs=1", "--resume").output


def test_an_unknown_backend_is_named_before_the_pipeline_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "foo")
    result = run(app, ["train", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2 and "NFT_KERNELS_BACKEND: got 'foo', accepted are" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "[]"),
        ("transformer/config.json", '{"_class_name": "SD3Transformer2DModel", "num_layers": "x"}'),
        ("vae/config.json", "{}"),
        ("tokenizer/tokenizer_config.json", "{}"),
    ],
)
def test_a_broken_pipeline_is_named(pipeline, tmp_path, file, text):
    shutil.copytree(pipeline.removeprefix("pipeline="), tmp_path / "pipeline")
    (tmp_path / "pipeline" / file).write_text(text)
    broken = f"pipeline={tmp_path / 'pipeline'}"
    commands = [["plan", broken], ["train", broken, *TINY, "--output", str(tmp_path / "run")]]
    # What a tokenizer lacks shows when it is used.
    for command in commands[:1] if file.startswith("tokenizer") else commands:
        result = run(app, command)
        assert result.exit_code == 2 and "error: pipeline: " in result.output, (command[0], result.output)


def test_plan_allocates_nothing_and_names_what_is_no_name():
    # 2^31 rows of a LoRA would be hundreds of gigabytes.
    assert run(app, ["plan", "lora_rank=2147483647"]).exit_code == 0
    result = run(app, ["plan", f"pipeline={'a' * 300}"])
    assert result.exit_code == 2 and "error: pipeline: " in result.output


def test_a_report_names_an_alarm_once_however_often_it_was_raised(tmp_path):
    said = {3: ["velocity: 11"], 4: ["velocity: 12", "x0_large: 6"], 9000: ["velocity: 13"]}
    lines = ({"epoch": i, "step": i, "reward": 0.5, "alarms": said.get(i, [])} for i in range(1, 9001))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(load_config("shapes").dump())
    page = report.write_report(tmp_path).read_text()
    items = "<li>epoch 9000, the last of 3 since epoch 3: velocity: 13</li><li>epoch 4: x0_large: 6</li>"
    assert f"<ul>{items}</ul>" in page


@pytest.mark.parametrize("more", ['"alarms": 3', '"alarms": [3]', '"eval_strict": [1]'])
def test_a_log_that_no_trainer_wrote_is_named(tmp_path, more):
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 1, "step": 1, {more}}}\n')
    (tmp_path / "config.yaml").write_text(load_config("shapes").dump())
    result = run(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "error: metrics: " in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_reports_show_the_first_and_the_last_and_add_up_the_seconds(tmp_path):
    lines = [
        {"epoch": 0, "step": 0, "eval_strict": 0.1, "eval_x": 0.2},
        {"epoch": 1, "step": 1, "reward": 0.3, "seconds": 1.0},
        {"epoch": 2, "step": 2, "reward": 0.7, "seconds": 2.0},
        {"epoch": 2, "step": 2, "eval_strict": 0.9, "eval_x": 0.8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(load_config("shapes").dump())
    assert run(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>strict</td><td>0.1</td><td>0.9</td>" in page and "<td>x</td><td>0.2</td><td>0.8</td>" in page
    assert run(app, ["report", str(tmp_path), "--output", str(tmp_path / "one.html")]).exit_code == 0
    row = "<td>2</td><td>0.7</td><td></td><td>0.9</td><td>3</td>"
    assert row in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("logged", "row"),
    [
        (3, "<td>a</td><td>-0.00312</td><td>-0.00389</td>"),  # the second stage has begun and has no score yet
        (4, "<td>a</td><td>0.25</td><td>0.25</td>"),
        (5, "<td>a</td><td>0.25</td><td>0.75</td>"),
    ],
)
def test_a_report_compares_scores_of_one_stage_and_marks_where_the_next_begins(tmp_path, monkeypatch, logged, row):
    """The held-out score at the end of a stage is by that stage's rewards."""
    marks = []

    def close(figure):
        lines = [line for axis in figure.axes for line in axis.lines]
        marks.append({tuple(line.get_xdata()) for line in lines if line.get_linestyle() == ":"})

    monkeypatch.setattr(report.plt, "close", close)
    lines = [
        {"epoch": 0, "step": 0, "eval_strict": -0.00312, "eval_a": -0.00312},
        {"epoch": 2, "step": 2, "eval_strict": -0.00389, "eval_a": -0.00389},
        {"epoch": 3, "step": 3, "reward": 0.5},
        {"epoch": 3, "step": 3, "eval_strict": 0.25, "eval_a": 0.25, "eval_new": 0.125},
        {"epoch": 5, "step": 5, "eval_strict": 0.75, "eval_a": 0.75, "eval_new": 0.5, "eval_newest": 1234.5678},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:logged]))
    (tmp_path / "config.yaml").write_text("stages: [{epochs: 2}, {epochs: 3}, {epochs: 9}]\n")
    assert run(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert row in page
    assert ("<td>new</td><td>0.125</td><td>0.5</td>" in page) == (logged == 5)
    assert ("<td>newest</td><td></td><td>1235</td>" in page) == (logged == 5)
    # Between the epochs 2 and 3, in the picture of the scores and in that of all metrics.
    assert marks == [{(2.5, 2.5)}] * 2


def test_stages_that_no_trainer_wrote_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1}\n')
    (tmp_path / "config.yaml").write_text("stages: [{}]\n")
    result = run(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "config.yaml is damaged: KeyError" in " ".join(result.output.split())


def test_a_grid_of_many_pictures_is_spread_over_them(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axis, picture: shown.append(picture[0, 0, 0].item()))
    pictures = torch.arange(96, dtype=torch.uint8)[:, None, None, None].expand(96, 4, 4, 3)
    save_grid(pictures, ["a"] * 96, tmp_path / "grid.png")
    assert shown == list(range(0, 96, 4))


def test_a_long_prompt_leaves_room_for_the_pictures_of_a_grid(tmp_path):
    """And none for all of itself: each picture is as large as under a short one."""
    pictures = torch.full((24, 8, 8, 3), 200, dtype=torch.uint8)
    covered = []
    for count in (4, 300):
        save_grid(pictures, [" ".join(["word"] * count)] * 24, tmp_path / "grid.png")
        covered.append((pixels(tmp_path / "grid.png") == 200).mean())
    assert covered[1] > 0.7 * covered[0] > 0.2


def test_reports_escape_what_prompts_files_and_folders_are_called(tmp_path):
    run_folder = tmp_path / "a$x^{$b"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text("<b>seed</b>: 1\n")
    logged = {"epoch": 0, "step": 0, "eval_<script>": 0.5, "eval_strict": 0.5, "eval_reward_$\\frac$": 0.5}
    (run_folder / "metrics.jsonl").write_text(json.dumps(logged) + "\n")
    shutil.copytree(run_folder, tmp_path / "_other")
    (tmp_path / "_other" / "config.yaml").write_text("<b>seed</b>: 2\n")
    assert run(app, ["report", str(run_folder)]).exit_code == 0
    page = tmp_path / "both.html"
    result = run(app, ["report", str(run_folder), str(tmp_path / "_other"), "--output", str(page)])
    assert result.exit_code == 0, result.output
    for text in ((run_folder / "report.html").read_text(), page.read_text()):
        assert "<script>" not in text and "<b>" not in text


def test_a_report_shows_what_was_logged_once(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "reward": 0.5}\n')
    assert run(app, ["report", str(tmp_path)]).exit_code == 0
    drawn = [line for figure in figures for axis in figure.axes for line in axis.lines if len(line.get_xdata())]
    assert len(drawn) == 2 and all(line.get_marker() == "o" for line in drawn)


def test_a_report_shows_no_kl_that_was_not_evaluated(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report.plt, "close", lambda figure: drawn.update((a.get_title(), a) for a in figure.axes))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    lines = ({"epoch": epoch, "step": epoch, "loss": 0.0, "kl": kl} for epoch, kl in enumerate((0.0, 0.0, 0.2, 0.3)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(app, ["report", str(tmp_path)]).exit_code == 0
    assert [len(drawn[key].lines[0].get_xdata()) for key in ("loss", "kl")] == [4, 2]


def test_a_dozen_runs_can_be_told_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.plt, "close", lambda figure: drawn.extend(figure.axes[1].lines))
    for i in range(12):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "config.yaml").write_text("seed: 1\n")
        lines = (json.dumps({"epoch": epoch, "step": epoch, "reward": i}) + "\n" for epoch in (1, 2))
        (tmp_path / f"{i}" / "metrics.jsonl").write_text("".join(lines))
    folders = [str(tmp_path / f"{i}") for i in range(12)]
    assert run(app, ["report", *folders, "--output", str(tmp_path / "all.html")]).exit_code == 0
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 12


def test_reports_have_a_curve_for_each_of_several_rewards(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report.plt, "close", lambda figure: drawn.append({a.get_title() for a in figure.axes if a.lines})
    )
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    lines = (
        {"epoch": 0, "step": 0, "eval_strict": 0.1, "eval_reward_clip": 0.2, "eval_reward_clip_std": 0.1},
        {"epoch": 1, "step": 2, "reward": 0.5, "reward_std": 0.1, "reward_clip": 0.4, "reward_clip_std": 0.3},
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(app, ["report", str(tmp_path)]).exit_code == 0
    assert {"reward", "eval_strict", "reward_clip", "eval_reward_clip"} <= drawn[1]
    assert not any(title.endswith("_std") for title in drawn[1])
