"""InfoNCE on one process: against a dense float64 softmax, at the edges, and in bf16. Several processes: test_distributed."""

import math

import pytest
import torch

from encoder.contrastive import contrastive_loss


def dense(a, b, scale, text=None, threshold=None):
    """The same loss as one float64 matrix, written with logsumexp."""
    a, b = (feat.double() / feat.double().norm(dim=-1, keepdim=True) for feat in (a, b))
    logits = scale.double() * a @ b.T
    if threshold is not None:
        text = text.double() / text.double().norm(dim=-1, keepdim=True)
        drop = (text @ text.T > threshold) & ~torch.eye(len(a), dtype=torch.bool)
        logits = logits.masked_fill(drop, -math.inf)
    positive = logits.diagonal()
    return ((logits.logsumexp(1) - positive).mean() + (logits.logsumexp(0) - positive).mean()) / 2


@pytest.mark.parametrize("threshold", [None, 0.2, 0.9])
def test_equals_the_dense_matrix_in_value_and_gradient(threshold):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(11, 5, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(12.0, requires_grad=True)
    loss, report = contrastive_loss(a, b, scale, b if threshold else None, threshold)
    expected = dense(a, b, scale, b.detach(), threshold)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert report["count"] == 11
    for got, want in zip(torch.autograd.grad(loss, [a, b, scale]), torch.autograd.grad(expected, [a, b, scale]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_length_of_a_feature_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    lengths = torch.rand(6, 1, generator=generator) * 50 + 0.1
    one, _ = contrastive_loss(a, b, torch.tensor(10.0), b, 0.5)
    two, _ = contrastive_loss(a * lengths, b * lengths.flip(0), torch.tensor(10.0), b * lengths, 0.5)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_chance_is_log_n_and_a_perfect_match_is_zero():
    same = torch.ones(8, 4)
    assert float(contrastive_loss(same, same, torch.tensor(100.0))[0]) == pytest.approx(math.log(8), rel=1e-5)
    basis = torch.eye(8)
    assert float(contrastive_loss(basis, basis, torch.tensor(100.0))[0]) == pytest.approx(0.0, abs=1e-6)


def test_a_single_pair_and_no_pair_are_zero():
    for count in (1, 0):
        a = torch.randn(count, 4, requires_grad=True)
        b = torch.randn(count, 4, requires_grad=True)
        scale = torch.tensor(14.0, requires_grad=True)
        loss, report = contrastive_loss(a, b, scale, b, 0.9)
        assert float(loss) == 0 and report == {"count": count, "masked_fraction": 0.0}
        loss.backward()
        assert not a.grad.any() and not b.grad.any() and not scale.grad.any()


def test_the_positive_is_never_filtered():
    """With every text alike everything but the diagonal goes: the loss is 0 and finite, not -inf or nan."""
    a, text = torch.randn(5, 4, requires_grad=True), torch.ones(5, 4)
    loss, report = contrastive_loss(a, torch.randn(5, 4), torch.tensor(14.0), text, 0.9)
    loss.backward()
    assert float(loss) == 0 and report["masked_fraction"] == 1.0 and torch.isfinite(a.grad).all()


def test_bf16_features_are_compared_in_float32():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(16, 32, generator=generator).bfloat16() for _ in range(2))
    loss, _ = contrastive_loss(a, b, torch.tensor(100.0).bfloat16())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(dense(a.float(), b.float(), torch.tensor(100.0))), rel=1e-4)
