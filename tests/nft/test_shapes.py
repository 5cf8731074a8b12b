"""The shapes world: the verifier accepts right pictures, rejects wrong ones, and follows GenEval's rule."""

import random

import numpy as np
import pytest

pytest.importorskip("diffusers")

from nft.rewards.geneval import Detection, directions, judge
from nft.worlds.shapes.prompts import GROUPS, sample, split
from nft.worlds.shapes.render import render
from nft.worlds.shapes.verify import detect, verify

ENTRIES = [entry for held_out in (False, True) for entry in sample(held_out, per_group=40)]


def test_at_least_99_percent_of_clean_renderings_pass():
    rng = random.Random(5)
    verdicts = [verify(render(entry, rng), entry).strict for entry in ENTRIES for _ in range(3)]
    assert np.mean(verdicts) >= 0.99


def test_wrong_pictures_are_rejected():
    """One demand is changed at a time, so that the picture is wrong in exactly one known way."""
    rng = random.Random(6)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    colors, shapes = ["red", "green", "blue"], ["circle", "square", "triangle"]
    accepted = []
    for entry in ENTRIES:
        for change in ("class", "count", "color", "position"):
            first, *others = [dict(item) for item in entry["include"]]
            last = others[-1] if others else first
            if change == "class":
                used = {item["class"] for item in entry["include"]}
                first["class"] = rng.choice([s for s in shapes if s not in used])
            elif change == "count":
                first["count"] += 1 if first["count"] < 4 and not others else 0
                if first["count"] == entry["include"][0]["count"]:
                    continue
            elif change in first and change == "color":
                first["color"] = rng.choice([c for c in colors if c != first["color"]])
            elif change in last and change == "position":
                last["position"] = [opposite[last["position"][0]], 0]
            else:
                continue
            picture = render({"include": [first, *others]}, rng)
            accepted.append(verify(picture, entry).strict)
    assert len(accepted) > 300 and np.mean(accepted) == 0


@pytest.mark.parametrize("kind", ["white", "noise", "grey"])
def test_pictures_of_nothing_hold_no_object(kind):
    rng = np.random.default_rng(0)
    picture = {
        "white": np.full((64, 64, 3), 255),
        "noise": rng.integers(0, 256, (64, 64, 3)),
        "grey": np.full((64, 64, 3), 128),
    }[kind].astype(np.uint8)
    assert detect(picture) == [] or (kind == "grey" and all(d.name == "square" for d in detect(picture)))


def test_split_is_disjoint_and_fixed():
    train, held = ({e["prompt"] for g in split(side).values() for e in g} for side in (False, True))
    assert not train & held and len(split(True)) == len(GROUPS) == 6
    assert split(True) == split(True)


def box(x, y, size=10):
    return (x, y, x + size, y + size)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (box(0, 50), box(50, 50), {"left of"}),
        (box(50, 0), box(50, 50), {"above"}),
        (box(90, 90), box(50, 50), {"right of", "below"}),
        (box(51, 50), box(50, 50), set()),  # within a tenth of the summed sizes
        (box(52, 50), box(50, 50), set()),
        (box(54, 50), box(50, 50), set()),  # beyond it, but by half of the offset only
        (box(55, 50), box(50, 50), {"right of"}),
    ],
)
def test_directions(mine, theirs, expected):
    assert directions(mine, theirs) == expected


def obj(name, color="red", at=(0, 0)):
    return Detection(name, box(*at), color=color)


@pytest.mark.parametrize(
    ("found", "include", "exclude", "strict", "partial"),
    [
        ([obj("a")], [{"class": "a", "count": 1}], [], 1, 1),
        ([], [{"class": "a", "count": 1}], [], 0, 0),
        ([obj("a")] * 3, [{"class": "a", "count": 2}], [], 0, 0.5),
        ([obj("a")] * 9, [{"class": "a", "count": 2}], [], 0, -2.5),
        ([obj("a")] * 2, [{"class": "a", "count": 2}], [{"class": "a", "count": 3}], 1, 1),
        ([obj("a"), obj("b")], [{"class": "a", "count": 1}], [{"class": "b", "count": 1}], 0, 1),
        ([obj("a", "blue")], [{"class": "a", "count": 1, "color": "red"}], [], 0, 0.5),
        ([obj("a"), obj("a", "blue")], [{"class": "a", "count": 2, "color": "red"}], [], 0, 0.75),
        ([obj("a"), obj("a")], [{"class": "a", "count": 1, "color": "red"}], [], 0, 0),
    ],
)
def test_rule_worked_by_hand(found, include, exclude, strict, partial):
    verdict = judge(found, {"include": include, "exclude": exclude})
    assert (verdict.strict, verdict.partial) == (strict, partial)
    assert bool(verdict.reasons) == (not strict)


@pytest.mark.parametrize(("x", "strict", "partial"), [(50, 1, 1), (-50, 0, 3 / 4)])
def test_position_rule(x, strict, partial):
    include = [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["right of", 0]}]
    verdict = judge([obj("a"), obj("b", at=(x, 0))], {"include": include})
    assert verdict.strict == strict and verdict.partial == pytest.approx(partial)


@pytest.mark.parametrize("held_out", [False, True])
def test_small_groups_repeat_their_prompts(held_out):
    """The score is a mean over groups, and every group's has to be over as many pictures."""
    per_group = 150
    entries = sample(held_out=held_out, per_group=per_group)
    assert [entry["tag"] for entry in entries] == [tag for tag in split(held_out) for _ in range(per_group)]
    for tag, known in split(held_out).items():
        drawn = [entry["prompt"] for entry in entries if entry["tag"] == tag]
        counts = [drawn.count(entry["prompt"]) for entry in known]
        assert max(counts) - min(counts) <= 1
