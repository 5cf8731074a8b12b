"""The fused Stable Diffusion 3 forward on a GPU, in the dtypes and with the attention that are used there."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from test_sd3 import MODELS, Products, add_adapters, assert_as_accurate, assert_same, evaluate, inputs, run
from test_sd3 import build as build_on_cpu

from nft_kernels.models import attention
from nft_kernels.models.sd3 import accelerate, restore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EPS = torch.finfo(torch.bfloat16).eps
OPERATORS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "math": "_scaled_dot_product_attention_math",
}


@pytest.fixture(autouse=True)
def default_device():
    """None is set here: torch.compile cannot resume a broken graph under the mode that sets it."""


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name):
    """In bfloat16, with trained adapters in float32."""
    model = add_adapters(build_on_cpu(name)).cuda().bfloat16()
    for parameter_name, p in model.named_parameters():
        if "lora" in parameter_name:
            p.data = p.data.float()
    return model


def draw(model):
    with torch.no_grad():
        return model(*inputs(torch.bfloat16, model.device), return_dict=False)[0]


@pytest.mark.parametrize("adapter", ["default", "old", "disabled"])
def test_parity_with_diffusers_in_float32(model, adapter):
    model.float()
    if adapter == "disabled":
        model.disable_adapters()
    else:
        model.set_adapter(adapter)
    wanted, wanted_without_grad = evaluate(model), run(model)
    accelerate(model)
    assert_same(evaluate(model), wanted)
    assert_same([run(model)], [wanted_without_grad])


def test_bfloat16_is_as_accurate_as_diffusers(model):
    exact = evaluate(copy.deepcopy(model).double(), torch.float64)
    plain = evaluate(model, torch.bfloat16)
    accelerate(model)
    assert_as_accurate(evaluate(model, torch.bfloat16), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", attention.CHOICES)
def test_the_chosen_attention_runs_and_is_right(choice, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, weights = (torch.randn(2, 333, 4, 64, generator=generator, device="cuda") for _ in range(4))
    exact_inputs = [x.double().requires_grad_() for x in (q, k, v)]
    given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    reason = None if choice in ("auto", "native") else attention.why_not(choice, *given)
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"attention: '{choice}' cannot run"):
            attention.select(choice, given[0].shape, dtype, given[0].device)
        pytest.skip(reason)
    name = attention.select(choice, given[0].shape, dtype, given[0].device)
    assert name == choice or choice in ("auto", "native")
    with Products() as seen:
        out = attention.attend(name, *given)
    if name in OPERATORS:
        assert seen.count(OPERATORS[name]) + seen.count("_safe_softmax", "_softmax") == 1
        assert (seen.count(OPERATORS[name]) == 1) or name == "math"
    scores = torch.einsum("bqhd,bkhd->bhqk", *exact_inputs[:2]) / 8
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), exact_inputs[2])
    got = [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), given)]
    wanted = [exact, *torch.autograd.grad((exact * weights.to(dtype).double()).sum(), exact_inputs)]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


def test_policies_with_equal_weights_agree_bitwise(model):
    """With and without a gradient, as the loss compares them."""
    accelerate(model)
    for name, p in model.named_parameters():
        if ".old." in name:
            p.data.copy_(model.get_parameter(name.replace(".old.", ".default.")))
    current = model(*inputs(torch.bfloat16, model.device), return_dict=False)[0]
    assert current.requires_grad
    model.set_adapter("old")
    assert torch.equal(draw(model), current)


def test_rollouts_are_as_accurate_with_gelu_in_the_epilogue(model):
    model.disable_adapters()
    exact, plain = run(copy.deepcopy(model).float()), draw(model)
    path = accelerate(model)
    with path.rollout(), Products() as seen:
        got = draw(model)
    assert seen.count("_addmm_activation") == 5
    assert_as_accurate([got], [plain], [exact])


@pytest.mark.parametrize("name", MODELS)
def test_float8(name):
    # Its products take multiples of 16 only.
    model = build_on_cpu(name, head_dim=16).cuda().bfloat16()
    wanted = draw(model)
    path = accelerate(model)
    with path.rollout(float8=True), Products() as seen:
        got = draw(model)
    assert seen.count("_scaled_mm") > 10
    assert 0.001 * wanted.norm() < (got - wanted).norm() < 0.2 * wanted.norm()
    after = draw(model)
    restore(model)
    assert_same([after], [draw(model)], 4 * EPS)


def test_float8_in_a_cuda_graph_follows_the_weights():
    model = build_on_cpu("sd35", head_dim=16).cuda().bfloat16()
    path = accelerate(model)
    path.keep_float8 = True
    x = inputs(torch.bfloat16, model.device)
    with torch.no_grad(), path.rollout(float8=True):
        draw(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(*x, return_dict=False)[0]
    before = captured.clone()
    for p in model.parameters():
        p.data.mul_(1.1)
    with torch.no_grad(), path.rollout(float8=True):
        graph.replay()
        assert torch.equal(captured, draw(model)) and not torch.equal(captured, before)


def test_cuda_graph(model):
    path = accelerate(model)
    x = inputs(torch.bfloat16, model.device)
    with torch.no_grad(), path.rollout():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(*x)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(*x, return_dict=False)[0]
        x[0].mul_(-2)
        graph.replay()
        assert torch.equal(captured, model(*x, return_dict=False)[0])
