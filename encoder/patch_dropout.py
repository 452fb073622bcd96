"""Patch dropout: the image tower sees a random subset of the patches, each with its own position (FLIP, arXiv 2212.00794).

Patches are dropped after the position embeddings were added, so what is left knows where it lies, and boxes mean what they
mean without dropout. The CLS token is kept. The Prompter sees the tokens that the tower saw.

B images, N patches, K kept patches, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def kept_patches(images: range, step: int, seed: int, num_patches: int, dropout: float) -> Tensor:
    """The patches that each image keeps in this step, (B, K) in ascending order.

    images: the images' places in the global batch; each has a draw of its own, so the number of ranks changes nothing
    dropout: share of the patches that is dropped; at least one is kept
    """
    kept = max(1, round(num_patches * (1 - dropout)))
    rows = []
    for place in images:
        generator = torch.Generator().manual_seed((((seed * 1_000_003 + step) << 24) + place) % 2**63)
        rows.append(torch.randperm(num_patches, generator=generator)[:kept].sort().values)
    return torch.stack(rows)


@contextmanager
def only_patches(embeddings: nn.Module, kept_BK: Tensor | None) -> Iterator[None]:
    """Within it `embeddings`, of a CLIP or SigLIP tower, gives the CLS token and these patches of each image; None, all.

    The stock tower runs as it is, on fewer tokens.
    """
    if kept_BK is None:
        yield
        return

    def select(module: nn.Module, _, tokens_BND: Tensor) -> Tensor:
        num_class_tokens = module.num_positions - module.num_patches  # 0 for SigLIP
        first = torch.arange(num_class_tokens, device=kept_BK.device).expand(len(kept_BK), -1)
        index_BK = torch.cat([first, num_class_tokens + kept_BK], dim=1)
        return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))

    handle = embeddings.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
