"""FLUX.1 and Qwen-Image behind the model adapter, on tiny pipelines with random weights, against diffusers' own."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from distributed_worker import Brightness
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from nft.config import load_config
from nft.export import export_lora, export_pipeline
from nft.full import FullPolicy, load_policy
from nft.models import MODELS, find
from nft.plan import _KNOWN, plan
from nft.policy import Policy
from nft.rollout import rollout
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import TEXT_LENGTH, _clip_tokenizer, _t5_tokenizer, _words, build_pipeline

PROMPTS = ["a red circle", "two blue squares"]
LENGTH = 200
SMALL = ["resolution=64", "prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1",
         "eval_prompts_per_group=1", "eval_steps=1", "eval_solver=euler", "epochs=2", "updates_per_epoch=1",
         "lora_rank=4", "lora_alpha=8", "learning_rate=0.01", "kl_weight=0.1",
         f"max_sequence_length={LENGTH}"]  # fmt: skip


def build_flux(*, distilled):
    """Distilled is dev with its dynamic shift, not distilled is schnell."""
    torch.manual_seed(0)
    clip, t5 = _clip_tokenizer(_words()), _t5_tokenizer(_words())
    encoder = CLIPTextConfig(vocab_size=len(clip), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, max_position_embeddings=TEXT_LENGTH,
                             eos_token_id=clip.eos_token_id)  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(encoder),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def build_qwen():
    """One token a byte: with the pipeline's template a prompt has some 180 tokens."""
    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e4,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
        ),
    )


BUILDERS = {
    "qwen": build_qwen,
    "flux-dev": lambda: build_flux(distilled=True),
    "flux-schnell": lambda: build_flux(distilled=False),
}


@pytest.fixture(scope="module", params=BUILDERS)
def pipeline(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    BUILDERS[request.param]().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides])


