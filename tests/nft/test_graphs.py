"""CUDA graphs without a GPU: a stand-in records every operator that runs, and replays it into the same memory."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nft.graphs import Graph, Graphs


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
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
    def record(graph, pool=None, capture_error_mode="global"):
        with graph:
            yield

    for name, value in (
        ("Stream", lambda: stream),
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
        graph = Graph(evaluate, inputs(0))
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
        call = Graph(evaluate, inputs(0), weights) if recorded else evaluate
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
    graph = Graph(function(weights), inputs(0), weights)
    first, second = graph(*inputs(1)), graph(*inputs(2))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="backward: it is of an evaluation that was followed by another"):
        first.sum().backward()


def test_a_weight_without_a_part_in_the_output_has_a_gradient_of_zero():
    weights = [*leaves(), torch.ones(2, requires_grad=True)]
    graph = Graph(function(weights), inputs(0), weights)
    graph(*inputs(1)).sum().backward()
    assert weights[2].grad.eq(0).all() and weights[0].grad.abs().sum() > 0


def test_what_comes_twice_in_a_row_is_recorded():
    weights, calls = leaves(), []
    evaluate = function(weights)

    def counted(*tensors):
        calls.append(len(tensors[0]))
        return evaluate(*tensors)

    graphs = Graphs()
    # Two evaluations warm up and a third is recorded when the second batch of 4 comes; afterwards nothing is called.
    expected = {0: [4], 1: [4] * 4, 2: [4] * 4, 3: [4] * 4 + [2], 4: [4] * 4 + [2], 5: [4] * 4 + [2]}
    for i, count in enumerate((4, 4, 4, 2, 4, 4)):
        got = graphs("default", counted, inputs(i, count), weights)
        assert calls == expected[i]
        torch.testing.assert_close(got, evaluate(*inputs(i, count)))
    assert graphs("old", counted, inputs(9), ()).shape == (4, 3) and calls[-1] == 4 and len(calls) == 6
