"""The reward protocol, the registry, and every bundled reward against a formula written here."""

import io
import json
import math
import re
import sys
import threading
import time
import types
import weakref
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("transformers")

from tiny_rewards import clip_model, save_clip
from typer.testing import CliRunner

from nft.cli import app
from nft.data import preference
from nft.data.ocr import generate
from nft.rewards import registry
from nft.rewards.base import Reward, RewardError, Scored, join, score
from nft.rewards.clip import Aesthetic, CLIPScore, HPSv2, PickScore
from nft.rewards.image_reward import ImageReward
from nft.rewards.jpeg import JPEGCompressibility
from nft.rewards.ocr import OCR, PaddleOCR, edit_distance, target_of, text_score
from nft.rewards.pool import RewardSpec, Scorer
from nft.rewards.unified import UnifiedReward

PROMPTS = ["a red dog", "two cats on a mat", "bus"]


def noise(count=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


# --- the protocol ---


class Brightness(Reward):
    range = (0.0, 1.0)
    needs = ("scale",)
    batch = 2

    def __init__(self, sizes=None):
        self.sizes = [] if sizes is None else sizes

    def __call__(self, pictures, prompts, metadata):
        self.sizes.append(len(pictures))
        mean = pictures.float().mean((1, 2, 3))
        return Scored(mean / 255 * torch.tensor([entry["scale"] for entry in metadata]), {"mean": mean})


def test_scores_come_in_batches_and_in_order():
    reward, pictures = Brightness(), noise(5)
    scored = score(reward, pictures, ["p"] * 5, [{"scale": 1 / (i + 1)} for i in range(5)])
    expected = pictures.double().mean((1, 2, 3))
    assert reward.sizes == [2, 2, 1]
    assert scored.details["mean"].tolist() == pytest.approx(expected.tolist())
    assert scored.score.tolist() == pytest.approx([v / 255 / (i + 1) for i, v in enumerate(expected.tolist())])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": noise().float()}, TypeError, "pictures: got torch.float32"),
        ({"pictures": noise()[..., :2]}, ValueError, r"pictures: got shape \(3, 32, 32, 2\)"),
        ({"prompts": ["p"]}, ValueError, "prompts: got 1, accepted is one per picture, 3"),
        ({"metadata": [{"scale": 1}, {}, {"scale": 1}]}, ValueError, "entry 1 lacks scale, which Brightness needs"),
        ({"metadata": [{"scale": 9}] * 3}, RewardError, "Brightness: .* its range is"),
        ({"metadata": [{"scale": math.nan}] * 3}, RewardError, "Brightness: score holds NaN"),
    ],
)
def test_bad_batches_and_scores_are_named(change, error, message):
    batch = {"pictures": noise(), "prompts": ["p"] * 3, "metadata": [{"scale": 1}] * 3} | change
    with pytest.raises(error, match=message):
        score(Brightness(), **batch)


class Placed(Brightness):
    uses_device = True

    def __init__(self, device):
        super().__init__()
        self.device = device


def test_a_reward_is_on_the_gpu_of_its_process_and_not_of_its_thread(monkeypatch):
    """CUDA's current device is a thread's own, and the first one in a new thread."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(registry, "find", lambda name: Placed)
    for device, given in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert registry.load("placed", device=device).device == given
    # One that has a device of its own is there, and is asked once at a time.
    specs = {"own": RewardSpec("placed", device="cuda:1", workers=3), "other": RewardSpec("placed")}
    scorer = Scorer(specs, device="cuda")
    assert [scorer.judges[name].device for name in specs] == ["cuda:1", "cuda:3"]
    assert scorer._threads["own"]._max_workers == 1
    scorer.close()


def test_a_reward_leaves_its_device_with_its_stage(monkeypatch):
    """The next stage's are made before the task of this one is gone."""
    monkeypatch.setattr(registry, "find", lambda name: Placed)
    scorer = Scorer({"own": RewardSpec("placed")})
    scorer.submit(noise(), [{"prompt": "p", "scale": 1}] * 3)
    scorer.gather()
    reward = weakref.ref(scorer.judges["own"])
    scorer.close()
    assert reward() is None


def test_pictures_are_kept_no_longer_than_they_have_no_score(monkeypatch):
    taken, broken = [], True

    class Seen(Brightness):
        threaded = True

        def __call__(self, pictures, prompts, metadata):
            taken.append(weakref.ref(pictures._base))
            if broken and len(pictures) == 1:
                raise RuntimeError("later")
            return super().__call__(pictures, prompts, metadata)

    monkeypatch.setattr(registry, "find", lambda name: Seen)
    with Scorer({"r": RewardSpec("seen")}) as scorer:
        for count in (2, 1):
            scorer.submit(noise(count), [{"prompt": "p", "scale": 1}] * count)
        with pytest.raises(RewardError, match="reward r: Seen: RuntimeError: later"):
            scorer.gather()
        first, *failed = taken
        assert first() is None and all(pictures() is not None for pictures in failed)
        broken = False
        assert len(scorer.gather()["r"].score) == 3


