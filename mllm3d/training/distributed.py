"""Ranks: started by `deepspeed`, `torchrun` or plain `python`, on GPUs (nccl) or the CPU (gloo)."""

import atexit
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mllm3d.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the others.

    `control` is a gloo group over all ranks: what the host needs to know (counts, errors) goes through it and
    so never waits for the work that is queued on a GPU.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The small picklable `value` of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a CPU tensor over the ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.control)
        return total

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def stop(self, message: str) -> NoReturn:
        """End the run on all ranks, for a reason that all of them know: rank 0 has the word, the others leave
        silently with the command line's status for a `UserError`."""
        if self.is_main:
            raise UserError(message)
        time.sleep(3)  # a launcher ends the other ranks as soon as one has left; let rank 0 speak first
        sys.exit(2)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives; a `UserError` or `OSError` in it on any rank stops all of them."""
        error: Exception | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        messages = [message for message in self.gather(error and one_line(error)) if message]
        if messages:
            self.stop(messages[0])


def one_line(error: Exception) -> str:
    """What a user reads of an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'system'}: {error.strerror}"
    return str(error)


def start(threads: int | None) -> World:
    """Join the other ranks, or be the only one. `threads` per rank; None: an equal share of the cores."""
    _set_environment()
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    # Set by us, because the launchers differ (torchrun allows one thread) and sums depend on the number.
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    _start_deepspeed()
    control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
    assert control is not None
    atexit.register(leave)  # also after an error: gloo's threads would end the process with a signal
    return World(rank, size, device, control)


def leave() -> None:
    """Part from the other ranks, without waiting for them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_environment() -> None:
    """What a launcher sets, for plain `python`. Without it DeepSpeed asks mpi4py."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Without it DeepSpeed counts the machine's NUMA nodes in a new process, for every bucket that it reduces.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # DeepSpeed calls some of torch's collectives by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Shared-memory collectives for CPUs would be compiled by g++ here; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
