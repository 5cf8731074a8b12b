"""Gaussian mixtures, whose velocities are known in closed form: the world that theory and solvers are checked on.

Rectified flow as everywhere here, x_t = (1-t) x0 + t eps and v = eps - x0 with t = 1 noise. Points are (B, d), times a
number or a tensor without dimensions, so that autograd can differentiate by either.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Of K Gaussians in d dimensions with diagonal covariances; noised, each of them stays Gaussian."""

    shares: Tensor
    """(K,) probabilities of the components."""
    means: Tensor
    """(K, d)."""
    deviations: Tensor
    """(K, d), above 0."""

    def _noised(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variances (K, d), distances of x to the means (B, K, d) and log of share times density (B, K), at time t."""
        variance = ((1 - t) * self.deviations) ** 2 + t * t
        distance = x[:, None] - (1 - t) * self.means
        logs = -(distance**2 / variance + (2 * torch.pi * variance).log()).sum(-1) / 2
        return variance, distance, logs + self.shares.log()

    def log_density(self, x: Tensor, t: float | Tensor) -> Tensor:
        """log p_t(x), (B,)."""
        return self._noised(x, t)[2].logsumexp(1)

    def posterior(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Probability of every component given x_t = x, (B, K)."""
        return self._noised(x, t)[2].softmax(1)

    def clean(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, K, d) and variance (K, d) of x0 given x_t = x and the component."""
        variance, distance, _ = self._noised(x, t)
        gain = (1 - t) * self.deviations**2 / variance
        return self.means + gain * distance, (t * self.deviations) ** 2 / variance

    def velocities(self, x: Tensor, t: float | Tensor) -> Tensor:
        """E[eps - x0 | x_t = x, component], (B, K, d)."""
        variance, distance, _ = self._noised(x, t)
        return t * distance / variance - self.clean(x, t)[0]

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """E[eps - x0 | x_t = x], (B, d)."""
        return (self.posterior(x, t)[..., None] * self.velocities(x, t)).sum(1)

    def weighted(self, factors: Tensor) -> "Mixture":
        """The mixture whose shares are these times ``factors`` (K,), normalised."""
        shares = self.shares * factors
        return Mixture(shares / shares.sum(), self.means, self.deviations)

    def sample(self, count: int, seed: int) -> Tensor:
        """(count, d) draws of x0."""
        generator = torch.Generator().manual_seed(seed)
        k = self.shares.multinomial(count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.deviations[k] * noise
