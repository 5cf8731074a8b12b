"""Configurations: every bundled one is sound, and everything that is not is refused by name before any work."""

import re
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

import yaml

from nft.config import _ELSEWHERE, _NOT_HERE, Config, ConfigError, load_config
from nft.objectives import unread
from nft.rewards import registry
from nft.rewards.base import missing_packages
from nft.settings import _BUNDLED

BUNDLED = sorted(path.stem for path in _BUNDLED.glob("*.yaml"))
BASELINES = {f"shapes_{name}" for name in ("sft", "rwr", "flow_grpo", "flow_grpo_fast", "mix_grpo", "dance_grpo", "awm",
                                           "v_grpo", "explore", "filter")}  # fmt: skip
RUNS = ["shapes", "sd35_geneval", "sd35_ocr", "sd35_pickscore", "sd35_hpsv2", "sd35_multi_reward"]


def refused(name="shapes", *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(str(name), list(overrides))
    return str(caught.value)


def test_every_run_has_a_variant_for_one_and_two_gpus():
    assert set(BUNDLED) == {run + variant for run in RUNS for variant in ("", "_1gpu", "_2gpu")} | BASELINES


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_configuration_survives_being_saved(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(config.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    for epoch in (0, config.epochs // 2, config.epochs - 1):
        assert again.at(epoch).model_dump() == config.at(epoch).model_dump()
    assert again.model_dump() == config.model_dump()


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_documents_configurations_are_accepted(page, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        path = tmp_path / "config.yaml"
        path.write_text(block if "base:" in block else f"base: shapes\n{block}")
        for spec in load_config(path).reward_specs().values():
            if spec.reward in registry.BUNDLED and not missing_packages(registry.find(spec.reward)):
                registry.check(spec.reward, spec.options, device=spec.device)


def test_stages_over_a_base_without_them_say_how_long_a_run_is(tmp_path):
    (tmp_path / "stages.yaml").write_text("stages: [{epochs: 3}, {epochs: 2}]")
    (tmp_path / "over.yaml").write_text("base: sd35_pickscore\nstages: [{epochs: 3}, {epochs: 2}]")
    (tmp_path / "both.yaml").write_text("base: [sd35_pickscore, stages.yaml]")
    for name in ("over", "both"):
        assert load_config(tmp_path / f"{name}.yaml").epochs == 5
    (tmp_path / "wrong.yaml").write_text("base: sd35_pickscore\nepochs: 4\nstages: [{epochs: 3}, {epochs: 2}]")
    assert "epochs: got 4, but the stages add up to 5" in refused(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    "stages",
    [
        ["prompts_per_epoch=8", "stages=[{epochs: 1}, {epochs: 1, prompts_per_epoch: 1, group_size: 2}]"],
        ["prompts_per_epoch=1", "group_size=2", "stages=[{epochs: 1}, {epochs: 2, group_size: 12}]"],
        ["stages=[{epochs: 3, micro_batch: 7}, {epochs: 1, updates_per_epoch: 2}]"],
    ],
)
def test_stages_survive_being_saved_and_their_lengths_can_be_changed_then(stages, tmp_path):
    config, path = load_config("shapes", stages), tmp_path / "config.yaml"
    path.write_text(config.dump())
    again = load_config(str(path))
    assert again.dump() == config.dump() and again.epochs == config.epochs
    for own, other in zip(config.all_stages(), again.all_stages(), strict=True):
        assert own.model_dump() == other.model_dump()
    assert load_config(str(path), ["stages.1.epochs=5"]).epochs == config.all_stages()[0].epochs + 5


@pytest.mark.parametrize("setting", [
    "seed: 1", "device: cuda", "dtype: bfloat16", "lora_rank: 4", "lora_alpha: 4", "adapter: full", "eval_every: 5",
    "keep_checkpoints: 3", "resolution: 32", "pipeline: x", "offload: true", "shard: true", "preflight: false",
    "tracker: wandb", "alarms: {velocity: 3.0}", "max_sequence_length: 12", "fused_transformer: false",
])  # fmt: skip
def test_what_a_run_is_built_with_is_no_setting_of_a_stage(setting):
    assert setting.partition(":")[0] in refused("shapes", f"stages=[{{epochs: 1}}, {{epochs: 1, {setting}}}]")


def test_the_curriculum_has_the_papers_five_stages():
    config = load_config("sd35_multi_reward")
    starts = [0, 800, 1100, 1300, 1500]
    assert config.epochs == 1600
    for start, end in zip(starts, [*starts[1:], 1600], strict=True):
        assert config.at(start).model_dump() == config.at(end - 1).model_dump()
        assert start == 0 or config.at(start).rewards != config.at(start - 1).rewards
    # What a stage does not name comes from outside, where an override reaches it too.
    changed = load_config("sd35_multi_reward", ["seed=7", "stages.1.epochs=5"])
    assert changed.epochs == 1305 and changed.at(800).rewards == {"geneval": 1.0} and changed.at(900).seed == 7


def test_bases_are_read_first_and_may_be_files_beside(tmp_path):
    (tmp_path / "one.yaml").write_text("base: shapes\nepochs: 3\nseed: 1\n")
    (tmp_path / "two.yaml").write_text("seed: 2\n")
    (tmp_path / "run.yaml").write_text("base: [one.yaml, two.yaml]\ngroup_size: 5\n")
    config = load_config(str(tmp_path / "run.yaml"))
    assert (config.epochs, config.seed, config.group_size, config.rollout_solver) == (3, 2, 5, "dpm++2M")
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    assert "its own base" in refused(tmp_path / "loop.yaml")


def test_a_base_that_is_missing_is_named_with_the_file_that_asks_for_it(tmp_path):
    (tmp_path / "run.yaml").write_text("base: nope\n")
    assert refused(tmp_path / "run.yaml").startswith(f"base of {tmp_path / 'run.yaml'}: got 'nope'")


def test_a_library_gets_the_same_errors(tmp_path):
    (tmp_path / "run.yaml").write_text("epochs: 3\n")
    config = load_config(tmp_path / "run.yaml", ("seed=1",))
    assert (config.epochs, config.seed) == (3, 1)
    for name, overrides in ((None, None), (3, None), ("shapes", "epochs=3"), ("shapes", [3])):
        with pytest.raises(ConfigError, match=r"got .*, accepted is"):
            load_config(name, overrides)
    with pytest.raises(ConfigError, match=r"^epoch: unknown key, did you mean epochs\?$"):
        Config(epoch=3)
    with pytest.raises(ConfigError, match=r"^group_size: got 1, "):
        Config(group_size=1)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = "ten"


def test_dotted_overrides_reach_nested_values():
    config = load_config("sd35_pickscore", ["rewards.hpsv2=0.5", "rollout_solver=ddim", "rollout_options.eta=5e-1"])
    assert config.rewards == {"pickscore": 1.0, "hpsv2": 0.5} and config.rollout_options == {"eta": 0.5}


def test_the_window_is_checked():
    assert "window: got 11, accepted are 1 to 10, rollout_steps" in refused("shapes_mix_grpo", "window=11")
    assert "and mixed has 2 of them" in refused("shapes_mix_grpo", "timesteps_per_sample=3")
    assert "accepted is the solver mixed without a window" in refused(
        "shapes_mix_grpo", "rollout_options.window=[0, 2]"
    )
    # cps draws no noise in the last step to t = 0, which the window comes to in the end.
    assert "and cps has 9 of them" in refused("shapes_flow_grpo", "rollout_solver=cps")
    assert "and mixed has 1 of them" in refused("shapes_mix_grpo", "rollout_options={sde: cps, eta: 0.8}")
    load_config("shapes_flow_grpo_fast", ["rollout_options={sde: cps, eta: 0.8}"])


@pytest.mark.parametrize(
    ("item", "partner"),
    [("window_order=random", "window"), ("window_epochs=3", "window"), ("filter_std=0.1", "filter_mean")],
)
def test_a_setting_that_would_do_nothing_is_refused(item, partner):
    key, value = item.split("=")
    assert f"{key}: got {value} without {partner}, accepted is" in refused("shapes", item)


def test_defaults_shrink_with_a_small_epoch_but_given_values_are_refused():
    config = load_config("shapes", ["prompts_per_epoch=1", "group_size=2"])
    assert (config.micro_batch, config.updates_per_epoch) == (6, 2)


POSITIVE = ["lora_rank", "lora_alpha", "epochs", "prompts_per_epoch", "rollout_steps", "rollout_batch",
            "max_sequence_length", "timesteps_per_sample", "updates_per_epoch", "micro_batch", "learning_rate",
            "max_grad_norm", "beta", "adv_clip_max", "eval_every", "eval_prompts_per_group", "eval_steps",
            "keep_checkpoints", "rwr_temperature", "resolution", "clip_range", "window", "window_epochs",
            "explore", "explore_steps", "filter_std"]  # fmt: skip


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "[1]", "{a: 1}", "many", "true"])
@pytest.mark.parametrize("key", POSITIVE)
def test_positive_numbers(key, value):
    assert refused("shapes", f"{key}={value}").startswith(f"{key}: got ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_size=1", "group_size: got 1"),
        ("group_size=2.5", "group_size: got 2.5"),
        ("seed=-1", "seed: got -1"),
        ("kl_weight=-1", "kl_weight: got -1"),
        ("weight_decay=-0.1", "weight_decay: got -0.1"),
        ("epochs='3'", "epochs: got '3'"),
        ("epochs=", "epochs: got None"),
        ("gradient_checkpointing=1", "gradient_checkpointing: got 1"),
        ("pipeline=", "pipeline: got None"),
        ("pipeline=5", "pipeline: got 5"),
        ("timesteps_per_sample=11", "timesteps_per_sample: got 11, accepted are 1 to 10, rollout_steps"),
        ("updates_per_epoch=289", "updates_per_epoch: got 289, accepted are 1 to 288"),
        ("micro_batch=865", "micro_batch: got 865, accepted are 1 to 864"),
        ("rollout_solver=eulr", "rollout_solver: got 'eulr'"),
        ("eval_solver=dpm", "eval_solver: got 'dpm'"),
        ("rollout_options={eta: 0.5}", "rollout_solver: got dpm++2M with options {'eta': 0.5}"),
        ("window=2", "window: got 2 with dpm++2M and options {}, accepted is the solver mixed"),
        (
            "objective=grpo",
            "timesteps_per_sample: got 3, but grpo trains on the steps that draw noise, and dpm++2M has 0",
        ),
        ("shared_noise=1", "shared_noise: got 1"),
        ("window_order=left", "window_order: got 'left'"),
        ("rollout_options.order=9", "rollout_solver: got dpm++2M"),
        ("rollout_options.Order=2", "Order: unknown option of dpm++2M, accepted are none"),
        ("resolution=100", "resolution: got 100"),
        ("device=gpu", "device: got 'gpu', accepted are cpu, cuda and cuda:N"),
        ("device=cuda:x", "device: got 'cuda:x'"),
        ("device=cuda:01", "device: got 'cuda:01'"),
        ("device=cuda:99999999999", "device: got 'cuda:99999999999'"),
        ("alarms.velocity=-1.0", "alarms.velocity: got -1.0, accepted are numbers of at least 0"),
        ("prompts=mine.txt", "prompts: got mine.txt with task=shapes, which brings its own"),
        ("held_out_prompts=ocr", "held_out_prompts: got ocr with task=shapes"),
        ("combine=gdpo", "combine: got gdpo with task=shapes"),
        ("zz=1e-4", "zz: unknown key, `nft config show` lists the known ones"),
        ("EPOCHS=3", "EPOCHS: unknown key, did you mean epochs?"),
        ("lr=1e-4", "lr: unknown key, did you mean learning_rate?"),
        ("kl_beta=1e-4", "kl_beta: unknown key, did you mean kl_weight?"),
        ("train.beta=1e-4", "train.beta: unknown key, did you mean kl_weight?"),
        ("sample.num_steps=10", "sample.num_steps: unknown key, did you mean rollout_steps?"),
        ("train.clip_range=1e-4", "train.clip_range: unknown key, did you mean clip_range?"),
        ("adv_clip_range=5", "adv_clip_range: unknown key, did you mean adv_clip_max?"),
        ("num_image_per_prompt=8", "num_image_per_prompt: unknown key, did you mean group_size?"),
        ("fp8=true", "fp8: unknown key, did you mean float8_rollout?"),
        ("base=sd35_ocr", "base: unknown key; it is a key of files"),
        ("warmup_steps=10", "warmup_steps: unknown key; the learning rate is constant"),
        ("guidance_scale=4.5", "guidance_scale: unknown key; rollouts and training use no guidance"),
        ("fused_transformer=1", "fused_transformer: got 1, accepted are auto, true and false"),
        ("alarms.saturated=5.0", "alarms.saturated: got 5.0, accepted are shares, 0 to 1"),
        ("alarms.Velocity=3.0", "alarms.Velocity: unknown key, did you mean velocity?"),
        ("alarms.x=3.0", "alarms.x: unknown key, accepted are old_deviation, saturated,"),
        ("alarms={x: 1.0, x: 2.0}", "alarms: is not YAML: x: comes 2 times, accepted is once"),
        ("beta=1e39", "beta: got 1e+39, accepted are numbers that float32 holds"),
        (f"beta={10**39}", "beta: got 1e+39, accepted are numbers that float32 holds"),
        ("beta=1e-320", "beta: got 1e-320, accepted are"),
        ("kl_weight=1e39", "kl_weight: got 1e+39, accepted are"),
        ("filter_mean=-1e39", "filter_mean: got -1e+39, accepted are"),
        (f"lora_rank={10**22}", "lora_rank: got 10000000000000000000000, accepted are numbers below 2**31"),
        ("rollout_batch=2147483648", "rollout_batch: got 2147483648, accepted are"),
        ("group_size=10001", "group_size: got 10001, input should be less than or equal to 10000"),
        ("explore=10001", "explore: got 10001"),
        ("prompts_per_epoch=100001", "prompts_per_epoch: got 100001"),
        ("eval_prompts_per_group=100001", "eval_prompts_per_group: got 100001"),
        ("max_sequence_length=4097", "max_sequence_length: got 4097"),
        ("learning_rate=1e-4f", "learning_rate: got '1e-4f'"),
        ("learning_rate=1e3.5", "learning_rate: got '1e3.5'"),
        ("learning_rate=2024-13-45", "learning_rate: got '2024-13-45'"),
        ("learning_rate=!!int x", "learning_rate: cannot be read: ValueError"),
        ("learning_rate=!!bool x", "learning_rate: cannot be read: KeyError"),
        ("learning_rate=!!timestamp x", "learning_rate: cannot be read: AttributeError"),
        (f"learning_rate={'1' * 5000}", "learning_rate: cannot be read: ValueError"),
        (f"learning_rate={'[' * 3000}", "learning_rate: cannot be read: RecursionError"),
        ("epochs=1:30", "epochs: got '1:30'"),
        ("epochs=0b11", "epochs: got '0b11'"),
        ("epochs=1_0", "epochs: got '1_0'"),
        (f"rollout_options.eta={10**400}", "rollout_solver: got dpm++2M with options"),
        ("dtype=float16", "dtype: got 'float16'"),
        ("task=shape", "task: got 'shape'"),
        ("objective=dpo", "objective: got 'dpo'"),
        ("tracker=mlflow", "tracker: got 'mlflow'"),
        ("combine=mean", "combine: got 'mean'"),
        ("rewards.ocr=1.0", "rewards: got {'ocr': 1.0}, but the task is shapes"),
        ("task=rewards", "rewards: got none, but the task is rewards"),
        ("learning_rat=1", "learning_rat: unknown key, did you mean learning_rate?"),
        ("=1", "override: got '=1', accepted is key=value"),
        (".epochs=1", "override: got '.epochs=1', accepted is key=value"),
        ("alarms..velocity=1.0", "override: got 'alarms..velocity=1.0', accepted is key=value"),
        ("epochs", "override: got 'epochs', accepted is key=value"),
        ("epochs.x=1", "epochs: got {'x': 1}"),
        ("epochs=[1", "epochs: is not YAML"),
        ("stages.0.epochs=1", "epochs"),
        ("stages=[{epochs: 2, beta: -1}]", "stages.0.beta: got -1"),
        ("stages=[{beta: 1}]", "stages.0.epochs: missing"),
        ("stages=[{epochs: 2, seed: 1}]", "stages.0.seed: cannot differ between stages"),
        ("stages=[{epochs: 2, bta: 1}]", "stages.0.bta: unknown key, did you mean beta?"),
    ],
)
def test_a_bad_override_is_named(override, message):
    assert message in refused("shapes", override)


@pytest.mark.parametrize(
    ("solver", "option", "message"),
    [
        ("ddim", "etta=0.5", "etta: unknown option of ddim, did you mean eta?"),
        ("flow-sde", "eta=true", "eta: got True, accepted is a number"),
        ("flow-sde", "eta=1e300", "eta: got 1e+300, accepted is a number"),
        ("flow-sde", "eta=1e30", "accepted are coefficients that float32 holds"),
        ("unipc", "order=true", "order: got True, accepted are 1, 2, 3"),
        ("mixed", "window={0: 1, 2: 3}", "window: got {0: 1, 2: 3}, accepted are two integers"),
        ("mixed", "window=2", "window: got 2, accepted are two integers"),
    ],
)
def test_options_of_a_solver_are_named(solver, option, message):
    refusal = refused("shapes", f"rollout_solver={solver}", f"rollout_options.{option}")
    assert f"rollout_solver: got {solver} with options" in refusal and message in refusal


@pytest.mark.parametrize("index", ["-1", "+0", " 0 ", "0_0", "2", "x"])
def test_a_stage_is_named_by_its_index_alone(index):
    stages = ["stages=[{epochs: 1}, {epochs: 2}]", "stages.0.epochs=7"]
    assert load_config("shapes", stages).epochs == 9
    assert f"there is no stages.{index}.epochs to set" in refused("shapes", *stages, f"stages.{index}.epochs=9")


@pytest.mark.parametrize(
    ("objective", "overrides"),
    [
        ("nft", ["clip_range=0.2", "rwr_temperature=2"]),
        ("positive", ["clip_range=0.2", "rwr_temperature=2"]),
        ("awm", ["beta=0.5", "advantage_mode=binary", "rwr_temperature=2"]),
        ("grpo", ["beta=0.5", "advantage_mode=binary", "weighting=t", "rwr_temperature=2"]),
        ("rwr", ["beta=0.5", "advantage_mode=binary", "weighting=t", "clip_range=0.2", "adv_clip_max=1"]),
        ("sft", ["beta=0.5", "adv_clip_max=1", "weighting=t", "clip_range=0.2", "rwr_temperature=2"]),
    ],
)
def test_what_an_objective_does_not_read_is_refused(objective, overrides):
    chosen = [f"objective={objective}", "rollout_solver=flow-sde"]
    assert {item.partition("=")[0] for item in overrides} <= unread(objective)
    for item in overrides:
        key = item.partition("=")[0]
        default = Config.model_fields[key].default
        message = refused("shapes", *chosen, item)
        assert f"{key}: got " in message and f"with objective={objective}, accepted is {default} then" in message
        load_config("shapes", [*chosen, f"{key}={default}"])


def test_what_no_stage_uses_need_not_fit():
    scored = "stages=[{epochs: 1, prompts: shapes, rewards: {jpeg: 1}}]"
    assert load_config("shapes", ["task=rewards", scored]).at(0).rewards == {"jpeg": 1}
    noisy = "{epochs: 1, rollout_solver: flow-sde}"
    assert load_config("shapes", ["objective=grpo", f"stages=[{noisy}]"]).at(0).rollout_solver == "flow-sde"
    assert "stages.1.timesteps_per_sample: got 3, but grpo" in refused(
        "shapes", "objective=grpo", f"stages=[{noisy}, {{epochs: 1}}]"
    )


def test_rewards_are_checked():
    assert "rewards.pickscore: got -1" in refused("sd35_pickscore", "rewards.pickscore=-1")
    assert "rewards.pickscore: got 'a'" in refused("sd35_pickscore", "rewards.pickscore=a")
    assert "accepted is at least one with a weight above 0" in refused("sd35_pickscore", "rewards.pickscore=0")
    assert "rewards: got the name 'a_std'" in refused("sd35_pickscore", "rewards.a_std={reward: jpeg}")
    assert load_config("sd35_pickscore", ["rewards.hpsv2=0"]).reward_specs()["hpsv2"].weight == 0
    assert "rewards: got the name ''" in refused("sd35_pickscore", "rewards={'': {reward: jpeg}}")
    assert "prompts: got none" in refused("sd35_pickscore", "prompts=null")
    assert "epochs: got 20, but the stages add up to 1600" in refused("sd35_multi_reward", "epochs=20")
    for setting, message in (
        ("{wieght: 1.0}", ".wieght: unknown key, did you mean weight?"),
        ("{reward: 3}", ".reward: got 3, accepted is str"),
        ("{reward: null}", ".reward: got None, accepted is str"),
        ("{workers: 1.5}", ".workers: got 1.5, accepted is int"),
        ("{workers: true}", ".workers: got True, accepted is int"),
        ("{workers: 257}", ".workers: got 257, accepted are 1 to 256"),
        ("{options: [1]}", ".options: got [1], accepted is dict"),
        ("{device: 3}", ".device: got 3, accepted is str | None"),
        ("{device: gpu}", "device: got 'gpu', accepted are cpu, cuda and cuda:N"),
        (str(10**400), "rewards.pickscore: got 10000"),
        ("5e-324", "rewards.pickscore: got 5e-324, accepted are numbers that float32 holds"),
        ("{weight: 1e308}", "rewards.pickscore: got 1e+308, accepted are numbers that float32 holds"),
    ):
        assert message in refused("sd35_pickscore", f"rewards.pickscore={setting}")


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ("gradient_checkpointing=true", "gradient_checkpointing=True, accepted is False"),
        ("compile_rollout=default", "compile_rollout=default, accepted is null"),
        ("adapter=full", "adapter=full, accepted is lora"),
        ("shard=true", "shard=True, accepted is False"),
        ("device=cpu", "device=cpu, accepted is a GPU"),
    ],
)
def test_cuda_graphs_are_refused_with_what_they_cannot_record(setting, accepted):
    message = refused("shapes", "device=cuda", "cuda_graphs=true", setting)
    assert f"cuda_graphs: got true with {accepted}" in message


