"""One epoch of the trainer against the same in plain diffusers and PyTorch, in float64: what the formulas say of the
pictures, times and noise that the trainer has chosen."""

import pytest
import torch
from distributed_worker import Brightness
from torch.func import functional_call

pytest.importorskip("diffusers")

from diffusers import StableDiffusion3Pipeline

from nft.config import load_config
from nft.rollout import rollout
from nft.tasks import TASKS
from nft.trainer import Trainer

GROUPS, SIZE, STEPS, TIMES, UPDATES = 3, 4, 4, 2, 2
SETTINGS = {"prompts_per_epoch": GROUPS, "group_size": SIZE, "rollout_solver": "euler", "rollout_steps": STEPS,
            "timesteps_per_sample": TIMES, "updates_per_epoch": UPDATES, "micro_batch": 5, "rollout_batch": 8,
            "epochs": 500, "lora_rank": 4, "lora_alpha": 6, "kl_weight": 0.3, "beta": 0.7, "adv_clip_max": 1.5,
            "learning_rate": 0.003, "weight_decay": 0.1, "max_grad_norm": 0.005, "eval_steps": 3,
            "eval_solver": "euler", "eval_prompts_per_group": 1}  # fmt: skip
EPOCH = 400


class Plain:
    """The pipeline with adapters added to its weights."""

    def __init__(self, folder, policy):
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
        self.transformer = self.pipeline.transformer.double()
        self.weights = dict(self.transformer.named_parameters())
        names = [name for name, _ in policy.transformer.named_parameters()]
        self.names = [name for name in names if ".default." in name]
        self.length = policy._max_sequence_length

    def velocity(self, adapter, x, t, prompts):
        """Of an adapter, whose parameters are in the order of ``names``, or of the base, at times t (B,)."""
        weights = dict(self.weights)
        if adapter is not None:
            parts = dict(zip(self.names, adapter, strict=True))
            for name in [n for n in parts if ".lora_A." in n]:
                key = name.replace(".lora_A.default", "")
                product = parts[name.replace("lora_A", "lora_B")] @ parts[name]
                weights[key] = weights[key] + SETTINGS["lora_alpha"] / SETTINGS["lora_rank"] * product
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        given = x.double(), embeds.double(), pooled.double(), 1000 * t.double()
        return functional_call(self.transformer, weights, given, {"return_dict": False})[0]

    @torch.no_grad()
    def draw(self, adapter, noise, prompts, steps):
        x = noise.double()
        for k in range(steps):
            v = self.velocity(adapter, x, torch.full((len(x),), 1 - k / steps), prompts)
            x = x - v / steps
        return x

    @torch.no_grad()
    def pictures(self, x0):
        """(B, H, W, 3) in 0 to 255."""
        vae = self.pipeline.vae
        decoded = vae.decode(x0.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
        return 255 * (decoded / 2 + 0.5).clamp(0, 1).double().permute(0, 2, 3, 1)


def nft(v, v_old, v_ref, x_t, x0, t, r):
    """Loss, KL and deviation of every pair (B,)."""
    beta, largest = SETTINGS["beta"], SETTINGS["adv_clip_max"]
    t = t.double().view(-1, 1, 1, 1)

    def branch(velocity):
        error = x_t - t * velocity - x0
        weight = error.abs().mean((1, 2, 3)).clamp_min(1e-5).detach()
        return error.square().mean((1, 2, 3)) / weight

    positive, negative = branch((1 - beta) * v_old + beta * v), branch((1 + beta) * v_old - beta * v)
    policy = largest * (r * positive + (1 - r) * negative) / beta
    kl = (v - v_ref).square().mean((1, 2, 3))
    return policy + SETTINGS["kl_weight"] * kl, kl, (v - v_old).abs().mean((1, 2, 3))


def close(got, wanted, rtol=1e-4):
    """To a share of the largest element."""
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=rtol * scale)


def make(pipeline, folder, *overrides):
    """A trainer in the middle of a run: its policies differ."""
    given = [f"{key}={value}" for key, value in SETTINGS.items()]
    trainer = Trainer(load_config("shapes", [f"pipeline={pipeline}", *given, *overrides]), folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*trainer.policy.trained, *trainer.policy._old, *trainer.ema.shadow_params):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    trainer.policy.old_is_current = False
    trainer.epoch = EPOCH
    return trainer


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)


@pytest.fixture
def first_noise(monkeypatch):
    """What every rollout starts from."""
    import nft.rollout

    drawn, plain = [], nft.rollout.add_noise
    monkeypatch.setattr(nft.rollout, "add_noise", lambda *a, **k: drawn.append(plain(*a, **k)) or drawn[-1])
    return drawn


def copies(tensors):
    return [x.detach().double().clone() for x in tensors]


