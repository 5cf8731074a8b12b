"""GenEval on COCO: prompts, and the detector on tiny networks of the real classes."""

import math
import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from nft.data.geneval import CLASSES, COLORS, COUNTS, GROUPS, generate
from nft.rewards.base import score
from nft.rewards.detector import GenEvalReward
from nft.rewards.geneval import Detection, benchmark, counted, directions, judge


def test_prompts_fit_their_metadata_and_seed():
    groups = generate(60, seed=3)
    assert tuple(groups) == GROUPS and generate(60, seed=3) == groups and generate(60, seed=4) != groups
    for tag, entries in groups.items():
        assert len({entry["prompt"] for entry in entries}) == 60
        for entry in entries:
            assert entry["tag"] == tag
            for item in entry["include"]:
                assert item["class"] in CLASSES and item.get("color", "red") in COLORS
                singular = item["class"] in entry["prompt"]
                assert singular or (item["count"] > 1 and COUNTS[item["count"]] in entry["prompt"])
                assert item.get("color", "") in entry["prompt"] and item.get("position", [""])[0] in entry["prompt"]
    assert {item["count"] for entry in groups["counting"] for item in entry["include"]} == {2, 3, 4}
    assert all(e["exclude"][0]["count"] == e["include"][0]["count"] + 1 for e in groups["counting"])
    # "a dog left of a cat": the cat is the anchor and comes first, the dog refers to it.
    for entry in groups["position"]:
        anchor, placed = entry["include"]
        where, index = placed["position"]
        assert index == 0 and "position" not in anchor
        assert entry["prompt"].index(placed["class"]) < entry["prompt"].index(where)


def test_small_groups_end_when_they_are_exhausted():
    sizes = {tag: len(entries) for tag, entries in generate(1000, seed=0).items()}
    # 80 classes; three counts; ten colours for all but person and orange.
    assert sizes == dict.fromkeys(GROUPS, 1000) | {"single_object": 80, "counting": 240, "colors": 780}