def test_float8_and_full_fine_tuning_are_checked_against_the_rest():
    fused = ["fused_transformer=true", "float8_rollout=true"]
    assert "float8_rollout: got true with dtype=float32, on a GPU it needs bfloat16" in refused(
        "shapes", *fused, "device=cuda"
    )
    load_config("shapes", [*fused, "device=cuda", "dtype=bfloat16"])
    assert "fused_transformer: got true with adapter=full, accepted is lora" in refused(
        "shapes", *fused, "adapter=full"
    )
    for item, default in (("lora_rank=4", 32), ("lora_alpha=4", 64)):
        key = item.partition("=")[0]
        assert f"{key}: got 4 with adapter=full, accepted is {default} then" in refused("shapes", "adapter=full", item)
        load_config("shapes", ["adapter=full", f"{key}={default}"])


def test_a_file_may_merge_what_it_has_named(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "task: rewards\nprompts: ocr\n"
        "rewards:\n  ocr: &both {weight: 0.5, workers: 2}\n  jpeg: {<<: *both, workers: 1}\n"
    )
    specs = load_config(str(tmp_path / "run.yaml")).reward_specs()
    assert [(spec.weight, spec.workers) for spec in specs.values()] == [(0.5, 2), (0.5, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds NoneType"),
        ("- epochs: 3\n", "holds list"),
        ("epochs\n", "holds str"),
        ("epochs: 3\nepochs: 4\n", "epochs: comes 2 times"),
        ("rewards: {a: 1.0, a: 2.0}\n", "bad.yaml: is not YAML: a: comes 2 times"),
        ("alarms:\n  velocity: 1.0\n  velocity: 2.0\n", 'velocity: comes 2 times, accepted is once in "<'),
        ("alarms:\n  <<: {velocity: 1.0}\n  <<: {gradient: 2.0}\n", "<<: comes 2 times"),
        ("1: a\n'1': b\n", "1: comes 2 times"),
        ("seed: !!bool x\n", "bad.yaml: cannot be read: KeyError"),
        ("epochs: [3\n", "is not YAML"),
        ("3: 4\n", "3: unknown key"),
        ("base: 3\n", "base: got 3"),
        ("base: shape\n", "got 'shape', did you mean shapes?"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_named(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refused(tmp_path / "bad.yaml")


def test_missing_and_unreadable_files_are_named(tmp_path):
    assert "config: got 'sd35_genval', did you mean sd35_geneval" in refused("sd35_genval")
    assert "nowhere.yaml', but there is no such file; accepted" in refused(tmp_path / "nowhere.yaml")
    assert "config: got 'shapes.yaml', but there is no such file; did you mean shapes?" in refused("shapes.yaml")
    assert "config: got 'SHAPES', did you mean shapes?" in refused("SHAPES")
    for name in ("x" * 300, "x" * 300 + ".yaml", "\0.yaml"):
        assert refused(name).startswith("config: got ")
    (tmp_path / "run").write_text("epochs: 3\n")
    message = refused(tmp_path / "run")
    assert "no such file" not in message and message.endswith("or the path of a .yaml or .yml file")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "bytes.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refused(tmp_path / "folder.yaml")


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 3e-4\nepochs: 010\nbeta: .5E+1\nprompts: 1e5.txt\ntask: rewards\nrewards: {jpeg: 5.}\n"
    )
    config = load_config(str(path))
    assert (config.learning_rate, config.epochs, config.beta, config.prompts) == (3e-4, 10, 5.0, "1e5.txt")
    assert config.rewards == {"jpeg": 5.0}
    assert yaml.safe_load("3e-4") == "3e-4" and yaml.safe_load("010") == 8


@pytest.mark.parametrize("text", ["1e5", "010", "1:30", "0x10", "1_0", "2024-01-02", "3e4-model", "5."])
def test_text_like_a_number_survives_being_saved(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(load_config("shapes", [f"pipeline='{text}'"]).dump())
    assert load_config(str(path)).pipeline == yaml.safe_load(path.read_text())["pipeline"] == text


def test_a_mapping_that_is_merged_before_it_is_read_has_each_key_once(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "task: rewards\nprompts: ocr\nrewards:\n"
        "  ocr: {options: &a {<<: {workers: 1}, workers: 2}}\n  jpeg: {<<: *a, weight: 3}\n"
    )
    assert load_config(str(tmp_path / "run.yaml")).reward_specs()["jpeg"].workers == 2


def test_every_setting_is_explained(tmp_path):
    for overrides in ([], ["stages=[{epochs: 1}, {epochs: 2, beta: 0.3}]"]):
        config = load_config("shapes", overrides)
        text = config.dump(explained=True)
        (tmp_path / "explained.yaml").write_text(text)
        assert load_config(tmp_path / "explained.yaml") == config and "#" not in config.dump()
        lines = text.splitlines()
        keys = [i for i, line in enumerate(lines) if line.partition(":")[0] in Config.model_fields]
        assert keys and all(lines[i - 1].startswith("# ") for i in keys)
        assert all(len(line) <= 120 for line in lines if line.startswith("#"))
        for names in ("One of copy, linear_0.5, delayed_0.999.", "One of default, reduce-overhead, max-autotune."):
            assert names in " ".join(text.replace("\n# ", " ").split())


def test_names_of_other_trainers_lead_to_settings():
    for name in _ELSEWHERE.values():
        assert name.partition(".")[0] in Config.model_fields
    assert not ({*_ELSEWHERE, *_NOT_HERE} & Config.model_fields.keys())


def test_a_preset_can_watch_a_second_reward():
    specs = load_config("sd35_geneval", ["rewards.pickscore=0.0"]).reward_specs()
    assert {name: spec.weight for name, spec in specs.items()} == {"geneval": 1.0, "pickscore": 0.0}
