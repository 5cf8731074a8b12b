import numpy as np
import pytest
import torch

from nft_kernels import group_advantages, optimality_probability


@pytest.mark.parametrize("std", ["global", "group"])
def test_advantages_against_numpy(std):
    rng = np.random.default_rng(0)
    rewards, ids = rng.normal(size=24), rng.integers(0, 5, 24) * 7
    expected = np.empty(24)
    for i in range(24):
        group = rewards[ids == ids[i]]
        expected[i] = (rewards[i] - group.mean()) / ((rewards if std == "global" else group).std() + 1e-4)
    got = group_advantages(torch.tensor(rewards), torch.tensor(ids), std=std)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_equal_rewards_give_no_advantage():
    got = group_advantages(torch.full((6,), 0.25), torch.tensor([0, 0, 0, 1, 1, 1]), std="group")
    assert got.eq(0).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("continuous", [0.0, 0.0, 0.4, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_probability_worked_by_hand(mode, expected):
    A = torch.tensor([-9.0, -5.0, -1.0, 0.0, 1.0, 7.0], dtype=torch.float64)
    assert torch.allclose(optimality_probability(A, mode=mode), torch.tensor(expected).double(), atol=1e-15, rtol=1e-7)


@pytest.mark.parametrize("adv_clip_max", [1e-9, 1e5, 2**70, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_optimality_probability_takes_bounds_that_the_dtype_does_not_hold(dtype, adv_clip_max):
    A = torch.tensor([-2.0, 0.0, 1.0], dtype=dtype)
    bound = float(adv_clip_max)
    expected = (A.double().clamp(-bound, bound) / bound / 2 + 0.5).to(dtype)
    assert torch.equal(optimality_probability(A, adv_clip_max=adv_clip_max), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_advantages(torch.zeros(3), torch.zeros(2).long()), ValueError, "group_ids: got shape"),
        (
            lambda: group_advantages(torch.zeros(3), torch.zeros(3, device="meta").long()),
            ValueError,
            "group_ids: got device meta, accepted is the device of rewards, cpu",
        ),
        (lambda: group_advantages(torch.zeros(3), torch.zeros(3)), TypeError, "group_ids: got torch.float32"),
        (lambda: group_advantages(torch.zeros(3), torch.zeros(3) * 1j), TypeError, "group_ids: got torch.complex64"),
        (
            lambda: group_advantages(torch.full((2,), float("inf")), torch.zeros(2).long()),
            ValueError,
            "rewards: got NaN",
        ),
        (
            lambda: group_advantages(torch.zeros(2), torch.zeros(2).long(), std="local"),
            ValueError,
            "std: got 'local'",
        ),
        (lambda: optimality_probability(torch.zeros(2), mode="soft"), ValueError, "mode: got 'soft'"),
        (lambda: optimality_probability(torch.zeros(2), mode=np.zeros(3)), ValueError, "mode: got array"),
        (lambda: optimality_probability(torch.zeros(2), adv_clip_max=0), ValueError, "adv_clip_max: got 0"),
        (lambda: optimality_probability(torch.zeros(2), adv_clip_max="5"), TypeError, "adv_clip_max: got str"),
        (lambda: group_advantages([1.0, 2.0], torch.zeros(2).long()), TypeError, "rewards: got list"),
        (lambda: group_advantages(torch.zeros(2), [0, 0]), TypeError, "group_ids: got list"),
        (lambda: group_advantages(torch.zeros(2).long(), torch.zeros(2).long()), TypeError, "rewards: got torch.int64"),
        (lambda: optimality_probability([0.5]), TypeError, "A: got list"),
        (lambda: optimality_probability(torch.tensor([float("nan")])), ValueError, "A: got NaN"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