def test_the_80_classes_are_coco():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES[i] for i in (0, 16, 24, 49, 79)] == ["person", "dog", "backpack", "orange", "toothbrush"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    torch.manual_seed(0)
    detector, clip = (str(tmp_path_factory.mktemp(name)) for name in ("detector", "clip"))
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, num_attention_heads=2, encoder_layers=1, decoder_layers=2, num_queries=6, num_labels=80,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(detector)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(detector)
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz-" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(clip)
    return GenEvalReward(detector, clip)


def entry(tag, *include, **more):
    return {"tag": tag, "include": [{"count": 1, **item} for item in include], **more}


def test_saved_networks_load_and_score(reward):
    pictures = torch.randint(0, 256, (3, 48, 64, 3), dtype=torch.uint8)
    asked = [entry("single_object", {"class": name}) for name in ("dog", "cat", "bus")]
    scored = score(reward, pictures, ["a photo"] * 3, asked)
    assert scored.score.shape == (3,) and set(scored.details) == {"strict", "correct"}
    assert all(value in (0, 1) for value in [*scored.details["strict"], *scored.details["correct"]])


def segments(*found):
    """What the processor returns for (class, score, left, top, right, bottom) on 40 x 40 pixels."""
    masks = torch.zeros(len(found), 40, 40)
    info = []
    for i, (name, confidence, left, top, right, bottom) in enumerate(found):
        masks[i, top:bottom, left:right] = 1
        info.append({"id": i, "label_id": CLASSES.index(name), "score": confidence})
    return {"segmentation": masks, "segments_info": info}


def test_boxes_thresholds_and_classes(reward):
    picture = np.zeros((40, 40, 3), np.uint8)
    result = segments(
        ("dog", 0.29, 0, 0, 9, 9), ("dog", 0.5, 5, 6, 20, 30), ("cat", 0.95, 1, 1, 4, 4), ("bus", 0.9, 0, 0, 5, 5)
    )
    found = reward._read(picture, result, entry("two_object", {"class": "dog"}, {"class": "cat"}))
    assert [(d.name, d.box, d.confidence) for d in found] == [
        ("dog", (5, 6, 20, 30), 0.5),
        ("cat", (1, 1, 4, 4), 0.95),
    ]
    counting = entry("counting", {"class": "dog", "count": 2})
    assert reward._read(picture, result, counting) == []
    sure = segments(*[("dog", confidence, 0, 0, 9, 9) for confidence in (0.89, 0.9, 0.901)])
    assert [d.confidence for d in reward._read(picture, sure, counting)] == [0.901]
    many = segments(*[("dog", 0.91 + i / 1000, 0, 0, 9, 9) for i in range(20)])
    kept = reward._read(picture, many, counting)
    assert len(kept) == 16 and min(d.confidence for d in kept) == pytest.approx(0.914)


def test_colour_is_the_nearest_text_to_the_crop_on_grey(reward):
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    result = segments(("dog", 0.9, 4, 8, 24, 30))
    result["segmentation"][0, 10, 10] = 0
    (found,) = reward._read(picture, result, entry("colors", {"class": "dog", "color": "red"}))
    masked = picture.copy()
    masked[~(result["segmentation"][0].numpy() > 0)] = 153
    inputs = reward.clip_processor(images=masked[8:30, 4:24], return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        vision = reward.clip.vision_model(**inputs).pooler_output @ reward.clip.visual_projection.weight.T
        scores = []
        for color in COLORS:
            texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            tokens = reward.clip_processor(text=texts, return_tensors="pt", padding=True)
            text = reward.clip.text_model(**tokens).pooler_output @ reward.clip.text_projection.weight.T
            mean = (text / text.norm(dim=-1, keepdim=True)).mean(0)
            scores.append((vision[0] @ (mean / mean.norm())).item())
    assert found.color == COLORS[int(np.argmax(scores))]


def test_a_crop_is_masked_to_grey(reward, monkeypatch):
    """#999999 around the object; a class that is also excluded keeps its colour."""
    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    result = segments(("dog", 0.9, 4, 8, 24, 30))
    result["segmentation"][0, 8:12, 4:24] = 0
    result["segmentation"][0, 8, 4] = 1
    seen, processor = [], reward.clip_processor

    def record(*, images=None, **others):
        if images is not None:
            seen.append(np.asarray(images))
        return processor(images=images, **others)

    monkeypatch.setattr(reward, "clip_processor", record)
    asked = entry("colors", {"class": "dog", "color": "red"}, exclude=[{"class": "dog", "count": 2}])
    (found,) = reward._read(picture, result, asked)
    (crop,) = seen
    assert found.color in COLORS and crop.shape == (22, 20, 3)
    np.testing.assert_array_equal(crop[4:], picture[12:30, 4:24])
    np.testing.assert_array_equal(crop[0, 0], picture[8, 4])
    assert (crop[0, 1:] == 0x99).all() and (crop[1:4] == 0x99).all()


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match="hf download /nowhere"):
        GenEvalReward("/nowhere")


def test_equal_confidences_are_taken_from_the_last(reward):
    """The benchmark sorts ascending and reverses: with the count of one and a tie, the last one's colour decides."""
    rng = random.Random(0)
    for _ in range(500):
        values = [rng.choice([0.2, 0.3, 0.31, 0.5, 0.9, 0.95]) for _ in range(rng.randrange(30))]
        order = np.argsort(values, kind="stable")[::-1]
        for tag, threshold in (("counting", 0.9), ("colors", 0.3)):
            assert counted(values, tag) == [i for i in order if values[i] > threshold][:16]
    result = segments(("dog", 0.5, 0, 0, 9, 9), ("dog", 0.8, 1, 1, 9, 9), ("dog", 0.8, 2, 2, 9, 9))
    found = reward._read(np.zeros((40, 40, 3), np.uint8), result, entry("colors", {"class": "dog"}))
    assert [d.box[0] for d in found] == [2, 1, 0]
    # The rule takes them in that order.
    red, blue = (Detection("dog", d.box, d.confidence, c) for d, c in zip(found[:2], ("red", "blue"), strict=True))
    assert benchmark([red, blue], {"include": [{"class": "dog", "count": 1, "color": "red"}]})


def test_an_empty_mask_is_no_object(reward):
    many = segments(*[("dog", 0.5, 0, 0, 0, 0)] * 20, ("dog", 0.4, 1, 2, 3, 4))
    (found,) = reward._read(np.zeros((40, 40, 3), np.uint8), many, entry("colors", {"class": "dog"}))
    assert found.box == (1, 2, 3, 4)


# --- the rule, written out here from its description ---


def seen_from(box, target):
    """The direction rule on plain floats: offsets of the centres, less a tenth of the summed sizes, over the distance
    of the centres."""
    found = set()
    sides = ((0, 2, "left of", "right of"), (1, 3, "above", "below"))
    offsets = [(box[a] + box[b]) / 2 - (target[a] + target[b]) / 2 for a, b, *_ in sides]
    distance = math.sqrt(offsets[0] ** 2 + offsets[1] ** 2)
    for (a, b, low, high), offset in zip(sides, offsets, strict=True):
        beyond = abs(offset) - 0.1 * ((box[b] - box[a]) + (target[b] - target[a]))
        if beyond >= 1e-3 and beyond > 0.5 * distance:
            found.add(low if offset < 0 else high)
    return found


def by_confidence(detections, name):
    return sorted((d for d in detections if d.name == name), key=lambda d: d.confidence, reverse=True)


def asked_for(item, chosen, anchors):
    if any("color" in item and d.color != item["color"] for d in chosen):
        return False
    if "position" in item:
        where, index = item["position"]
        return anchors[index] is not None and all(
            where in seen_from(a.box, b.box) for a in chosen for b in anchors[index]
        )
    return True


def at_least(detections, entry):
    anchors = []
    for item in entry["include"]:
        chosen = by_confidence(detections, item["class"])[: item["count"]]
        fits = len(chosen) == item["count"] and asked_for(item, chosen, anchors)
        anchors.append(chosen if fits else None)
    excluded = [len(by_confidence(detections, x["class"])) >= x["count"] for x in entry["exclude"]]
    return all(a is not None for a in anchors) and not any(excluded)


def exactly(detections, entry):
    exact = all(len(by_confidence(detections, x["class"])) == x["count"] for x in entry["include"])
    return exact and at_least(detections, entry)


def random_case(rng):
    size = rng.choice([16, 64, 512])
    detections = []
    for _ in range(rng.randint(0, 6)):
        x, y, w, h = (rng.randint(0, size) if size == 16 else size * rng.random() for _ in range(4))
        color = rng.choice(["red", "blue", "blue"])
        detections.append(Detection(rng.choice("ab"), (x, y, x + w, y + h), rng.random(), color))
    include = []
    for i in range(rng.randint(1, 3)):
        item = {"class": rng.choice("abbac"[: 4 + (rng.random() < 0.2)]), "count": rng.choice([1, 1, 2, 3])}
        if rng.random() < 0.4:
            item["color"] = rng.choice(["red", "blue"])
        if i and rng.random() < 0.6:
            item["position"] = [rng.choice(["left of", "right of", "above", "below"]), rng.randrange(i)]
        include.append(item)
    exclude = [{"class": rng.choice("ab"), "count": rng.randint(2, 5)}] if rng.random() < 0.3 else []
    return detections, {"include": include, "exclude": exclude}


def test_both_rules_follow_their_description():
    rng = random.Random(0)
    verdicts = []
    for _ in range(4000):
        detections, entry = random_case(rng)
        verdict = judge(detections, entry)
        assert verdict.correct == benchmark(detections, entry) == at_least(detections, entry), (detections, entry)
        assert verdict.strict == exactly(detections, entry), (detections, entry)
        assert (verdict.strict == 1) <= (verdict.partial == 1) and verdict.strict <= verdict.correct
        verdicts.append((verdict.correct, verdict.strict))
    assert 300 < sum(c for c, _ in verdicts) < 3700 and 100 < sum(s for _, s in verdicts) < 3700


def test_directions_follow_their_description():
    rng = random.Random(1)
    kinds = set()
    for _ in range(4000):
        corners = [[rng.randint(0, 40) for _ in range(4)] for _ in "ab"]
        a, b = ((x, y, x + w, y + h) for x, y, w, h in corners)
        assert directions(a, b) == seen_from(a, b)
        kinds.add(frozenset(directions(a, b)))
    assert len(kinds) == 9  # nowhere, four sides, four corners


@pytest.mark.parametrize(
    ("count", "colors", "item", "partial"),
    [
        (2, "rr", {}, 1),
        (2, "r", {}, 0.5),
        (1, "rrrrr", {}, -3),  # not capped below
        (2, "rr", {"color": "r"}, 1),
        (2, "rb", {"color": "r"}, (1 + 0.5) / 2),
        (2, "r", {"color": "r"}, (0.5 + 0) / 2),
        (1, "r", {"position": ["right of", 0]}, (1 + 1 + 1) / 3),
        (1, "r", {"position": ["left of", 0]}, (1 + 1 + 0 + 1) / 4),
        (1, "b", {"color": "r", "position": ["left of", 0]}, (1 + 1 + 0) / 3),
        (2, "r", {"color": "r", "position": ["right of", 0]}, (1 + 0.5 + 0) / 3),
    ],
)
def test_partial_credit_worked_by_hand(count, colors, item, partial):
    anchor = [] if "position" not in item else [{"class": "t", "count": 1}]
    found = [Detection("a", (100, 0, 110, 10), color=color) for color in colors] + [Detection("t", (0, 0, 10, 10))]
    include = [*anchor, {"class": "a", "count": count, **item}]
    assert judge(found, {"include": include}).partial == pytest.approx(partial)


def test_the_benchmarks_rule_looks_at_the_most_confident():
    found = [Detection("a", (0, 0, 9, 9), 0.4, "red"), Detection("a", (0, 0, 9, 9), 0.8, "blue")]
    for color, correct in (("blue", True), ("red", False)):
        assert benchmark(found, {"include": [{"class": "a", "count": 1, "color": color}]}) == correct


def test_a_missing_anchor_counts_once():
    include = [{"class": "t", "count": 1}, {"class": "a", "count": 1, "position": ["left of", 0]}]
    verdict = judge([Detection("a", (0, 0, 9, 9))], {"include": include})
    assert verdict.partial == pytest.approx((0 + 1 + 0) / 3) and not verdict.correct
