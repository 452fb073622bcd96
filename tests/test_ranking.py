"""Places and recall against plain loops and brute force over all orders; equal scores; embeddings that are not finite."""

from itertools import permutations

import numpy as np
import pytest
import torch

from encoder.errors import DataError
from eval import ranking
from eval.metrics import chance_at, recall_at


def naive_place(scores, copies, wanted):
    """(higher, equal and wrong, equal and right) of one query; `wanted`: candidate -> how many of its copies are right."""
    top = max(scores[c] for c in wanted)
    higher = sum(n for s, n in zip(scores, copies, strict=True) if s > top)
    right = sum(n for c, n in wanted.items() if scores[c] == top)
    return higher, sum(n for s, n in zip(scores, copies, strict=True) if s == top) - right, right


@pytest.mark.parametrize("block", [1, 17, 2**25])
def test_places_equal_a_plain_loop_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(ranking, "_BLOCK", block)
    rng = np.random.default_rng(0)
    queries, candidates = rng.integers(-1, 2, (9, 3)), rng.integers(-1, 2, (14, 3))  # small integers: many equal scores
    copies = rng.integers(2, 4, 14)
    wanted = [{int(c): int(rng.integers(1, 3)) for c in rng.choice(14, rng.integers(1, 4), replace=False)} for _ in range(9)]
    pairs = [(q, c) for q, right in enumerate(wanted) for c, times in right.items() for _ in range(times)]
    rng.shuffle(pairs)
    places, best = ranking.rank(
        torch.tensor(queries).float(), torch.tensor(candidates).float(), torch.tensor(np.array(pairs)), torch.tensor(copies)
    )
    scores = queries @ candidates.T
    assert places.tolist() == [list(naive_place(row, copies, right)) for row, right in zip(scores, wanted, strict=True)]
    assert [scores[q, b] for q, b in enumerate(best)] == scores.max(1).tolist()


@pytest.mark.parametrize(("higher", "wrong", "right"), [(0, 0, 1), (0, 3, 1), (1, 2, 2), (2, 1, 1), (3, 2, 3), (5, 0, 1)])
def test_recall_is_the_mean_over_all_orders_of_equal_scores(higher, wrong, right):
    for k in (1, 2, 3, 5, 10):
        orders = set(permutations("w" * wrong + "r" * right))
        expected = np.mean(["r" in (("x",) * higher + order)[:k] for order in orders])
        assert recall_at(k, np.array([[higher, wrong, right]]))[0] == pytest.approx(expected, abs=1e-12)


def test_a_model_that_finds_all_alike_scores_chance():
    emb = torch.ones(50, 4) / 2
    places, _ = ranking.rank(emb, emb, torch.arange(50)[:, None].expand(-1, 2))
    for k in (1, 5, 10):
        assert recall_at(k, places.numpy()).mean() == pytest.approx(k / 50)
        assert chance_at(k, 50, np.ones(50)) == pytest.approx(k / 50)
    assert chance_at(2, 4, np.array([1, 2])) == pytest.approx((2 / 4 + (1 - 1 / 6)) / 2)
    assert chance_at(5, 3, np.array([1])) == 1


def test_embeddings_that_are_not_finite_are_refused():
    emb = torch.ones(3, 2)
    emb[1, 0] = torch.nan
    for pair in ((emb, torch.ones(3, 2)), (torch.ones(3, 2), emb)):
        with pytest.raises(DataError, match="not finite"):
            ranking.rank(*pair, torch.tensor([[0, 0], [1, 1], [2, 2]]))