def test_pictures_are_scored_as_they_were_handed_over(monkeypatch):
    """The caller may draw its next ones into the same memory."""
    overwritten = threading.Event()

    class Late(Brightness):
        threaded = True

        def __call__(self, pictures, prompts, metadata):
            assert overwritten.wait(60)
            return super().__call__(pictures, prompts, metadata)

    monkeypatch.setattr(registry, "find", lambda name: Late)
    pictures = torch.full((2, 8, 8, 3), 51, dtype=torch.uint8)
    with Scorer({"r": RewardSpec("late")}) as scorer:
        scorer.submit(pictures, [{"prompt": "p", "scale": 1}] * 2)
        pictures.fill_(255)
        overwritten.set()
        assert scorer.gather()["r"].score.tolist() == pytest.approx([0.2, 0.2])


def test_a_detail_that_is_not_finite_is_named_unless_it_may_be_so():
    class Detailed(Reward):
        def __call__(self, pictures, prompts, metadata):
            return Scored(torch.zeros(len(pictures)), {"size": torch.full((len(pictures),), math.inf)})

    batch = noise(), ["p"] * 3, [{}] * 3
    with pytest.raises(RewardError, match="Detailed: size holds NaN or infinity"):
        score(Detailed(), *batch)
    assert score(Detailed(), *batch, all_finite=False).details["size"].tolist() == [math.inf] * 3


OWN = '''
import torch
from nft.rewards.base import Reward

class Redness(Reward):
    """Share of red."""
    range = (0.0, 1.0)
    packages = ("torch",)

    def __init__(self, gain=1.0):
        self.gain = gain

    def __call__(self, pictures, prompts, metadata):
        return self.gain * pictures[..., 0].float().mean((1, 2)) / 255
'''


