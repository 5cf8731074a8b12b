"""Prompt sets, GenEval's own file, and the task that scores with any rewards."""

import json
import random
import threading
from collections import Counter
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from nft.config import load_config
from nft.data import geneval, prompts
from nft.data.geneval import GROUPS, POSITIONS
from nft.evaluate import SUITES
from nft.rewards.detector import GenEvalReward
from nft.rewards.geneval import Verdict
from nft.rewards.pool import RewardSpec
from nft.tasks import Rewards, Shapes, build, check
from nft.worlds.shapes.render import render

CAT = {"class": "cat", "count": 1}
ENTRY = {
    "tag": "position",
    "include": [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}


def test_the_benchmarks_file_is_read(tmp_path):
    other = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a red bus"}
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(f"{json.dumps(ENTRY)}\n\n{json.dumps(other)}\n")
    assert geneval.read(path) == [ENTRY, other]
    odd = ENTRY | {"prompt": "a dog\u2028left of a cat"}
    path.write_text(f"\ufeff{json.dumps(odd, ensure_ascii=False)}\n", encoding="utf-8")
    assert geneval.read(path) == [odd]
    generated = [entry for group in geneval.generate(30, seed=0).values() for entry in group]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in generated))
    assert geneval.read(path) == generated


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ""),
        ('"text"', "accepted is an object with a prompt"),
        (json.dumps(ENTRY | {"prompt": " "}), "accepted is an object with a prompt"),
        (json.dumps(ENTRY | {"tag": "size"}), "accepted is an object with a prompt and one of the tags"),
        (json.dumps(ENTRY | {"include": [{"class": "kat", "count": 1}]}), "include 0: class: got 'kat'"),
        *(
            (json.dumps(ENTRY | {"include": [{"class": "cat", "count": count}]}), f"include 0: count: got {count}")
            for count in (0, True, 1.0, None)
        ),
        (json.dumps(ENTRY | {"exclude": [{"class": "cat", "count": 0}]}), "exclude 0: count: got 0"),
        (json.dumps(ENTRY | {"exclude": None}), "exclude: got None, accepted is a list of objects"),
        (json.dumps(ENTRY | {"include": [ENTRY["include"][1]]}), "include 0: position: got .* an index before"),
        *(
            (json.dumps(ENTRY | {"include": [CAT, CAT | {"position": position}]}), "include 1: position: got ")
            for position in (*([POSITIONS[0], i] for i in (-1, -2, 1, 0.0, False)), ["near", 0], ["above"], "ab", None)
        ),
        (json.dumps(ENTRY | {"include": [CAT | {"position": ["left of", -1]}]}), "include 0: position: got "),
        (json.dumps(ENTRY | {"include": [CAT | {"color": "teal"}]}), "include 0: color: got 'teal'"),
        (json.dumps(ENTRY | {"include": [7]}), "include 0: got 7, accepted is an object with class and count"),
        (json.dumps({"tag": "colors", "prompt": "a red bus"}), "include: got None, accepted is a list of at least one"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "metadata.jsonl"
    path.write_text(f"{json.dumps(ENTRY)}\n{line}\n")
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        geneval.read(path)


def test_prompts_without_what_a_reward_needs_are_named_once_it_is_there():
    """As of a reward server, whose needs are not known before."""
    with pytest.raises(ValueError, match=r"^prompts: metadata: entry 0 lacks include, which ShapesReward needs"):
        Rewards(torch.device("cpu"), {"shapes": RewardSpec("shapes")}, train="ocr")


def test_prompt_files(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\n a dog \n")
    assert prompts.read(tmp_path / "mine.txt") == [{"tag": "mine", "prompt": p} for p in ("a cat", "a dog")]
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "tag": "t"}\n')
    assert prompts.read(tmp_path / "mine.jsonl") == [
        {"tag": "mine", "prompt": "a", "n": 1},
        {"tag": "t", "prompt": "b"},
    ]
    # Neither a byte-order mark nor Unicode's other ends of a line belong to the format.
    (tmp_path / "mine.txt").write_text("\ufeffa\u2028cat\na\x85dog\r\n", newline="", encoding="utf-8")
    assert [entry["prompt"] for entry in prompts.read(tmp_path / "mine.txt")] == ["a\u2028cat", "a\x85dog"]
    (tmp_path / "mine.jsonl").write_text('\ufeff{"prompt": "a\u2028cat"}\n', encoding="utf-8")
    assert [entry["prompt"] for entry in prompts.read(tmp_path / "mine.jsonl")] == ["a\u2028cat"]
    for name, text, message in (
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2: got prompt None"),
        ("bad.jsonl", '{"prompt": " "}', "line 1: got prompt ' '"),
        ("bad.jsonl", '{"prompt": "a", "tag": [1]}', r"line 1: got tag \[1\], accepted is a text"),
        ("bad.jsonl", '{"prompt": "a", "tag": null}', "line 1: got tag None"),
        ("bad.jsonl", '{"prompt": "a", "tag": "reward_x"}', "line 1: got tag 'reward_x', accepted is any other"),
        ("strict.txt", "a", "strict.txt, line 1: got tag 'strict', accepted is any other"),
        ("bad.jsonl", "[1]", "line 1"),
        ("empty.txt", "\n", "empty"),
        ("bad.csv", "a", "accepted are shapes, geneval, ocr, preference or a .txt or .jsonl file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.read(tmp_path / name)


@pytest.mark.parametrize("read", [prompts.read, geneval.read, prompts.held_out])
def test_a_file_that_is_not_utf_8_is_named(read, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a cat\n\xff\n")
    with pytest.raises(ValueError, match=r"prompts: .*bad.txt is not UTF-8: invalid start byte at byte 6"):
        read(str(tmp_path / "bad.txt") if read is prompts.held_out else tmp_path / "bad.txt")


def test_held_out_prompts_are_named_as_such():
    with pytest.raises(ValueError, match=r"held_out_prompts: got 'x.csv'"):
        prompts.held_out("x.csv")


@pytest.mark.parametrize("source", prompts.SETS)
def test_held_out_prompts_are_not_trained_on(source):
    held = prompts.held_out(source)
    kept = prompts.train(source, held)
    assert not {e["prompt"] for e in held} & {e["prompt"] for group in kept for e in group}
    assert held == prompts.held_out(source) and min(map(len, kept)) > 5
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"per_group: got {count}"):
            prompts.held_out(source, count)
    few = prompts.held_out(source, 2)
    assert [e["tag"] for e in few] == [tag for tag in dict.fromkeys(e["tag"] for e in held) for _ in range(2)]


def test_what_is_evaluated_on_is_not_trained_on():
    """The suite's prompts, and of GenEval those that name the same objects the other way round."""
    for source, name in (("ocr", "ocr"), ("preference", "drawbench")):
        tested = {entry["prompt"] for entry in SUITES["paper"].prompts[name]()}
        assert len(tested) >= 200
        assert not tested & {e["prompt"] for group in prompts.train(source, []) for e in group}

    def asked(entry):
        """'a cat and a dog' asks for what 'a dog and a cat' does, 'a cat below a dog' for 'a dog above a cat'."""
        prompt = entry["prompt"].removeprefix("a photo of ")
        for where, mirrored in (("right of", "left of"), ("below", "above")):
            one, found, other = prompt.partition(f" {where} ")
            prompt = f"{other} {mirrored} {one}" if found else prompt
        return entry["tag"], frozenset(prompt.split(" and "))

    benchmark, held = (
        {asked(e) for e in part} for part in (SUITES["paper"].prompts["geneval"](), prompts.held_out("geneval"))
    )
    # Nor is what a checkpoint is chosen by.
    assert not benchmark & held and len(held) > 400
    tested = benchmark | held
    groups = {group[0]["tag"]: group for group in prompts.train("geneval", prompts.held_out("geneval"))}
    assert list(groups) == list(geneval.GROUPS)
    # There are no other single objects than those 80.
    assert len(groups.pop("single_object")) == 80
    assert not tested & {asked(e) for group in groups.values() for e in group}
    assert all(len(group) > 50 for group in groups.values())


def test_texts_that_are_tested_are_not_trained_on_in_another_place():
    """Nor with another ending: the first two words are not, though each of them is."""
    train = [entry for group in prompts.train("ocr", prompts.held_out("ocr")) for entry in group]
    sides = [train, prompts.held_out("ocr"), SUITES["paper"].prompts["ocr"]()]
    assert [len(side) for side in sides] == [5000, 1000, 1000]
    pairs = [{tuple(entry["text"].split()[:2]) for entry in side} for side in sides]
    assert not (pairs[0] & pairs[1] or pairs[0] & pairs[2] or pairs[1] & pairs[2])
    words = [{word for pair in side for word in pair} for side in pairs]
    assert words[0] == words[1] == words[2]


def test_a_file_without_other_prompts_cannot_be_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "b.txt").write_text("a cat\na dog\n")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert [[e["prompt"] for e in g] for g in prompts.train(b, prompts.held_out(a))] == [["a dog"]]
    lines = [json.dumps({"prompt": p, "tag": tag}) for p, tag in (("a cat", "x"), ("a dog", "y"), ("a hen", "x"))]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert [[e["prompt"] for e in g] for g in prompts.train(str(tmp_path / "c.jsonl"), [])] == [
        ["a cat", "a hen"],
        ["a dog"],
    ]
    with pytest.raises(ValueError, match="no prompt that is not held out"):
        prompts.train(a, prompts.held_out(b))
    with pytest.raises(ValueError, match="prompts: got 'ocrr', accepted are shapes, geneval, ocr"):
        Rewards(torch.device("cpu"), {"jpeg": RewardSpec("jpeg")}, train="ocrr")
    with pytest.raises(ValueError, match="held_out_prompts: got none"):
        Rewards(torch.device("cpu"), {"jpeg": RewardSpec("jpeg")}, train=a)


def test_geneval_is_scored_beside_the_sampling(monkeypatch):
    """The partial credit is trained on and the strict score reported; a batch is handed over before it is scored."""
    going = threading.Event()

    def verdicts(self, pictures, entries):
        assert going.wait(10)
        return [Verdict(1.0, float(i % 2), 0.5 - i, ()) for i in range(len(entries))]

    monkeypatch.setattr(GenEvalReward, "__init__", lambda self, *, device: None)
    monkeypatch.setattr(GenEvalReward, "verdicts", verdicts)
    task = build(load_config("sd35_geneval", ["device=cpu"]), torch.device("cpu"))
    try:
        pictures = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
        task.submit(pictures, task.held_out_prompts(1)[:3])
        going.set()
        assert task.gather().tolist() == [[0.5, 0.0], [-0.5, 1.0], [-1.5, 0.0]]
        assert task.weights == {"geneval": 1.0}
    finally:
        going.set()
        task.close()


def test_geneval_keeps_its_prompts(monkeypatch):
    monkeypatch.setattr(GenEvalReward, "__init__", lambda self, *, device: None)
    task = build(load_config("sd35_geneval", ["device=cpu"]), torch.device("cpu"))
    held = task.held_out_prompts(40)
    assert {e["tag"] for e in held} == set(geneval.GROUPS) - {"single_object"} and len(held) == 200
    groups = task.train_prompts()
    assert [group[0]["tag"] for group in groups] == list(geneval.GROUPS) and len(groups[0]) == 80
    task.close()


def test_a_task_of_several_rewards():
    """The shapes verifier in a process of its own agrees with the world's task, and both rewards are combined."""
    specs = {"shapes": RewardSpec("shapes"), "small": RewardSpec("jpeg", weight=0.5)}
    task = Rewards(torch.device("cpu"), specs, train="shapes", method="normalized_sum")
    try:
        entries = task.held_out_prompts(2)
        assert entries == Shapes(torch.device("cpu")).held_out_prompts(2)
        pictures = torch.randint(0, 256, (len(entries), 64, 64, 3), dtype=torch.uint8)
        pictures[::2] = 255
        for start in range(0, len(entries), 5):
            task.submit(pictures[start : start + 5], entries[start : start + 5])
        scores = task.gather()
        expected = Shapes(torch.device("cpu")).score(pictures, entries)
        assert torch.equal(scores[:, 0], expected[:, 0]) and torch.equal(scores[:, 2], expected[:, 1])
        # A white picture is smaller.
        assert (scores[::2, 1] > scores[1::2, 1][: len(scores[::2])].max()).all()
        assert torch.equal(task.score(pictures, entries), scores)
        assert task.weights == {"shapes": 1.0, "small": 0.5} and task.method == "normalized_sum"
    finally:
        task.close()


def test_held_out_prompts_stay_what_they_were_when_the_run_began(tmp_path, monkeypatch):
    """Their file may be another one, or gone, hundreds of epochs later."""
    (tmp_path / "train.txt").write_text("a cat\na dog\n")
    lines = ('{"prompt": "a fox", "tag": "one"}', '{"prompt": "an owl", "tag": "two"}', '{"prompt": "b", "tag": "one"}')
    (held := tmp_path / "held.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("nft.tasks.Scorer", lambda rewards, device: SimpleNamespace(judges={}))
    task = Rewards(torch.device("cpu"), {}, train=str(tmp_path / "train.txt"), held_out=str(held))
    held.unlink()
    assert [entry["prompt"] for entry in task.held_out_prompts(1)] == ["a fox", "an owl"]
    assert [entry["prompt"] for entry in task.held_out_prompts(2)] == ["a fox", "b", "an owl"]


def test_small_groups_of_the_shapes_world_repeat_their_held_out_prompts(monkeypatch):
    monkeypatch.setattr("nft.tasks.Scorer", lambda rewards, device: SimpleNamespace(judges={}))
    for task in (Shapes(torch.device("cpu")), Rewards(torch.device("cpu"), {}, train="shapes")):
        assert task.held_out_prompts(60) == prompts.held_out("shapes", 60)
        assert Counter(entry["tag"] for entry in task.held_out_prompts(60)) == dict.fromkeys(GROUPS, 60)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (5, "include: got 5, accepted is a list of at least one object"),
        ([], "include: got []"),
        ([5], "include 0: got 5, accepted is an object with class and count"),
        ([{"class": "nonsense", "count": 1}], "include 0: class: got 'nonsense', accepted are circle"),
        ([{"class": "circle", "count": "two"}], "include 0: count: got 'two', accepted are positive integers"),
        ([{"class": "circle", "count": -1}], "include 0: count: got -1"),
        ([{"class": "circle"}], "include 0: count: got None"),
        ([{"class": "circle", "count": 1, "color": "puce"}], "include 0: color: got 'puce'"),
        ([{"class": "circle", "count": 1, "color": ["red"]}], "include 0: color: got ['red'], accepted are red"),
        ([{"class": ["circle"], "count": 1}], "include 0: class: got ['circle'], accepted are circle"),
        ([{"class": "circle", "count": 1, "position": ["above", 0]}], "include 0: position: got ['above', 0]"),
        ([{"class": "circle", "count": 1, "position": "above"}], "include 0: position: got 'above'"),
    ],
)
def test_entries_that_the_rules_cannot_read_are_named(include, message, tmp_path):
    good = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}]}
    bad = {"prompt": "another", "include": include}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    settings = ["task=rewards", "rewards.shapes=1", f"prompts={tmp_path / 'mine.jsonl'}", "held_out_prompts=shapes"]
    with pytest.raises(ValueError) as caught:
        check(load_config("shapes", settings))
    assert "entry 1, 'another': " in str(caught.value) and message in str(caught.value)


