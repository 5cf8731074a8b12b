"""The fused Stable Diffusion 3 forward against diffusers' own on tiny random transformers."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from diffusers import SD3Transformer2DModel  # noqa: E402

from nft_kernels import backends  # noqa: E402
from nft_kernels.backends import choose  # noqa: E402
from nft_kernels.models import attention, float8  # noqa: E402
from nft_kernels.models.sd3 import accelerate, restore  # noqa: E402

# Dual attention and qk-norm as in 3.5 Medium, and neither as in 3 Medium. The last block drops its context.
MODELS = {"sd35": {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, "sd3": {}}
# The attention that auto takes here.
AUTO = "short" if choose("auto", torch.empty(0)) == "native" else "flash"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(autouse=True)
def default_device():
    """None is set here: torch.compile cannot resume a broken graph under the mode that sets it."""


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name, layers=3, head_dim=8):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=3,
        joint_attention_dim=12,
        caption_projection_dim=3 * head_dim,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        **MODELS[name],
    )
    for parameter_name, p in model.named_parameters():
        if "attn" in parameter_name and "norm" in parameter_name:
            torch.nn.init.uniform_(p, 0.5, 2)
    return model.requires_grad_(False)


def add_adapters(model, **options):
    options = {"target_modules": TARGETS, "r": 4} | options
    config = peft.LoraConfig(lora_alpha=8, init_lora_weights=False, **options)
    for name in ("default", "old"):
        model.add_adapter(config, adapter_name=name)
    model.set_adapter("default")
    return model


def inputs(dtype=torch.float32, device="cpu", batch=2, words=5):
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 8, 6), (batch, words, 12), (batch, 10)
    x, embeds, pooled = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x, embeds, pooled, torch.linspace(150.3, 900.0, batch, device=device)


def evaluate(model, dtype=torch.float32):
    """Output, and gradients of all that is trained and of the inputs."""
    *tensors, t = inputs(dtype, model.device)
    tensors = [x.requires_grad_() for x in tensors]
    out = model(*tensors, t, return_dict=False)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), *torch.autograd.grad((out * weights).sum(), [*tensors, *trained])


def assert_same(got, wanted, tolerance=2e-5):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def assert_as_accurate(got, plain, exact):
    """In bfloat16, in norm."""
    for a, b, wanted in zip(got, plain, exact, strict=True):
        error, allowed = ((x.double() - wanted).norm() for x in (a, b))
        assert a.dtype == b.dtype
        assert error <= max(2 * allowed, 4 * torch.finfo(torch.bfloat16).eps * wanted.norm())


def run(model):
    with torch.no_grad():
        return model(*inputs(device=model.device), return_dict=False)[0]


@pytest.mark.parametrize("adapters", ["none", "default", "old", "both", "disabled", "of high rank"])
def test_parity_with_diffusers(model, adapters):
    if adapters != "none":
        add_adapters(model, r=16 if adapters == "of high rank" else 4)
    if adapters == "disabled":
        model.disable_adapters()
    elif adapters in ("default", "old", "both"):
        model.set_adapter(["default", "old"] if adapters == "both" else adapters)
    wanted, wanted_without_grad = evaluate(model), run(model)
    accelerate(model)
    assert_same(evaluate(model), wanted)
    assert_same([run(model)], [wanted_without_grad])


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_parity_of_the_backends_with_diffusers(backend):
    place = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    if backend != "reference" and (reason := backends.load(backend).why_not(torch.empty(0, device=place))):
        pytest.skip(reason)
    model = add_adapters(build("sd35", layers=2)).to(place)
    wanted = evaluate(model)
    accelerate(model, backend=backend)
    assert_same(evaluate(model), wanted)


def test_bfloat16_is_as_accurate_as_diffusers(model):
    add_adapters(model)
    model.bfloat16()
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.float()
    exact = evaluate(copy.deepcopy(model).double(), torch.float64)
    plain = evaluate(model, torch.bfloat16)
    accelerate(model)
    assert_as_accurate(evaluate(model, torch.bfloat16), plain, exact)


@pytest.mark.parametrize(
    ("rank", "dtype", "masters", "autocast", "added"),
    [
        (5, torch.float32, torch.float32, False, False),
        (6, torch.float32, torch.float32, False, True),
        (6, torch.float32, torch.float32, True, False),
        (16, torch.bfloat16, torch.float32, False, False),
        (16, torch.bfloat16, torch.bfloat16, False, False),
        (16, torch.float32, torch.float64, False, False),
    ],
)
def test_adapters_of_high_rank_are_added_to_weights_that_keep_them(rank, dtype, masters, autocast, added):
    """24 x 24 multiplications of a weight's gradient, and 2 (24 + 24) of every rank."""
    model = add_adapters(build("sd35", layers=1), r=rank).to(dtype)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.to(masters)
    accelerate(model)
    *tensors, t = inputs(dtype)
    with torch.autocast("cpu", enabled=autocast), Products() as products:
        model(*tensors, t)
    # Beside the weights they are copied to the product's dtype.
    assert (products.count("_foreach_copy_") == 0) == added


