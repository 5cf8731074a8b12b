"""Alarms: a preflight before the first epoch, and thresholds on what every epoch measures anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .distributed import whole

if TYPE_CHECKING:
    from .trainer import Trainer


class AlarmError(RuntimeError):
    """A run that cannot learn, or that has stopped to; the message says why and what to look at."""


class Alarm(NamedTuple):
    """``metric`` beyond ``threshold`` on the side of ``above`` means ``advice``."""

    metric: str
    threshold: float
    above: bool
    advice: str


ALARMS = {
    "old_deviation": Alarm(
        "old_deviation_relative", 0.5, True,
        "the trained velocity has moved far from the old policy's: the learning rate is too high, updates_per_epoch "
        "too many for one epoch's pictures, or old_policy follows too slowly"),
    "saturated": Alarm(
        "r_saturated", 0.5, True,
        "most pictures weigh 0 or 1: rewards have outliers, adv_clip_max is too small, or advantage_std=group divides "
        "by the deviation of groups that hardly differ"),
    "zero_variance": Alarm(
        "zero_variance_groups", 0.8, True,
        "in most groups all pictures score alike, so that nothing is learned from them: prompts are too easy or too "
        "hard, the reward is too coarse, group_size too small, or the reward does not see the pictures at all"),
    "x0_large": Alarm(
        "x0_rms", 5.0, True,
        "latents have grown beyond what a VAE decodes: the policy diverges, or the VAE's scaling is another one"),
    "x0_small": Alarm(
        "x0_rms", 0.05, False,
        "latents have collapsed: pictures are flat; the learning rate is too high or the reward likes empty pictures"),
    "velocity": Alarm(
        "velocity_rms", 10.0, True,
        "velocities have grown by an order: the policy diverges; lower the learning rate or raise kl_weight"),
    "gradient": Alarm(
        "grad_norm", 100.0, True,
        "gradients are far above max_grad_norm: the loss is badly scaled, as with a beta that is too small, or the "
        "learning rate has thrown the policy off"),
    "no_gradient": Alarm(
        "grad_norm", 1e-12, False,
        "there is no gradient: all rewards are equal within their groups, or the adapters are not in the graph"),
    "nonfinite_rewards": Alarm(
        "nonfinite_rewards", 0.0, True,
        "they counted as the mean of their group: the score divides by zero, overflows, or fails on some pictures"),
}  # fmt: skip

# The others, which are no comparison of one metric of one epoch.
NONFINITE, HACKING, FALLING, HELD_OUT = "nonfinite_updates", "reward_hacking", "reward_falling", "held_out_falling"
THRESHOLDS = {name: alarm.threshold for name, alarm in ALARMS.items()}
THRESHOLDS |= {NONFINITE: 3.0, HACKING: 0.3, FALLING: 0.5, HELD_OUT: 0.3}
"""Value beyond which each alarm is raised. ``nonfinite_updates``: how many updates in a row may be skipped before the
run stops. ``held_out_falling``: by how many of its standard deviations over pictures a held-out score falls below its
best; ``reward_hacking``: the same while the trained reward rises by as many of its own. ``reward_falling``: by how many
the trained reward falls below its best."""
SHARES = ("saturated", "zero_variance")
"""Those that are shares of pictures or groups."""
# Epochs whose mean is the trained reward: that of one is as hard or easy as its prompts.
_RECENT = 10
_REMEDY = (
    "A lower learning_rate, a larger kl_weight or fewer updates_per_epoch help; `best` is the checkpoint with the best "
    "held-out score"
)


class Alarms:
    """Watches one run."""

    def __init__(self, thresholds: Mapping[str, float]) -> None:
        """``thresholds`` replaces some of ``THRESHOLDS``."""
        self.thresholds = {**THRESHOLDS, **thresholds}
        self._skipped = 0
        # By held-out score: the trained reward where the score was best, the score and its deviation.
        self._best: dict[str, tuple[float, float, float]] = {}
        # Mean and deviation of the trained reward: of the newest epochs, and where it was best.
        self._rewards: list[tuple[float, float]] = []
        self._highest: tuple[float, float] | None = None

    def update(self, finite: bool) -> None:
        """Count the updates in a row whose loss or gradient was not finite.

        Raises:
            AlarmError: more of them than the threshold.
        """
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped > self.thresholds[NONFINITE]:
            raise AlarmError(
                f"{NONFINITE}: {self._skipped} updates in a row had a loss or gradient that is not finite; users "
                "usually trained in half precision with a learning rate that is too high, or had broken latents or a "
                "reward that overflows"
            )

    def epoch(self, metrics: Mapping[str, Any]) -> list[str]:
        """Messages about one epoch's metrics."""
        self._rewards = [*self._rewards, (metrics["reward"], metrics.get("reward_std", 0.0))][-_RECENT:]
        messages = []
        for name, (metric, _, above, advice) in ALARMS.items():
            value, threshold = metrics.get(metric), self.thresholds[name]
            if value is not None and (value > threshold if above else value < threshold):
                sign = "above" if above else "below"
                messages.append(f"{name}: {metric} is {value:.3g}, {sign} {threshold:g}; {advice}")
        if metrics.get("nonfinite_updates"):
            messages.append(f"{NONFINITE}: {metrics['nonfinite_updates']} updates were not finite and were skipped")
        return messages

    def evaluation(self, held_out: Mapping[str, Sequence[float]], nonfinite: int = 0) -> list[str]:
        """Compare with the best evaluation: a trained reward or a held-out score that has fallen.

        Args:
            held_out: mean and standard deviation over held-out pictures of the reported score and of every reward that
                is only watched.
            nonfinite: how many held-out pictures have a score that is not finite.
        """
        # Before the first epoch nothing was trained, and so nothing has risen since.
        messages, trained, spread = [], math.inf, 0.0
        if nonfinite > self.thresholds["nonfinite_rewards"]:
            messages.append(
                f"nonfinite_rewards: scores of {nonfinite} held-out pictures are not finite and count for nothing: the "
                "score divides by zero, overflows, or fails on some pictures"
            )
        if self._rewards:
            trained, spread = (sum(column) / len(self._rewards) for column in zip(*self._rewards, strict=True))
            if self._highest is None or trained >= self._highest[0]:
                self._highest = trained, spread
            # Of pictures that have all become noise the rewards hardly differ.
            fall, unit = self._highest[0] - trained, max(spread, self._highest[1])
            if fall > self.thresholds[FALLING] * unit:
                messages.append(
                    f"{FALLING}: the trained reward is {fall:.3g} below its best; look at the pictures: the policy "
                    f"gets worse. {_REMEDY}"
                )
        for name, (score, deviation) in held_out.items():
            if not math.isfinite(score):
                continue
            if name not in self._best or score >= self._best[name][1]:
                self._best[name] = trained, score, deviation
            rise, fall = trained - self._best[name][0], self._best[name][1] - score
            unit = max(deviation, self._best[name][2])
            if rise > self.thresholds[HACKING] * spread and fall > self.thresholds[HACKING] * unit:
                messages.append(
                    f"{HACKING}: held-out {name} is {fall:.3g} below its best, since when the trained reward rose by "
                    f"{rise:.3g}; look at the pictures: the policy may exploit the reward. A larger kl_weight, a "
                    "second reward or fewer epochs help"
                )
            elif fall > self.thresholds[HELD_OUT] * unit:
                messages.append(
                    f"{HELD_OUT}: held-out {name} is {fall:.3g} below its best; look at the pictures: the policy gets "
                    f"worse, or fits the training prompts alone. {_REMEDY}"
                )
        return messages

    def restart(self) -> None:
        """Forget what was compared with: another task's scores come."""
        self._best, self._rewards, self._highest = {}, [], None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to raise the same alarms."""
        return {
            "skipped": self._skipped,
            "best": self._best,
            "rewards": self._rewards,
            "highest": self._highest,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``."""
        self._skipped, self._highest = state["skipped"], state["highest"]
        self._best, self._rewards = dict(state["best"]), list(state["rewards"])