BAD = """
from nft.rewards.base import Reward

class Bad(Reward):
    def __init__(self):
        raise RuntimeError("no good")

    def __call__(self, pictures, prompts, metadata): ...
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "redness_reward.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "redness_reward:Redness"
    sys.modules.pop("redness_reward", None)


def test_own_reward_by_module_and_attribute(own_module):
    assert len(OWN.splitlines()) < 40
    pictures = noise()
    scored = score(registry.load(own_module, {"gain": 0.5}), pictures, PROMPTS, [{}] * 3)
    assert scored.score.tolist() == pytest.approx((pictures[..., 0].double().mean((1, 2)) / 510).tolist())


def test_own_reward_by_entry_point(own_module, monkeypatch):
    from importlib.metadata import EntryPoint

    points = [EntryPoint("redness", own_module, registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "nft.rewards" else [])
    assert type(registry.load("redness")).__name__ == "Redness"
    listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "200"})
    assert listing.exit_code == 0 and "redness" in listing.output


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("Own = torch", "'broken_reward:Own', but broken_reward fails: NameError: name 'torch' is not defined"),
        ("import torch; torch.nothing", "broken_reward fails: AttributeError: .*torch.*nothing"),
        ("import no_such_package", "broken_reward fails: ModuleNotFoundError: .*no_such_package"),
        (
            "from nft.rewards.base import Reward\nclass Own(Reward):\n    batch = 0",
            "'broken_reward:Own' with batch = 0, Input should be greater than 0",
        ),
        (
            "from nft.rewards.base import Reward\nclass Own(Reward):\n    range = 'ab'",
            "'broken_reward:Own' with range = 'ab', Input should be a valid tuple",
        ),
        (
            "from nft.rewards.base import Reward\nclass Own(Reward):\n    range = (1.0, 0.0)",
            r"'broken_reward:Own' with range = \(1.0, 0.0\), accepted is \(lowest, highest\)",
        ),
        (
            "from nft.rewards.base import Reward\nclass Own(Reward):\n    needs = 'word'",
            "'broken_reward:Own' with needs = 'word', Input should be a valid tuple",
        ),
        ("class Own: pass", "'broken_reward:Own', accepted is a subclass of nft.rewards.base.Reward"),
        ("Own = 3", "'broken_reward:Own', accepted is a subclass of nft.rewards.base.Reward"),
    ],
)
def test_a_broken_reward_is_named_with_its_own_error(code, message, tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    (tmp_path / "broken_reward.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)
    with pytest.raises(ValueError, match=message):
        registry.load("broken_reward:Own")
    points = [EntryPoint("mine", "broken_reward:Own", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)
    listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "240"})
    assert listing.exit_code == 0 and all(name in listing.output for name in registry.BUNDLED)
    (row,) = [line for line in listing.output.splitlines() if "mine" in line]
    assert "broken: " in row
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qualitty": 3}, "rewards.jpeg.options.qualitty: unknown key, did you mean quality"),
        ({"name": "x"}, "rewards.jpeg.options.name: unknown key, accepted are quality"),
        ({1: 2}, "rewards.jpeg.options.1: unknown key"),
        ({"device": "cuda"}, "rewards.jpeg.options.device: unknown key"),
        (
            {"quality": date(2024, 1, 1)},
            r"options.quality: got datetime.date\(.*accepted are JSON's types",
        ),
        ({"quality": "high"}, "rewards.jpeg: quality: got 'high', accepted are whole numbers from 1 to 100"),
        ({"quality": 50.5}, "rewards.jpeg: quality: got 50.5"),
        ({"quality": True}, "rewards.jpeg: quality: got True"),
        ({"quality": 0}, "rewards.jpeg: quality: got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        registry.load("jpeg", options)


def test_a_reward_that_takes_no_options_says_so():
    with pytest.raises(ValueError, match=r"rewards.shapes.options.scale: unknown key, accepted are none"):
        registry.check("shapes", {"scale": 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clipscore", {"device": "cuda"}, "options.device: got 'cuda', accepted is none: it is given beside"),
        ("http://host:1/jpeg", {"url": "x"}, "options.url: got 'x', accepted is none: it is given beside"),
        ("http://host:1/jpeg", {"timeout": -3}, "r.options.timeout: got -3, accepted is a positive number of seconds"),
        ("http://host:1/jpeg", {"timeout": "x"}, "r.options.timeout: got 'x'"),
        ("http://host:1/jpeg", {"patience": "x"}, "r.options.patience: got 'x'"),
        ("http://host:1/jpeg", {"patience": math.nan}, "r.options.patience: got nan"),
        ("http://", {}, "r.reward: got 'http://', accepted is http://host:port/name"),
        ("http://host", {}, "r.reward: got 'http://host'"),
        ("http://host:1/", {}, "r.reward: got 'http://host:1/'"),
        ("http://host:99999/jpeg", {}, "r.reward: got 'http://host:99999/jpeg'"),
        ("http://[host/jpeg", {}, "r.reward: got"),
        *(
            (name, {}, f"r.reward: got '{name}'; accepted are .*module:attribute or a server's")
            for name in ("host:1/jpeg", "ftp://host/jpeg", "./mine:Own", "mine:Own:x", ":Own", "mine:")
        ),
        (3, {}, "reward: got 3, accepted is a name"),
    ],
)
def test_what_cannot_be_asked_is_found_out_without_asking(name, options, message):
    with pytest.raises(ValueError, match=message):
        registry.check(name, options, where="r")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("jpeg", "cuda", "r.device: got 'cuda', accepted is none, as jpeg uses no device"),
        ("http://host:1/jpeg", "cpu", "r.device: got 'cpu', accepted is none"),
        ("clipscore", "cuda:99", "r.device: got 'cuda:99', but this machine"),
        ("clipscore", "tpu", "r.device: got 'tpu', accepted are cpu, cuda and cuda:N"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(name, device, message):
    with pytest.raises(ValueError, match=message):
        registry.check(name, device=device, where="r")
    registry.check("clipscore", device="cpu")


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        ("RuntimeError('boom')", RewardError, "rewards.own_broken:Own: RuntimeError: boom"),
        ("ValueError('boom')", ValueError, "rewards.own_broken:Own: boom"),
        ("KeyError('boom')", RewardError, "rewards.own_broken:Own: KeyError: 'boom'"),
    ],
)
def test_a_constructor_that_fails_is_named(raised, error, message, tmp_path, monkeypatch):
    code = (
        "from nft.rewards.base import Reward\nclass Own(Reward):\n    def __call__(self, *batch): ...\n"
        "    def __init__(self, **more):\n        raise "
    )
    (tmp_path / "own_broken.py").write_text(code + raised)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_broken", raising=False)
    with pytest.raises(error, match=message):
        registry.load("own_broken:Own", {"any": 1})
    monkeypatch.delitem(sys.modules, "own_broken", raising=False)


def test_a_reward_that_cannot_be_called_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_empty.py").write_text("from nft.rewards.base import Reward\nclass Own(Reward): pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ValueError, match=r"rewards\.own_empty:Own: .*__call__"):
        registry.load("own_empty:Own")


def test_a_reward_that_fails_is_named_with_its_error():
    class Failing(Reward):
        def __call__(self, pictures, prompts, metadata):
            return metadata[0]["no such key"]

    with pytest.raises(RewardError, match="Failing: KeyError: 'no such key'"):
        score(Failing(), noise(), PROMPTS, [{}] * 3)


def test_a_reward_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    code = "import time\nfrom nft.rewards.base import Reward\nclass Own(Reward):\n    def __call__(self, *batch):\n"
    (tmp_path / "own_slow.py").write_text(code + "        time.sleep(600)\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    scorer = Scorer({"r": RewardSpec("own_slow:Own")})
    scorer.submit(noise(), [{"prompt": "p"}] * 3)
    begin = time.monotonic()
    scorer.close()
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("where", ["def __init__(self)", "def __call__(self, *batch)"])
def test_a_reward_that_exits_does_not_end_the_command(where, tmp_path, monkeypatch):
    code = "import sys\nfrom nft.rewards.base import Reward\nclass Own(Reward):\n    def __call__(self, *batch): ...\n"
    (tmp_path / "own_exit.py").write_text(f"{code}    {where}: sys.exit(0)\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_exit", raising=False)
    with pytest.raises(RewardError, match=r"Own: SystemExit: 0"):
        score(registry.load("own_exit:Own"), noise(), PROMPTS, [{}] * 3)


def test_a_check_of_prompts_that_fails_is_named():
    class Failing(Reward):
        def __call__(self, pictures, prompts, metadata): ...

        @staticmethod
        def check_prompt(prompt, entry):
            raise KeyError("word")

    with pytest.raises(RewardError, match=r"entry 0, .*Failing\.check_prompt: KeyError: 'word'"):
        score(Failing(), noise(), PROMPTS, [{}] * 3)


def test_scores_that_are_no_tensor_are_named():
    class Plain(Reward):
        def __call__(self, pictures, prompts, metadata):
            return [0.0] * len(pictures)

    with pytest.raises(RewardError, match="Plain: score is a list, not a tensor"):
        score(Plain(), noise(), PROMPTS, [{}] * 3)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ([{"a"}, {"a", "b"}], r"Moody: got details \['a'\] and \['a', 'b'\], accepted are the same in every call"),
        ([{"a"}, {"b"}], "Moody: got details"),
        ([{"score"}, {"score"}], "Moody: a detail is called score, accepted is another name"),
    ],
)
def test_details_that_would_be_lost_are_named(details, message):
    class Moody(Reward):
        batch = 2

        def __call__(self, pictures, prompts, metadata):
            return Scored(torch.zeros(len(pictures)), {name: torch.ones(len(pictures)) for name in details.pop(0)})

    with pytest.raises(RewardError, match=message):
        score(Moody(), noise(), PROMPTS, [{}] * 3)


def test_batches_of_different_details_are_not_joined():
    parts = [Scored(torch.zeros(1), {name: torch.zeros(1)}) for name in "ab"]
    with pytest.raises(RewardError, match=r"r: got details \['a'\] and \['b'\]"):
        join("r", parts)


def test_a_reward_that_fails_as_it_is_loaded_is_named(tmp_path, monkeypatch):
    (tmp_path / "bad_reward.py").write_text(BAD)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(RewardError, match=r"rewards\.bad_reward:Bad: RuntimeError: no good"):
        registry.load("bad_reward:Bad")
    served = CliRunner().invoke(app, ["reward-server", "bad_reward:Bad"], env={"COLUMNS": "240"})
    assert served.exit_code == 2 and "rewards.bad_reward:Bad: RuntimeError: no good" in served.output


def test_a_folder_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=f"'{tmp_path}' cannot be loaded: .*config.json"):
        CLIPScore(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orc", "got 'orc', did you mean ocr?"),
        (":A", "got ':A'; accepted are"),
        ("jpeg:", "got 'jpeg:', did you mean jpeg?"),
        ("no_such_module:A", "there is no module 'no_such_module'"),
        ("nft.rewards.jpeg:A", "nft.rewards.jpeg has no 'A'"),
    ],
)
def test_unknown_rewards_are_named(name, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        registry.load(name)


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(OCR, "packages", ("no_such_engine",))
    with pytest.raises(RewardError, match=r'no_such_engine not installed: pip install "diffusion-nft\[ocr\]"'):
        registry.load("ocr")
    listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "200"})
    lines = {name: [line for line in listing.output.splitlines() if name in line] for name in registry.BUNDLED}
    assert listing.exit_code == 0 and all(lines.values())
    assert "no_such_engine" in lines["ocr"][0] and "diffusion-nft[ocr]" in lines["ocr"][0]
    assert "installed" in lines["jpeg"][0]


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "80"}).output
    assert "unifiedreward" in listing
    states = "".join(line.split("\u2502")[5].strip() for line in listing.splitlines() if "\u2502" in line)
    assert "hfdownloadyuvalkirstain/PickScore_v1" in states.replace(" ", "")
    assert "\u2026" not in CliRunner().invoke(app, ["solvers"], env={"COLUMNS": "60"}).output


def test_missing_weights_are_listed(monkeypatch, tmp_path):
    import huggingface_hub

    def here(repo, file):
        return str(tmp_path) if (repo, file) == ("xswu/HPSv2", "HPS_v2.1_compressed.pt") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", here)
    listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "240"}).output
    assert "weights missing: hf download yuvalkirstain/PickScore_v1" in listing
    assert "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in listing and "hf download xswu/HPSv2" not in listing


def test_a_missing_head_is_listed(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: "here")
    monkeypatch.chdir(tmp_path)

    def row():
        listing = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "300"}).output
        return next(line for line in listing.splitlines() if "aesthetic" in line)

    head = "sac+logos+ava1-l14-linearMSE.pth"
    assert f"{head} missing: https://github.com/christophschuhmann/improved-aesthetic-predictor" in row()
    (tmp_path / head).touch()
    assert "missing" not in row() and "installed" in row()


# --- JPEG ---


def test_jpeg_is_the_file_size(tmp_path):
    pictures = torch.cat([noise(1, 64, 48), torch.zeros(1, 64, 48, 3, dtype=torch.uint8)])
    scored = score(JPEGCompressibility(quality=80), pictures, ["", ""], [{}, {}])
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(tmp_path / "picture.jpg", quality=80)
        assert scored.score[i].item() == pytest.approx(-(tmp_path / "picture.jpg").stat().st_size / 1000 / 500)
    assert scored.score[1] > scored.score[0]


# --- OCR ---


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance_of_known_pairs(a, b, distance):
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("Hello World", "hello world", 1),
        ("xxHELLO\nWORLDxx", "Hello World", 1),  # contained
        ("hallo", "hello", 0.8),
        ("", "hello", 0),
        ("STRASSE", "Straße", 1),  # of one case there is no other letter
        ("completely different text", "hello", 0),  # capped at the target's length
    ],
)
def test_text_score_worked_by_hand(read, target, expected):
    assert text_score(read, target) == pytest.approx(expected)


def test_the_target_is_quoted_or_given():
    assert target_of('a sign "Open" and "Closed"', {}) == "Open"
    assert target_of('say "" and "abc", not " "', {}) == "abc"
    assert target_of("a sign", {"text": "Shut"}) == "Shut"
    for unquoted in ("a sign", 'a sign ""', 'a sign "  "'):
        with pytest.raises(ValueError, match="quoted text"):
            target_of(unquoted, {})
    for text in (None, ["A"], 24):
        with pytest.raises(ValueError, match=r"text: got .*accepted is a text"):
            target_of('a sign "Open"', {"text": text})


def rendered(text, size=(320, 128)):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((16, 40), text, fill="black", font=ImageFont.load_default(34))
    return np.asarray(image)


def test_ocr_reads_rendered_text():
    pytest.importorskip("rapidocr", reason='pip install "diffusion-nft[ocr]"')
    pictures = torch.from_numpy(np.stack([rendered(text) for text in ("Golden Bakery", "Silver Bridge", "")]))
    prompts = ['a sign "Golden Bakery"', 'a sign "Golden Bakery"', 'a sign "Golden Bakery"']
    scored = score(registry.load("ocr"), pictures, prompts, [{}] * 3)
    exact, other, none = scored.score.tolist()
    assert exact == 1 and none == 0
    # silverbridge against goldenbakery: worked out by the definition of the distance.
    assert other == pytest.approx(1 - edit_distance("silverbridge", "goldenbakery") / 12)
    assert scored.details["exact"].tolist() == [1, 0, 0]
    upside_down = score(registry.load("ocr"), pictures[:1].flip(1, 2), prompts[:1], [{}])
    assert upside_down.details["exact"].tolist() == [0]


def test_paddleocr_is_given_bgr_and_joins_the_lines(monkeypatch):
    """A stand-in with PaddleOCR 3's interface; the package itself is not tested."""
    seen = []

    class StandIn:
        def __init__(self, **options):
            assert options["lang"] == "en"

        def predict(self, picture):
            seen.append(picture)
            return [{"rec_texts": ["Golden", "Bakery"]}]

    module = types.ModuleType("paddleocr")
    module.PaddleOCR = StandIn
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    picture = noise(1)
    assert score(PaddleOCR(), picture, ['"golden bakery"'], [{}]).score.tolist() == [1]
    np.testing.assert_array_equal(seen[0], picture[0].numpy()[..., ::-1])