@pytest.mark.parametrize("mode", ["continuous", "positive_only"])
def test_an_epoch_is_what_the_formulas_say(pipeline, tmp_path, monkeypatch, first_noise, mode):
    trainer = make(pipeline, tmp_path, f"advantage_mode={mode}")
    policy, plain = trainer.policy, Plain(pipeline, trainer.policy)
    old, count = copies(policy._old), GROUPS * SIZE

    data = trainer.sample()
    # A CPU fills batches up.
    noise = torch.cat([part[: SETTINGS["rollout_batch"]] for part in first_noise])[:count]
    prompts = data["prompts"]
    assert [prompts[SIZE * i : SIZE * i + SIZE] for i in range(GROUPS)] == [[p] * SIZE for p in prompts[::SIZE]]
    assert torch.pdist(noise.flatten(1)).min() > 1
    close(data["x0"], plain.draw(old, noise, prompts, STEPS))
    # Pictures are rounded.
    reward = plain.pictures(data["x0"]).mean((1, 2, 3))
    assert (255 * data["scores"][:, 0] - reward).abs().max() < 0.51
    reward = data["scores"][:, 0].double()
    centred = reward.view(GROUPS, SIZE) - reward.view(GROUPS, SIZE).mean(1, keepdim=True)
    advantage = (centred / (reward.std(correction=0) + 1e-4)).flatten()
    low = 0 if mode == "positive_only" else -SETTINGS["adv_clip_max"]
    r = advantage.clamp(low, SETTINGS["adv_clip_max"]) / (2 * SETTINGS["adv_clip_max"]) + 0.5
    close(data["r"], r)
    assert r.unique().numel() > GROUPS and data["measured"]["reward"] == pytest.approx(reward.mean().item(), rel=1e-4)

    # Everything that an update is made of, in order.
    batches, updates = [], []
    embed, add_noise, step = policy.embed, Trainer.optimize.__globals__["add_noise"], trainer.optimizer.step

    def noised(x0, t, *, seed):
        batches[-1].update(x0=x0, t=t, x_t=add_noise(x0, t, seed=seed))
        return batches[-1]["x_t"]

    def stepped():
        before, gradients = copies(policy.trained), copies(p.grad for p in policy.trained)
        step()
        updates.append((batches[:], before, gradients))
        batches.clear()

    monkeypatch.setattr(policy, "embed", lambda texts: batches.append({"prompts": texts}) or embed(texts))
    monkeypatch.setitem(Trainer.optimize.__globals__, "add_noise", noised)
    monkeypatch.setattr(trainer.optimizer, "step", stepped)
    average = copies(trainer.ema.shadow_params)
    metrics = trainer.optimize(data)

    assert len(updates) == UPDATES and [group["lr"] for group in trainer.optimizer.param_groups] == [0.003]
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1]
    pictures, chosen, eps, measured = [], [], [], []
    for number, (parts, before, gradients) in enumerate(updates, start=1):
        leaves, total = [p.clone().requires_grad_() for p in before], 0
        pairs = sum(len(part["t"]) for part in parts)
        assert pairs == count * TIMES // UPDATES and max(len(part["t"]) for part in parts) == SETTINGS["micro_batch"]
        of_update = []
        for part in parts:
            x0, x_t, t = part["x0"].double(), part["x_t"].double(), part["t"]
            index = [(data["x0"] - x.float()).abs().flatten(1).amax(1).argmin().item() for x in x0]
            assert torch.equal(data["x0"][index].double(), x0) and [prompts[i] for i in index] == part["prompts"]
            pictures += index
            chosen += zip(index, t.tolist(), strict=True)
            level = t.double().view(-1, 1, 1, 1)
            eps.append((x_t - (1 - level) * x0) / level)
            v = plain.velocity(leaves, x_t, t, part["prompts"])
            with torch.no_grad():
                v_old, v_ref = (plain.velocity(which, x_t, t, part["prompts"]) for which in (old, None))
            each, kl, deviation = nft(v, v_old, v_ref, x_t, x0, t, r[index])
            total = total + each.sum() / pairs
            rms = v.detach().square().mean((1, 2, 3)).sqrt()
            of_update.append(torch.stack([each.detach(), kl.detach(), deviation.detach(), rms]))
        wanted = torch.autograd.grad(total, leaves)
        norm = torch.cat([g.flatten() for g in wanted]).norm()
        assert norm > 3 * SETTINGS["max_grad_norm"]
        for got, exact in zip(gradients, wanted, strict=True):
            close(got, exact * SETTINGS["max_grad_norm"] / norm, 2e-3)
        measured.append([*torch.cat(of_update, 1).mean(1).tolist(), norm.item()])
        decay, after = (
            min((1 + number) / (10 + number), 0.9),
            updates[number][1] if number < UPDATES else policy.trained,
        )
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, after, strict=True)]
    assert sorted(pictures) == sorted([*range(count)] * TIMES) and pictures != sorted(pictures)
    assert len(set(chosen)) == count * TIMES and {t for _, t in chosen} == {1 - k / STEPS for k in range(STEPS)}
    eps = torch.cat(eps)
    assert torch.pdist(eps.flatten(1)).min() > 1
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    names = ("loss", "kl", "old_deviation", "velocity_rms", "grad_norm")
    for name, values in zip(names, zip(*measured, strict=True), strict=True):
        assert metrics[name] == pytest.approx(sum(values) / UPDATES, rel=1e-3), name
    # Of which an alarm tells: a velocity's own size is another for every model.
    relative = metrics["old_deviation"] / metrics["velocity_rms"]
    assert metrics["old_deviation_relative"] == pytest.approx(relative, rel=1e-6) and metrics["velocity_rms"] != 1
    for got, exact in zip(trainer.ema.shadow_params, average, strict=True):
        close(got, exact)
    eta = 0.001 * (EPOCH + 1)
    for got, before, now in zip(policy._old, old, policy.trained, strict=True):
        close(got, eta * before + (1 - eta) * now.double())


