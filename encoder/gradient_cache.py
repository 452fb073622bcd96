"""A large batch in micro batches, with the large batch's own loss and gradient (GradCache, arXiv 2101.06983).

A contrastive loss does not add up over micro batches: every pair of the batch is in it. But its features do not depend on
one another. So each micro batch is run twice. First without a graph, to have the features of the whole batch, the loss
over all of them and its gradient by each feature; then with a graph, into which that gradient is fed. One micro batch's
activations are in memory at a time, for one more forward pass.
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from encoder.model import ClocOutput
from encoder.precision import upcast


def cached_backward(
    parts: list[dict[str, Tensor]],
    forward: Callable[[dict], ClocOutput],
    loss_of: Callable[[ClocOutput, Tensor | None, Tensor | None], tuple[Tensor, dict]],
    backward: Callable[[Tensor], None],
) -> dict:
    """One backward pass over the batch that `parts` make up together; returns the report of `loss_of`.

    forward: runs one part; called twice with each, with the same random numbers
    loss_of: (loss, report) of the features, boxes (R, 4) and image_index (R,) of the whole batch
    backward: called once per part, in order, with a scalar; together they make the gradient of the loss
    """
    random_states, cached = [], []
    for part in parts:
        random_states.append(_random_state())
        with torch.no_grad():
            cached.append(_leaves(forward(part)))
    loss, report = loss_of(_joined(cached), *_joined_regions(parts))
    loss.backward()
    for part, state, leaves in zip(parts, random_states, cached, strict=True):
        _set_random_state(state)
        output = forward(part)
        terms = [
            (upcast(getattr(output, name)) * upcast(leaf.grad)).sum()
            for name, leaf in vars(leaves).items()
            if leaf is not None and leaf.grad is not None  # a bias that the loss does not use has no gradient
        ]
        backward(sum(terms))
    return report


def _random_state() -> list[Tensor]:
    """Of the CPU's generator and of that of this process' GPU, where there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


def _leaves(output: ClocOutput) -> ClocOutput:
    """The same values as the start of a new graph."""
    return ClocOutput(
        **{name: None if value is None else value.detach().requires_grad_() for name, value in vars(output).items()}
    )


def _joined(outputs: list[ClocOutput]) -> ClocOutput:
    """Features one below the other; of the scalars, the same in all, the mean, so that each gets its part of the gradient."""
    joined = {}
    for field in fields(ClocOutput):
        values = [getattr(output, field.name) for output in outputs]
        if values[0] is None:
            joined[field.name] = None
        else:
            joined[field.name] = torch.cat(values) if values[0].ndim else torch.stack(values).mean()
    return ClocOutput(**joined)


def _joined_regions(parts: list[dict[str, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """Boxes and image_index of the whole batch, in the order of the joined features."""
    if "boxes" not in parts[0]:
        return None, None
    image_index, first = [], 0
    for part in parts:
        image_index.append(part["image_index"] + first)
        first += len(part["pixel_values"])
    return torch.cat([part["boxes"] for part in parts]), torch.cat(image_index)
