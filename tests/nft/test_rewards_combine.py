"""Combinations of rewards against NumPy in float64, written out per group."""

import math

import numpy as np
import pytest
import torch

from nft.rewards.combine import METHODS, combine, normalized_sum

IDS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
WEIGHTS = {"ocr": 1.0, "pickscore": 0.5}


@pytest.fixture
def rewards():
    rng = np.random.default_rng(0)
    return {"ocr": rng.random(9), "pickscore": 20 + 3 * rng.random(9)}


def advantages(values, std):
    out = np.empty(9)
    for group in set(IDS):
        at = [i for i, other in enumerate(IDS) if other == group]
        deviation = np.sqrt(np.mean((values - values.mean()) ** 2)) if std == "global" else values[at].std()
        out[at] = (values[at] - values[at].mean()) / (deviation + 1e-4)
    return out


def probability(a, clip):
    return np.clip(np.clip(a, -clip, clip) / (2 * clip) + 0.5, 0, 1)


def expected(rewards, method, std, clip):
    w = WEIGHTS
    if method == "sum":
        a = advantages(sum(w[k] * v for k, v in rewards.items()), std)
    elif method == "normalized_sum":
        a = advantages(sum(w[k] * (v - v.mean()) / v.std() for k, v in rewards.items()), std)
    elif method == "gdpo":
        a = sum(w[k] * advantages(v, "group") for k, v in rewards.items())
    else:
        each = {k: advantages(v, std) for k, v in rewards.items()}
        r = sum(w[k] * probability(a, clip) for k, a in each.items()) / 1.5
        return sum(w[k] * a for k, a in each.items()) / 1.5, r
    return a, probability(a, clip)


@pytest.mark.parametrize("clip", [5.0, 0.5])
@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_follow_their_formula(rewards, method, std, clip):
    tensors = {name: torch.from_numpy(values) for name, values in rewards.items()}
    found = combine(tensors, WEIGHTS, torch.tensor(IDS), method=method, std=std, adv_clip_max=clip)
    a, r = expected(rewards, method, std, clip)
    np.testing.assert_allclose(found.advantages.numpy(), a, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.r.numpy(), r, rtol=1e-9, atol=1e-12)
    if clip == 0.5 and method != "per_reward":
        assert {0.0, 1.0} <= set(found.r.tolist())


def test_every_reward_is_logged(rewards):
    tensors = {name: torch.from_numpy(values) for name, values in rewards.items()}
    metrics = combine(tensors, WEIGHTS, torch.tensor(IDS)).metrics
    for name, values in rewards.items():
        assert metrics[f"reward_{name}"] == pytest.approx(values.mean())
        assert metrics[f"reward_{name}_std"] == pytest.approx(values.std())


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zero_is_logged_and_nothing_else(rewards, method):
    tensors = {name: torch.from_numpy(values) for name, values in rewards.items()}
    tensors["watched"] = torch.linspace(0, 1, len(IDS))
    with_it, without = (
        combine(x, w, torch.tensor(IDS), method=method)
        for x, w in (
            (tensors, WEIGHTS | {"watched": 0.0}),
            ({name: tensors[name] for name in rewards}, WEIGHTS),
        )
    )
    assert torch.equal(with_it.r, without.r) and torch.equal(with_it.advantages, without.advantages)
    more = {"reward_watched": 0.5, "reward_watched_std": tensors["watched"].std(correction=0).item()}
    assert with_it.metrics == pytest.approx(without.metrics | more)


def test_a_unit_matters_to_the_sum_only(rewards):
    """A reward in other units changes the plain sum and nothing else, but for the 1e-4 beside the deviation."""
    tensors = {name: torch.from_numpy(values) for name, values in rewards.items()}
    scaled = tensors | {"pickscore": 100 * tensors["pickscore"]}
    for method in METHODS:
        before, after = (combine(x, WEIGHTS, torch.tensor(IDS), method=method).r for x in (tensors, scaled))
        assert torch.allclose(before, after, atol=1e-3) == (method != "sum")


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_normalized_rewards_have_the_deviation_1(rewards, scale):
    """However small their own: those of jpeg differ by thousandths."""
    for dtype in (torch.float32, torch.float64):
        small = torch.from_numpy(scale * rewards["ocr"]).to(dtype)
        normalized = normalized_sum({"a": small}, {"a": 1.0}).double()
        assert normalized.std(correction=0).item() == pytest.approx(1, rel=1e-6)
        assert normalized.mean().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reward_that_is_the_same_for_all_adds_nothing(rewards, dtype):
    counted = torch.from_numpy(rewards["ocr"]).to(dtype)
    alone = normalized_sum({"a": counted}, {"a": 1.0})
    for value in (0.1, 26.7, 1e-5):
        same = torch.full((9,), value, dtype=dtype)
        # Or but for its rounding, as of pictures that a model scored in other batches.
        for other in (same, same * torch.tensor([1, 1 + 1e-7, 1 - 1e-7] * 3, dtype=dtype)):
            assert torch.equal(normalized_sum({"a": counted, "b": other}, {"a": 1.0, "b": 1e6}), alone)


def test_float32_of_a_large_offset_keeps_its_groups():
    """Rewards of one group that are all equal earn nothing, whatever their size."""
    same = {"a": torch.full((9,), 26.7)}
    assert combine(same, {"a": 1.0}, torch.tensor(IDS)).r.tolist() == [0.5] * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "method: got 'mean', accepted are sum, normalized_sum, gdpo, per_reward"),
        ({"weights": {"ocr": 1.0}}, "weights: got .*accepted is one for each"),
        *(
            ({"weights": {"ocr": bad, "pickscore": 1.0}}, f"weights: got {bad} for ocr, accepted are finite .* least 0")
            for bad in (-0.1, -1.0, np.nan, np.inf)
        ),
        ({"weights": {"ocr": 0.0, "pickscore": 0.0}}, "weights: got 0 for all rewards, accepted is at least one"),
        ({"std": "foo"}, "std: got 'foo', accepted are 'global' and 'group'"),
        *(
            ({"rewards": {"ocr": torch.ones(9), "pickscore": torch.ones(size)}}, rf"rewards: got shape \({size},\) for")
            for size in (1, 4)
        ),
        (
            {"rewards": {"ocr": torch.ones(9), "pickscore": torch.arange(9)}},
            "rewards: got torch.int64 for pickscore, accepted are floating-point tensors",
        ),
        ({"rewards": {}}, "rewards: got none"),
        ({"rewards": {"ocr": torch.full((9,), torch.nan), "pickscore": torch.ones(9)}}, "NaN"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named_by_every_method(rewards, method, change, message):
    tensors = {name: torch.from_numpy(values) for name, values in rewards.items()}
    arguments = {"rewards": tensors, "weights": WEIGHTS, "group_ids": torch.tensor(IDS), "method": method} | change
    with pytest.raises((ValueError, TypeError), match=message):
        combine(**arguments)


@pytest.mark.parametrize("method", ["sum", "normalized_sum", "gdpo", "per_reward"])
def test_a_watched_reward_may_hold_anything(method):
    groups, counted = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.4])
    watched = torch.tensor([math.nan, math.inf, 1.0, -math.inf, 2.0, 3.0])
    alone = combine({"a": counted}, {"a": 2.0}, groups, method=method)
    both = combine({"a": counted, "b": watched}, {"a": 2.0, "b": 0.0}, groups, method=method)
    assert torch.equal(both.r, alone.r) and torch.equal(both.advantages, alone.advantages)
