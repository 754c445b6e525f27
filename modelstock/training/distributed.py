"""Which of several processes this one is, and the few collectives that training needs. Alone, they do nothing."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from modelstock.devices import device_kind
from modelstock.errors import ParamsError


@dataclass(frozen=True)
class World:
    """One of `size` processes that train together, and its device.

    The process group must exist where size > 1: NCCL for CUDA devices, gloo for CPUs.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            # A reduction rather than dist.barrier, which guesses a device.
            dist.all_reduce(torch.zeros(1, device=self.device))

    def gather(self, own: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape and dtype, in the order of ranks."""
        if self.size == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return parts

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; all must ask."""
        if self.size == 1:
            return here
        return any(map(bool, self.gather(torch.tensor([float(here)], device=self.device))))

    def exchange(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Send `counts[r]` consecutive values of the vector `own` to process r; get this one's part of every other's.

        Returns one vector of `counts[rank]` values a process, in the order of ranks.
        """
        if self.size == 1:
            return [own]
        mine = counts[self.rank]
        received = torch.empty(mine * self.size, dtype=own.dtype, device=own.device)
        dist.all_to_all_single(received, own.contiguous(), [mine] * self.size, list(counts))
        return [received[r * mine : (r + 1) * mine] for r in range(self.size)]


ALONE = World()


@contextlib.contextmanager
def processes(count: int, device: str, module: str) -> Iterator[World]:
    """This process's place among `count` that train together; one that torchrun did not start becomes torchrun.

    `device`: "auto" (a GPU where there is one), "cpu" or "cuda". `module`: what torchrun runs in each process, with
    this process's arguments.

    Raises:
        ParamsError: no such device, or a torchrun of another size.
    """
    kind = device_kind(device)
    if kind == "cuda" and torch.cuda.device_count() < count:
        raise ParamsError(
            "devices",
            got=count,
            expected=f"at most the {torch.cuda.device_count()} GPUs this process sees",
            cure="lower it, or widen CUDA_VISIBLE_DEVICES; the flow gives a stage one GPU, `dvc repro` all",
        )
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 0), ("RANK", 0), ("LOCAL_RANK", 0)))
    if size and size != count:
        raise ParamsError(
            "torchrun", got=f"{size} processes", expected=f"{count}, as params.yaml says", cure="make them agree"
        )
    if count == 1:
        yield World(device=torch.device(kind, 0) if kind == "cuda" else torch.device("cpu"))
        return
    if not size:
        here = "127.0.0.1"
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        launcher = [
            sys.executable,
            "-m",
            "modelstock.training.launcher",
            f"--nproc-per-node={count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={here}:0",
            f"--local-addr={here}",
            "-m",
            module,
        ]
        sys.stdout.flush()
        os.execv(sys.executable, [*launcher, *sys.argv[1:]])
    if kind == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank, size, torch.device(kind, local) if kind == "cuda" else torch.device("cpu"))
    finally:
        dist.destroy_process_group()