def distribution(r: Tensor, rewards: Tensor, x0: Tensor) -> dict[str, Any]:
    """What one epoch's pictures say.

    Args:
        r: (B,) optimality probabilities.
        rewards: (P, G) by prompt and picture of its group.
        x0: (B, C, H, W) clean latents.
    """
    return {
        "r_histogram": torch.histc(r.float().cpu(), 10, 0, 1).int().tolist(),
        "r_saturated": ((r <= 0) | (r >= 1)).float().mean().item(),
        "zero_variance_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "x0_rms": x0.float().square().mean().sqrt().item(),
    }


def preflight(trainer: Trainer) -> None:
    """Sample, decode and score one prompt's pictures and take a step on them, then put the weights back.

    A run of hours must not end at its first reward, decoding or backward, nor spend its hours on nothing.

    Raises:
        AlarmError: latents, pictures, scores or gradients that no training can use.
    """
    policy = trainer.policy
    before = [parameter.detach().clone() for parameter in policy.trained]
    x0, pictures, scores = trainer.preflight_pictures()
    for what, values, hint in (
        ("latents", x0, "the pipeline's weights or dtype are broken"),
        ("scores", scores, "the reward fails on these pictures"),
    ):
        if not values.isfinite().all():
            raise AlarmError(f"preflight: {what} are not finite; {hint}")
    if (pictures.flatten(1).amax(1) == pictures.flatten(1).amin(1)).all():
        raise AlarmError("preflight: every picture has one colour; the VAE does not fit the pipeline or overflows")
    # No more at once than in training, for memory's sake; half of them count as good, whatever they score, as their
    # rewards may well be equal.
    x0 = x0[: trainer.stage.micro_batch]
    weights = torch.arange(1, len(x0) + 1, device=x0.device).remainder(2).to(x0.dtype)
    try:
        trainer.backward(x0, weights)
    except RuntimeError as error:
        raise AlarmError(f"preflight: the backward fails: {error}") from error
    gradients = [parameter.grad for parameter in policy.trained if parameter.grad is not None]
    if not gradients or not all(whole(gradient).isfinite().all() for gradient in gradients):
        raise AlarmError("preflight: the gradient is missing or not finite; try dtype=float32 or a larger beta")
    if not any(whole(gradient).any() for gradient in gradients):
        raise AlarmError("preflight: the gradient is zero; the trained weights do not reach the loss")
    torch.optim.SGD(policy.trained, lr=trainer.stage.learning_rate).step()
    if not all(whole(parameter.detach()).isfinite().all() for parameter in policy.trained):
        raise AlarmError("preflight: a step makes the weights infinite; lower the learning rate")
    with torch.no_grad():
        for parameter, old in zip(policy.trained, before, strict=True):
            parameter.copy_(old)
            parameter.grad = None