# The last is oneDNN's, where the processor has AVX-512.
PRODUCTS = "addmm", "mm", "bmm", "mkldnn::_linear_pointwise"


class Products(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def count(self, *names):
        return sum(name.split(".")[0] in names for name in self.names)


def test_projections_and_modulations_are_single_products(model):
    with Products() as plain:
        run(model)
    accelerate(model)
    run(model)
    with Products() as fused:
        run(model)
    saved = plain.count(*PRODUCTS) - fused.count(*PRODUCTS)
    dual = len(model.config.dual_attention_layers)
    # 7 modulations become one; 3 projections become one for the sample, the context and the second attention.
    assert saved == 6 + 3 * 4 + 2 * dual
    # The reference of qk-norm has a copy for each of queries, keys and values, as diffusers.
    assert fused.count("cat") <= plain.count("cat")


def test_blocks_add_their_residuals_and_the_biases_of_parts_in_the_norms():
    pytest.importorskip("triton", minversion="3.4")
    counts = []
    for layers in (1, 2):
        model = build("sd35", layers).to("cuda" if torch.cuda.is_available() else "cpu")
        accelerate(model, backend="triton")
        with Products() as seen:
            run(model)
        counts.append(seen.count("add", "add_", "addcmul"))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("order", ["before", "after"])
def test_swapped_weights_are_followed(model, order):
    """As nft's ``merged`` does: every weight gets other memory, twice, with and without an evaluation in between."""
    if order == "before":
        accelerate(model)
        run(model)
    add_adapters(model)
    if order == "after":
        accelerate(model)
    reference = copy.deepcopy(model)
    if "forward" in vars(reference):
        restore(reference)
    for adapter, look in (("default", True), ("old", False), ("old", True), ("default", True)):
        bases = []
        for m in (model, reference):
            m.disable_adapters()
            layers = [layer for layer in m.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
            bases.append([(layer.base_layer, layer.base_layer.weight.data) for layer in layers])
            for layer in layers:
                layer.base_layer.weight.data = layer.base_layer.weight + layer.get_delta_weight(adapter)
        if look:
            assert_same([run(model)], [run(reference)])
        for kept in bases:
            for layer, weight in kept:
                layer.weight.data = weight
    for m in (model, reference):
        m.enable_adapters()
        m.set_adapter("default")
    assert_same(evaluate(model), evaluate(reference))


def test_weights_changed_in_place_are_followed(model):
    add_adapters(model)
    wanted = run(model)
    accelerate(model)
    before = run(model)
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    assert_same([run(model)], [wanted])
    model.disable_adapters()
    reference = copy.deepcopy(model)
    restore(reference)
    # PEFT takes the adapter out again when it is asked to do without it.
    assert_same([run(model)], [run(reference)])
    assert not any(layer.merged for layer in layers) and not torch.equal(run(model), before)
    for p in model.parameters():
        p.data *= 1.1
    for p in reference.parameters():
        p.data *= 1.1
    assert_same([run(model)], [run(reference)])


def test_joined_parameters_keep_working_after_inference_mode_and_a_change_of_dtype(model):
    accelerate(model)
    with torch.inference_mode():
        model(*inputs())
    add_adapters(model)
    evaluate(model)
    model.double()
    out = model(*inputs(torch.float64), return_dict=False)[0]
    restore(model)
    assert_same([out], [model(*inputs(torch.float64), return_dict=False)[0]], 1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "trained base",
        "trained biases",
        "dora",
        "dropout",
        "hook",
        "backward hook",
        "backward pre-hook",
        "replaced forward",
        "layerwise casting",
        "some",
    ],
)
def test_other_layers_are_called_as_they_are(model, kind):
    if kind == "trained base":
        model.requires_grad_(True)
    elif kind == "trained biases":
        for name, p in add_adapters(model).named_parameters():
            p.requires_grad_(name.endswith("base_layer.bias"))
    elif kind == "dora":
        add_adapters(model, use_dora=True)
    elif kind == "dropout":
        # Without those whose order of drawing is not that of diffusers.
        add_adapters(model, lora_dropout=0.5, target_modules=["to_q", "to_k", "to_v", "add_q_proj"]).train()
    elif kind == "some":
        model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "add_v_proj"]))
    elif kind == "hook":
        model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "backward hook":
        model.transformer_blocks[0].attn.to_k.register_full_backward_hook(lambda module, new, old: (2 * new[0],))
    elif kind == "backward pre-hook":
        model.transformer_blocks[0].attn.to_k.register_full_backward_pre_hook(lambda module, old: (2 * old[0],))
    elif kind == "replaced forward":
        # As accelerate's and diffusers' hooks do.
        for layer in (model.transformer_blocks[0].norm1.linear, model.transformer_blocks[1].ff.net[0].proj):
            layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    else:
        # Weights in float16 but for a product.
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.manual_seed(5)
    wanted = evaluate(model)
    accelerate(model)
    torch.manual_seed(5)
    assert_same(evaluate(model), wanted)