def packed(latents):
    """2 x 2 patches as tokens, by their definition."""
    return torch.stack([
        latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        for row in range(latents.shape[2] // 2)
        for column in range(latents.shape[3] // 2)
    ], 1)  # fmt: skip


def theirs(pipeline, latents, steps, output_type, **options):
    """diffusers' own pipeline from the same noise, at the times that it takes by itself."""
    side = latents.shape[-1] * pipeline.vae_scale_factor
    return pipeline(prompt=PROMPTS, height=side, width=side, latents=packed(latents), num_inference_steps=steps,
                    max_sequence_length=LENGTH, output_type=output_type, **options).images  # fmt: skip


def test_more_tokens_than_a_pipeline_takes_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"max_sequence_length: got 2000, accepted for a \w+Pipeline are 1 to"):
        Policy(settings(pipeline, "max_sequence_length=2000"))


def test_a_prompt_that_is_cut_is_named_once(pipeline, capsys):
    policy = Policy(settings(pipeline))
    policy.embed(PROMPTS)
    assert "has more than" not in capsys.readouterr().out
    assert policy.model.too_long([*PROMPTS, "a red circle " * 80], LENGTH) == ["a red circle " * 80]
    policy.embed(["a red circle " * 80])
    policy.embed(["a blue circle " * 80])
    said = capsys.readouterr().out
    assert said.count(f"has more than max_sequence_length={LENGTH} tokens") == 1 and "'a red circle a red" in said
    assert len(said) < 500


@pytest.mark.parametrize("spacing", ["even", "pipeline"])
def test_a_euler_rollout_is_diffusers_own(pipeline, spacing):
    policy = Policy(settings(pipeline, f"timestep_spacing={spacing}"))
    whole = find(pipeline).pipeline_class.from_pretrained(pipeline)
    whole.set_progress_bar_config(disable=True)
    noise = rollout(policy, PROMPTS, [1, 2], torch.tensor([1.0]), "euler", 2)
    with policy.merged("default"):
        x0 = rollout(policy, PROMPTS, [1, 2], policy.times(4), "euler", 2)
    assert x0.shape == (2, *policy.latent_shape) and x0.dtype == torch.float32
    assert (x0 - noise).abs().max() > 0.1
    torch.testing.assert_close(packed(x0), theirs(whole, noise, 4, "latent"), rtol=1e-4, atol=1e-5)
    expected = torch.from_numpy(theirs(whole, noise, 4, "np")) * 255
    pictures = policy.decode(x0)
    assert pictures.shape == (2, 64, 64, 3) and expected.std() > 5
    assert (pictures.float() - expected).abs().max() < 0.51


def test_a_guided_rollout_is_diffusers_own(pipeline):
    policy = Policy(settings(pipeline, "timestep_spacing=pipeline"))
    whole = find(pipeline).pipeline_class.from_pretrained(pipeline)
    whole.set_progress_bar_config(disable=True)
    noise = rollout(policy, PROMPTS, [1, 2], torch.tensor([1.0]), "euler", 2)
    x0 = rollout(policy, PROMPTS, [1, 2], policy.times(4), "euler", 2, guidance=4.5)
    expected = theirs(whole, noise, 4, "latent", true_cfg_scale=4.5, negative_prompt=["", ""])
    torch.testing.assert_close(packed(x0), expected, rtol=1e-4, atol=1e-5)
    assert (theirs(whole, noise, 4, "latent") - expected).abs().max() > 1e-3


def test_a_picture_depends_on_its_prompt_and_not_on_its_batch(pipeline):
    policy = Policy(settings(pipeline))
    many = rollout(policy, PROMPTS * 5, list(range(10)), policy.times(2), "heun", 10)
    alone = rollout(policy, PROMPTS[1:], [3], policy.times(2), "heun", 1)
    assert torch.equal(many[3:4], alone)
    other = rollout(policy, PROMPTS[:1], [3], policy.times(2), "heun", 1)
    assert (alone - other).abs().max() > 1e-4


def test_half_precision_and_compiled_rollouts_draw_what_float32_does(pipeline, monkeypatch, request):
    if "qwen" in request.node.name and torch.__version__ < "2.9":
        pytest.skip("older compilers do not take diffusers' rotary embedding")
    compiled, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, mode: (compiled.append(mode), compile(module, backend="aot_eager"))[1]
    )
    latents, expected = [], []
    for extra in ([], ["compile_rollout=default"], ["dtype=bfloat16"]):
        policy = Policy(settings(pipeline, *extra))
        with policy.merged("old"):
            latents.append(rollout(policy, PROMPTS, [1, 2], policy.times(3), "unipc", 8))
        assert policy.decode(latents[-1]).dtype == torch.uint8
    assert compiled == ["default"]
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-5)
    noise = rollout(policy, PROMPTS, [1, 2], torch.tensor([1.0]), "euler", 2)
    for dtype in (torch.float32, torch.bfloat16):
        whole = find(pipeline).pipeline_class.from_pretrained(pipeline, dtype=dtype)
        whole.set_progress_bar_config(disable=True)
        expected.append(theirs(whole, noise.to(dtype), 3, "latent").float())
    error, allowed = ((half - full).norm() / full.norm() for half, full in (latents[::-2], expected[::-1]))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_training_changes_the_weights_resumes_and_is_exported(pipeline, tmp_path, adapter):
    options = [f"adapter={adapter}", "gradient_checkpointing=true"]
    options += ["lora_rank=32", "lora_alpha=64"] if adapter == "full" else []
    whole = Trainer(settings(pipeline, *options), tmp_path / "whole")
    start = [parameter.detach().clone() for parameter in whole.policy.trained]
    whole.train()
    Trainer(settings(pipeline, *options, "epochs=1"), tmp_path / "parts").train()
    second = Trainer(settings(pipeline, *options), tmp_path / "parts", resume=True)
    assert second.epoch == 1
    second.train()
    assert isinstance(whole.policy, FullPolicy) == (adapter == "full")
    assert all(map(torch.equal, whole.policy.trained, second.policy.trained))
    moved = [not torch.equal(a, b) for a, b in zip(start, whole.policy.trained, strict=True)]
    assert sum(moved) > 0.9 * len(moved)

    def velocity(model):
        x, t = torch.randn(2, *whole.policy.latent_shape, generator=torch.Generator().manual_seed(0)), torch.ones(2) / 2
        with torch.no_grad():
            return whole.policy.model.velocity(model, x, t, *whole.policy.embed(PROMPTS))

    whole.policy.use("default")
    expected = velocity(whole.policy.transformer)
    base = find(pipeline).pipeline_class.from_pretrained(pipeline)
    assert (velocity(base.transformer) - expected).abs().max() > 1e-3
    if adapter == "lora":
        export_lora(tmp_path / "whole", tmp_path / "lora", weights="default")
        base.load_lora_weights(tmp_path / "lora")
        torch.testing.assert_close(velocity(base.transformer), expected, rtol=1e-4, atol=1e-5)
    export_pipeline(tmp_path / "whole", tmp_path / "merged", pipeline, weights="default")
    merged = find(pipeline).pipeline_class.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(velocity(merged.transformer), expected, rtol=1e-4, atol=1e-5)


