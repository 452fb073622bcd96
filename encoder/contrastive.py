"""Exact contrastive losses over the global batch, in blocks: softmax (InfoNCE) and sigmoid, with the similar-text filter.

Each rank holds its own rows of the N x N logit matrix, all columns, and of those one block at a time: the forward pass
keeps only sums, the backward pass computes the blocks again. Memory grows with N, not with its square, and an entry is
computed on one rank only.

n rows on this rank, N rows on all ranks, E joint space. Row i of `a` and row i of `b` are a pair.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize, softplus

from encoder.distributed import gather, gather_counts, logsumexp_over_ranks, rank, sum_over_ranks, sum_to_owners
from encoder.precision import upcast


def contrastive_loss(
    a_nE: Tensor,
    b_nE: Tensor,
    logit_scale: Tensor,
    threshold: float | None = None,
    logit_bias: Tensor | None = None,
    block_size: int = 2048,
) -> tuple[Tensor, dict[str, int | Tensor]]:
    """This rank's share of the loss of all ranks' pairs: the shares sum to the loss.

    Without a bias, the symmetric InfoNCE (arXiv 2410.02746, Eqs. 1-2); with one, the pairwise sigmoid loss (arXiv
    2303.15343, Eq. 1): every pair is a yes-or-no question of its own, and the sum is divided by N.

    a_nE, b_nE: (n, E) paired features of this rank, unnormalised; similarity is the cosine. Any n, zero included
    logit_scale, logit_bias: () a logit is scale * cosine + bias; the scale is 1/temperature
    threshold: a pair i != j whose `b` (texts) have a cosine above it leaves the loss: both denominators (Section 3.4), or
        its question. No gradient flows through this filter
    block_size: rows and columns of a block
    Returns the share, which every rank must weigh alike, and the report: `count` N and `masked_fraction` (), of all
    off-diagonal pairs.
    """
    counts = gather_counts(len(a_nE), a_nE.device)
    total = sum(counts)
    # Float32: a bf16 cosine times a scale of up to 100 is off by tenths of a logit.
    a_nE, b_nE, scale = normalize(upcast(a_nE), dim=-1), normalize(upcast(b_nE), dim=-1), upcast(logit_scale)
    if logit_bias is None:
        loss_sum, masked = _Softmax.apply(a_nE, b_nE, scale, counts, threshold, block_size)
    else:
        loss_sum, masked = _Sigmoid.apply(a_nE, b_nE, scale, upcast(logit_bias), counts, threshold, block_size)
    masked = masked if threshold is None else sum_over_ranks(masked)
    masked_fraction = masked / max(1, total * (total - 1))
    return loss_sum / max(1, total), {"count": total, "masked_fraction": masked_fraction}


@dataclass
class _Strip:
    """This rank's rows of the logit matrix, `start` to `start + n` of N; float32.

    a_nE: own rows; b_NE: all columns, both normalised; a logit is scale * cosine + bias
    """

    a_nE: Tensor
    b_NE: Tensor
    scale: Tensor
    bias: Tensor | None
    start: int
    threshold: float | None
    block_size: int

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
        """(rows, columns, logits, positives, similar) of each block.

        logits: the block, -inf where the pair is filtered; positives: a view of those of its entries that are true pairs
        similar: the filtered entries; None where nothing is filtered
        """
        own_texts = self.b_NE[self.start : self.start + len(self.a_nE)]
        for i in range(0, len(self.a_nE), self.block_size):
            rows = slice(i, i + self.block_size)
            scaled = self.scale * self.a_nE[rows]
            for j in range(0, len(self.b_NE), self.block_size):
                columns, diagonal = slice(j, j + self.block_size), self.start + i - j
                logits, similar = scaled @ self.b_NE[columns].T, None
                if self.bias is not None:
                    logits += self.bias
                if self.threshold is not None:
                    similar = own_texts[rows] @ self.b_NE[columns].T > self.threshold
                    similar.diagonal(diagonal).fill_(False)
                    logits.masked_fill_(similar, -torch.inf)
                yield rows, columns, logits, logits.diagonal(diagonal), similar

    def gradients(self, slope: Callable, grad: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of a, of b's own rows, of scale and bias; `slope` turns a block into the loss' derivative by its logits.

        grad: () of the loss
        """
        grad_a, grad_b = torch.zeros_like(self.a_nE), torch.zeros_like(self.b_NE)
        grad_bias = None if self.bias is None else torch.zeros_like(self.bias)
        for rows, columns, logits, positives, _ in self.blocks():
            slopes = slope(rows, columns, logits, positives)
            grad_a[rows].addmm_(slopes, self.b_NE[columns])
            grad_b[columns].addmm_(slopes.T, self.a_nE[rows])
            if grad_bias is not None:
                grad_bias += grad * slopes.sum()
        grad_scale = grad * (self.a_nE * grad_a).sum()  # each slope times its cosine, summed by rows
        factor = grad * self.scale
        return grad_a.mul_(factor), sum_to_owners(grad_b.mul_(factor), counts), grad_scale, grad_bias