@pytest.mark.parametrize("mixed", ["weights", "adapters"])
def test_dtypes_may_differ(model, mixed):
    add_adapters(model)
    for name, p in model.named_parameters():
        if "to_k" in name and ("lora" in name) == (mixed == "adapters"):
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed == "weights"):
        wanted = run(model)
        accelerate(model)
        got = run(model)
    changed = {p.dtype for name, p in model.named_parameters() if "to_k" in name and "old" not in name}
    assert got.dtype == wanted.dtype and changed == {torch.float32, torch.bfloat16}
    restore(model)
    exact = run(model.float())
    assert (got - exact).norm() <= 2 * (wanted - exact).norm()


def test_restore_gives_the_original_bitwise(model, tmp_path):
    add_adapters(model)
    wanted, state = evaluate(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    accelerate(model)
    evaluate(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    restore(model)
    assert type(model).forward is model.forward.__func__
    assert all(torch.equal(a, b) for a, b in zip(evaluate(model), wanted, strict=True))
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters())
    with pytest.raises(ValueError, match="transformer: got one that is not accelerated"):
        restore(model)


def test_gradient_checkpointing(model):
    add_adapters(model)
    wanted = evaluate(model)
    accelerate(model)
    with Products() as kept:
        evaluate(model)
    model.enable_gradient_checkpointing()
    model.train()
    with Products() as recomputed:
        assert_same(evaluate(model), wanted)
    assert recomputed.count(*PRODUCTS) > kept.count(*PRODUCTS)


def test_a_tangent_is_right_or_refused_but_never_lost(model):
    path = accelerate(model, attention="math")
    x, *others = inputs()

    def tangent(forward):
        with torch.no_grad(), forward_ad.dual_level():
            (y,) = forward(forward_ad.make_dual(x, torch.ones_like(x)), *others, return_dict=False)
            return forward_ad.unpack_dual(y).tangent

    got = tangent(model)
    path.attention, path.attention_used = "auto", {}
    model(*inputs())  # which chooses one that may know no tangents
    assert_same(tangent(model), got)
    restore(model)
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(got, tangent(model))


def test_compiles_without_a_break():
    model = add_adapters(build("sd35", layers=1))
    wanted = evaluate(model)
    path = accelerate(model)
    torch._dynamo.reset()
    assert_same(evaluate(torch.compile(model, backend="aot_eager", fullgraph=True)), wanted)
    # As for longer sequences: it is compiled for any.
    assert set(path.attention_used.values()) == {
        attention.select("auto", (2, 1024, 3, 8), torch.float32, torch.device("cpu"))
    }


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_takes_any_batch_and_prompt(dynamic):
    model = add_adapters(build("sd35", layers=1))
    batches = [inputs(batch=batch, words=words) for batch, words in ((2, 5), (3, 5), (5, 7))]
    wanted = [model(*batch).sample for batch in batches]
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, expected in zip(batches, wanted, strict=True):
        assert_same(compiled(*batch).sample, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_derivatives_of_functions_leave_the_weights_alone(adapted):
    """Within ``torch.func`` tensors are wrappers, which must not become the model's parameters."""
    model = build("sd35", layers=1)
    model = add_adapters(model) if adapted else model
    x, *others = inputs()

    def loss(x):
        return model(x, *others, return_dict=False)[0].square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.grad(loss)(x)
    accelerate(model)
    # As the first forward, and once an attention is chosen.
    assert_same(torch.func.grad(loss)(x), expected)
    before = loss(x)
    assert_same(torch.func.grad(loss)(x), expected)
    assert torch.equal(loss(x), before)


@pytest.mark.parametrize(
    ("choice", "ran"), [("flash", "flash"), ("math", "math"), ("native", "flash"), ("short", "short"), ("auto", AUTO)]
)
def test_the_chosen_attention_is_what_runs(model, choice, ran):
    if ran == "short" and AUTO != "short":
        pytest.skip("the compiled module is not installed")
    path = accelerate(model, attention=choice)
    with Products() as seen:
        out = run(model)
    assert (seen.count("_scaled_dot_product_flash_attention_for_cpu") > 0) == (ran == "flash")
    assert (seen.count("_softmax", "_safe_softmax") > 0) == (ran == "math")
    dual = bool(model.config.dual_attention_layers)
    shapes = {(2, 17, 3, 8), (2, 12, 3, 8)} if dual else {(2, 17, 3, 8)}
    assert {key[0] for key in path.attention_used} == shapes
    assert set(path.attention_used.values()) == {ran}
    restore(model)
    assert_same([out], [run(model)])


def test_a_choice_overrides_the_switches_around_it():
    model = build("sd35")
    accelerate(model, attention="flash")
    for _ in range(2):
        # Before it is chosen, and once it is.
        with sdpa_kernel(SDPBackend.MATH), Products() as seen:
            run(model)
        assert seen.count("_scaled_dot_product_flash_attention_for_cpu") == 4
        run(model)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("cudnn", "torch has none for such cpu tensors"),
        ("efficient", "torch has none for such cpu tensors"),
        ("flash2", "flash_attn.flash_attn_func is not installed"),
        ("flash3", "flash_attn_interface.flash_attn_func is not installed"),
        ("flash4", "flash_attn.cute.flash_attn_func is not installed"),
    ],
)
def test_an_attention_that_cannot_run_says_why(model, choice, reason):
    accelerate(model, attention=choice)
    with pytest.raises(RuntimeError, match=rf"attention: '{choice}' cannot run for torch.float32 .*{reason}"):
        run(model)


