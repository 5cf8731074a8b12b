"""Old policies with rewards whose velocities are known in closed form; everything here is float64."""

import pytest
import torch
from rewarded import Rewarded

from nft.worlds.mixture import Mixture


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def space():
    """Four components in three dimensions."""
    g = torch.Generator().manual_seed(0)
    means, deviations = torch.randn(4, 3, generator=g), 0.3 + 0.5 * torch.rand(4, 3, generator=g)
    old = Mixture(torch.tensor([0.1, 0.2, 0.3, 0.4]), means, deviations)
    return Rewarded(old, torch.tensor([0.9, 0.3, 0.1, 0.6]))


@pytest.fixture
def line():
    """Three components in one dimension, where integrals over x0 are sums over a grid."""
    old = Mixture(
        torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.5], [0.5], [2.0]]), torch.tensor([[0.3], [0.5], [0.2]])
    )
    return Rewarded(old, torch.tensor([0.2, 0.6, 0.9]))


@pytest.fixture(params=[0.1, 0.5, 0.9])
def t(request):
    return request.param


@pytest.fixture
def noised(t):
    """A function from a mixture to draws of x_t."""

    def draw(mixture, count=6):
        x0 = mixture.sample(count, seed=1)
        return (1 - t) * x0 + t * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))

    return draw