def test_half_a_character_is_no_prompt(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "a " + chr(0xD800)}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: got prompt 'a .ud800', accepted is a text"):
        prompts.read(tmp_path / "mine.jsonl")


def test_too_many_objects_are_worth_no_less_than_none():
    """1 - |1 - 3| / 1 is below 0, which would outweigh what a picture of the group can gain."""
    shape = {"class": "circle", "count": 1}
    entry = {"tag": "single_object", "include": [shape], "prompt": "a circle"}
    three = {"tag": "counting", "include": [shape | {"count": 3}], "prompt": "three circles"}
    pictures = torch.from_numpy(np.stack([render(asked, random.Random(0)) for asked in (three, entry)]))
    task = Shapes(torch.device("cpu"))
    assert task.score(pictures, [entry] * 2).tolist() == [[0, 0], [1, 1]]
    assert task.score(pictures[:1], [three]).tolist() == [[1, 1]]


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    epochs=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 3),
)
def test_every_prompt_comes_once_before_any_comes_again(sizes, epochs, seed):
    groups = [[{"prompt": f"{g} {i}"} for i in range(size)] for g, size in enumerate(sizes)]
    ends = [0, *accumulate(epochs)]
    drawn = [
        entry["prompt"]
        for first, count in zip(ends, epochs, strict=False)
        for entry in prompts.in_turn(groups, first, count, seed)
    ]
    for g, size in enumerate(sizes):
        own = drawn[g :: len(sizes)]
        for start in range(0, len(own), size):
            part = own[start : start + size]
            assert len(set(part)) == len(part) and set(part) <= {f"{g} {i}" for i in range(size)}


def test_the_order_of_prompts_is_another_every_time_for_every_group_and_every_seed():
    groups = [[{"prompt": str(i)} for i in range(100)]] * 2
    orders = [
        [entry["prompt"] for entry in prompts.in_turn(groups, first, 200, seed)[g::2]]
        for seed in (0, 1)
        for first in (0, 200)
        for g in (0, 1)
    ]
    assert all(sorted(order, key=int) == [str(i) for i in range(100)] for order in orders)
    assert len({tuple(order) for order in orders}) == 8
