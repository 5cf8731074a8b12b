"""CUDA graphs without a GPU: a stand-in records every operator that runs, and replays it into the same memory."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nft.config import load_config
from nft.graphs import Graph, Graphs
from nft.policy import Policy
from nft.trainer import Trainer


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What is held shares the memory, and not the autograd graph that these become part of.
        call = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))
        self.calls.append((func, *call))
        return out

    def pool(self):
        return self

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for held, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                    held.copy_(new)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """CUDA's streams do nothing here."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def record(graph, pool=None, stream=None, capture_error_mode="global"):
        if pool is None:
            # On a GPU its nodes would have the recorded stream wait for another, which ends the recording.
            alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]
            assert not alive, "an autograd graph is alive"
        with graph:
            yield

    for name, value in (
        ("Stream", lambda device=None: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda stream: nullcontext()),
        ("CUDAGraph", RecordedGraph),
        ("graph", record),
    ):
        monkeypatch.setattr(torch.cuda, name, value)


def function(weights):
    def evaluate(x, scale):
        hidden = torch.tanh(x @ weights[0])
        return (hidden @ weights[1]) * scale[:, None]

    return evaluate


def leaves():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, generator=g).requires_grad_(), torch.randn(7, 3, generator=g).requires_grad_()]


def inputs(seed, count=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=g), torch.rand(count, generator=g)


def test_replays_follow_inputs_and_weights():
    weights = leaves()
    evaluate = function(weights)
    with torch.no_grad():
        graph = Graph(evaluate, inputs(0), (), torch.cuda.Stream())
        results = []
        for seed in (1, 2):
            weights[0].mul_(1.5)
            results.append((graph(*inputs(seed)), evaluate(*inputs(seed))))
    # Also the first, whose memory the second replay has not taken.
    for got, wanted in results:
        torch.testing.assert_close(got, wanted)


def test_gradients_add_up_as_eager_ones_do():
    """Over micro-batches, with a step of the optimizer between."""
    results = []
    for recorded in (False, True):
        weights = leaves()
        evaluate = function(weights)
        call = Graph(evaluate, inputs(0), weights, torch.cuda.Stream()) if recorded else evaluate
        optimizer, found = torch.optim.SGD(weights, lr=0.1), []
        for seed in range(1, 7):
            call(*inputs(seed)).square().sum().backward()
            if seed % 3 == 0:
                found += [w.grad.clone() for w in weights]
                optimizer.step()
                optimizer.zero_grad()
        results.append(found + [w.detach() for w in weights])
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, eager)


def test_a_backward_after_another_evaluation_is_refused():
    weights = leaves()
    graph = Graph(function(weights), inputs(0), weights, torch.cuda.Stream())
    first, second = graph(*inputs(1)), graph(*inputs(2))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="backward: it is of an evaluation that was followed by another"):
        first.sum().backward()


def test_a_weight_without_a_part_in_the_output_has_a_gradient_of_zero():
    weights = [*leaves(), torch.ones(2, requires_grad=True)]
    graph = Graph(function(weights), inputs(0), weights, torch.cuda.Stream())
    graph(*inputs(1)).sum().backward()
    assert weights[2].grad.eq(0).all() and weights[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("counts", "called"),
    [
        # Two evaluations warm up and a third is recorded when 4 comes again; afterwards it is not called.
        ((4, 4, 4, 2, 4), (1, 4, 4, 5, 5)),
        ((4, 2, 4, 2, 4), (1, 2, 5, 6, 6)),
        ((2, 4, 2, 4, 4), (1, 2, 3, 6, 6)),
        ((2, 2, 4, 4, 4), (1, 4, 5, 8, 8)),
    ],
)
def test_the_largest_batch_is_recorded_when_it_comes_again(counts, called):
    weights, calls = leaves(), []
    evaluate = function(weights)

    def counted(*tensors):
        calls.append(len(tensors[0]))
        return evaluate(*tensors)

    graphs = Graphs(torch.device("cpu"))
    for i, (count, total) in enumerate(zip(counts, called, strict=True)):
        got = graphs("default", counted, inputs(i, count), weights).detach()
        assert len(calls) == total
        torch.testing.assert_close(got, evaluate(*inputs(i, count)).detach())
    # Another kind has graphs of its own.
    before = len(calls)
    assert graphs("old", counted, inputs(9), ()).shape == (4, 3) and len(calls) == before + 1


@pytest.mark.parametrize("fused", ["false", "true"])
def test_an_epoch_trains_as_without_graphs(pipeline, tmp_path, monkeypatch, fused):
    # The stand-in replays operators of PyTorch, and does not see kernels that are given addresses.
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "reference")
    overrides = ["prompts_per_epoch=2", "group_size=4", "rollout_steps=3", "timesteps_per_sample=2", "micro_batch=4",
                 "updates_per_epoch=2", "lora_rank=4", "kl_weight=0.1", "preflight=false"]  # fmt: skip
    config = load_config("shapes", [f"pipeline={pipeline}", f"fused_transformer={fused}", *overrides])
    results = []
    for name in ("eager", "graphs"):
        trainer = Trainer(config, tmp_path / name)
        if name == "graphs":
            trainer.policy._graphs = Graphs(torch.device("cpu"))
        for _ in range(2):
            data = trainer.sample()
            data["r"] = torch.linspace(0, 1, len(data["r"]))
            metrics = trainer.optimize(data)
        assert metrics["nonfinite_updates"] == 0
        results.append([metrics["loss"], *(p.detach().clone() for p in trainer.policy.trained)])
    (eager_loss, *eager), (loss, *recorded) = results
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    for a, b in zip(eager, recorded, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_every_adapter_with_and_without_a_gradient_has_graphs_of_its_own(pipeline):
    policy, kinds = Policy(load_config("shapes", [f"pipeline={pipeline}", "lora_rank=4"])), []
    policy._graphs = lambda kind, evaluate, inputs, parameters: kinds.append((kind, bool(parameters))) or inputs[0]
    x, t, conditions = torch.zeros(1, *policy.latent_shape), torch.ones(1), policy.embed(["a red circle"])
    for adapter in ("default", "old", None):
        policy.use(adapter)
        policy.velocity(x, t, *conditions)
    policy.use("default")
    with torch.no_grad():
        policy.velocity(x, t, *conditions)
        with policy.merged("old"):
            policy.velocity(x, t, *conditions)
    assert len({kind for kind, _ in kinds}) == 5 and [trained for _, trained in kinds] == [True, *[False] * 4]
