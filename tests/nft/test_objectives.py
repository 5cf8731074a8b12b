"""Objectives against their formulas."""

import math

import pytest
import torch

pytest.importorskip("diffusers")

from nft.config import load_config
from nft.objectives import OBJECTIVES, Batch


def config(objective, **changes):
    return load_config("shapes", [f"objective={objective}", *(f"{k}={v}" for k, v in changes.items())])


def test_sft_keeps_what_is_above_its_groups_mean():
    advantages = torch.tensor([-1.0, 0.5, 2.0, 0.0, 0.0, -0.5, 0.5, 0.0])
    weights = OBJECTIVES["sft"].weights(advantages, config("sft"))
    torch.testing.assert_close(weights, torch.tensor([0.0, 8 / 3, 8 / 3, 0, 0, 0, 8 / 3, 0]))
    assert not OBJECTIVES["sft"].weights(torch.zeros(4), config("sft")).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_rwr_weighs_by_the_exponential(temperature):
    advantages = torch.tensor([-3.0, 0.0, 1.0, 2.5])
    weights = OBJECTIVES["rwr"].weights(advantages, config("rwr", rwr_temperature=temperature))
    expected = [math.exp(a / temperature) for a in advantages.tolist()]
    mean = sum(expected) / 4
    torch.testing.assert_close(weights, torch.tensor([e / mean for e in expected]))
    # No overflow for any advantage.
    assert OBJECTIVES["rwr"].weights(advantages * 1e4, config("rwr")).isfinite().all()


@pytest.mark.parametrize("objective", ["sft", "rwr"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_flow_matching_is_the_weighted_error_of_the_velocity(objective, kl_weight):
    g = torch.Generator().manual_seed(0)
    x0, eps, v_theta, v_ref = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(4))
    t, weights = torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
    v_theta.requires_grad_()
    batch = Batch(v_theta, None, v_ref if kl_weight else None, x_t, x0, t, weights)
    out = OBJECTIVES[objective].loss(batch, config(objective, kl_weight=kl_weight), False)
    out.loss.backward()
    expected = sum(
        w * ((v - (e - x)) ** 2).mean() + kl_weight * ((v - r) ** 2).mean()
        for w, v, e, x, r in zip(weights.double(), v_theta.detach().double(), eps.double(), x0.double(), v_ref.double(),
                                 strict=True)
    ) / 3  # fmt: skip
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    error = v_theta.detach() - (eps - x0)
    gradient = 2 / 16 / 3 * (weights.view(-1, 1, 1, 1) * error + kl_weight * (v_theta.detach() - v_ref))
    torch.testing.assert_close(v_theta.grad, gradient, rtol=1e-4, atol=1e-6)
    assert out.kl.any() == bool(kl_weight)