@pytest.mark.parametrize(
    ("name", "module", "major", "others"),
    [
        ("flash2", "flash_attn", 8, (0, 7)),
        ("flash3", "flash_attn_interface", 9, (0, 8, 10)),
        ("flash4", "flash_attn.cute", 10, (0, 8, 12)),
    ],
)
def test_flash_attention_packages_are_used_when_installed(monkeypatch, name, module, major, others):
    calls = []

    def flash_attn_func(q, k, v):
        calls.append(q.shape)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return out if name == "flash2" else (out, None)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(attention, "_capability", lambda device: major)
    model = build("sd35").bfloat16()
    path = accelerate(model)
    args = *inputs(torch.bfloat16)[:3], torch.tensor([150.3, 900.0])
    out = model(*args, return_dict=False)[0]
    assert set(path.attention_used.values()) == {name} and set(calls) == {(2, 17, 3, 8), (2, 12, 3, 8)}
    restore(model)
    assert_same([out], [model(*args, return_dict=False)[0]], 0.05)
    q = torch.zeros(1, 2, 3, 8)
    assert "it takes float16 and bfloat16, not torch.float32" in attention.why_not(name, q, q, q)
    wide = torch.zeros(1, 2, 3, 512, dtype=torch.bfloat16)
    assert "not 512" in attention.why_not(name, wide, wide, wide)
    for other in others:
        monkeypatch.setattr(attention, "_capability", lambda device, other=other: other)
        assert "it needs an NVIDIA GPU of compute capability" in attention.why_not(name, q, q, q)


