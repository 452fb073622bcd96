"""Exact InfoNCE over the global batch, in both directions, with the similar-text filter.

n rows on this rank, N rows on all ranks, E joint space. Row i of `a` and row i of `b` are a pair.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from encoder.distributed import gather, gather_counts, gather_with_grad, rank


def contrastive_loss(
    a_nE: Tensor, b_nE: Tensor, logit_scale: Tensor, filter_nE: Tensor | None = None, threshold: float | None = None
) -> tuple[Tensor, dict[str, float]]:
    """This rank's share of the symmetric InfoNCE loss (arXiv 2410.02746, Eqs. 1-2): the shares sum to the loss.

    a_nE, b_nE: (n, E) paired features of this rank, unnormalised; similarity is the cosine. Any n, zero included
    logit_scale: () multiplies the cosines, 1/temperature
    filter_nE, threshold: texts (n, E) by which false negatives are told: a pair i != j whose texts have a cosine above
        `threshold` leaves both denominators (Section 3.4). No gradient flows through it
    Returns the share, and the report: `count` N, `masked_fraction` of the off-diagonal pairs of this rank's rows.
    """
    counts = gather_counts(len(a_nE), a_nE.device)
    start, total = sum(counts[: rank()]), sum(counts)
    # Float32: a bf16 cosine times a scale of up to 100 is off by tenths of a logit.
    a_nE, b_nE = (normalize(feat.float(), dim=-1) for feat in (a_nE, b_nE))
    a_NE, b_NE = gather_with_grad(a_nE, counts), gather_with_grad(b_nE, counts)
    targets = torch.arange(start, start + len(a_nE), device=a_nE.device)

    similar, masked_fraction = None, 0.0
    if threshold is not None and filter_nE is not None:
        with torch.no_grad():
            filter_nE = normalize(filter_nE.float(), dim=-1)
            similar = filter_nE @ gather(filter_nE, counts).T > threshold
            similar[torch.arange(len(targets), device=targets.device), targets] = False
            masked_fraction = float(similar.sum()) / max(1, len(targets) * (total - 1))

    def direction(rows_nE, columns_NE):
        logits_nN = logit_scale.float() * rows_nE @ columns_NE.T
        if similar is not None:
            logits_nN = logits_nN.masked_fill(similar, -torch.inf)
        return cross_entropy(logits_nN, targets, reduction="sum")

    # A rank without rows still owns a (zero) term of every tensor, so that all ranks run the same backward collectives.
    share = (direction(a_nE, b_NE) + direction(b_nE, a_NE)) / (2 * max(total, 1))
    return share, {"count": total, "masked_fraction": masked_fraction}
