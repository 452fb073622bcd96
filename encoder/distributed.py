"""Rank, world size, and gathers that carry gradients; no-ops when there is one process.

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
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(value) for value in counts]


def gather(local: Tensor, counts: list[int]) -> Tensor:
    """Rows of all ranks in rank order, (n_r, ...) -> (sum of n_r, ...); no gradient. `counts` from `gather_counts`."""
    if world_size() == 1:
        return local
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, counts):
        ctx.start, ctx.length = sum(counts[: rank()]), len(local)
        return gather(local, counts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still need the one it handed over
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.length], None


def gather_with_grad(local: Tensor, counts: list[int]) -> Tensor:
    """As `gather`, and every rank's use of a row sends its gradient back to the rank that owns the row (summed)."""
    return local if world_size() == 1 else _GatherWithGrad.apply(local, counts)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over ranks, detached: for reports."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value