class _Softmax(torch.autograd.Function):
    """Over own rows and own columns, the sum of (log-sum-exp - positive) / 2; and the number of entries filtered."""

    @staticmethod
    def forward(ctx, a_nE, b_nE, scale, counts, threshold, block_size):
        b_NE, start = gather(b_nE, counts), sum(counts[: rank()])
        strip = _Strip(a_nE, b_NE, scale, None, start, threshold, block_size)
        by_row_n, by_column_N = (feat.new_full((len(feat),), -torch.inf) for feat in (a_nE, b_NE))
        positives_n, masked = torch.zeros_like(by_row_n), a_nE.new_zeros((), dtype=torch.long)
        for rows, columns, logits, positives, similar in strip.blocks():
            by_row_n[rows] = torch.logaddexp(by_row_n[rows], logits.logsumexp(1))
            by_column_N[columns] = torch.logaddexp(by_column_N[columns], logits.logsumexp(0))
            first = max(rows.start, columns.start - start)
            positives_n[first : first + len(positives)] = positives
            if similar is not None:
                masked += similar.count_nonzero()
        by_column_N = logsumexp_over_ranks(by_column_N)
        ctx.save_for_backward(a_nE, b_NE, scale, by_row_n, by_column_N)
        ctx.rest = start, counts, threshold, block_size
        ctx.mark_non_differentiable(masked)
        own_columns_n = by_column_N[start : start + len(a_nE)]
        return ((by_row_n - positives_n) + (own_columns_n - positives_n)).sum() / 2, masked

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        a_nE, b_NE, scale, by_row_n, by_column_N = ctx.saved_tensors
        start, counts, threshold, block_size = ctx.rest

        def slope(rows, columns, logits, positives):
            probabilities = (logits - by_row_n[rows, None]).exp_()
            probabilities += logits.sub_(by_column_N[columns]).exp_()
            probabilities.diagonal(start + rows.start - columns.start).sub_(2)
            return probabilities

        strip = _Strip(a_nE, b_NE, scale, None, start, threshold, block_size)
        return *strip.gradients(slope, grad / 2, counts)[:3], None, None, None


class _Sigmoid(torch.autograd.Function):
    """Over own rows, the sum of -log sigmoid(+logit) of true pairs and (-logit) of others; and the number filtered."""

    @staticmethod
    def forward(ctx, a_nE, b_nE, scale, bias, counts, threshold, block_size):
        b_NE, start = gather(b_nE, counts), sum(counts[: rank()])
        strip = _Strip(a_nE, b_NE, scale, bias, start, threshold, block_size)
        loss, masked = a_nE.new_zeros(()), a_nE.new_zeros((), dtype=torch.long)
        for _, _, logits, positives, similar in strip.blocks():
            positives.neg_()
            loss += softplus(logits).sum()
            if similar is not None:
                masked += similar.count_nonzero()
        ctx.save_for_backward(a_nE, b_NE, scale, bias)
        ctx.rest = start, counts, threshold, block_size
        ctx.mark_non_differentiable(masked)
        return loss, masked

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        a_nE, b_NE, scale, bias = ctx.saved_tensors
        start, counts, threshold, block_size = ctx.rest

        def slope(rows, columns, logits, positives):
            logits.sigmoid_()
            positives.sub_(1)  # of a true pair: -sigmoid(-logit)
            return logits

        strip = _Strip(a_nE, b_NE, scale, bias, start, threshold, block_size)
        return *strip.gradients(slope, grad, counts), None, None, None