@pytest.mark.parametrize(("choice", "others"), [("native", True), ("math", False)])
def test_what_torch_would_take_leaves_other_threads_their_choice(model, monkeypatch, choice, others):
    seen, plain = [], F.scaled_dot_product_attention

    def spy(*qkv):
        seen.append(torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled())
        return plain(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    accelerate(model, attention=choice)
    run(model)
    assert set(seen) == {others}


def fake_quantized(linear):
    """A linear layer whose factors went through float8, with a scale for every row, and came back."""

    def through(x):
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    return lambda x: F.linear(through(x), through(linear.weight), linear.bias)


def test_policies_with_equal_weights_agree_bitwise(model):
    """With and without a gradient, as the loss compares them."""
    add_adapters(model)
    accelerate(model)
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            part["old"].load_state_dict(part["default"].state_dict())
    current = model(*inputs(), return_dict=False)[0]
    assert current.requires_grad
    model.set_adapter("old")
    assert torch.equal(run(model), current)


def test_rollouts_take_gelu_in_the_epilogue(model, monkeypatch):
    """On the CPU that epilogue is the other form of GELU, so a product with the tanh form stands in for it."""
    calls = []

    def addmm_activation(bias, x, weight, use_gelu):
        calls.append(x.shape)
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    wanted = run(model)
    path = accelerate(model)
    monkeypatch.setattr("nft_kernels.models.sd3._TANH_EPILOGUE", ("cpu",))
    monkeypatch.setattr(torch, "_addmm_activation", addmm_activation)
    run(model)
    assert not calls
    with path.rollout():
        assert_same([run(model)], [wanted])
        with pytest.raises(RuntimeError, match="rollout: cannot run: it gives no gradients"):
            model(*inputs())
    assert calls == [(24, 24), (10, 24)] * 2 + [(24, 24)]


@pytest.fixture
def float8_products():
    if reason := float8.why_not(torch.empty(0)):
        pytest.skip(reason)


def test_float8_by_the_kernels(float8_products):
    pytest.importorskip("triton", minversion="3.4")
    model, outs = build("sd35", layers=1), []
    wanted = run(model)
    for backend in ("reference", "triton"):
        path = accelerate(model, backend=backend)
        run(model)
        with path.rollout(float8=True), Products() as seen:
            outs.append(run(model))
        restore(model)
    # Only the embedding of the timestep puts tensors together, twice.
    assert [seen.count(name) for name in ("_scaled_mm", "gelu", "cat")] == [7, 0, 2]
    # float8 magnifies the last bits of float32 where they decide how a number is rounded.
    assert (outs[1] - outs[0]).norm() < 0.2 * (outs[0] - wanted).norm()


@pytest.mark.parametrize("keep", [False, True])
def test_float8_weights_are_those_of_the_rollout(model, keep, float8_products):
    """Kept or not, they are made of what the weights are when it begins."""
    path = accelerate(model)
    path.keep_float8 = keep
    with path.rollout(float8=True):
        before = run(model)
    assert bool(path._float8) == keep
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ff." in name:
                parameter.mul_(1.5)
    with path.rollout(float8=True):
        after = run(model)
    restore(model)
    with accelerate(model).rollout(float8=True):
        assert torch.equal(after, run(model)) and not torch.equal(after, before)


def test_layers_that_are_trained_themselves_have_their_gradients(model):
    parameters = [*model.transformer_blocks[0].attn.parameters(), *model.transformer_blocks[0].ff.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def gradients():
        out = model(*inputs(), return_dict=False)[0]
        return torch.autograd.grad(out.square().sum(), parameters)

    wanted = gradients()
    accelerate(model)
    assert_same(gradients(), wanted)


@pytest.mark.parametrize("adapter", ["none", "default", "old", "feed_forward"])
def test_float8(model, adapter, float8_products):
    if adapter == "feed_forward":
        add_adapters(model, target_modules=["net.0.proj", "net.2"])
    elif adapter != "none":
        add_adapters(model).set_adapter(adapter)
    wanted = run(model)
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        inside = name.startswith("transformer_blocks") and "norm1" not in name and "lora_" not in name
        if type(module) is torch.nn.Linear and inside:
            module.forward = fake_quantized(module)
    path = accelerate(model)
    with path.rollout(float8=True):
        got = run(model)
        assert torch.equal(run(model), got)
    effect = (got - wanted).norm()
    assert 0.001 * wanted.norm() < effect < 0.2 * wanted.norm()
    # float8 magnifies the last bits of float32 where they decide how a number is rounded.
    assert (got - run(reference)).norm() < 0.2 * effect
    assert_same([run(model)], [wanted])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_layers", [1]),
        ("joint_attention_kwargs", {"scale": 0.5}),
        ("block_controlnet_hidden_states", [torch.zeros(1)]),
    ],
)
def test_what_only_the_original_forward_knows_is_refused_by_name(model, name, value):
    accelerate(model)
    with pytest.raises(ValueError, match=f"{name}: got {type(value).__name__}, accepted is None"):
        model(*inputs(), **{name: value})


