"""The rollout engine: what a picture depends on, and what it leaves as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from accelerate.hooks import CpuOffload, UserCpuOffloadHook

from nft.config import load_config
from nft.policy import Policy, times
from nft.rollout import rollout, solver_options
from nft.worlds.shapes.prompts import sample
from nft.worlds.shapes.tiny import build_pipeline

ROOT = Path(__file__).parents[2]
PROMPTS = [entry["prompt"] for entry in sample(held_out=True, per_group=11)][:64]


@pytest.fixture(scope="module")
def policy():
    return Policy(load_config("shapes"))


def draw(policy, part, batch, solver="dpm++2M"):
    with policy.merged("old"):
        x0 = rollout(policy, PROMPTS[part], list(range(64))[part], times(4, 1.0), solver, batch)
    return policy.decode(x0)


@pytest.mark.parametrize("isa", ["AVX512", "AVX2"])
def test_a_row_of_a_product_does_not_depend_on_the_others(isa):
    """By MKL it would, on Intel's processors and with AVX2 for most numbers of rows."""
    code = (
        "import nft, torch\n"
        "x, weight = torch.randn(1664, 128), torch.randn(512, 128)\n"
        "whole = torch.nn.functional.linear(x, weight)\n"
        "rows = (16, 32, 48, 64, 80, 112, 128, 208, 256, 416)\n"
        "assert all(torch.equal(torch.nn.functional.linear(x[:n], weight), whole[:n]) for n in rows)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"MKL_ENABLE_INSTRUCTIONS": isa}, check=True)


def test_pictures_are_the_same_for_any_batch_size(policy):
    assert len(set(PROMPTS)) > 20
    for solver in ("dpm++2M", "heun", "flow-sde"):
        expected = draw(policy, slice(None), 64, solver)
        assert torch.equal(draw(policy, slice(None), 7, solver), expected)
        assert torch.equal(
            torch.cat([draw(policy, slice(i, i + 1), 1, solver) for i in range(0, 64, 9)]), expected[::9]
        )
    assert expected.float().std() > 10


def test_offloaded_parts_draw_the_same_pictures_and_are_put_aside_after_every_use(policy, monkeypatch):
    moves = []

    class Recorded(UserCpuOffloadHook):
        def offload(self):
            moves.append(("aside", self.model))
            super().offload()

    monkeypatch.setattr("accelerate.big_modeling.UserCpuOffloadHook", Recorded)
    load = CpuOffload.pre_forward

    def used(hook, part, *args, **kwargs):
        moves.append(("use", part))
        return load(hook, part, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", used)
    offloaded = Policy(load_config("shapes", ["offload=true"]))
    pipeline = offloaded.pipeline
    parts = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3, pipeline.vae]
    parts = [part for part in parts if part is not None]
    moves.clear()
    offloaded.embed(["a prompt that was not there before"])
    assert all([move for move, moved in moves if moved is part][-1] == "aside" for part in parts[:-1])
    assert torch.equal(draw(offloaded, slice(0, 20), 8), draw(policy, slice(0, 20), 8))
    for part in parts:
        own = [move for move, moved in moves if moved is part]
        assert "use" in own and own[-1] == "aside"
    assert all(moved is not pipeline.transformer for _, moved in moves)
    assert {id(moved) for _, moved in moves} == set(map(id, parts))


def test_no_more_embeddings_are_kept_than_there_is_room_for(monkeypatch):
    policy = Policy(load_config("shapes"))
    encoded, encode = [], policy.model.encode
    monkeypatch.setattr(policy.model, "encode", lambda prompts, n: (encoded.extend(prompts), encode(prompts, n))[1])
    prompts = list(dict.fromkeys(PROMPTS))[:24]
    expected = policy.embed(prompts)
    one = sum(row[:1].nbytes for row in expected)
    monkeypatch.setattr("nft.policy.KEPT_BYTES", 10 * one)
    policy._conditions.clear()
    for part in (prompts[:16], prompts[12:]):
        for found, all_of_them in zip(policy.embed(part), expected, strict=True):
            assert torch.equal(found, all_of_them[[prompts.index(p) for p in part]])
        assert len(policy._conditions) == 10
    encoded.clear()
    policy.embed(prompts[14:])
    assert not encoded
    policy.embed(prompts[:1])
    assert set(encoded) == {prompts[0]}


def test_pictures_are_the_same_in_two_processes(policy, tmp_path):
    """Each draws an uneven part in an interpreter of its own, with a thread count of its own."""
    code = (
        "import sys, torch; from tests.nft.test_rollout import *\n"
        "begin, end, threads, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]\n"
        "torch.set_num_threads(threads)\n"
        "torch.save(draw(Policy(load_config('shapes')), slice(begin, end), 64), path)"
    )
    parts = [(0, 29, 1), (29, 64, 2)]
    running = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, part), str(tmp_path / f"{part[0]}.pt")], cwd=ROOT)
        for part in parts
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    halves = [torch.load(tmp_path / f"{part[0]}.pt") for part in parts]
    assert torch.equal(torch.cat(halves), draw(policy, slice(None), 64))


