"""Rank, world size, gathers and sums over ranks; no-ops when there is one process.

Whatever is gathered may have a different first dimension on every rank, zero included.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def choose_backend() -> str:
    """`nccl` with this process' GPU chosen, or `gloo` where there is none: what a process group is to be made with."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return "nccl"
    import deepspeed  # slow to import, and only those who train get here

    # DeepSpeed would compile a shared-memory operator first: minutes, and a build that is interrupted leaves a lock
    # file on which every later run waits for ever. Gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return "gloo"


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_counts(count: int, device: torch.device | None = None) -> list[int]:
    """The value of `count` on every rank, in rank order."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), 1, dtype=torch.long, device=device)
    dist.all_gather(list(counts), torch.full((1,), count, dtype=torch.long, device=device))
    return counts.flatten().tolist()  # one wait for the device, not one a rank


def gather(local: Tensor, counts: list[int]) -> Tensor:
    """Rows of all ranks in rank order, (n_r, ...) -> (sum of n_r, ...); no gradient. `counts` from `gather_counts`."""
    if world_size() == 1:
        return local
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    parts = padded.new_empty(len(counts), *padded.shape)
    dist.all_gather(list(parts), padded)
    if min(counts) == max(counts):
        return parts.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_lines(lines: list[str]) -> list[str]:
    """The texts of all ranks, in rank order. A rank waits here for the slowest."""
    if world_size() == 1:
        return lines
    parts = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, lines)
    return [line for part in parts for line in part]


def sum_to_owners(values: Tensor, counts: list[int]) -> Tensor:
    """The way back of `gather`: every rank's (sum of n_r, ...) are added up, and a rank gets its own rows (n_r, ...).

    `values` is written over.
    """
    if world_size() > 1:
        dist.all_reduce(values)
    start = sum(counts[: rank()])
    return values[start : start + counts[rank()]]


def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """log of the sum over ranks of exp(values), elementwise; no gradient. Each element is finite on some rank."""
    if world_size() == 1:
        return values
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    total = (values - highest).exp_()
    dist.all_reduce(total)
    return highest + total.log_()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over ranks, detached: for reports."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value
