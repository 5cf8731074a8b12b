"""Evaluations as CUDA graphs: for a micro-batch Python takes longer to launch the kernels than the GPU to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Graph:
    """One evaluation, recorded once with its backward and then replayed. The memory of both is kept for as long as it
    lives, and so are the addresses of all that it reads: weights may only be changed in place."""

    def __init__(
        self,
        evaluate: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        stream: torch.cuda.Stream,
    ):
        """Record. No autograd graph of the parameters may be alive: it holds their nodes, which belong to the stream
        that it was made on, and that may not wait for one that is recorded.

        Args:
            evaluate: takes ``inputs``, whose shapes are those of every replay.
            parameters: of which a gradient is wanted; none if there is no backward.
            stream: to record on, of the inputs' device, which has to be the current one.
        """
        self._inputs, self.parameters = [x.clone() for x in inputs], tuple(parameters)
        # Other threads may use the GPU meanwhile, for rewards say.
        mode: Any = {"stream": stream, "capture_error_mode": "thread_local"}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What first calls set up cannot be set up while recording.
            for _ in range(2):
                out = evaluate(*self._inputs)
                if self.parameters:
                    torch.autograd.grad(out, self.parameters, torch.zeros_like(out), materialize_grads=True)
                del out
        torch.cuda.current_stream().wait_stream(stream)
        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, **mode):
            out = evaluate(*self._inputs)
        self._out = out.detach()
        if self.parameters:
            self._grad_out, self._backward = torch.empty_like(self._out), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), **mode):
                grads = torch.autograd.grad(out, self.parameters, self._grad_out, materialize_grads=True)
                self._grads = torch.cat([grad.flatten() for grad in grads])
        self.replays = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What ``evaluate`` gives for other contents of the inputs."""
        for here, x in zip(self._inputs, inputs, strict=True):
            here.copy_(x)
        return _Replay.apply(self, *self.parameters) if self.parameters else self.replay()

    def replay(self) -> Tensor:
        """The output for what the inputs hold, in memory of its own."""
        self.replays += 1
        self._forward.replay()
        return self._out.clone()

    def gradients(self, grad_out: Tensor, replays: int) -> list[Tensor]:
        """Gradients of the parameters, if the forward that they belong to is still the last."""
        if replays != self.replays:
            raise RuntimeError("backward: it is of an evaluation that was followed by another, which took its memory")
        self._grad_out.copy_(grad_out)
        self._backward.replay()
        # The parameters' .grad may take what comes back, so it must not be what the next replay writes.
        parts = self._grads.clone().split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, *parameters: Tensor) -> Tensor:
        out = graph.replay()
        ctx.graph, ctx.replays = graph, graph.replays
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.graph.gradients(grad_out, ctx.replays)


class Graphs:
    """Graphs of a function, one for each kind of evaluation and shapes. One is recorded the second time that the
    largest batch of a kind so far comes: a ragged last one would keep memory for the rest of the run."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Any, Graph] = {}
        self._largest: dict[Any, tuple[int, Any]] = {}

    def __call__(
        self, kind: Any, evaluate: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Tensor:
        """``evaluate(*inputs)``, by a graph if there is one; ``kind`` is all that it depends on besides."""
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        graph, batch = self._graphs.get((kind, shapes)), (len(inputs[0]), shapes)
        largest = self._largest.get(kind, (0, None))
        if graph is None and batch == largest:
            with torch.cuda.device_of(inputs[0]):
                graph = self._graphs[kind, shapes] = Graph(evaluate, inputs, parameters, self._stream)
        if graph is not None:
            return graph(*inputs)
        if batch[0] >= largest[0]:
            self._largest[kind] = batch
        return evaluate(*inputs)
