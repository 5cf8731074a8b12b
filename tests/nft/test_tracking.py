"""Trackers get every epoch's numbers; one whose package is missing is refused before any work."""

import json

import pytest

pytest.importorskip("diffusers")

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from distributed_worker import Brightness

from nft import tracking
from nft.config import load_config
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import build_pipeline

SMALL = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
         "eval_steps=1", "eval_solver=euler", "lora_rank=4", "epochs=2"]  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_what_is_logged(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    build_pipeline().save_pretrained(tmp_path / "pipeline")
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    needs_folder, takes_pictures = name == "tensorboard", name != "trackio"
    seen = {"logged": [], "pictures": [], "finished": 0}

    class Recorder(GeneralTracker):
        name = "recorder"
        tracker = None
        requires_logging_directory = needs_folder

        def __init__(self, project, name=None, logging_dir=None):
            super().__init__()
            seen["start"] = (project, name, logging_dir)

        def start(self):
            pass

        def store_init_configuration(self, values):
            seen["settings"] = values

        def log(self, values, step):
            seen["logged"].append((step, values))

        if takes_pictures:

            def log_images(self, values, step):
                seen["pictures"].append((step, values["held_out"]))

        def finish(self):
            seen["finished"] += 1

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [name])
    Trainer(
        load_config("shapes", [f"pipeline={tmp_path / 'pipeline'}", *SMALL, f"tracker={name}"]), tmp_path / "run"
    ).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in seen["logged"]] == [line["epoch"] for line in lines] == [0, 1, 2, 2]
    for (_, values), line in zip(seen["logged"], lines, strict=True):
        assert values and all(line[key] == value for key, value in values.items())
    assert [step for step, _ in seen["pictures"]] == ([0, 2] if takes_pictures else [])
    for _, pictures in seen["pictures"]:
        shapes = {picture.shape for picture in pictures}
        assert 1 < len(pictures) <= 24 and shapes == {(3, 64, 64) if name == "tensorboard" else (64, 64, 3)}
        assert all(picture.dtype == "uint8" for picture in pictures)
    project = "mine" if name == "wandb" else "nft"
    assert seen["start"] == (project, *((None, tmp_path / "run") if needs_folder else ("run", None)))
    assert seen["finished"] == 1
    assert seen["settings"]["learning_rate"] == 1e-3
    # Trackers take no lists or mappings.
    assert all(isinstance(value, bool | int | float | str) for value in seen["settings"].values())


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    build_pipeline().save_pretrained(tmp_path / "pipeline")
    settings = [f"pipeline={tmp_path / 'pipeline'}", *SMALL, "tracker=wandb"]

    class LoggedOut(GeneralTracker):
        name = "recorder"
        tracker = None
        requires_logging_directory = False

        def __init__(self, project, name):
            raise RuntimeError("No API key configured")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", LoggedOut)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(ValueError, match="tracker: wandb does not start: No API key configured"):
        Trainer(load_config("shapes", settings), tmp_path / "run")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"tracker: got 'wandb', but its package is missing.*`pip install wandb`"):
        Trainer(load_config("shapes", ["tracker=wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
