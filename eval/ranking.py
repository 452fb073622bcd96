"""Where the right answer lands among many candidates: similarities in, places out. No files, no pictures.

A place is three counts: how many wrong candidates score higher than the best right one, how many wrong ones score the
same, and how many right ones do. `eval.metrics.recall_at` needs no more, and equal scores are no luck there.

Q queries, C candidates, P pairs of a query and one of its right candidates, E joint space.
"""

import torch
from torch import Tensor

from encoder.errors import DataError

_BLOCK = 2**25  # similarities at once


def rank(query_QE: Tensor, candidate_CE: Tensor, right_P2: Tensor, copies_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places (Q, 3), integers, and the best candidate of each query (Q,).

    right_P2: (query, candidate) rows, at least one per query
    copies_C: how many equal candidates each row stands for, 1 by default; a pair given n times means n right copies
    Raises DataError where an embedding is not finite: no order can be made of it.
    """
    for emb in (query_QE, candidate_CE):
        if not torch.isfinite(emb).all():
            raise DataError("the model gives embeddings that are not finite, which cannot be ranked; its weights are damaged")
    num_queries, num_candidates = len(query_QE), len(candidate_CE)
    device = candidate_CE.device
    copies_C = torch.ones(num_candidates, dtype=torch.long) if copies_C is None else copies_C
    copies_C = copies_C.to(device, torch.float32)  # exact up to 2^24 candidates
    right_P2 = right_P2[right_P2[:, 0].argsort(stable=True)].to(device)
    starts = torch.searchsorted(right_P2[:, 0].contiguous(), torch.arange(num_queries + 1, device=device)).tolist()
    block = max(1, _BLOCK // num_candidates)
    places, best = [], []
    for start in range(0, num_queries, block):
        end = min(start + block, num_queries)
        similarity = query_QE[start:end].to(device) @ candidate_CE.T
        rows, columns = right_P2[starts[start] : starts[end]].unbind(1)
        rows = rows - start
        of_right = similarity[rows, columns]
        top = torch.full((end - start,), -torch.inf, device=device).scatter_reduce(0, rows, of_right, "amax")
        higher = (similarity > top[:, None]).float() @ copies_C
        equal = (similarity == top[:, None]).float() @ copies_C
        right = torch.zeros_like(equal).index_add(0, rows, (of_right == top[rows]).float())
        places.append(torch.stack([higher, equal - right, right], dim=1).long().cpu())
        best.append(similarity.argmax(dim=1).cpu())
    return torch.cat(places), torch.cat(best)