def test_base_weights_are_bitwise_the_same_after_a_thousand_epochs(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    policy = Policy(load_config("shapes", [f"pipeline={tmp_path}", "dtype=bfloat16", "lora_rank=2"]))
    base = {name: p.clone() for name, p in policy.transformer.named_parameters() if "lora" not in name}
    addresses, threads = set(), torch.get_num_threads()
    # A thousand tiny products are no work for several threads.
    torch.set_num_threads(1)
    for _ in range(1000):
        with torch.no_grad():
            torch._foreach_add_(policy.trained, 1e-3)
        policy.update_old(0.5)
        with policy.merged("old"):
            weight = policy.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
            addresses.add(weight.data_ptr())
    torch.set_num_threads(threads)
    assert len(addresses) == 1
    assert not torch.equal(weight, policy._merged[0])
    now = dict(policy.transformer.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in base.items())


def test_a_picture_beyond_the_size_of_the_decoder_is_decoded_in_tiles(policy, monkeypatch):
    vae, sizes = policy.pipeline.vae, []
    decoder = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda x, *args: (sizes.append(x.shape[-1]), decoder(x, *args))[1])
    limit = vae.config.sample_size // policy.pipeline.vae_scale_factor
    assert policy.decode(torch.zeros(1, 16, 2 * limit, 2 * limit)).shape == (1, 128, 128, 3)
    assert max(sizes) <= limit < 2 * limit


@pytest.mark.parametrize(("side", "together"), [(64, 16), (256, 16), (512, 4), (768, 1), (2048, 1)])
def test_a_megapixel_is_decoded_at_once_whatever_the_batch(policy, monkeypatch, side, together):
    sizes = []
    monkeypatch.setattr(policy.model, "decode", lambda x: (sizes.append(len(x)), torch.zeros(len(x), 3, 8, 8))[1])
    latents = torch.zeros(17, 16, side // 8, side // 8)
    assert policy.decode(latents[:1]).shape == (1, 8, 8, 3) and sizes == [together]
    assert len(policy.decode(latents)) == 17 and set(sizes) == {together}


def test_compiled_rollouts_draw_what_eager_ones_do(tmp_path, monkeypatch):
    build_pipeline().save_pretrained(tmp_path)
    compiled, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, mode: (compiled.append(mode), compile(module, backend="aot_eager"))[1]
    )
    pictures = []
    for extra in ([], ["compile_rollout=default"]):
        torch.manual_seed(0)
        policy = Policy(load_config("shapes", [f"pipeline={tmp_path}", "lora_rank=2", *extra]))
        with policy.merged("old"):
            pictures.append(rollout(policy, PROMPTS[:3], [1, 2, 3], times(3, 1.0), "unipc", 8))
    assert compiled == ["default"]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-5)


def test_the_fused_transformer_draws_and_trains_as_diffusers_does(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    pictures, gradients = [], []
    for extra in ([], ["fused_transformer=true"]):
        torch.manual_seed(0)
        policy = Policy(load_config("shapes", [f"pipeline={tmp_path}", "lora_rank=2", *extra]))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (*policy.trained, *policy._old):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        addresses = []
        for _ in range(3):
            with policy.merged("old"):
                x0 = rollout(policy, PROMPTS[:3], [1, 2, 3], times(3, 1.0), "dpm++2M", 8)
            addresses.append([copy.data_ptr() for copy in policy._merged])
            v = policy.velocity(x0, torch.full((3,), 0.5), *policy.embed(PROMPTS[:3]))
        assert addresses[1] == addresses[2]
        pictures.append(x0)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(v.square().sum(), policy.trained)]))
    assert "forward" in vars(policy.transformer)
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_weights_are_merged_in_float32_and_rounded_once():
    policy = Policy(load_config("shapes", ["dtype=bfloat16", "lora_rank=4", "lora_alpha=6"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy._old:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    layers = policy._adapted
    expected = [
        layer.base_layer.weight.double()
        + 1.5 * layer.lora_B["old"].weight.double() @ layer.lora_A["old"].weight.double()
        for layer in layers
    ]
    with policy.merged("old"):
        for layer, exact in zip(layers, expected, strict=True):
            # The nearest bfloat16, but where float32 decides a tie.
            error = (layer.base_layer.weight.double() - exact).abs()
            assert (error <= 0.502 * 2**-7 * exact.abs()).all()


def test_a_random_window_depends_on_the_seed_and_stays_for_its_epochs():
    def windows(seed):
        config = load_config(
            "shapes_flow_grpo_fast", [f"seed={seed}", "window_epochs=3", "timesteps_per_sample=2", "window=2"]
        )
        return [solver_options(config, epoch)["window"] for epoch in range(30)]

    for found in (windows(0), windows(1)):
        assert all(found[k : k + 3] == [found[k]] * 3 for k in range(0, 30, 3))
        assert len(set(found)) > 1 and all(0 <= start and stop == start + 2 <= 5 for start, stop in found)
    assert windows(0) == windows(0) != windows(1)


def test_a_policy_begins_with_what_is_trained():
    policy = Policy(load_config("shapes"))
    x, t = torch.zeros(1, *policy.latent_shape), torch.full((1,), 0.5)
    gradients = torch.autograd.grad(policy.velocity(x, t, *policy.embed(["a red circle"])).sum(), policy.trained)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