def test_ocr_prompts_are_pinned_and_different():
    entries = generate(500, seed=1)
    assert entries == generate(500, seed=1) and len({e["prompt"] for e in entries}) == 500
    assert generate(500, seed=2) != entries
    assert all(target_of(e["prompt"], {}) == e["text"] for e in entries)
    with pytest.raises(ValueError, match="count: got 24577"):
        generate(24577, seed=0)


def test_preference_prompts_differ_and_are_of_every_kind():
    entries = preference.generate(300, seed=1)
    assert entries == preference.generate(300, seed=1) != preference.generate(300, seed=2)
    assert len({e["prompt"] for e in entries}) == len(entries)
    assert [e["tag"] for e in entries[::300]] == list(preference.KINDS)
    for count in (0, 18433):
        with pytest.raises(ValueError, match=f"per_kind: got {count}, accepted is 1 to 18432"):
            preference.generate(count, seed=0)


# --- CLIP ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    return save_clip(tmp_path_factory.mktemp("clip"))


def unit(x):
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def reference_cosine(model, processor, pictures, prompts):
    """Cosine by the towers and projections one at a time; at 32 pixels nothing is resized, only normalised."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((pictures / 255 - mean) / deviation).permute(0, 3, 1, 2)
    found = []
    with torch.no_grad():
        images = unit(model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T)
        for image, prompt in zip(images, prompts, strict=True):
            tokens = processor.tokenizer([prompt], return_tensors="pt")
            text = unit(model.text_model(**tokens).pooler_output @ model.text_projection.weight.T)
            found.append((image @ text[0]).item())
    return found


def test_clipscore_is_the_cosine(clip):
    reward, pictures = CLIPScore(clip), noise()
    expected = reference_cosine(reward.model, reward.processor, pictures, PROMPTS)
    assert score(reward, pictures, PROMPTS, [{}] * 3).score.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 1e-3


def test_prompts_beyond_77_tokens_are_cut(clip):
    long = " ".join(["word"] * 200)
    assert score(CLIPScore(clip), noise(1), [long], [{}]).score.isfinite().all()


def test_pickscore_is_the_scaled_cosine_over_26(clip):
    reward, pictures = PickScore(clip, clip), noise()
    cosine = reference_cosine(reward.model, reward.processor, pictures, PROMPTS)
    scale = math.exp(reward.model.logit_scale.item())
    scored = score(reward, pictures, PROMPTS, [{}] * 3)
    assert scored.score.tolist() == pytest.approx([scale * c / 26 for c in cosine], abs=1e-5)
    assert scored.details["pickscore"].tolist() == pytest.approx([scale * c for c in cosine], abs=1e-4)


def open_clip_names(model):
    """A CLIP's weights as open_clip names and packs them."""
    source, state = model.state_dict(), {"logit_scale": model.logit_scale.data}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(2):
            ours, theirs = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                packed = torch.cat([source[f"{ours}self_attn.{which}_proj.{kind}"] for which in "qkv"])
                state[f"{theirs}attn.in_proj_{kind}"] = packed
                for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                    state[f"{theirs}{b}.{kind}"] = source[f"{ours}{a}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
    state["token_embedding.weight"] = source["text_model.embeddings.token_embedding.weight"]
    state["positional_embedding"] = source["text_model.embeddings.position_embedding.weight"]
    state["text_projection"] = source["text_projection.weight"].T.contiguous()
    state["visual.class_embedding"] = source["vision_model.embeddings.class_embedding"]
    state["visual.positional_embedding"] = source["vision_model.embeddings.position_embedding.weight"]
    state["visual.conv1.weight"] = source["vision_model.embeddings.patch_embedding.weight"]
    state["visual.proj"] = source["visual_projection.weight"].T.contiguous()
    return state


def test_hpsv2_takes_the_published_file(clip, tmp_path):
    torch.manual_seed(1)
    tuned = clip_model()
    torch.save({"state_dict": open_clip_names(tuned)}, tmp_path / "HPS_v2.1_compressed.pt")
    reward, pictures = HPSv2(str(tmp_path), clip), noise()
    expected = reference_cosine(tuned, reward.processor, pictures, PROMPTS)
    assert score(reward, pictures, PROMPTS, [{}] * 3).score.tolist() == pytest.approx(expected, abs=1e-5)
    base = reference_cosine(CLIPScore(clip).model, reward.processor, pictures, PROMPTS)
    assert np.abs(np.subtract(base, expected)).max() > 1e-2


@pytest.mark.parametrize("widths", [(12, 1), (12, 8, 6, 1)])
def test_aesthetic_is_a_linear_head_on_the_unit_embedding(clip, tmp_path, widths):
    torch.manual_seed(2)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    # As published: dropouts between the layers leave every second index free.
    state = {f"layers.{2 * i}.{k}": v for i, layer in enumerate(layers) for k, v in layer.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    reward, pictures = Aesthetic(str(tmp_path / "head.pth"), clip), noise()
    pixels = reward.processor(images=list(pictures.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        x = unit(reward.model.vision_model(pixel_values=pixels).pooler_output @ reward.model.visual_projection.weight.T)
        for layer in layers:
            x = layer(x)
    assert score(reward, pictures, PROMPTS, [{}] * 3).score.tolist() == pytest.approx(x[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda clip: CLIPScore("/nowhere"), "hf download /nowhere"),
        (lambda clip: HPSv2("/nowhere", clip), "hf download /nowhere"),
        (lambda clip: HPSv2(clip, clip), "holds no HPS_v2.1_compressed.pt"),
        (lambda clip: Aesthetic("/nowhere.pth", clip), "/nowhere.pth.*improved-aesthetic-predictor"),
        (lambda clip: ImageReward(clip), "holds no ImageReward.pt"),
    ],
)
def test_missing_weights_are_named(clip, make, message):
    with pytest.raises(FileNotFoundError, match=message):
        make(clip)


# --- ImageReward ---

WIDTH, TEXT = 64, 32


def published_vision_name(name):
    """transformers' name of a BLIP vision weight as the published checkpoint has it."""
    for ours, theirs in (
        ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm"), ("encoder.layers", "blocks"),
        ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"), ("layer_norm", "norm"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("image_reward")
    sizes = {"hidden_size": TEXT, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "two", "cats", "on", "mat", "bus"]
    config = {**sizes, "vocab_size": len(words) + 2, "max_position_embeddings": 64}
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=2, num_attention_heads=1, image_size=32,
        patch_size=16, layer_norm_eps=1e-6,
    ))  # fmt: skip
    text = BlipTextModel(BlipTextConfig(**config, encoder_hidden_size=WIDTH), add_pooling_layer=False)
    head = [torch.nn.Linear(a, b) for a, b in ((TEXT, 16), (16, 8), (8, 1))]
    for module in (vision, text):
        for parameter in module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    state = {f"blip.visual_encoder.{published_vision_name(k)}": v for k, v in vision.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state |= {f"mlp.layers.{2 * i}.{k}": v for i, layer in enumerate(head) for k, v in layer.state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(
        json.dumps({**config, "vocab_size": len(words), "encoder_width": 768, "model_type": "bert"})
    )
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder), vision.eval(), text.eval(), head


def test_imagereward_is_the_standardised_head(image_reward):
    folder, vision, text, head = image_reward
    reward, pictures = ImageReward(folder, folder), noise()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(pictures, PROMPTS, strict=True):
            image = vision(((picture / 255 - mean) / deviation).permute(2, 0, 1)[None]).last_hidden_state
            tokens = reward.tokenizer([prompt], return_tensors="pt")
            # One prompt without padding: the padding of the reward must not show.
            x = text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
                     encoder_hidden_states=image).last_hidden_state[0, 0]  # fmt: skip
            for layer in head:
                x = layer(x)
            expected.append((x.item() - 0.16717362830052426) / 1.0333394966054072)
    scored = score(reward, pictures, PROMPTS, [{}] * 3)
    assert scored.score.tolist() == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 1e-3


def test_imagereward_crops_the_centre(image_reward):
    reward = ImageReward(image_reward[0], image_reward[0])
    wide = noise(1, 32, 64)
    whole, centre = (score(reward, p, ["a dog"], [{}]).score for p in (wide, wide[:, :, 16:48]))
    assert torch.allclose(whole, centre, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (64, 64), (20, 40)])
def test_imagereward_resizes_the_short_edge_and_then_crops(image_reward, height, width):
    """As PIL does both; at 32 pixels, which this network has, nothing is resized or cropped."""
    reward, picture = ImageReward(image_reward[0], image_reward[0]), noise(1, height, width)
    short = min(height, width)
    size = width * 32 // short, height * 32 // short
    resized = Image.fromarray(picture[0].numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    centre = torch.from_numpy(np.asarray(resized.crop((left, top, left + 32, top + 32))).copy())
    expected, found = (score(reward, p, ["a dog"], [{}]).score for p in (centre[None], picture))
    assert torch.allclose(found, expected, atol=1e-6)


# --- UnifiedReward ---


@pytest.fixture
def chat():
    """An OpenAI-compatible server that answers from a list and counts the requests under way."""
    state = {"replies": [], "requests": [], "busy": 0, "most": 0}
    lock, gate = threading.Lock(), threading.Event()
    state["gate"] = gate
    gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state["requests"].append((self.path, self.headers["Authorization"], body))
                state["busy"] += 1
                state["most"] = max(state["most"], state["busy"])
                status, text = state["replies"].pop(0) if state["replies"] else (200, "Final Score: 4")
            gate.wait(5)
            with lock:
                state["busy"] -= 1
            if callable(text):
                text = text(body)
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()


def unified(chat, **options):
    pytest.importorskip("httpx", reason='pip install "diffusion-nft[server]"')
    return UnifiedReward(chat["url"], "judge", **options)


def test_unifiedreward_sends_picture_and_prompt_and_reads_the_score(chat, monkeypatch):
    import base64

    monkeypatch.setenv("NFT_UNIFIED_REWARD_KEY", "secret")

    def by_caption(body):
        text = body["messages"][0]["content"][1]["text"]
        numbers = {"red": "3.5", "cats": "1"}
        found = [number for word, number in numbers.items() if word in text]
        return f"It fits.\nFinal Score: {found[0]}" if found else "I cannot say."

    chat["replies"] = [(200, by_caption)] * 3
    scored = score(unified(chat), noise(), PROMPTS, [{}] * 3)
    assert scored.score.tolist() == pytest.approx([0.7, 0.2, 0.0])
    assert scored.details["answered"].tolist() == [1, 1, 0]
    path, key, body = chat["requests"][0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["temperature"] == 0
    prefix, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert prefix == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 512)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Score: 5", 1.0),
        ("Final Score: **4.25**", 0.85),
        ("Final Score: 3.", 0.6),
        ("final score: 2", 0.4),
        ("**FINAL SCORE:** [3.5]", 0.7),
        ("Final Score: 5.5", None),
        ("Final Score: 10", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Final Score: none", None),
        (None, None),
        ([{"type": "text", "text": "Final Score: 4"}], None),
    ],
)
def test_unifiedreward_takes_whole_numbers_from_1_to_5(chat, text, expected):
    chat["replies"] = [(200, text), (200, "Final Score: 4")]
    scored = score(unified(chat, concurrency=1), noise(2), ["p"] * 2, [{}] * 2)
    assert scored.score.tolist() == pytest.approx([expected or 0.0, 0.8])
    assert scored.details["answered"].tolist() == [float(expected is not None), 1]


def test_unifiedreward_says_what_is_answered_where_no_answer_can_be_read(chat):
    """As by another model, or to a question of one's own: scores of 0 for all would train nothing, in silence."""
    chat["replies"] = [(200, "It is lovely.")] * 15
    with pytest.raises(RewardError, match=r"unifiedreward: http://127.* answered 'It is lovely.', accepted is 'Final"):
        score(unified(chat), noise(8), ["p"] * 8, [{}] * 8)
    # Of a few it may be by chance.
    assert score(unified(chat), noise(7), ["p"] * 7, [{}] * 7).score.eq(0).all()


@pytest.mark.parametrize(
    "options",
    [{"timeout": "x"}, {"timeout": -1}, {"retries": -1}, {"retries": "x"}, {"concurrency": 0}, {"question": 3},
     {"question": "How good?"}, {"model": ""}, {"url": "nope"}],
    ids=str,
)  # fmt: skip
def test_unifiedreward_names_options_that_it_cannot_use(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"rewards.unifiedreward: {name}: got {re.escape(repr(value))}, accepted"):
        registry.load("unifiedreward", options)


def test_unifiedreward_tries_again_and_then_names_the_server(chat, monkeypatch):
    monkeypatch.setattr("nft.rewards.unified._FIRST_PAUSE", 0.01)
    chat["replies"] = [(503, ""), (429, "")]
    assert score(unified(chat), noise(1), ["p"], [{}]).score.tolist() == pytest.approx([0.8])
    assert len(chat["requests"]) == 3
    chat["replies"] = [(500, "")] * 3
    with pytest.raises(RewardError, match=r"unifiedreward: http://127.*status 500"):
        score(unified(chat, retries=2), noise(1), ["p"], [{}])
    assert len(chat["requests"]) == 6
    chat["replies"] = [(401, "")]
    with pytest.raises(RewardError, match="status 401"):
        score(unified(chat), noise(1), ["p"], [{}])
    assert len(chat["requests"]) == 7


def test_unifiedreward_keeps_its_limits(chat, monkeypatch):
    monkeypatch.setattr("nft.rewards.unified._FIRST_PAUSE", 0.01)
    chat["gate"].clear()
    with pytest.raises(RewardError, match="ReadTimeout"):
        score(unified(chat, timeout=0.2, retries=1), noise(1), ["p"], [{}])
    chat["gate"].set()
    chat["most"] = 0
    score(unified(chat, concurrency=3), noise(12), ["p"] * 12, [{}] * 12)
    assert 1 <= chat["most"] <= 3