def test_whole_weights_are_exported_into_their_own_pipeline_alone(tmp_path):
    for name, build in BUILDERS.items():
        build().save_pretrained(tmp_path / name)
    for name in ("qwen", "flux-dev"):
        with pytest.raises(ValueError, match=r"does not fit the pipeline: .* missing, unknown or of another shape"):
            export_pipeline(tmp_path / "flux-schnell" / "transformer", tmp_path / "out", str(tmp_path / name))
        assert not (tmp_path / "out").exists()


def test_a_lora_of_a_layer_whose_name_ends_others_adapts_it_alone(tmp_path):
    """FLUX has a proj_out at the end, and one in every block."""
    build_flux(distilled=True).save_pretrained(tmp_path / "flux")
    transformer = FluxPipeline.from_pretrained(tmp_path / "flux").transformer
    assert sum(name.endswith("proj_out") for name, _ in transformer.named_modules()) > 1
    down, up = (torch.randn(size) for size in ((2, transformer.proj_out.in_features), (64, 2)))
    save_file({"transformer.proj_out.lora_A.weight": down, "transformer.proj_out.lora_B.weight": up},
              tmp_path / "lora.safetensors")  # fmt: skip
    policy = load_policy(settings(str(tmp_path / "flux")), tmp_path / "lora.safetensors")
    assert [tuple(weight.shape) for weight in policy.trained] == [down.shape, up.shape]
    assert torch.equal(policy.trained[1], up)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_plan_counts_what_a_model_does(pipeline, checkpointing):
    config = settings(pipeline, f"gradient_checkpointing={checkpointing}", "micro_batch=1", "rollout_batch=1")
    policy, costs = Policy(config), plan(config, epoch=1)
    conditions = policy.embed(["a red circle"])
    planned = policy.model.conditions(1, LENGTH)
    assert [(x.shape, x.dtype) for x in conditions] == [(x.shape, x.dtype) for x in planned]
    # A plan's reference and rollouts are evaluated without an adapter, and its training with one.
    x_t, t = torch.randn(1, *policy.latent_shape), torch.tensor([0.5])

    def flops(adapter, *, train):
        policy.use(adapter)
        # The counter does not know the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(train), FlopCounterMode(display=False) as counter:
            v = policy.velocity(x_t, t, *conditions)
            if train:
                v.sum().backward()
        return counter.get_total_flops()

    reference, old, step = flops(None, train=False), flops("old", train=False), flops("default", train=True)
    # Two updates' worth of four pictures, each trained on once; the merge itself is small beside them.
    assert costs.rollout_flops == pytest.approx(costs.rollout_evaluations * reference, rel=0.01)
    assert costs.training_flops == pytest.approx(4 * (reference + old + step), rel=0.01)


