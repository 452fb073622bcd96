"""One evaluation on several processes, as `deepspeed`, `torchrun` or `srun` start them: each answers its share of the pictures.

Only marks of progress pass between them (gloo, also where the models run on GPUs); answers go through files.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from encoder.distributed import rank, world_size
from encoder.errors import DataError
from encoder.launch import slurm_environment

# How long the fastest process waits for the slowest.
PATIENCE = timedelta(days=2)


def add_launcher_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes of a launcher for as long as the block lasts; nothing where there is one process.

    What others than the first print is left out, so that the terminal reads as if there were one.
    """
    os.environ |= slurm_environment(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    stdout = sys.stdout
    with open(os.devnull, "w") as nowhere:
        sys.stdout = stdout if rank() == 0 else nowhere
        try:
            yield
        finally:
            sys.stdout = stdout
            dist.destroy_process_group()


def best_device() -> str:
    """The GPU of this process where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if world_size() > 1 else "cuda"


def first_does(action: Callable[[], None]) -> None:
    """The first process acts while the others wait; a DataError of its is raised by all."""
    if world_size() == 1:
        return action()
    said: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except DataError as error:
            said = [str(error)]
    dist.broadcast_object_list(said)
    if said[0] is not None:
        raise DataError(said[0])


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()
