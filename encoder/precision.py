"""Where arithmetic is done in float32 whatever the model's precision."""

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """float32 for lower precisions; float64 stays, so that tests in it are not cut to float32 on the way."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
