"""What is known of a later stage's task is said at the start."""

import pytest

pytest.importorskip("diffusers")

import huggingface_hub

from nft import tasks
from nft.config import load_config
from nft.rewards import registry
from nft.rewards.base import RewardError
from nft.trainer import Trainer


def checked(*overrides):
    tasks.check(load_config("shapes", ["task=rewards", "prompts=ocr", *overrides]))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quoted.txt").write_text('a sign "Open"\na sign "Shut"\n')
    (tmp_path / "mixed.txt").write_text('a board "Open"\na board\n')


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards={small: {reward: jpeg, options: {quality: 101}}}"], "rewards.small: quality: got 101, accepted"),
        (["rewards.jpeg.options.qualty=3"], "rewards.jpeg.options.qualty: unknown key, did you mean quality?"),
        (["rewards={jpeg: {device: cuda}}"], "rewards.jpeg.device: got 'cuda', accepted is none"),
        (["rewards={clipscore: {device: 'cuda:99'}}"], "rewards.clipscore.device: got 'cuda:99', but this machine"),
        (["rewards={far: {reward: 'http://host'}}"], "rewards.far.reward: got 'http://host', accepted is http://host"),
        (["rewards={shapes: 1}"], "prompts: metadata: entry 0 lacks include, which ShapesReward needs"),
        (
            ["rewards={shapes: 1}", "prompts=shapes", "held_out_prompts=quoted.txt"],
            "held_out_prompts: metadata: entry 0 lacks include",
        ),
        (
            ["rewards={jpeg: 1}", "prompts=quoted.txt", "held_out_prompts=x.csv"],
            "held_out_prompts: got 'x.csv', accepted are",
        ),
    ],
)
def test_bad_rewards_and_prompts_are_named(overrides, message, files):
    with pytest.raises(ValueError) as caught:
        checked(*overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("side", ["prompts", "held_out_prompts"])
def test_every_prompt_of_ocr_has_a_text(side, files, monkeypatch):
    monkeypatch.setattr("nft.rewards.ocr.OCR.packages", ())
    monkeypatch.setattr("nft.rewards.ocr.OCR.engine", staticmethod(lambda: None))
    checked("rewards={ocr: 1}")
    both = {"prompts": "quoted.txt", "held_out_prompts": "quoted.txt"} | {side: "mixed.txt"}
    with pytest.raises(ValueError, match=f"^{side}: metadata: entry 1, 'a board': prompt: got 'a board', accepted for"):
        checked("rewards={ocr: 1}", *(f"{key}={file}" for key, file in both.items()))


def test_weights_are_looked_for(files, tmp_path, monkeypatch):
    """Only those that the options leave in place; what is not here is fetched where that can be done."""
    fetched = []

    def fetch(repo, filename):
        fetched.append((repo, filename))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(FileNotFoundError, match="hf download yuvalkirstain/PickScore_v1"):
        checked("rewards={pickscore: 1}")
    with pytest.raises(FileNotFoundError, match="hf download laion/CLIP-ViT-H-14"):
        checked("rewards={pickscore: {options: {model: mine}}}")
    assert [file for _, file in fetched] == ["config.json", "preprocessor_config.json"]
    checked("rewards={pickscore: {options: {model: mine, processor: mine}}}")
    with pytest.raises(FileNotFoundError, match=r"sac.logos.ava1-l14-linearMSE.pth.*improved-aesthetic-predictor"):
        checked("rewards={aesthetic: 1}")
    checked("rewards={aesthetic: {options: {head: mine, model: mine}}}")
    with pytest.raises(FileNotFoundError, match="hf download"):
        tasks.check(load_config("sd35_geneval", ["device=cpu"]))


def test_a_server_is_not_asked_and_nothing_is_loaded_on_a_device(monkeypatch):
    monkeypatch.setattr(registry, "load", None)
    monkeypatch.setattr(tasks, "fetch_weights", lambda kind, options: None)
    checked("rewards={clipscore: {device: cpu}, far: {reward: 'http://127.0.0.1:1/ocr'}}")


def test_a_second_stage_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("nft.trainer.Policy", None)
    stage = "{epochs: 1, task: rewards, prompts: shapes, rewards: {jpeg: {options: {quality: 101}}}}"
    with pytest.raises(ValueError, match=r"rewards.jpeg: quality: got 101"):
        Trainer(load_config("shapes", [f"stages=[{{epochs: 1}}, {stage}]"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_to_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nft.rewards.jpeg.JPEGCompressibility.__init__", lambda self: 1 / 0)
    with pytest.raises(RewardError, match=r"rewards.jpeg: ZeroDivisionError"):
        checked("rewards={jpeg: 1}")
