"""What several processes share, through accelerate: who does which part, and what is put together again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor


class Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone.

    There is no wrapper around the model: gradients of any number of micro-batches accumulate locally, and are summed
    once when an optimizer step is due. So no process has to take part in every micro-batch, or in any.
    """

    def __init__(self, device: str) -> None:
        """Join the others.

        Raises:
            ValueError: one GPU named for several processes.
        """
        self.state = PartialState(cpu=device == "cpu")
        self.count, self.rank, self.main = (
            self.state.num_processes,
            self.state.process_index,
            self.state.is_main_process,
        )
        if self.count > 1 and ":" in device:
            raise ValueError(f"device: got {device!r} for {self.count} processes, accepted are cuda and cpu")

    def share(self, total: int, rank: int | None = None) -> slice:
        """Which of ``total`` things a process does, this one by default: consecutive ones, as even as can be."""
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.count, total * (rank + 1) // self.count)

    def gather(self, own: Tensor, total: int) -> Tensor:
        """All ``total`` rows, in order and on every process, of which ``own`` are this process' share."""
        if self.count == 1:
            return own
        shares = [self.share(total, rank) for rank in range(self.count)]
        sizes = [share.stop - share.start for share in shares]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = gather(padded.to(self.state.device)).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(own.device)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], sums: Tensor) -> Tensor:
        """Sum the gradients over all processes, and ``sums`` (N,) with them, in one exchange."""
        if self.count == 1:
            return sums
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([sums, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        parts = flat.split([len(sums), *(p.numel() for p in parameters)])
        for parameter, part in zip(parameters, parts[1:], strict=True):
            parameter.grad = part.view_as(parameter)
        return parts[0]

    def wait(self) -> None:
        """Until all are here."""
        self.state.wait_for_everyone()