def test_an_evaluation_draws_with_the_averaged_weights(pipeline, tmp_path, monkeypatch, first_noise):
    trainer = make(pipeline, tmp_path)
    plain, average = Plain(pipeline, trainer.policy), copies(trainer.ema.shadow_params)
    # Of one group more than of the other.
    known = {entry["tag"]: entry for entry in trainer.task.held_out_prompts(1)}
    first, second = list(known)[:2]
    entries = [known[tag] for tag in (first, first, first, second)]
    monkeypatch.setattr(trainer.task, "held_out_prompts", lambda count: entries)
    strict = torch.tensor([1.0, 0.0, 1.0, 0.5])
    monkeypatch.setattr(trainer.task, "score", lambda *_: torch.stack([torch.zeros(4), strict], 1))
    scores, pictures, prompts = trainer.evaluate()
    assert prompts == [entry["prompt"] for entry in entries]
    wanted = {"eval_strict": (2 / 3 + 0.5) / 2, f"eval_{first}": 2 / 3, f"eval_{second}": 0.5}
    # Around a mean over pictures of 5/8: two are 3/8 above it, one is 5/8 and one 1/8 below.
    assert scores == pytest.approx(
        wanted | {"eval_strict_std": ((2 * 9 + 25 + 1) / 64 / 4) ** 0.5, "nonfinite_scores": 0}
    )
    exact = plain.pictures(plain.draw(average, torch.cat(first_noise)[:4], prompts, SETTINGS["eval_steps"]))
    assert (pictures.double() - exact).abs().max() < 0.6 and exact.std() > 5
    # Nothing of it stays.
    for got, exact in zip(
        trainer.policy.trained, copies(make(pipeline, tmp_path / "other").policy.trained), strict=True
    ):
        assert torch.equal(got.double(), exact)


def test_every_evaluation_draws_from_the_same_noise(pipeline, tmp_path, first_noise):
    """Else scores would differ for more than the weights' sake."""
    trainer = make(pipeline, tmp_path)
    found = []
    for trainer.epoch in (0, 1, EPOCH):
        first_noise.clear()
        trainer.evaluate()
        found.append(torch.cat(first_noise)[: len(trainer.task.held_out_prompts(1))])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.pdist(found[0].flatten(1)).min() > 1


def test_what_is_drawn_depends_on_seed_and_epoch(pipeline, tmp_path, first_noise):
    def noise(seed, epoch):
        trainer = make(pipeline, tmp_path / f"{seed}-{epoch}-{len(first_noise)}", f"seed={seed}")
        trainer.epoch = epoch
        first_noise.clear()
        trainer.sample()
        return torch.cat(first_noise)

    again, *others = noise(0, 1), noise(0, 2), noise(1, 1)
    assert torch.equal(noise(0, 1), again)
    assert all((other - again).flatten(1).abs().amax(1).min() > 0.1 for other in others)


@pytest.mark.parametrize("reference", [False, True])
def test_guidance_is_away_from_the_empty_prompt_or_the_reference(pipeline, tmp_path, first_noise, reference):
    trainer = make(pipeline, tmp_path)
    policy, plain, prompts, scale = trainer.policy, Plain(pipeline, trainer.policy), ["a red circle", "a triangle"], 3.0
    grid = torch.tensor([1.0, 0.4, 0.0])
    policy.use("default")
    x = rollout(policy, prompts, [1, 2], grid, "euler", 8, guidance=scale, reference=reference)
    exact, adapter = first_noise[0][:2].double(), copies(policy.trained)
    for t, s in ((1.0, 0.4), (0.4, 0.0)):
        times = torch.full((2,), t)
        with torch.no_grad():
            v = plain.velocity(adapter, exact, times, prompts)
            base = plain.velocity(*((None, exact, times, prompts) if reference else (adapter, exact, times, ["", ""])))
        exact = exact + (s - t) * (base + scale * (v - base))
    close(x, exact)
