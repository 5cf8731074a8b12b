"""What a run exports gives, in plain diffusers, the pictures that the trainer's policy draws."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import StableDiffusion3Pipeline
from distributed_worker import Brightness
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nft.cli import app
from nft.config import load_config
from nft.export import export_lora, export_pipeline
from nft.full import load_policy
from nft.models.flux import Flux
from nft.settings import saved_settings
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.weights import find_weights
from nft.worlds.shapes.tiny import build_pipeline

SMALL = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
         "eval_steps=1", "eval_solver=euler", "lora_rank=4", "lora_alpha=12", "epochs=2",
         "learning_rate=0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    build_pipeline().save_pretrained(folder / "pipeline")
    before, TASKS["shapes"] = TASKS["shapes"], Brightness
    try:
        run = Trainer(load_config("shapes", [f"pipeline={folder / 'pipeline'}", *SMALL]), folder / "run")
        run.train()
    finally:
        TASKS["shapes"] = before
    return run


def velocities(transformer):
    g = torch.Generator().manual_seed(0)
    x, embeds, pooled = (torch.randn(2, *shape, generator=g) for shape in ((16, 8, 8), (20, 64), (64,)))
    with torch.no_grad():
        return transformer(x, embeds, pooled, torch.tensor([300.0, 800.0]), return_dict=False)[0]


def test_whoever_may_read_a_new_file_may_read_the_weights(trainer, tmp_path):
    export_lora(trainer.folder, tmp_path / "lora")
    export_pipeline(trainer.folder, tmp_path / "merged", trainer.config.pipeline)
    (plain := tmp_path / "plain").touch()
    found = [path for folder in (trainer.folder, tmp_path) for path in folder.rglob("*.safetensors")]
    assert len(found) > 4 and {path.stat().st_mode for path in found} == {plain.stat().st_mode}


@pytest.mark.parametrize("weights", ["ema", "default"])
def test_lora_and_merged_pipeline_are_the_policy(trainer, tmp_path, weights):
    base = StableDiffusion3Pipeline.from_pretrained(trainer.config.pipeline)
    untouched = velocities(base.transformer)
    if weights == "ema":
        with trainer._averaged():
            expected = velocities(trainer.policy.transformer)
    else:
        trainer.policy.use("default")
        expected = velocities(trainer.policy.transformer)
    assert (expected - untouched).abs().max() > 1e-3
    for name, more in (("lora", []), ("merged", ["--merge"])):
        # Of the run, and of one of its checkpoints.
        source = trainer.folder / ("best" if name == "merged" and weights == "ema" else "")
        arguments = ["export", str(source), str(tmp_path / name), "--weights", weights, *more]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        # What diffusers' own call has unless it is told otherwise, and the model is trained with.
        assert f"FLUX.1-dev keeps its distilled guidance_scale={Flux.guidance}" in " ".join(result.output.split())
    base.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(velocities(base.transformer), expected, rtol=1e-4, atol=1e-5)
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.transformer.named_parameters())
    torch.testing.assert_close(velocities(merged.transformer), expected, rtol=1e-4, atol=1e-5)


def test_a_library_exports_what_is_evaluated_unless_told_otherwise(trainer, tmp_path):
    files = {}
    for name, options in (("plain", {}), ("ema", {"weights": "ema"}), ("default", {"weights": "default"})):
        export_lora(trainer.folder, tmp_path / name, **options)
        files[name] = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weight, files["ema"][key]) for key, weight in files["plain"].items())
    assert not all(torch.equal(weight, files["default"][key]) for key, weight in files["plain"].items())


def test_a_merged_pipeline_is_as_wide_as_the_runs_weights(trainer, tmp_path):
    shutil.copytree(trainer.folder, tmp_path / "run", symlinks=True)
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("dtype: float32", "dtype: bfloat16"))
    for run, dtype in ((trainer.folder, torch.float32), (tmp_path / "run", torch.bfloat16)):
        output = tmp_path / str(dtype)
        assert CliRunner().invoke(app, ["export", str(run), str(output), "--merge"]).exit_code == 0
        for part in ("transformer", "vae", "text_encoder"):
            weights = load_file(next((output / part).glob("*.safetensors")))
            assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {dtype}


def test_a_merged_pipeline_draws_though_its_parts_came_in_two_dtypes(trainer, pipeline, tmp_path):
    """As the bundled one's, and Stable Diffusion 3.5's, whose encoders are stored in float16."""
    whole = StableDiffusion3Pipeline.from_pretrained(pipeline)
    for encoder in (whole.text_encoder, whole.text_encoder_2, whole.text_encoder_3):
        encoder.half()
    whole.save_pretrained(tmp_path / "mixed")
    export_pipeline(trainer.folder, tmp_path / "out", str(tmp_path / "mixed"))
    drawn = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    drawn.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.0, "num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 8}
    assert drawn("a red circle", **options, output_type="latent").images.dtype == torch.float32


def test_a_merged_pipeline_is_what_a_run_in_bfloat16_draws_with(trainer, pipeline, tmp_path):
    """To the bit, though the pipeline is stored in another half precision."""
    StableDiffusion3Pipeline.from_pretrained(pipeline, dtype=torch.float16).save_pretrained(tmp_path / "half")
    export_pipeline(trainer.folder, tmp_path / "out", str(tmp_path / "half"), half=True)
    config = trainer.config.model_copy(update={"pipeline": str(tmp_path / "half"), "dtype": "bfloat16"})
    policy = load_policy(config, trainer.folder)
    exported = load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))
    with policy.merged("default"):
        drawn = {name.replace(".base_layer", ""): w for name, w in policy.transformer.state_dict().items()}
    assert all(torch.equal(drawn[name], weight) for name, weight in exported.items())


def test_peft_loads_a_runs_checkpoint(trainer, tmp_path):
    config, own = trainer.config, trainer.folder / "checkpoint" / "ema"
    policy = load_policy(config, own)
    base = StableDiffusion3Pipeline.from_pretrained(config.pipeline).transformer
    with warnings.catch_warnings():
        # Of weights that are missing PEFT says no more.
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base, own)
    torch.testing.assert_close(velocities(loaded), velocities(policy.transformer), rtol=1e-4, atol=1e-5)
    # As checkpoints were named before.
    shutil.copytree(own, tmp_path / "before")
    path = tmp_path / "before" / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): w for name, w in load_file(path).items()}, path)
    assert all(map(torch.equal, load_policy(config, tmp_path / "before").trained, policy.trained))


def test_an_exported_lora_needs_no_settings(trainer, tmp_path):
    """For tools that take alpha from tensors of that name alone, and scale by 1 where there are none."""
    export_lora(trainer.folder, tmp_path, weights="default")
    exported = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {name: m for name, m in trainer.policy.transformer.named_modules() if isinstance(m, LoraLayer)}
    assert len(exported) == 2 * len(layers)
    for name, layer in layers.items():
        down, up = (exported[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))


@pytest.mark.parametrize("kind", ["peft", "settings", "bare", "alphas", "down and up", "other tools"])
def test_loras_of_other_trainers_are_what_peft_makes_of_them(trainer, tmp_path, kind):
    """Of other layers than ours, where the file can say so of several ranks and alphas, and in a file of any name."""
    several = {"rank_pattern": {"proj_out": 2}, "alpha_pattern": {"proj_out": 2 if kind == "bare" else 5}}
    lora = LoraConfig(
        r=4,
        lora_alpha=4 if kind == "bare" else 12,
        target_modules=["to_q", "ff.net.0.proj", "context_embedder", "proj_out"],
        init_lora_weights=False,
        **({} if kind in ("peft", "settings") else several),
    )
    base = StableDiffusion3Pipeline.from_pretrained(trainer.config.pipeline)
    untouched = velocities(base.transformer)
    model = get_peft_model(base.transformer, lora)
    expected = velocities(model)
    assert (expected - untouched).abs().max() > 1e-2
    source, state = tmp_path / "any.safetensors", get_peft_model_state_dict(model)
    state = {name.removeprefix("base_model.model."): weight for name, weight in state.items()}
    if kind == "peft":
        model.save_pretrained(source := tmp_path / "peft")
    elif kind == "settings":
        StableDiffusion3Pipeline.save_lora_weights(
            tmp_path, state, weight_name=source.name, transformer_lora_adapter_metadata=lora.to_dict()
        )
    else:
        prefix, down, up = {
            "down and up": ("transformer.", "lora.down", "lora.up"),
            "other tools": ("diffusion_model.", "lora_down", "lora_up"),
        }.get(kind, ("transformer.", "lora_A", "lora_B"))
        layers = {name.rpartition(".lora_")[0] for name in state}
        alphas = {f"{prefix}{name}.alpha": torch.tensor(5.0 if name == "proj_out" else 12.0) for name in layers}
        state = {prefix + k.replace("lora_A", down).replace("lora_B", up): weight for k, weight in state.items()}
        save_file(state | ({} if kind == "bare" else alphas), source)
    policy = load_policy(trainer.config, source)
    torch.testing.assert_close(velocities(policy.transformer), expected, rtol=1e-4, atol=1e-5)
    export_lora(source, tmp_path / "lora")
    base = StableDiffusion3Pipeline.from_pretrained(trainer.config.pipeline)
    base.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(velocities(base.transformer), expected, rtol=1e-4, atol=1e-5)
    export_pipeline(source, tmp_path / "merged", trainer.config.pipeline)
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(velocities(merged.transformer), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_what_was_written_are_not_drawn_with_nor_exported(trainer, tmp_path, monkeypatch):
    """A safetensors file says nothing of a byte that has changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trainer.folder, "run", symlinks=True)
    path = Path("run/checkpoint/ema/adapter_model.safetensors")
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 0x40
    path.write_bytes(flipped)
    commands = ["export run out", "export run out --merge", f"export {path} out", "sample dog --checkpoint run",
                "eval --checkpoint run/best --limit 1"]  # fmt: skip
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 2 and "has another checksum than when it was written" in result.output, command
    assert not Path("out").exists() and not Path("samples").exists()
    # The others of the checkpoint are as they were.
    assert CliRunner().invoke(app, ["export", "run", "out", "--weights", "default"]).exit_code == 0
    # A copy of the weights alone is whatever it is.
    shutil.copytree(path.parent, "ema")
    assert CliRunner().invoke(app, ["export", "ema", "copy"]).exit_code == 0
    # Where they are lost others are not taken for them, unless those are asked for.
    shutil.rmtree(path.parent)
    result = CliRunner().invoke(app, ["sample", "dog", "--checkpoint", "run", "--output", "pictures"])
    assert result.exit_code == 2 and " is missing; delete " in result.output, result.output
    assert CliRunner().invoke(app, ["export", "run/checkpoint/default", "trained"]).exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "got a LoRA with use_rslora in .*peft, accepted is one without"),
        ({"r": 8}, "got r=8 beside .*peft.*, accepted is the rank of its matrices, 4"),
    ],
)
def test_a_lora_with_settings_that_make_another_of_it_is_refused(trainer, tmp_path, change, message):
    shutil.copytree(trainer.folder / "checkpoint" / "default", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (partial(load_policy, trainer.config), partial(export_lora, output=tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "peft")


def test_a_run_is_drawn_with_the_weights_that_it_is_evaluated_with(trainer, tmp_path):
    run = trainer.folder
    # Whatever LoRA the configuration has, it is the run's.
    policy = load_policy(trainer.config.model_copy(update={"lora_rank": 2, "lora_alpha": 1}), run)
    assert (policy.lora.r, policy.lora.lora_alpha) == (4, 12)
    with trainer._averaged():
        assert all(map(torch.equal, policy.trained, trainer.policy.trained))
    assert not all(map(torch.equal, policy.trained, trainer.policy.trained))
    for source, weights in ((run, "ema"), (run / "best", "ema"), (run, "default"), (run / "best", "default")):
        assert find_weights(source, weights).parent.name == weights
    # Those of an older or another trainer, and a folder of one adapter.
    shutil.copytree(run / "checkpoint" / "default", tmp_path / "run" / "default")
    assert find_weights(tmp_path / "run") == find_weights(tmp_path / "run" / "default")


def test_a_run_is_drawn_and_evaluated_with_its_own_pipeline(trainer, tmp_path):
    """Its settings, and not those that commands have for no run."""
    run, invoke = trainer.folder, CliRunner().invoke
    ema = run / "checkpoint" / "ema"
    own = [(run, []), (run / "best", []), (ema, []), (ema / "adapter_model.safetensors", []),
           (run, ["--config", run / "config.yaml"])]  # fmt: skip
    others = [(run, ["--config", "shapes"]), (run, ["--override", "pipeline=shapes"])]
    drawn = []
    for i, (source, more) in enumerate([*own, *others]):
        arguments = ["a dog", "--checkpoint", source, "--steps", "2", "--output", tmp_path / str(i), *more]
        result = invoke(app, ["sample", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        drawn.append((tmp_path / str(i) / "0000_seed0.png").read_bytes())
    assert len(set(drawn[: len(own)])) == 1 and len(set(drawn)) == 2
    result = invoke(app, ["eval", "--checkpoint", str(run), "--limit", "1", "--output", str(tmp_path / "eval")])
    assert result.exit_code == 0, result.output
    subject = json.loads((tmp_path / "eval" / "settings.json").read_text())["subject"]
    assert subject.startswith(f"{trainer.config.pipeline} with ")
    # A checkpoint is deleted as a whole one day.
    inside, whole = str(run / "checkpoint" / "mine"), ["eval", "--limit", "1", "--checkpoint", str(run), "--output"]
    for command in (["sample", "a dog", "--output", inside], [*whole, inside], ["train", "--output", inside]):
        result = invoke(app, command)
        assert result.exit_code == 2 and "lies in the checkpoint" in result.output.replace("\n", "")
    result = invoke(app, [*whole, str(run)])
    assert result.exit_code == 2 and "holds metrics.jsonl already" in result.output.replace("\n", "")
    # A configuration beside a checkpoint that is no run's is another's.
    shutil.copytree(run / "checkpoint" / "default", tmp_path / "lora")
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    assert saved_settings(tmp_path / "lora") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "out"], "checkpoint: got '/nowhere'"),
        (["/nowhere", "out", "--merge"], "checkpoint: got '/nowhere'"),
        (["RUN", "out", "--weights", "best"], "weights: got 'best'"),
        (["RUN", "PIPELINE", "--merge"], "already; give another folder"),
        (["RUN", "out", "--merge", "--pipeline", "/nowhere"], "pipeline: got '/nowhere', it is neither a folder with"),
        (["RUN", "FILE"], "is a file"),
        (["RUN", "FILE", "--merge"], "is a file"),
        (["RUN", "CHECKPOINT"], "lies in the checkpoint"),
        (["RUN", "CHECKPOINT", "--merge"], "lies in the checkpoint"),
        (["LORA", "out", "--merge"], "pipeline: got none, and"),
        (["RUN", "out", "--pipeline", "shapes"], "pipeline: got 'shapes' without --merge"),
        (["RUN", "RUN"], "holds metrics.jsonl already"),
        (["RUN", "EXPORTED"], "holds pytorch_lora_weights.safetensors already"),
        (["RUN", ""], "got an empty name, accepted is a path"),
        (["MISFIT", "out", "--merge", "--pipeline", "PIPELINE"], "does not fit the pipeline, which has no layer trans"),
        (["KOHYA", "out"], "got lora_unet_transformer_blocks_0_attn_to_q in kohya.safetensors, accepted are layers by"),
        (["EMPTY", "out"], "got nothing in empty.safetensors, accepted are layers by"),
    ],
)
def test_bad_exports_are_named(trainer, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    shutil.copytree(trainer.folder / "checkpoint" / "default", tmp_path / "lora")
    names = {"RUN": str(trainer.folder), "PIPELINE": trainer.config.pipeline, "FILE": "file", "LORA": "lora"}
    shutil.copytree(tmp_path / "lora", tmp_path / "misfit")
    weights = load_file(tmp_path / "misfit" / "adapter_model.safetensors")
    moved = {name.replace("blocks.0.", "blocks.77."): weight for name, weight in weights.items()}
    save_file(moved, tmp_path / "misfit" / "adapter_model.safetensors")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "pytorch_lora_weights.safetensors").touch()
    kohya = "lora_unet_transformer_blocks_0_attn_to_q.lora_{}.weight"
    save_file({kohya.format(part): torch.ones(4, 4) for part in ("down", "up")}, "kohya.safetensors")
    save_file({}, "empty.safetensors")
    names |= {"MISFIT": "misfit", "EXPORTED": "exported", "KOHYA": "kohya.safetensors", "EMPTY": "empty.safetensors"}
    names["CHECKPOINT"] = str(trainer.folder / "checkpoint" / "default")
    result = CliRunner().invoke(app, ["export", *(names.get(argument, argument) for argument in arguments)])
    assert result.exit_code == 2 and message in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_an_export_to_a_full_disk_is_named(trainer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_lora_weights", full)
    result = CliRunner().invoke(app, ["export", str(trainer.folder), str(tmp_path / "lora")])
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and "lora could not be written: I/O error: No space left" in text, text
