"""CLIP's activation, QuickGELU, x sigmoid(1.702 x), in fewer passes over memory than autograd makes, and with half kept.

Values are those of the stock module, bit for bit. It is silu(1.702 x) / 1.702, so its derivative is silu's at 1.702 x, which
torch has as one fused kernel.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import QuickGELUActivation

SLOPE = 1.702


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return (SLOPE * values).sigmoid_().mul_(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, SLOPE * values)


class QuickGELU(nn.Module):
    """As `transformers.activations.QuickGELUActivation`; keeps its input alone for the backward pass. One derivative only."""

    def forward(self, values: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # so that it can be traced for export
            return values * torch.sigmoid(SLOPE * values)
        return _QuickGELU.apply(values)


def fuse_quick_gelu(model: nn.Module) -> None:
    """Puts `QuickGELU` in the place of every stock QuickGELU in `model`, whose parameters and their names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuickGELUActivation):
                setattr(module, name, QuickGELU())
