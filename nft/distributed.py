"""What several processes share, through accelerate: who does which part, and what is put together again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# How long a process waits for the others. One may write a hundred gigabytes, or ask its reward's server until the last
# try, which takes longer than NCCL's own 10 minutes, after which all would end.
_PATIENCE = timedelta(hours=2)


def several() -> bool:
    """Whether this is one of several processes that have joined."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of all lists that a transformer consists of."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]


def shard(transformer: nn.Module, device: torch.device, ignored: Iterable[nn.Parameter]) -> None:
    """Leave each process its part of every parameter but the ``ignored`` ones, on ``device``.

    Each repeated block is put together for its own evaluation only. In a backward gradients are summed over the
    processes, as ``Processes.sum_gradients`` does for what is not sharded.

    Raises:
        ValueError: a version of torch that cannot sum them.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"shard: got true with torch {torch.__version__}, accepted is 2.9 or later")
    mesh, kept = init_device_mesh(device.type, (torch.distributed.get_world_size(),)), {*ignored}
    for module in (*repeated_blocks(transformer), transformer):
        sharded: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        # Not the mean: losses are normalised by the pairs of all processes. Gloo has no scaled sum.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together, in which all processes take part; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This process' part of a sharded tensor; any other as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, as ``like`` is: on its device, and sharded if it is."""
    x = x.to(like.device)
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def check_device(device: str, processes: int) -> None:
    """Whether so many processes can share a device.

    Raises:
        ValueError: it is one GPU, and they are several.
    """
    if processes > 1 and ":" in device:
        raise ValueError(f"device: got {device!r} for {processes} processes, accepted are cuda and cpu")


class Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone.

    Unless the model is sharded, there is no wrapper around it: gradients of any number of micro-batches accumulate
    locally, and are summed once when an optimizer step is due. So no process has to take part in every micro-batch, or
    in any.
    """

    def __init__(self, device: str) -> None:
        """Join the others.

        Raises:
            ValueError: one GPU named for several processes, or variables that no launcher sets so.
        """
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
            if (value := os.environ.get(key, "0")) and not value.isdecimal():
                raise ValueError(f"{key}: got {value!r}, accepted is a whole number, as torchrun sets it")
        rank, count = (int(os.environ.get(key) or 0) for key in ("RANK", "WORLD_SIZE"))
        if 1 < count <= rank:
            # It would wait for the others for ever.
            raise ValueError(f"RANK: got {rank} with WORLD_SIZE={count}, accepted are ranks below it")
        self.state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        self.count, self.rank, self.main = (
            self.state.num_processes,
            self.state.process_index,
            self.state.is_main_process,
        )
        check_device(device, self.count)

    def share(self, total: int, rank: int | None = None) -> slice:
        """Which of ``total`` things a process does, this one by default: consecutive ones, as even as can be."""
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.count, total * (rank + 1) // self.count)

    def rounds(self, total: int, size: int) -> int:
        """How many batches of ``size`` hold the largest share of ``total`` things."""
        return math.ceil(math.ceil(total / self.count) / size)

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
        """Sum the gradients over all processes, and ``sums`` (N,) with them, in one exchange. The backward has summed
        those of sharded parameters."""
        if self.count == 1:
            return sums
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
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