def test_output_like_diffusers(model):
    x, embeds, pooled, t = inputs()
    accelerate(model)
    out = model(hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=t)
    assert torch.equal(out.sample, model(x, embeds, pooled, t, return_dict=False)[0])


def test_bad_input_is_named(model):
    with pytest.raises(TypeError, match="transformer: got Linear"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="attention: got 'fast', accepted are auto, native, short, cudnn"):
        accelerate(model, attention="fast")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        accelerate(model, backend="fast")
    accelerate(model)
    with pytest.raises(ValueError, match="transformer: its forward was already replaced"):
        accelerate(model)
    restore(model)
    model.enable_forward_chunking()
    with pytest.raises(ValueError, match="forward chunking"):
        accelerate(model)
    model.disable_forward_chunking()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="transformer: got FusedJointAttnProcessor2_0 in transformer_blocks"):
        accelerate(model)


@pytest.mark.parametrize("name", ["transformer_blocks.1", "transformer_blocks.0.attn", "transformer_blocks.0.ff",
                                  "transformer_blocks.0.norm1", "norm_out"])  # fmt: skip
def test_hooks_that_would_not_be_called_are_refused(model, name):
    add_adapters(model)
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match=f"transformer: got hooks on {name}, accepted are those of linear layers"):
        accelerate(model)
    handle.remove()
    accelerate(model)


def test_a_rollout_calls_a_feed_forward_layer_that_has_hooks(model, monkeypatch):
    """Its product would have the GELU in its epilogue on a GPU."""
    monkeypatch.setattr("nft_kernels.models.sd3._TANH_EPILOGUE", ("cpu",))
    model.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda module, args, out: 2 * out)
    wanted = run(model)
    path = accelerate(model)
    with torch.no_grad(), path.rollout():
        assert_same([run(model)], [wanted], 1e-3)


def test_a_norms_weight_that_is_not_what_it_was_is_refused():
    model = build("sd35")
    accelerate(model)
    run(model)
    norm = model.transformer_blocks[0].attn.norm_added_q
    for weight in (norm.weight[:2], norm.weight.to("meta")):
        norm.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        with pytest.raises(RuntimeError, match=rf"a norm's weight of shape \({len(weight)},\) on {weight.device}"):
            run(model)


def test_a_forward_that_something_else_replaced_is_not_taken_back():
    model = build("sd35")
    accelerate(model)
    ours = model.forward
    model.forward = lambda *args, **options: ours(*args, **options)
    with pytest.raises(ValueError, match="its forward was replaced since"):
        restore(model)
    model.forward = ours
    restore(model)
    assert "forward" not in vars(model)


def test_a_rollout_within_another_does_not_end_it():
    model = build("sd35")
    path = accelerate(model)
    with torch.no_grad(), path.rollout():
        with path.rollout():
            pass
        assert path._in_rollout
    assert not path._in_rollout