def test_what_a_model_does_not_take_is_named_before_weights_are_read(pipeline, tmp_path, monkeypatch):
    for kind in MODELS.values():
        monkeypatch.setattr(kind, "__init__", None)
    with pytest.raises(ValueError, match=r"fused_transformer: got true for a .*, accepted is StableDiffusion3Pipeline"):
        Policy(settings(pipeline, "fused_transformer=true"))
    if find(pipeline).__name__ == "QwenImage":
        accepted = "StableDiffusion3Pipeline, FluxPipeline$"
        with pytest.raises(ValueError, match=f"cuda_graphs: got true for a QwenImagePipeline, accepted is {accepted}"):
            Policy(settings(pipeline, "device=cuda", "cuda_graphs=true"))
    with pytest.raises(ValueError, match=r"resolution: got 24, accepted are multiples of 16$"):
        Policy(settings(pipeline, "resolution=24"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    with pytest.raises(
        ValueError, match="is a PixArtSigmaPipeline, accepted are StableDiffusion3Pipeline, FluxPipeline"
    ):
        Policy(settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("FlowMatchHeunDiscreteScheduler", None),
        ("UniPCMultistepScheduler", None),
        ("FlowMatchEulerDiscreteScheduler", "use_karras_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "use_exponential_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "use_beta_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "stochastic_sampling"),
    ],
)
def test_a_scheduler_of_other_times_or_steps_is_named_before_weights_are_read(tmp_path, name, option):
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", name]}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({option: True} if option else {}))
    named = f"{name} with {option}=true" if option else name
    for use in (Policy, plan):
        with pytest.raises(ValueError, match=f"pipeline: got the scheduler {named}, accepted is FlowMatchEuler"):
            use(settings(tmp_path))


def test_a_folder_of_one_variant_is_named(tmp_path):
    build_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"no file named .* Files of a variant, such as fp16, are not taken"):
        Policy(settings(tmp_path))


@pytest.mark.parametrize(("fused", "spacing"), [("false", "pipeline"), ("true", "pipeline"), ("false", "even")])
def test_stable_diffusion_35_large_needs_another_pipeline_and_nothing_else(tmp_path, fused, spacing):
    """Beside its size, Large differs from Medium by having no dual attention (its transformer's config.json)."""
    whole = build_pipeline()
    config = dict(whole.transformer.config) | {"dual_attention_layers": (), "num_layers": 2}
    whole.register_modules(
        transformer=SD3Transformer2DModel.from_config(config), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    whole.save_pretrained(tmp_path)
    whole = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    whole.set_progress_bar_config(disable=True)
    changes = ["device=cpu", "dtype=float32", "resolution=64", f"max_sequence_length={TEXT_LENGTH}"]
    # The configuration has the pipeline's own times.
    changes += [f"fused_transformer={fused}", *(["timestep_spacing=even"] if spacing == "even" else [])]
    policy = Policy(load_config("sd35_geneval", [f"pipeline={tmp_path}", *changes]))
    noise = rollout(policy, PROMPTS, [1, 2], torch.tensor([1.0]), "euler", 2)
    with policy.merged("old"):
        x0 = rollout(policy, PROMPTS, [1, 2], policy.times(4), "euler", 2)
    sigmas = [1.0, 0.75, 0.5, 0.25] if spacing == "even" else None
    expected = whole(PROMPTS, height=64, width=64, latents=noise, guidance_scale=0.0, num_inference_steps=4,
                     sigmas=sigmas, max_sequence_length=TEXT_LENGTH, output_type="latent")  # fmt: skip
    torch.testing.assert_close(x0, expected.images, rtol=1e-4, atol=1e-4)
    v = policy.velocity(x0, torch.full((2,), 0.5), *policy.embed(PROMPTS))
    gradients = torch.autograd.grad(v.square().sum(), policy.trained)
    # lora_A has no gradient while lora_B is 0.
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_stable_diffusion_3_without_t5_is_diffusers_own_and_is_exported(tmp_path):
    whole = build_pipeline()
    whole.register_modules(text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(tmp_path / "base")
    whole.set_progress_bar_config(disable=True)
    policy = Policy(settings(tmp_path / "base", "timestep_spacing=pipeline"))
    planned = policy.model.conditions(2, LENGTH)
    assert [x.shape for x in policy.embed(PROMPTS)] == [x.shape for x in planned]
    noise = rollout(policy, PROMPTS, [1, 2], torch.tensor([1.0]), "euler", 2)
    x0 = rollout(policy, PROMPTS, [1, 2], policy.times(4), "euler", 2)
    call = dict(height=64, width=64, latents=noise, guidance_scale=1.0, num_inference_steps=4,
                max_sequence_length=LENGTH, output_type="latent")  # fmt: skip
    torch.testing.assert_close(x0, whole(PROMPTS, **call).images, rtol=1e-4, atol=1e-5)
    policy.save_adapter("default", tmp_path / "lora")
    export_pipeline(tmp_path / "lora", tmp_path / "merged", str(tmp_path / "base"))
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged", text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(x0, merged(PROMPTS, **call).images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("stabilityai/stable-diffusion-3.5-large", 8.0, 8.2), ("black-forest-labs/FLUX.1-dev", 11.8, 12.0)],
)
def test_a_planned_model_has_its_published_size(name, low, high):
    """8.1 and 12 billion parameters (model pages)."""
    with torch.device("meta"):
        kind, config, _ = _KNOWN[name]
        model = kind.transformer_class.from_config(config)
    assert low < sum(parameter.numel() for parameter in model.parameters()) / 1e9 < high
