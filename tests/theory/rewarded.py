"""DiffusionNFT on a mixture, exactly: what the tests hold the loss and its optimum to."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nft.worlds.mixture import Mixture


@dataclass(frozen=True)
class Rewarded:
    """An old policy and the optimality probability of each of its components: the exact side of DiffusionNFT.

    A picture x0 has r(x0) = E[r | x0], the probability-weighted mean over the components that may have made it.
    """

    old: Mixture
    r: Tensor
    """(K,) in [0, 1]."""

    @cached_property
    def mean(self) -> Tensor:
        """p1 = E[r] under the old policy."""
        return (self.old.shares * self.r).sum()

    @cached_property
    def positive(self) -> Mixture:
        """pi+, proportional to r pi_old."""
        return self.old.weighted(self.r)

    @cached_property
    def negative(self) -> Mixture:
        """pi-, proportional to (1-r) pi_old."""
        return self.old.weighted(1 - self.r)

    def alpha(self, x: Tensor, t: float | Tensor) -> Tensor:
        """E[r | x_t = x], (B,); at t = 0 the reward r(x0) itself."""
        return self.old.posterior(x, t) @ self.r

    def delta(self, x: Tensor, t: float | Tensor) -> Tensor:
        """E[r (v - v_old(x)) | x_t = x], (B, d), from which both forms of Delta follow."""
        excess = self.old.velocities(x, t) - self.old.velocity(x, t)[:, None]
        return ((self.old.posterior(x, t) * self.r)[..., None] * excess).sum(1)

    def optimum(self, x: Tensor, t: float | Tensor, beta: float) -> Tensor:
        """v* = v_old + (2 / beta) Delta, (B, d)."""
        return self.old.velocity(x, t) + 2 / beta * self.delta(x, t)
