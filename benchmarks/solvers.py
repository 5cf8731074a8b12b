"""Error of every solver against evaluations of the model: ``python benchmarks/solvers.py``.

On a one-dimensional Gaussian mixture, whose velocity is known in closed form, the error is the Wasserstein distance of
the samples to the mixture; on the shapes world it is one minus the strict score of the held-out prompts (``--world``,
with the bundled base policy or ``--checkpoint``). Writes solvers.json and solvers.png.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import norm

from nft.worlds.mixture import Mixture
from nft_kernels import solver_step
from nft_kernels.provenance import write_report
from nft_kernels.solvers import SOLVERS, schedule, table

MIXTURE = Mixture(
    shares=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    means=torch.tensor([[-1.5], [0.5], [2.0]], dtype=torch.float64),
    deviations=torch.tensor([[0.3], [0.5], [0.2]], dtype=torch.float64),
)
STEPS = (2, 3, 5, 8, 12, 20, 40)


def quantiles(levels):
    """Of the mixture, by bisection of its distribution function."""
    shares, means, deviations = (x.flatten().numpy() for x in (MIXTURE.shares, MIXTURE.means, MIXTURE.deviations))
    low, high = np.full_like(levels, -10.0), np.full_like(levels, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = (shares * norm.cdf((middle[:, None] - means) / deviations)).sum(1) > levels
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def mixture_error(solver, count=20_000):
    """Wasserstein-1 distance from evenly spaced quantiles of the noise: without a step's own noise there is none."""
    levels = (np.arange(count) + 0.5) / count
    x, history = torch.from_numpy(norm.ppf(levels))[:, None], ()
    for i, t in enumerate(solver.times):
        x, history, *_ = solver_step(solver, i, x, MIXTURE.velocity(x, t), history, seed=0)
    return float(np.abs(np.sort(x[:, 0].numpy()) - quantiles(levels)).mean())


def world_errors(checkpoint, per_group):
    """A function from solver name and steps to one minus the strict score."""
    from nft.config import load_config
    from nft.full import load_policy
    from nft.policy import times
    from nft.rollout import rollout
    from nft.tasks import TASKS

    policy = load_policy(load_config("shapes"), checkpoint)
    task = TASKS["shapes"](policy.device)
    entries = task.held_out_prompts(per_group)
    prompts, seeds = [e["prompt"] for e in entries], list(range(len(entries)))

    def error(name, steps):
        with policy.merged("default"):
            pictures = policy.decode(rollout(policy, prompts, seeds, times(steps, 1.0), name, 96))
        return 1 - task.score(pictures, entries)[:, 1].mean().item()

    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", action="store_true", help="also on the shapes world")
    parser.add_argument("--checkpoint", type=Path, help="run or LoRA folder for --world")
    parser.add_argument("--per-group", type=int, default=20, help="held-out prompts of each task group")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    errors = {"mixture": lambda name, steps: mixture_error(table(name, schedule(steps)))}
    if options.world:
        errors["shapes"] = world_errors(options.checkpoint, options.per_group)
    rows = []
    for place, error in errors.items():
        for name in SOLVERS:
            for steps in STEPS:
                rows.append({"place": place, "solver": name, "evaluations": len(table(name, schedule(steps)).rows),
                             "error": error(name, steps)})  # fmt: skip
                print(*rows[-1].values(), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "solvers.json"
    write_report(path, "python benchmarks/solvers.py", torch.device("cpu"), {"results": rows})
    # More solvers than the default cycle has colours.
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=plt.colormaps["tab20"].colors)
    figure, axes = plt.subplots(1, len(errors), figsize=(6.5 * len(errors), 4.5), squeeze=False)
    for axis, place in zip(axes[0], errors, strict=True):
        for name in SOLVERS:
            points = [(r["evaluations"], r["error"]) for r in rows if r["place"] == place and r["solver"] == name]
            axis.plot(*zip(*points, strict=True), "o--" if table(name, schedule(4)).stochastic else "o-", label=name)
        axis.set(xlabel="evaluations of the model", xscale="log")
        axis.set_xticks(STEPS, STEPS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set(yscale="log", ylabel="Wasserstein distance to the mixture")
    if options.world:
        axes[0, 1].set(ylabel="1 - strict score on held-out prompts", ylim=(0, 1))
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.output / "solvers.png", dpi=120)


if __name__ == "__main__":
    main()
